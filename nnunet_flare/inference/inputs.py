"""What ``-i`` may be: an nnU-Net folder, single files, or DICOM series folders.

Needs neither torch nor nnU-Net, so that reading starts before they are imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.dicom import read_series
from nnunet_flare.dicom_files import series_folders
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import read_json
from nnunet_flare.images import SUFFIXES, Volume, find_cases, read_volume, stem_of, suffix_of

CHANNEL = re.compile(r"(.+)_(\d{4})")
"""nnU-Net's image names without suffix: ``<case>_<channel>``."""


MODEL_DATASET = {"labels": {str: object}, "file_ending": str}
"""What a model's dataset.json has at least."""

DICOM_OUTPUT = ".nii.gz"
"""Format of the label map of a DICOM series."""


@dataclass(frozen=True)
class Case:
    """A scan to predict: its name, one file (or DICOM folder) per channel, and the suffix of the label map."""

    name: str
    files: tuple[Path, ...]
    suffix: str

    def read(self) -> list[Volume]:
        """One volume per channel.

        Raises:
            CaseError: when a file is missing, unreadable or no 3-D scan.
        """
        return [read_series(path, self.name) if path.is_dir() else read_volume(path, self.name) for path in self.files]


def model_dataset(folder: Path) -> dict[str, Any]:
    """The dataset.json of a trained model's folder.

    Raises:
        InputError: when it is missing or no JSON.
    """
    path = folder / "dataset.json"
    try:
        document: dict[str, Any] = read_json(path, MODEL_DATASET, remedy="copy it again")
    except InputError as error:
        raise InputError(f"{error}; expected a trained model's folder (Trainer__Plans__configuration)") from error
    return document


def find_inputs(inputs: Sequence[Path], dataset_json: dict[str, Any]) -> list[Case]:
    """The cases of ``-i``, sorted by name.

    Args:
        inputs: folders of nnU-Net's image names or of DICOM series, or image files.
        dataset_json: the model's, for the file ending and the number of channels.

    Raises:
        InputError: when there is nothing to predict, or two inputs would write the same file.
    """
    channels = len(dataset_json.get("channel_names", dataset_json.get("modality", ())))
    cases: list[Case] = []
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            cases += _folder(path, dataset_json["file_ending"], channels)
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif suffix_of(path) is None:
            raise InputError(f"{path}: is no image file; expected one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    cases += _files(files, channels)
    seen: dict[str, Case] = {}
    for case in cases:
        if case.name in seen:
            raise InputError(
                f"{case.files[0]} and {seen[case.name].files[0]} would both be written as {case.name}{case.suffix}"
            )
        seen[case.name] = case
    return [seen[name] for name in sorted(seen)]


def check_channel_count(case: Case, channels: int) -> None:
    """Refuse a case with more channel files than the model takes.

    Raises:
        CaseError: naming the surplus file.
    """
    match = CHANNEL.fullmatch(stem_of(case.files[0]))
    if match is None:
        return
    surplus = case.files[0].with_name(f"{match.group(1)}_{channels:04d}{case.suffix}")
    if surplus not in case.files and surplus.exists():
        raise CaseError(case.name, f"{surplus}: has more channels than the {channels} the model was trained on")


def _folder(folder: Path, ending: str, channels: int) -> list[Case]:
    """The cases of a folder: in the model's format or, where it has none of that, another known one, or DICOM."""
    endings = [ending, *(suffix for suffix in SUFFIXES if suffix != ending)]
    for candidate in endings:
        if any(folder.glob(f"*_[0-9][0-9][0-9][0-9]{candidate}")):
            ending = candidate
            break
    else:
        series = series_folders(folder)
        if series and channels != 1:
            raise InputError(f"{folder}: holds DICOM series; a model of {channels} channels takes NIfTI files")
        if series:
            return [Case(path.resolve().name, (path,), DICOM_OUTPUT) for path in series]
    return [Case(name, tuple(files), ending) for name, files in find_cases(folder, ending, channels).items()]


def _files(files: Sequence[Path], channels: int) -> list[Case]:
    """Single files: each one case, or with several channels grouped by their names."""
    if channels == 1:
        return [Case(_case_name(path), (path,), suffix_of(path) or "") for path in files]
    groups: dict[str, list[Path]] = {}
    for path in sorted(files):
        groups.setdefault(_case_name(path), []).append(path)
    for name, group in groups.items():
        if len(group) != channels:
            raise InputError(f"{name}: {len(group)} files were given, the model takes {channels} channels")
    return [Case(name, tuple(group), suffix_of(group[0]) or "") for name, group in groups.items()]


def _case_name(path: Path) -> str:
    match = CHANNEL.fullmatch(stem_of(path))
    return match.group(1) if match else stem_of(path)
