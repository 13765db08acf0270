"""The options of ``flare-predict`` for what is written beside label maps."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare.errors import InputError
from nnunet_flare.inference.choices import UNCERTAINTIES
from nnunet_flare.labels import channel_names

if TYPE_CHECKING:
    from nnunet_flare.inference.forms import Form
    from nnunet_flare.inference.inputs import InputCase

log = logging.getLogger(__name__)

SHOWN = 3
"""Paths that are named in a message."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, in a group of their own."""
    out = parser.add_argument_group("further outputs")
    out.add_argument(
        "--statistics",
        action="store_true",
        help="also write OUT/statistics.csv and .json: volume (ml) and mean HU of every organ of every case",
    )
    out.add_argument(
        "--preview", action="store_true", help="also write a picture, OUT/<case>.png: three planes with the organs"
    )
    out.add_argument(
        "--save_probabilities",
        action="store_true",
        help="also write OUT/<case>.npz and .pkl, as nnU-Net does for nnUNetv2_ensemble",
    )
    out.add_argument(
        "--uncertainty",
        nargs="?",
        choices=UNCERTAINTIES,
        const="entropy",
        help="also write OUT/uncertainty/<case>.nii.gz, 0 to 255: entropy of the mean softmax (default), or "
        "disagreement: the share of folds with another label",
    )
    out.add_argument(
        "--dicom_seg",
        action="store_true",
        help="for DICOM series also write a DICOM segmentation, OUT/<case>.dcm (extra: dicom)",
    )
    out.add_argument(
        "--rtstruct",
        action="store_true",
        help="for DICOM series also write a radiotherapy structure set, OUT/rtstruct/<case>.dcm (extra: dicom)",
    )


def forms_of(args: argparse.Namespace, cases: Sequence[InputCase], dataset: dict[str, Any], model: Path) -> list[Form]:
    """The further outputs that were asked for.

    Args:
        args: of the command line.
        cases: all that will be predicted, by this part or another.
        dataset: the model's dataset.json.
        model: its folder.

    Raises:
        InputError: when one of them cannot be made.
    """
    from nnunet_flare.inference.inputs import model_reader
    from nnunet_flare.labels import drawn_parts, label_names

    names, parts = label_names(dataset), drawn_parts(dataset)
    found: list[Form] = []
    if args.statistics:
        from nnunet_flare.inference.statistics import Statistics

        found.append(Statistics(args.output, names, ct=is_ct(dataset), parts=parts, reader=model_reader(model)).form())
    if args.preview:
        from nnunet_flare.inference.previews import preview_form

        found.append(preview_form(args.output, names, ct=is_ct(dataset)))
    wanting = {
        "--save_members": args.save_members,
        "--save_probabilities": args.save_probabilities,
        "--uncertainty": args.uncertainty,
    }
    for option in (option for option, given in wanting.items() if given and args.windows != "all"):
        raise InputError(f"{option} needs --windows all; {args.windows} leaves windows out")
    if args.save_probabilities:
        from nnunet_flare.inference.probabilities import probabilities_form

        found.append(probabilities_form(args.output, model))
    if args.uncertainty:
        from nnunet_flare.inference.uncertainty import uncertainty_form

        found.append(uncertainty_form(args.uncertainty, args.output, model_reader(model)))
    if args.dicom_seg:
        found.append(_dicom_seg(args.output, cases, names, parts))
    if args.rtstruct:
        found.append(_rtstruct(args.output, cases, names, parts))
    return found


def there(cases: Sequence[InputCase], output: Path) -> set[tuple[str, Path, int]]:
    """Every further output of the cases, of any kind, that lies in a folder: case, file, and when it was written."""
    from nnunet_flare.images.file_names import SUFFIXES
    from nnunet_flare.inference.folder import MEMBERS, ROI
    from nnunet_flare.inference.statistics import CSV, measured

    found, rows = set(), measured(output)
    members = sorted((output / MEMBERS).glob("*"))
    for case in cases:
        name = case.name
        paths = [output / f"{name}{ending}" for ending in (".png", ".npz", ".pkl", ".dcm")]
        paths += [output / "uncertainty" / f"{name}.nii.gz", output / "rtstruct" / f"{name}.dcm"]
        paths += [folder / f"{name}{case.suffix}" for folder in members]
        paths += [output / ROI / f"{name}_0000{ending}" for ending in SUFFIXES]
        paths += [output / CSV] if name in rows else []
        found |= {(name, path, path.stat().st_mtime_ns) for path in paths if path.is_file()}
    return found


def tell_stale(earlier: set[tuple[str, Path, int]], written: Sequence[InputCase], output: Path) -> None:
    """Say which further outputs that were there ``earlier`` stay beside label maps that were written anew."""
    paths = sorted({path for _, path, _ in earlier & there(written, output)})
    if paths:
        more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
        log.warning(
            "%s%s: left of an earlier prediction; the label maps are new, so these do not belong to them: remove these "
            "or ask for them again",
            ", ".join(map(str, paths[:SHOWN])), more,
        )  # fmt: skip


def is_ct(dataset: dict[str, Any]) -> bool:
    """Whether the first channel holds CT numbers, by its name in dataset.json, as nnU-Net tells it."""
    channels = channel_names(dataset)
    return bool(channels) and str(channels.get("0", "")).casefold() == "ct"


def _dicom_seg(
    output: Path, cases: Sequence[InputCase], names: dict[int, str], parts: dict[int, tuple[int, ...]]
) -> Form:
    """Writes DICOM segmentations; refused at once where a case is no DICOM series."""
    from nnunet_flare.dicom.segmentation import SUFFIX, check_installed, write_dicom_seg
    from nnunet_flare.inference.forms import Finished, Form
    from nnunet_flare.kept import is_kept_dicom

    check_installed()
    _check_series("--dicom_seg", output, cases)

    def file(case: InputCase) -> Path:
        return output / f"{case.name}{SUFFIX}"

    def write(done: Finished, _: Any) -> None:
        write_dicom_seg(file(done.case), done.labels, done.case.files[0], names, done.case.name, parts)

    return Form(
        "seg",
        "DICOM segmentations",
        lambda case: (file(case),),
        write,
        lambda case: is_kept_dicom(file(case)),
        problem=lambda case: _no_series("--dicom_seg", case),
    )


def _rtstruct(
    output: Path, cases: Sequence[InputCase], names: dict[int, str], parts: dict[int, tuple[int, ...]]
) -> Form:
    """Writes structure sets, as :func:`_dicom_seg` segmentations."""
    from nnunet_flare.dicom.rtstruct import FOLDER, SUFFIX, is_kept_rtstruct, write_rtstruct
    from nnunet_flare.dicom.segmentation import check_installed
    from nnunet_flare.inference.forms import Finished, Form

    check_installed("--rtstruct")
    _check_series("--rtstruct", output / FOLDER, cases)

    def file(case: InputCase) -> Path:
        return output / FOLDER / f"{case.name}{SUFFIX}"

    def write(done: Finished, _: Any) -> None:
        write_rtstruct(file(done.case), done.labels, done.case.files[0], names, done.case.name, parts)

    return Form(
        "rt",
        "structure sets",
        lambda case: (file(case),),
        write,
        lambda case: is_kept_rtstruct(file(case)),
        problem=lambda case: _no_series("--rtstruct", case),
    )


def _check_series(option: str, output: Path, cases: Sequence[InputCase]) -> None:
    for case in cases:
        problem = _no_series(option, case)
        if problem is not None:
            raise InputError(problem)
        if output.exists() and output.samefile(case.files[0]):
            raise InputError(f"-o {output}: is a DICOM series, and {option} would write into it; choose another folder")


def _no_series(option: str, case: InputCase) -> str | None:
    """Why a case, of those that --watch finds later too, has no DICOM form."""
    if case.files[0].is_dir():
        return None
    return f"{option}: {case.files[0]} is not a folder of a DICOM series; leave out {option}"
