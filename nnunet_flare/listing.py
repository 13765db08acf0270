"""What a folder holds: every file that looks like an image is taken for a case, or named with the reason why not.

Taken is what lies in the folder itself, and series of DICOM files in folders in it. What lies deeper is named only:
whose scan it is, and whether it is a scan at all or a label map, nobody can tell from there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.dicom.files import is_dicom
from nnunet_flare.errors import InputError
from nnunet_flare.images import SUFFIXES, stem_of, suffix_of

CHANNEL = re.compile(r"(.+)_(\d{4})", re.DOTALL)
"""nnU-Net's image names without suffix: ``<case>_<channel>``."""

IMAGE_LIKE = re.compile(
    r"\.(nii|mha|mhd|nrrd|nhdr|hdr|img|dcm|ima|dicom|mnc|mgz|mgh|gipl)(\.(gz|bz2|xz|zst|zip|part(ial)?|(cr)?download))*$",
    re.IGNORECASE,
)
"""Endings of medical images, also of formats that are not read, packed or only half downloaded."""

OWN_FOLDERS = ("members", "roi", "uncertainty", "rtstruct")
"""What ``flare-predict`` writes below its output folder."""

KNOWN = ", ".join(SUFFIXES)


@dataclass(frozen=True)
class Listing:
    """The files of every case (one per channel, or a folder of DICOM files), and what was not taken.

    ``refused`` has the reason by case, for other channels than expected; ``clashes`` too, for several files that give
    one case; ``left`` by path. ``images`` are all files in the folder itself with an image's name that are no output.
    """

    cases: Mapping[str, tuple[Path, ...]]
    refused: Mapping[str, str]
    clashes: Mapping[str, str]
    left: Mapping[str, str]
    images: tuple[Path, ...] = ()

    @property
    def not_taken(self) -> dict[str, str]:
        """The reasons of all that was not taken."""
        return {**self.left, **self.refused, **self.clashes}


def list_scans(
    folder: Path,
    channels: int,
    *,
    besides: Collection[Path] = (),
    name: Callable[[str], str] = str,
    is_output: Callable[[Path, Path], bool] = lambda path, scan: False,
) -> Listing:
    """The scans in a folder: ``<case>_0000.<ext>`` and so on, ``<case>.<ext>`` of one channel, and DICOM series.

    Args:
        folder: one that exists.
        channels: how many each case has.
        besides: folders that are looked at by themselves, or written to.
        name: makes a case's id of what the file is called.
        is_output: whether a file ``<case>.<ext>`` beside a case's first file is a label map that was made of it.

    Where cases have one channel, a file ``<case>_<number>`` without ``<case>_0000`` beside it is a bare name, as
    ``FLARE23_0007.nii.gz``.
    """
    refused: dict[str, str] = {}
    left: dict[str, str] = {}
    found: dict[str, list[tuple[Path, ...]]] = {}
    images, series, others = _sort_out(folder)
    numbered, bare = _by_channel(images, channels)
    outputs = {path for path in bare if any(is_output(path, s) for s in numbered.get(stem_of(path), {}).get(0, ()))}
    for case, by_channel in numbered.items():
        reason = _wrong_channels(case, by_channel, channels)
        if reason is not None:
            refused[name(case)] = "; ".join(filter(None, (refused.get(name(case)), reason)))
            continue
        for choice in range(max(len(paths) for paths in by_channel.values())):
            files = tuple(by_channel[c][min(choice, len(by_channel[c]) - 1)] for c in range(channels))
            found.setdefault(name(case), []).append(files)
    for path in sorted({*bare} - outputs):
        if channels != 1:
            left[str(path)] = f"has no channel in its name; expected <case>_0000, ... of {channels} channels"
        else:
            found.setdefault(name(stem_of(path)), []).append((path,))
    for path in series:
        if channels != 1:
            left[str(path)] = f"is a DICOM series; expected image files of {channels} channels, <case>_0000 and so on"
        else:
            found.setdefault(name(path.resolve().name), []).append((path,))
    left |= others
    left |= dict(_below(folder, set(series), besides))
    clashes = {
        case: f"{' and '.join(_told(files) for files in choices)} both give the case '{case}'; rename or remove one"
        for case, choices in found.items()
        if len(choices) > 1
    }
    cases = {case: choices[0] for case, choices in sorted(found.items()) if case not in clashes}
    for case in cases.keys() & refused.keys():  # the same case again, with other channels
        refused[case] = f"{_told(cases.pop(case))} gives the same case; {refused[case]}"
    return Listing(cases, refused, clashes, left, tuple(path for path in images if path not in outputs))


def list_label_maps(folder: Path, *, besides: Collection[Path] = ()) -> Listing:
    """The label maps ``<case>.<ext>`` in a folder; see :class:`Listing`.

    A DICOM segmentation beside the label map of its case is another form of it.
    """
    images, series, others = _sort_out(folder)
    found: dict[str, list[Path]] = {}
    for path in images:
        found.setdefault(stem_of(path), []).append(path)
    left = {path: why for path, why in others.items() if Path(path).stem not in found}
    for path in series:
        if path != folder:
            left[str(path)] = "is a folder of DICOM files; expected label maps, one file per case"
            continue
        for file in sorted(folder.iterdir()):
            if file.is_file() and suffix_of(file) is None and is_dicom(file) and file.stem not in found:
                left[str(file)] = f"is a DICOM file; expected label maps ({KNOWN})"
    left |= dict(_below(folder, set(series), [*besides, *(folder / own for own in OWN_FOLDERS)]))
    clashes = {
        case: f"{' and '.join(path.name for path in paths)} both give the case '{case}'; keep one"
        for case, paths in found.items()
        if len(paths) > 1
    }
    cases = {case: (paths[0],) for case, paths in sorted(found.items()) if case not in clashes}
    return Listing(cases, {}, clashes, left, tuple(images))


def label_maps(
    folder: Path, what: str, *, besides: Collection[Path] = (), one_each: bool = False
) -> tuple[dict[str, Path], dict[str, str]]:
    """The label maps of a folder by case, and why other files were not taken.

    Raises:
        InputError: when the folder is missing, or holds nothing that can be taken, and with ``one_each`` for two files
            of one case.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of {what}")
    listing = list_label_maps(folder, besides=besides)
    if one_each and listing.clashes:
        raise InputError(f"{folder}: some cases are given twice:{told(listing.clashes)}")
    if not listing.cases and not listing.clashes:
        raise InputError(f"{folder}: no {what}; expected label maps named <case>{SUFFIXES[0]}{told(listing.left)}")
    return {case: files[0] for case, files in listing.cases.items()}, listing.not_taken


def images_in(path: Path) -> list[Path]:
    """The files of a folder that have an image's name; any other path is itself."""
    return [file for file in sorted(path.iterdir()) if suffix_of(file) is not None] if path.is_dir() else [path]


def told(left: Mapping[str, str]) -> str:
    """What was not taken, as the rest of a message; empty where there is nothing."""
    return "".join(f"\n  {name}: {reason}" for name, reason in sorted(left.items()))


def is_image_like(path: Path) -> bool:
    """Whether a file is an image by its name, or a DICOM file by its first bytes."""
    return IMAGE_LIKE.search(path.name) is not None or (path.is_file() and is_dicom(path))


def _sort_out(folder: Path) -> tuple[list[Path], list[Path], dict[str, str]]:
    """What has an image file's name, folders of DICOM files (the folder itself too), and what else is like an image."""
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    images = [path for path in entries if suffix_of(path) is not None]
    others = [path for path in entries if suffix_of(path) is None]
    series = [path for path in others if path.is_dir() and _holds_dicom(path)]
    loose = [path for path in others if path.name != "DICOMDIR" and path.is_file() and is_dicom(path)]
    strange = {
        str(path): f"is not a readable file; expected {KNOWN} or DICOM files"
        for path in others
        if path not in loose and not path.is_dir() and IMAGE_LIKE.search(path.name)
    }
    if loose and (len(loose) > 1 or not (images or series)):
        return images, [folder, *series], {} if not (images or series) else strange
    return (
        images,
        series,
        strange | {str(path): "is a single DICOM file; expected a folder with a series" for path in loose},
    )


def _holds_dicom(folder: Path) -> bool:
    return any(path.is_file() and path.name[0] != "." and path.name != "DICOMDIR" and is_dicom(path)
               for path in sorted(folder.iterdir()))  # fmt: skip


def _by_channel(images: list[Path], channels: int) -> tuple[dict[str, dict[int, list[Path]]], list[Path]]:
    """Files with a channel's number by case and channel, and those without."""
    numbered: dict[str, dict[int, list[Path]]] = {}
    bare = []
    for path in images:
        match = CHANNEL.fullmatch(stem_of(path))
        if match is None:
            bare.append(path)
        else:
            numbered.setdefault(match.group(1), {}).setdefault(int(match.group(2)), []).append(path)
    for case in [case for case, found in numbered.items() if channels == 1 and 0 not in found]:
        bare += [path for paths in numbered.pop(case).values() for path in paths]
    return numbered, sorted(bare)


def _wrong_channels(case: str, found: Mapping[int, list[Path]], channels: int) -> str | None:
    surplus = [path for channel, paths in found.items() if channel >= channels for path in paths]
    if surplus:
        return f"{', '.join(map(str, surplus))}: has more channels than the {channels} the model was trained on"
    missing = [f"{case}_{channel:04d}" for channel in range(channels) if channel not in found]
    if missing:
        there = ", ".join(str(path) for paths in found.values() for path in paths)
        return f"{there}: has no file of channel(s) {', '.join(missing)}; {channels} channels are needed"
    return None


def _below(folder: Path, series: Collection[Path], besides: Collection[Path]) -> Iterator[tuple[str, str]]:
    """What is like an image in the folders below, with the reason; in a folder of DICOM files, other images only."""
    seen = {os.path.realpath(folder), *(os.path.realpath(path) for path in besides)}
    if any(os.path.realpath(folder) == os.path.realpath(path) for path in besides):
        seen |= {os.path.realpath(folder / own) for own in OWN_FOLDERS}
    waiting = [path for path in sorted(folder.iterdir()) if _is_plain_folder(path)]
    while waiting:
        inner = waiting.pop(0)
        if os.path.realpath(inner) in seen:
            continue
        seen.add(os.path.realpath(inner))
        try:
            entries = [path for path in sorted(inner.iterdir()) if not path.name.startswith(".")]
        except OSError as error:
            yield str(inner), f"cannot be opened ({error.strerror})"
            continue
        waiting = [path for path in entries if _is_plain_folder(path)] + waiting
        if inner not in series and _holds_dicom(inner):
            yield str(inner), f"holds DICOM files more than one folder below; give {inner.parent} itself"
            entries = [path for path in entries if suffix_of(path) is not None]
        for path in entries:
            if path.is_dir() and not suffix_of(path):
                continue
            if suffix_of(path) is not None or (inner not in series and IMAGE_LIKE.search(path.name)):
                yield str(path), f"lies in a folder below; move it, or give {inner} itself"


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and suffix_of(path) is None and not path.name.startswith(".")


def _told(files: tuple[Path, ...]) -> str:
    return ", ".join(file.name for file in files)
