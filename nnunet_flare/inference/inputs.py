"""What ``-i`` may be: an nnU-Net folder, single files, or DICOM series folders.

Needs neither torch nor nnU-Net, so that reading starts before they are imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.dicom import read_scan, series_folders
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import SUFFIXES, Volume, find_cases, stem_of, suffix_of
from nnunet_flare.readers import SITK, reader_of_plans

CHANNEL = re.compile(r"(.+)_(\d{4})")
"""nnU-Net's image names without suffix: ``<case>_<channel>``."""


DICOM_OUTPUT = ".nii.gz"
"""Format of the label map of a DICOM series."""


@dataclass(frozen=True)
class Case:
    """A scan to predict: its name, one file (or DICOM folder) per channel, and the suffix of the label map."""

    name: str
    files: tuple[Path, ...]
    suffix: str

    def read(self, reader: str = SITK) -> list[Volume]:
        """One volume per channel, NIfTI files as this reader of nnU-Net reads them.

        Raises:
            CaseError: when a file is missing, unreadable or no 3-D scan.
        """
        return [read_scan(path, self.name, reader=reader) for path in self.files]


def model_dataset(folder: Path) -> dict[str, Any]:
    """The dataset.json of a trained model's folder.

    Raises:
        InputError: when it is missing or no JSON.
    """
    return _model_document(folder / "dataset.json")


def model_reader(folder: Path) -> str:
    """The reader of images that a trained model's plans name.

    Raises:
        InputError: when plans.json is missing or no JSON.
    """
    return reader_of_plans(_model_document(folder / "plans.json"))


def _model_document(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{path}: no such file; expected the folder of a trained model (Trainer__Plans__configuration)"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}); copy it again") from error


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
