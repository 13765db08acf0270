"""A FLARE download as an nnU-Net dataset: links to its files, ``dataset.json``, and roles where labels are partial."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import name_problem, remove_leftovers, write_csv
from nnunet_flare.organs import dataset_labels
from nnunet_flare.preparation.annotated import read_annotated, role_of
from nnunet_flare.preparation.case_files import FILE_ENDING, Download, DownloadedScan
from nnunet_flare.preparation.dataset_document import READER, write_dataset_json
from nnunet_flare.preparation.download import find_download
from nnunet_flare.preparation.examine import RECORD, CaseFinding, examine_all, read_record
from nnunet_flare.preparation.layouts import Group, Layout
from nnunet_flare.preparation.place import place, place_empty
from nnunet_flare.preparation.prepared import DOMAINS, FOLDERS, PSEUDO, PreparedDataset, name_strangers
from nnunet_flare.preparation.role_table import write_roles


def prepare(
    layout: Layout,
    download_folder: Path,
    raw: Path,
    *,
    dataset_id: int | None = None,
    annotated: Path | None = None,
    copy: bool = False,
) -> PreparedDataset:
    """Make ``nnUNet_raw/DatasetXXX_<name>`` of a download; a second call goes on and never overwrites.

    Args:
        layout: which download, see :func:`nnunet_flare.preparation.layouts.layout_of`.
        download_folder: the unpacked download.
        raw: ``nnUNet_raw``.
        dataset_id: default the layout's own.
        annotated: CSV ``case,annotated`` where it is known better than from partial label maps.
        copy: copy the files instead of linking them.

    Raises:
        InputError: before anything is written, for a folder that is another download or has no labelled scan, a dataset
            folder that something else made, or a wrong CSV.
    """
    number = layout.dataset_id if dataset_id is None else dataset_id
    dataset = _dataset_folder(raw, number, layout)
    download = find_download(download_folder, layout, besides=raw)
    training = {case for case, scan in download.scans.items() if scan.group == "training"}
    if annotated is not None and not layout.partial:
        raise InputError(f"--annotated {annotated}: all label maps of {layout.name} are complete; leave it out")
    stated = {} if annotated is None else read_annotated(annotated, training, layout.organs)
    dataset.mkdir(parents=True, exist_ok=True)
    remove_leftovers(dataset, below=True)  # nnU-Net would take one in imagesTr for a case
    labels = dataset_labels(layout.organs)
    origin = f"{layout.name} in {download_folder.absolute()}"
    scans = list(download.scans.values())
    findings = examine_all(scans, sorted(labels.values()), dataset / RECORD, origin, reader=READER)
    groups: tuple[Group, ...] = tuple(g for g in FOLDERS if any(rule.group == g for rule in layout.rules))
    prepared = PreparedDataset(dataset, dataset / FOLDERS["unlabelled"], {g: [] for g in groups}, layout.expected)
    _note(prepared, download)
    for scan in scans:
        _enter(prepared, scan, findings[scan.case], layout, stated, copy)
    name_strangers(prepared)
    write_dataset_json(prepared, layout, labels)
    if len(layout.targets) > 1:
        rows = sorted(prepared.domains.items())
        write_csv(dataset / DOMAINS, [("case", "domain"), *rows])
    if prepared.roles:
        write_roles(prepared)
    return prepared


def _note(prepared: PreparedDataset, download: Download) -> None:
    prepared.set_aside.update(download.problems)
    prepared.not_recognised.update(download.unknown)
    if download.copies:
        prepared.notes.append(f"{download.copies} file(s) lie in the download more than once; each is taken once")
    if download.archives:
        prepared.notes.append(
            f"{len(download.archives)} archive(s) were not unpacked, the first is {download.archives[0]}"
        )


def _dataset_folder(raw: Path, number: int, layout: Layout) -> Path:
    if not 0 < number < 1000:
        raise InputError(f"-d {number}: expected an id from 1 to 999")
    folder = raw / f"Dataset{number:03d}_{layout.name}"
    for path in (raw, folder):
        if os.path.lexists(path) and not path.is_dir():
            raise InputError(f"{path}: exists and is not a folder; remove it, or choose another id with -d")
    others = [p.name for p in raw.glob(f"Dataset{number:03d}_*") if p != folder] if raw.is_dir() else []
    if others:
        raise InputError(f"-d {number}: {raw} holds {others[0]} under that id; choose another with -d")
    record = folder / RECORD
    if folder.is_dir() and any(folder.iterdir()) and not record.is_file():
        raise InputError(f"{folder}: exists and was not made by prepare; choose another id with -d")
    if record.is_file() and not str(_record(folder).get("origin", "")).startswith(f"{layout.name} "):
        raise InputError(f"{folder}: was made from {_record(folder).get('origin')}; choose another id with -d")
    return folder


def _enter(
    prepared: PreparedDataset,
    scan: DownloadedScan,
    finding: CaseFinding,
    layout: Layout,
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
        if group == "training" and layout.partial:
            if not finding.present and scan.case not in stated:
                prepared.notes.append(f"{scan.case}: its label map is empty, so it counts as unlabelled")
                group, label = "unlabelled", None
            else:
                ids = [organ.id for organ in layout.organs]
                prepared.roles[scan.case] = role_of(scan.case, finding.present, stated.get(scan.case), ids)
        elif group == "training" and not finding.present:
            raise CaseError(scan.case, f"{label}: the label map is empty; expected organs")
        suffix = scan.domain if group == "validation" and len(layout.targets) > 1 else ""
        part = f"Val{suffix}" if group == "validation" else "Tr"
        images = FOLDERS[group] + suffix if label is None else f"images{part}"
        place(scan.image, prepared.dataset / images / f"{scan.case}_0000{FILE_ENDING}", scan.case, copy=copy)
        if label is not None:
            place(label, prepared.dataset / f"labels{part}" / f"{scan.case}{FILE_ENDING}", scan.case, copy=copy)
        if group == "healthy":
            empty = prepared.dataset / "labelsHealthy" / f"{scan.case}{FILE_ENDING}"
            place_empty(scan.image, empty, scan.case, reader=READER)
        _enter_pseudo(prepared, scan, finding, copy)
    except CaseError as error:
        prepared.set_aside[scan.case] = error.reason
        prepared.roles.pop(scan.case, None)
        return
    prepared.cases[group].append(scan.case)
    if group == "unlabelled":
        prepared.domains[scan.case] = scan.domain
    if group == "validation" and label is not None:
        prepared.scored.setdefault(suffix, []).append(scan.case)


def _enter_pseudo(prepared: PreparedDataset, scan: DownloadedScan, finding: CaseFinding, copy: bool) -> None:
    """Link the usable pseudo-labels of a case under its id; the scan is used without the others, which are named."""
    for team, path in scan.pseudo.items():
        if team in finding.pseudo:
            prepared.set_aside[f"{PSEUDO}/{team}/{scan.case}"] = finding.pseudo[team]
            continue
        target = prepared.dataset / PSEUDO / team / f"{scan.case}{FILE_ENDING}"
        place(path, target, scan.case, copy=copy)
        prepared.pseudo.setdefault(team, []).append(scan.case)


def _record(dataset: Path) -> dict[str, Any]:
    return read_record(dataset / RECORD)
