"""Where a FLARE download keeps its files: found by name below one folder, however the archives were unpacked.

| | FLARE22 | FLARE23 |
|---|---|---|
| training scans | ``FLARE22_Tr_0001_0000.nii.gz`` | ``FLARE23_0001_0000.nii.gz`` up to 2200 |
| their label maps | ``FLARE22_Tr_0001.nii.gz`` | ``FLARE23_0001.nii.gz`` |
| unlabelled scans | ``Case_00001_0000.nii.gz`` in any number of folders | from 2201 on, or in a folder ``unlab...`` |
| validation | ``FLARETs_0001_0000.nii.gz`` | ``FLARE23Ts_0001_0000.nii.gz`` |

A label map below a folder whose name says ``pseudo`` is one of the pseudo-labels that were published later and is left
out; a scan there (``train_pseudo_label/imagesTr``) is an unlabelled one, unless it lies elsewhere as well. A label map
in a folder whose name says ``fix`` (``labelsTr2200/20230507-fix``) replaces the one outside. Every other file that
looks like an image is listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_flare.errors import InputError
from nnunet_flare.images import suffix_of
from nnunet_flare.listing import IMAGE_LIKE, is_image_like
from nnunet_flare.organs import FLARE22, FLARE23, Organ

FILE_ENDING = ".nii.gz"
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".001")
GROUPS = ("training", "unlabelled", "validation")


@dataclass(frozen=True)
class Challenge:
    """One year's data: what its files are called, and how many cases each group has when the download is complete."""

    name: str
    dataset_id: int
    organs: tuple[Organ, ...]
    example: str
    patterns: dict[str, str]
    expected: dict[str, int]
    last_labelled: int | None = None
    """Where labelled and unlabelled scans share a pattern: the highest number of a labelled one."""


CHALLENGES = {
    "flare22": Challenge(
        "FLARE22",
        22,
        FLARE22,
        "FLARE22_Tr_0001_0000.nii.gz",
        {"training": r"FLARE22_Tr_\d{4}", "unlabelled": r"Case_\d{5}", "validation": r"FLARETs_\d{4}"},
        {"training": 50, "unlabelled": 2000, "validation": 50},
    ),
    "flare23": Challenge(
        "FLARE23",
        23,
        FLARE23,
        "FLARE23_0001_0000.nii.gz",
        {"training": r"FLARE23_\d{4}", "validation": r"FLARE23Ts_\d{4}"},
        {"training": 2200, "unlabelled": 1800, "validation": 100},
        last_labelled=2200,
    ),
}


@dataclass(frozen=True)
class DownloadedScan:
    """One case of a download; ``label`` is None where there is none or none is wanted."""

    case: str
    group: str
    image: Path
    label: Path | None = None


@dataclass
class Download:
    """The cases of a download by id, what is wrong with others before any is opened, and files of unknown names."""

    scans: dict[str, DownloadedScan] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    """Published pseudo-labels, and scans beside them that lie elsewhere as well."""
    unknown: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)


@dataclass
class _Files:
    group: str = "training"
    images: list[Path] = field(default_factory=list)
    labels: list[Path] = field(default_factory=list)
    beside_pseudo: list[Path] = field(default_factory=list)
    """Scans below a folder of pseudo-labels."""


def find_download(folder: Path, challenge: Challenge, *, besides: Path | None = None) -> Download:
    """The cases of a challenge below a folder, without what lies in ``besides`` (the datasets made of it).

    Raises:
        InputError: when the folder is missing, or holds no training case; archives that wait to be unpacked are named.
    """
    if not folder.is_dir():
        raise InputError(f"--{challenge.name.lower()} {folder}: no such folder; expected the unpacked download")
    download = Download()
    found: dict[str, _Files] = {}
    for path in _walk(folder, besides):
        inside = path.relative_to(folder)
        is_pseudo = any("pseudo" in part.lower() for part in inside.parts[:-1])
        kind = _classify(inside, challenge)
        if kind is None and path.suffix.lower() in ARCHIVES and not IMAGE_LIKE.search(path.name):
            download.archives.append(path)
        elif kind is None and is_image_like(path):
            is_label = is_pseudo and not _says_images(inside) and suffix_of(path) is not None
            download.left_out += is_label
            download.unknown += [] if is_label else [path]
        if kind is None:
            continue
        case, group, is_image = kind
        if is_pseudo and not is_image:
            download.left_out += 1
            continue
        files = found.setdefault(case, _Files())
        if is_pseudo:
            files.beside_pseudo.append(path)
            continue
        files.group = group if is_image else files.group
        (files.images if is_image else files.labels).append(path)
    for case in sorted(found):
        _decide(case, found[case], download)
    if not any(scan.group == "training" for scan in download.scans.values()):
        archives = download.archives
        packed = f" {len(archives)} archive(s) wait to be unpacked, the first {archives[0]}." if archives else ""
        raise InputError(
            f"--{challenge.name.lower()} {folder}: no scan {challenge.example} with its label map below it.{packed} "
            "Expected the challenge's own file names; for other data make an nnU-Net dataset"
        )
    return download


def _walk(folder: Path, besides: Path | None) -> Iterator[Path]:
    """All files below a folder in a stable order, links followed, without those that file managers leave behind."""
    seen = set() if besides is None else {os.path.realpath(besides)}
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link in a circle, or nnUNet_raw inside the download
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (Path(root) / name for name in sorted(names) if not name.startswith("."))


def _classify(path: Path, challenge: Challenge) -> tuple[str, str, bool] | None:
    """(case, group, whether it is an image) of a file given relative to the download; None for any other file."""
    unlabelled_folder = any("unlab" in part.lower() for part in path.parts[:-1])
    for group, pattern in challenge.patterns.items():
        match = re.fullmatch(f"({pattern})(_0000)?(?i:{re.escape(FILE_ENDING)})", path.name)
        if match is None:
            continue
        case, is_image = match.group(1), match.group(2) is not None or _says_images(path)
        last = challenge.last_labelled
        if group == "training" and last is not None and (unlabelled_folder or int(case[-4:]) > last):
            group = "unlabelled"
        if group == "unlabelled":  # without a channel number only where the folder says that these are scans
            return (case, group, True) if is_image or unlabelled_folder else None
        return case, group, is_image
    return None


def _says_images(path: Path) -> bool:
    """Whether the folder that a file lies in says that it holds images and no labels."""
    name = path.parent.name.lower()
    return "image" in name and "label" not in name


def _decide(case: str, files: _Files, download: Download) -> None:
    """Enter a case into the download, or what is wrong with it."""
    if files.images:
        download.left_out += len(files.beside_pseudo)
    images = files.images or files.beside_pseudo
    if not files.images and not files.labels:
        files.group = "unlabelled"
    fixed = [path for path in files.labels if re.search(r"(^|[^a-z])fix", path.parent.name.lower())]
    labels = fixed or files.labels
    for what, paths in (("scans", images), ("label maps", labels)):
        if len(paths) > 1:
            listed = " and ".join(map(str, paths))
            download.problems[case] = f"{len(paths)} {what} of this name: {listed}; remove or rename all but one"
            return
    if not images:
        download.problems[case] = f"{labels[0]}: a label map without its scan {case}_0000{FILE_ENDING}"
    elif files.group == "training" and not labels:
        download.problems[case] = f"{images[0]}: a training scan without its label map {case}{FILE_ENDING}"
    else:
        label = labels[0] if labels and files.group != "unlabelled" else None
        download.scans[case] = DownloadedScan(case, files.group, images[0], label)
