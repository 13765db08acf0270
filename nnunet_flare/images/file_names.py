"""The names of image files: their endings, and nnU-Net's ``<case>_0000<file_ending>``."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_flare.errors import InputError

SUFFIXES: tuple[str, ...] = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
"""File name endings of single-file images, longest first."""

NIFTI_SUFFIXES = (".nii.gz", ".nii")


def suffix_of(path: Path) -> str | None:
    """The image suffix of a file name (``.nii.gz``, ...), or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def stem_of(path: Path) -> str:
    """File name without its image suffix."""
    suffix = suffix_of(path)
    return path.name if suffix is None else path.name[: -len(suffix)]


def find_cases(folder: Path, file_ending: str, channels: int = 1) -> dict[str, list[Path]]:
    """The cases of an nnU-Net image folder (``<case>_0000<file_ending>`` and so on), sorted by id.

    Missing channels are left for the reader to report, case by case.

    Raises:
        InputError: when the folder is missing or holds no such file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected images named <case>_0000{file_ending}")
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending), re.DOTALL)  # a line break is a character too
    names = {m.group(1) for p in folder.iterdir() if (m := pattern.fullmatch(p.name)) and not p.name.startswith(".")}
    if not names:
        seen = sorted(p.name for p in folder.iterdir())[:3]
        raise InputError(f"{folder}: no image named <case>_0000{file_ending}; found {seen or 'nothing'}")
    return {n: [folder / f"{n}_{channel:04d}{file_ending}" for channel in range(channels)] for n in sorted(names)}
