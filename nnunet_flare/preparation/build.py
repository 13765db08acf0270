"""A FLARE download as an nnU-Net dataset: links to its files, ``dataset.json``, and roles where labels are partial."""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_flare.cases import FILE_NAME, Case, write_table
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import link_or_copy, name_problem, remove_leftovers, replacing, write_json
from nnunet_flare.organs import dataset_labels
from nnunet_flare.preparation.annotated import read_annotated, role_of
from nnunet_flare.preparation.examine import RECORD, CaseFinding, examine_all, read_record
from nnunet_flare.preparation.layout import CHALLENGES, FILE_ENDING, GROUPS, Challenge, DownloadedScan, find_download

TABLE_KEY = "table_sha256"
"""In the record: the case table as it was written, so that one changed by hand is known."""

READER = "NibabelIOWithReorient"
"""The scans come from many scanners in several orientations; this stock reader turns each by exact flips."""

FOLDERS = {"training": "imagesTr", "unlabelled": "unlabelled", "validation": "imagesTs"}
"""Validation scans with a label map lie in ``imagesVal`` and ``labelsVal``, to be scored; the others are test scans."""


@dataclass
class PreparedDataset:
    """What :func:`prepare` made: the dataset, cases by group, roles; who was set aside or is odd, with the reason."""

    dataset: Path
    unlabelled: Path
    cases: dict[str, list[str]]
    expected: dict[str, int]
    roles: dict[str, Case] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)
    """Validation cases with a label map."""
    not_recognised: list[Path] = field(default_factory=list)
    """Files of the download that look like images and have no name of the challenge's."""


def prepare(
    challenge_name: str,
    download_folder: Path,
    raw: Path,
    *,
    dataset_id: int | None = None,
    annotated: Path | None = None,
    copy: bool = False,
) -> PreparedDataset:
    """Make ``nnUNet_raw/DatasetXXX_<challenge>`` of a download; a second call goes on and never overwrites.

    Args:
        challenge_name: ``flare22`` or ``flare23``.
        download_folder: the unpacked download.
        raw: ``nnUNet_raw``.
        dataset_id: default the challenge's own, 22 or 23.
        annotated: CSV ``case,annotated`` where it is known better than from the label maps (FLARE23).
        copy: copy the files instead of linking them.

    Raises:
        InputError: before anything is written, for a folder without the challenge's files, a dataset folder that
            something else made, or a wrong CSV.
    """
    challenge = CHALLENGES[challenge_name]
    number = challenge.dataset_id if dataset_id is None else dataset_id
    dataset = _dataset_folder(raw, number, challenge)
    download = find_download(download_folder, challenge, besides=raw)
    training = {case for case, scan in download.scans.items() if scan.group == "training"}
    if annotated is not None and challenge.last_labelled is None:
        raise InputError(f"--annotated {annotated}: all label maps of {challenge.name} are complete; leave it out")
    stated = {} if annotated is None else read_annotated(annotated, training, challenge.organs)
    dataset.mkdir(parents=True, exist_ok=True)
    remove_leftovers(dataset, below=True)  # nnU-Net would take one in imagesTr for a case
    labels = dataset_labels(challenge.organs)
    origin = f"{challenge.name} in {download_folder.absolute()}"
    scans = list(download.scans.values())
    written = _record(dataset).get(TABLE_KEY)
    findings = examine_all(scans, sorted(labels.values()), dataset / RECORD, origin, reader=READER)
    prepared = PreparedDataset(
        dataset, dataset / FOLDERS["unlabelled"], {group: [] for group in GROUPS}, challenge.expected
    )
    prepared.set_aside.update(download.problems)
    if download.left_out:
        prepared.notes.append(f"{download.left_out} file(s) in folders of published pseudo-labels are left out")
    if download.archives:
        prepared.notes.append(f"{len(download.archives)} archive(s) were not opened, the first {download.archives[0]}")
    prepared.not_recognised += download.unknown
    for scan in scans:
        _enter(prepared, scan, findings[scan.case], challenge, stated, copy)
    _name_strangers(prepared)
    _write_dataset_json(prepared, challenge, labels)
    if prepared.roles:
        _write_roles(prepared, written)
    return prepared


def _dataset_folder(raw: Path, number: int, challenge: Challenge) -> Path:
    if not 0 < number < 1000:
        raise InputError(f"-d {number}: expected an id from 1 to 999")
    folder = raw / f"Dataset{number:03d}_{challenge.name}"
    others = [p.name for p in raw.glob(f"Dataset{number:03d}_*") if p != folder] if raw.is_dir() else []
    if others:
        raise InputError(f"-d {number}: {raw} holds {others[0]} under that id; choose another with -d")
    record = folder / RECORD
    if folder.is_dir() and any(folder.iterdir()) and not record.is_file():
        raise InputError(f"{folder}: is there already and was not made by prepare; choose another id with -d")
    if record.is_file() and not str(_record(folder).get("origin", "")).startswith(f"{challenge.name} "):
        raise InputError(f"{folder}: was made from {_record(folder).get('origin')}; choose another id with -d")
    return folder


def _enter(
    prepared: PreparedDataset,
    scan: DownloadedScan,
    finding: CaseFinding,
    challenge: Challenge,
    stated: Mapping[str, tuple[int, ...]],
    copy: bool,
) -> None:
    """Link a good case into its group's folders; set a bad one aside."""
    too_long = name_problem(scan.case, prepared.dataset)
    if too_long is not None:
        prepared.set_aside[scan.case] = f"{scan.image}: {too_long}"
        return
    if finding.problems:
        prepared.set_aside[scan.case] = "; ".join(finding.problems)
        return
    if finding.odd:
        prepared.notes.append(f"{scan.case}: {'; '.join(finding.odd)}")
    group, label = scan.group, scan.label
    try:
        if group == "training" and challenge.last_labelled is not None:
            if not finding.present and scan.case not in stated:
                prepared.notes.append(f"{scan.case}: its label map is empty, so it is taken as unlabelled")
                group, label = "unlabelled", None
            else:
                ids = [organ.id for organ in challenge.organs]
                prepared.roles[scan.case] = role_of(scan.case, finding.present, stated.get(scan.case), ids)
        elif group == "training" and not finding.present:
            raise CaseError(scan.case, f"{label}: the label map is empty; expected organs")
        part = "Val" if group == "validation" and label is not None else "Tr"
        images = FOLDERS[group] if label is None else f"images{part}"
        place(scan.image, prepared.dataset / images / f"{scan.case}_0000{FILE_ENDING}", scan.case, copy=copy)
        if label is not None:
            place(label, prepared.dataset / f"labels{part}" / f"{scan.case}{FILE_ENDING}", scan.case, copy=copy)
    except CaseError as error:
        prepared.set_aside[scan.case] = error.reason
        prepared.roles.pop(scan.case, None)
        return
    prepared.cases[group].append(scan.case)
    if group == "validation" and label is not None:
        prepared.scored.append(scan.case)


def place(source: Path, target: Path, case: str, *, copy: bool = False) -> None:
    """Make ``target`` the file ``source`` by a link, or a copy; a link to nothing is replaced, another file never.

    Raises:
        CaseError: when another file is there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if os.path.samefile(source, target) or filecmp.cmp(source, target):
            return
        raise CaseError(
            case, f"{target}: is another file than {source}; nothing is overwritten, remove it to take that"
        )
    if not copy:
        link_or_copy(source, target)
        return
    target.unlink(missing_ok=True)
    with replacing(target) as temporary:
        shutil.copy2(source, temporary)


def _name_strangers(prepared: PreparedDataset) -> None:
    """Scans from an earlier call whose case is not used any more: nnU-Net would train on them."""
    for group in ("training", "unlabelled"):
        folder = prepared.dataset / FOLDERS[group]
        used = set(prepared.cases[group])
        for path in sorted(folder.glob(f"*{FILE_ENDING}")) if folder.is_dir() else ():
            case = re.sub(r"_0000$", "", path.name.removesuffix(FILE_ENDING))
            if case not in used:
                why = f"{path} is from an earlier call and its case is not used any more; remove it and its label map"
                prepared.set_aside[case] = "; ".join(filter(None, (prepared.set_aside.get(case), why)))


def _write_dataset_json(prepared: PreparedDataset, challenge: Challenge, labels: dict[str, int]) -> None:
    write_json(
        prepared.dataset / "dataset.json",
        {
            "channel_names": {"0": "CT"},
            "labels": labels,
            "numTraining": len(prepared.cases["training"]),
            "file_ending": FILE_ENDING,
            "overwrite_image_reader_writer": READER,
            "name": challenge.name,
            "description": f"MICCAI {challenge.name} challenge, prepared by nnunet-flare",
        },
    )


def _write_roles(prepared: PreparedDataset, written: str | None) -> None:
    """Write the case table, unless a person has changed the one that the last call wrote (its SHA-256)."""
    path = prepared.dataset / FILE_NAME
    if path.is_file() and _sha256(path) != written:
        prepared.notes.append(f"{path} was changed by hand and is kept; remove it to have it written anew")
    else:
        write_table(path, prepared.roles)
        written = _sha256(path)
    write_json(prepared.dataset / RECORD, {**_record(prepared.dataset), TABLE_KEY: written})


def _record(dataset: Path) -> dict[str, Any]:
    return read_record(dataset / RECORD)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
