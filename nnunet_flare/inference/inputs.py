"""What ``-i`` may be: an nnU-Net folder, single files, or DICOM series folders.

Needs neither torch nor nnU-Net, so that reading starts before they are imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.dicom.series import read_scan
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import read_json
from nnunet_flare.images import SUFFIXES, Volume, stem_of, suffix_of
from nnunet_flare.images.readers import SITK, reader_of_plans
from nnunet_flare.kept import is_label_map_of
from nnunet_flare.labels import channel_names
from nnunet_flare.listing import CHANNEL, Listing, list_scans, told

DOCUMENTS: dict[str, Any] = {
    "plans.json": {"plans_name": str, "image_reader_writer": str, "configurations": {str: dict}},
    "dataset.json": {"labels": {str: object}, "file_ending": str},
}
"""What the documents of a model's folder have at least."""

DICOM_OUTPUT = ".nii.gz"
"""Format of the label map of a DICOM series."""


@dataclass(frozen=True)
class InputCase:
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
        document: dict[str, Any] = read_json(path, DOCUMENTS[path.name], remedy="copy it again")
    except InputError as error:
        raise InputError(
            f"{error}; expected a trained model's folder (Trainer__Plans__configuration), or what flare-export wrote"
        ) from error
    return document


@dataclass(frozen=True)
class Inputs:
    """What ``-i`` holds: cases by name, why others are ``refused`` and files (by path) ``left``, all image files."""

    cases: dict[str, InputCase]
    refused: dict[str, str]
    left: dict[str, str]
    images: tuple[Path, ...]

    @property
    def not_taken(self) -> dict[str, str]:
        """The reasons of all that was not taken."""
        return {**self.left, **self.refused}

    def part(self, number: int, parts: int) -> list[InputCase]:
        """Every ``parts``-th case from ``number`` on, in the order of names.

        Cases that are refused count too, so that all parts agree when one of them finds a file more.
        """
        names = sorted({*self.cases, *self.refused})
        return [self.cases[name] for name in names[number::parts] if name in self.cases]


def find_inputs(
    inputs: Sequence[Path], dataset_json: dict[str, Any], *, output: Path | None = None, may_be_empty: bool = False
) -> Inputs:
    """The cases of ``-i``.

    Args:
        inputs: folders of images or of DICOM series, or image files.
        dataset_json: the model's, for the number of channels.
        output: the output folder, whose label maps are no scans where it lies in an input folder or is one.
        may_be_empty: whether folders without a scan are taken.

    Raises:
        InputError: when there is nothing to predict, or two inputs would write the same file.
    """
    channels = len(channel_names(dataset_json))
    cases: list[InputCase] = []
    files: list[Path] = []
    refused: dict[str, str] = {}
    left: dict[str, str] = {}
    images: list[Path] = []
    for path in inputs:
        if path.is_dir():
            besides = [other for other in inputs if other != path and other.is_dir()]
            found = _folder(path, channels, dataset_json["file_ending"], output, besides, may_be_empty)
            cases += [
                InputCase(case, taken, suffix_of(taken[0]) or DICOM_OUTPUT) for case, taken in found.cases.items()
            ]
            refused |= {**found.refused, **found.clashes}
            left |= found.left
            images += found.images
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif suffix_of(path) is None:
            raise InputError(f"{path}: is not an image file; expected one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    cases += _files(files, channels)
    seen: dict[str, InputCase] = {}
    for case in cases:
        if case.name in seen:
            raise InputError(
                f"{case.files[0]} and {seen[case.name].files[0]} would both be written as {case.name}{case.suffix}"
            )
        seen[case.name] = case
    return Inputs(dict(sorted(seen.items())), refused, left, (*images, *files))


def check_channel_count(case: InputCase, channels: int) -> None:
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


def _folder(
    folder: Path, channels: int, ending: str, output: Path | None, besides: Sequence[Path], may_be_empty: bool
) -> Listing:
    """What a folder holds, images in any format and DICOM series; refused where that is nothing."""
    is_output = output is not None and output.exists() and output.samefile(folder)
    found = list_scans(
        folder,
        channels,
        besides=besides if output is None else [*besides, output],
        is_output=is_label_map_of if is_output else lambda path, scan: False,
    )
    if not may_be_empty and not found.cases and not found.refused and not found.clashes:
        if found.left:
            raise InputError(f"{folder}: nothing to predict:{told(found.left)}")
        seen = sorted(path.name for path in folder.iterdir())[:3] or "nothing"
        raise InputError(f"{folder}: no image named <case>_0000{ending} and no DICOM series; found {seen}")
    return found


def _files(files: Sequence[Path], channels: int) -> list[InputCase]:
    """Single files: each one case, or with several channels grouped by their names."""
    if channels == 1:
        return [InputCase(_case_name(path, channels), (path,), suffix_of(path) or "") for path in files]
    groups: dict[str, list[Path]] = {}
    for path in sorted(files):
        groups.setdefault(_case_name(path, channels), []).append(path)
    for name, group in groups.items():
        if len(group) != channels:
            raise InputError(f"{name}: {len(group)} files were given, the model takes {channels} channels")
    return [InputCase(name, tuple(group), suffix_of(group[0]) or "") for name, group in groups.items()]


def _case_name(path: Path, channels: int) -> str:
    """A number of a channel that the model does not have is a part of the name, as in ``FLARE23_0007.nii.gz``."""
    match = CHANNEL.fullmatch(stem_of(path))
    return match.group(1) if match and int(match.group(2)) < channels else stem_of(path)
