"""Finding the files of a download below one folder, however its archives were unpacked.

Pseudo-labels that were published with a download lie below a folder whose name says ``pseudo``. A scan there
(``train_pseudo_label/imagesTr``) is taken unless it lies elsewhere as well. A label map in a folder whose name says
``fix`` (``labelsTr2200/20230507-fix``) replaces the one outside. Every other file that looks like an image is listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nnunet_flare.errors import InputError
from nnunet_flare.listing import IMAGE_LIKE, is_image_like
from nnunet_flare.preparation.case_files import FILE_ENDING, CaseFiles, Download, Kind, decide
from nnunet_flare.preparation.layouts import LAYOUTS, TEAMS, Layout

ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".001")
LABEL_WORD = re.compile(r"(?<![a-z])(labels?|masks?|gts?|annotations?)(tr|ts|val)?(?![a-z])|pseudo")


def find_download(folder: Path, layout: Layout, *, besides: Path | None = None) -> Download:
    """The cases of a layout below a folder, without what lies in ``besides`` (the datasets made of it).

    Raises:
        InputError: when the folder is missing, is another download, or holds no training case; archives that wait to
            be unpacked are named.
    """
    if not folder.is_dir():
        raise InputError(f"--{layout.year} {folder}: no such folder; expected the unpacked download")
    paths = list(_walk(folder, besides))
    _check_kind(folder, paths, layout)
    download = Download()
    found: dict[str, CaseFiles] = {}
    for path in paths:
        inside = Path(folder.resolve().name, path.relative_to(folder))
        if path.name.lower().endswith(FILE_ENDING) and _sort_in(path, inside, layout, found):
            continue
        if path.suffix.lower() in ARCHIVES and not IMAGE_LIKE.search(path.name):
            download.archives.append(path)
        elif is_image_like(path):
            download.unknown[path] = _why_unknown(inside, layout)
    for case in sorted(found):
        decide(case, found[case], download)
    if not any(scan.group == "training" for scan in download.scans.values()):
        archives = download.archives
        packed = f" {len(archives)} archive(s) wait to be unpacked, the first {archives[0]}." if archives else ""
        wrong = [f" {len(download.problems)} case(s) cannot be taken, the first: {case}: {reason}."
                 for case, reason in sorted(download.problems.items())[:1]]  # fmt: skip
        raise InputError(
            f"--{layout.year} {folder}: no scan {layout.example} with a label map in it.{packed}{''.join(wrong)} "
            "Expected the challenge's own names; for other data make an nnU-Net dataset"
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


def _check_kind(folder: Path, paths: list[Path], layout: Layout) -> None:
    """Refuse a download that has the signs of others and none of its own, and one of several tasks."""
    inside = [f"/{folder.resolve().name}/{path.relative_to(folder)}".lower() for path in paths]
    signed = [other for other in LAYOUTS if any(re.search(other.signs, path) for path in inside)]
    if signed and layout not in signed:
        flags = " or ".join(other.flags for other in signed)
        raise InputError(f"--{layout.year} {folder}: this is not {layout.name}; its file names are those of {flags}")
    others = {other.task for other in signed if other.task is not None} - {layout.task}
    if layout.task is not None and others:
        found = " and ".join(f"task {task}" for task in sorted(others))
        raise InputError(
            f"--{layout.year} {folder}: holds files of {found} too, whose scans have the same names as those of "
            f"task {layout.task}; give the folder of task {layout.task} alone"
        )


def _folders(inside: Path) -> str:
    return f"/{'/'.join(inside.parts[:-1])}/".lower()


def _sort_in(path: Path, inside: Path, layout: Layout, found: dict[str, CaseFiles]) -> bool:
    """Enter a file into its case by the first rule that it fits; False where it fits none."""
    name = path.name[: -len(FILE_ENDING)]
    stem = name.removesuffix("_0000")
    said = _said(inside)
    folders = _folders(inside)
    below_pseudo = any("pseudo" in part.lower() for part in inside.parts[1:-1])
    kind: Kind = said or ("image" if stem != name else "either")
    if below_pseudo and kind != "image":
        team = TEAMS.search(folders)
        of = team.group() if team else re.sub(r"[^\w-]+", "_", inside.parts[-2])
        found.setdefault(_case_by_name(stem, layout), CaseFiles()).pseudo.setdefault(of, []).append(path)
        return True
    for rule in layout.rules:
        case = rule.case_of(stem)
        if case is None or not re.search(rule.folder, folders):
            continue
        if rule.group not in ("training", "validation"):
            if said == "label" or (kind == "either" and not rule.folder):
                return False  # unlabelled scans have no label maps
            kind = "image"
        found.setdefault(case, CaseFiles()).add(path, kind, rule, spare=rule.spare or below_pseudo)
        return True
    return False


def _said(inside: Path) -> Literal["image", "label"] | None:
    """What the innermost folder that speaks of images or labels says; ``train_label`` and the like name a group."""
    for part in reversed(inside.parts[1:-1]):
        name = part.lower()
        if name.startswith("train"):
            continue
        if LABEL_WORD.search(name):
            return "label"
        if "image" in name:
            return "image"
    return None


def _case_by_name(stem: str, layout: Layout) -> str:
    """The id of a case by the first rule about names that the file's fits."""
    ids = (rule.case_of(stem) for rule in layout.rules if rule.name)
    return next((case for case in ids if case is not None), stem)


def _why_unknown(inside: Path, layout: Layout) -> str:
    folders = _folders(inside)
    if layout.targets and re.search(r"unlab|validation|coreset", folders):
        return f"a scan of an unknown modality; expected one of {', '.join(layout.targets)} in its folder's name"
    return f"not a file name or folder of {layout.name}"
