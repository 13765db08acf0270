"""A phantom data set on disk: nnU-Net's raw layout for the labelled cases, and unlabelled and test cases beside it.

``DIR/phantom.json`` holds the settings and what is true of every case; it is written last, so a folder with it is
whole. ``DIR/unlabelled_truth`` is for judging pseudo-labels only; no part of the self-training reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_flare.cases import FILE_NAME, Case, write_table
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, remove_leftovers, write_json
from nnunet_flare.images import write_labels, write_volume
from nnunet_flare.organs import FLARE22, FLARE23, dataset_labels
from nnunet_flare.phantom.anatomy import LESION_ID
from nnunet_flare.phantom.domains import domain_of
from nnunet_flare.phantom.scan import degrade, make_phantom

DATASET = "Dataset022_FLAREPhantom"
FILE_ENDING = ".nii.gz"
RECORD = "phantom.json"
VERSION = 1
"""Raised whenever the same settings would give other scans."""

GROUPS = {"labelled": "Tr", "partial": "Pa", "unlabelled": "Un", "test": "Ts"}
"""Groups of cases and their part of the case id; each group has its own seeds, so its size changes no other group."""

ANNOTATED: tuple[tuple[int, ...], ...] = ((1,), (2, 13), (3,), (4,))
"""What partial cases are annotated for, in turn: the organs of the older public data sets."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Planned:
    case: str
    group: str
    seed: int
    domain: str
    annotated: tuple[int, ...] | None = None
    junk: bool = False


def write_phantom(
    out: Path,
    *,
    labelled: int = 6,
    partial: int = 0,
    lesions: bool = False,
    unlabelled: int = 12,
    test: int = 4,
    size: tuple[int, int, int] = (48, 96, 96),
    seed: int = 0,
    domain: str | Sequence[str] = "wide",
    junk: int = 0,
) -> None:
    """Write a phantom data set below ``out``; one that is there already, with the same settings, is kept.

    Layout: ``nnUNet_raw/Dataset022_FLAREPhantom``, ``unlabelled/<case>_0000.nii.gz``,
    ``unlabelled_truth/<case>.nii.gz``, ``test/images/<case>_0000.nii.gz``, ``test/labels/<case>.nii.gz`` and
    ``phantom.json``. Names of scans that are no CT hold their domain (``FLAREPhantom_Un_mr_0000``).

    Args:
        out: folder to write to; created, or empty, or one that this function wrote.
        labelled: cases of the narrow domain with all labels.
        partial: further training cases, of ``domain``, with the labels of some organs only and an entry in
            ``flare_cases.json``.
        lesions: label lesions as 14 (FLARE23).
        unlabelled: cases of ``domain`` without labels.
        test: cases of ``domain`` to score on.
        size: voxels (z, y, x) of every scan; the field of view is the same for every size.
        seed: decides all scans.
        domain: ``wide``, ``between``, ``mr`` or ``pet``, of the cases that are not labelled; of several, in turn.
        junk: how many of the unlabelled scans are unusable (:func:`nnunet_flare.phantom.scan.degrade`).

    Raises:
        InputError: for impossible counts, an unknown domain, or a folder that holds something else.
    """
    counts = {"labelled": labelled, "partial": partial, "unlabelled": unlabelled, "test": test}
    for name, count in {**counts, "junk": junk}.items():
        if count < 0:
            raise InputError(f"phantom: {name} is {count}, expected 0 or more")
    if labelled + partial == 0:
        raise InputError("phantom: no labelled and no partial case; training needs at least 1")
    if junk > unlabelled:
        raise InputError(f"phantom: {junk} junk scans do not fit among {unlabelled} unlabelled ones")
    domains = [domain] if isinstance(domain, str) else list(domain)
    if not domains:
        raise InputError("phantom: no domain for unlabelled and test cases; expected at least one")
    others = [name for name in domains if domain_of(name).modality != "ct"]
    for name, count in (("partial", partial), ("junk", junk)):
        if others and count:
            raise InputError(
                f"phantom: {count} {name} with domain {', '.join(others)}; training cases and junk are CTs; ask for 0"
            )
    given = domain if isinstance(domain, str) else domains
    settings = {**counts, "lesions": lesions, "size": list(size), "seed": seed, "domain": given, "junk": junk}
    if _is_written(out, settings):
        logger.info("%s: the phantom already exists, with the same settings", out)
        return
    write_json(out / RECORD, {"version": VERSION, "complete": False, "settings": settings})
    remove_leftovers(out, below=True)  # nnU-Net would take one in imagesTr for a case
    planned = list(_plan(counts, seed=seed, domains=domains, lesions=lesions, junk=junk))
    truth = {}
    for plan in tqdm(planned, desc="phantom", unit="case", disable=None):
        truth[plan.case] = _write_case(out, plan, size=size, lesions=lesions)
    _write_dataset(out / "nnUNet_raw" / DATASET, planned, lesions=lesions)
    write_json(out / RECORD, {"version": VERSION, "complete": True, "settings": settings, "cases": truth})


def _is_written(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds this very phantom; False for an empty or half-written one, an error for anything else."""
    record = out / RECORD
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not record.is_file():
        raise InputError(f"{out}: is not empty and has no {RECORD}; choose another folder for the phantom")
    document = read_json(record, {"version": int, "settings": dict, "complete": bool}, remedy=f"delete {out}")
    found = {"version": document.get("version"), **document.get("settings", {})}
    differing = [key for key, value in {"version": VERSION, **settings}.items() if found.get(key) != value]
    if differing:
        told = ", ".join(f"{key} {found.get(key)!r}" for key in differing)
        raise InputError(f"{out}: holds a phantom with other settings ({told}); choose another folder or delete it")
    return bool(document["complete"])


def _plan(counts: dict[str, int], *, seed: int, domains: Sequence[str], lesions: bool, junk: int) -> Iterator[_Planned]:
    annotated = ((LESION_ID,), *ANNOTATED) if lesions else ANNOTATED
    spoiled = set(np.random.default_rng([seed, len(GROUPS)]).permutation(counts["unlabelled"])[:junk].tolist())
    for number, (group, part) in enumerate(GROUPS.items()):
        for index in range(counts[group]):
            domain = "narrow" if group == "labelled" else domains[index % len(domains)]
            modality = domain_of(domain).modality
            yield _Planned(
                case=f"FLAREPhantom_{part}_{'' if modality == 'ct' else modality + '_'}{index:04d}",
                group=group,
                seed=int(np.random.SeedSequence([seed, number, index]).generate_state(1)[0]),
                domain=domain,
                annotated=annotated[index % len(annotated)] if group == "partial" else None,
                junk=group == "unlabelled" and index in spoiled,
            )


def _write_case(out: Path, plan: _Planned, *, size: tuple[int, int, int], lesions: bool) -> dict[str, Any]:
    scan, labels = make_phantom(plan.seed, domain=plan.domain, size=size, lesions=lesions)
    if plan.junk:
        scan = degrade(plan.seed, scan)
    dataset = out / "nnUNet_raw" / DATASET
    images, label_maps = {
        "labelled": (dataset / "imagesTr", dataset / "labelsTr"),
        "partial": (dataset / "imagesTr", dataset / "labelsTr"),
        "unlabelled": (out / "unlabelled", out / "unlabelled_truth"),
        "test": (out / "test" / "images", out / "test" / "labels"),
    }[plan.group]
    voxels = np.bincount(labels.ravel(), minlength=LESION_ID + 1)
    if plan.annotated is not None:
        labels = np.where(np.isin(labels, plan.annotated), labels, 0).astype(np.uint8)
    write_volume(images / f"{plan.case}_0000{FILE_ENDING}", scan)
    write_labels(label_maps / f"{plan.case}{FILE_ENDING}", labels, scan)
    return {
        "group": plan.group,
        "seed": plan.seed,
        "domain": plan.domain,
        "junk": plan.junk,
        "spacing_mm": list(scan.spacing_mm),
        "voxels": {organ.name: int(voxels[organ.id]) for organ in (FLARE23 if lesions else FLARE22)},
    }


def _write_dataset(dataset: Path, planned: list[_Planned], *, lesions: bool) -> None:
    training = [plan for plan in planned if plan.group in ("labelled", "partial")]
    write_json(
        dataset / "dataset.json",
        {
            "channel_names": {"0": "CT"},
            "labels": dataset_labels(FLARE23 if lesions else FLARE22),
            "numTraining": len(training),
            "file_ending": FILE_ENDING,
            "name": DATASET.partition("_")[2],
            "description": "Synthetic abdominal CTs of nnunet-flare",
        },
    )
    if any(plan.annotated for plan in training):
        cases = {p.case: Case("partial", p.annotated) if p.annotated else Case() for p in training}
        write_table(dataset / FILE_NAME, cases)
