"""Post-processing the label maps of a folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import (
    SUFFIXES,
    Volume,
    read_labels_alone,
    read_volume,
    stem_of,
    suffix_of,
    write_labels,
)
from nnunet_flare.images.readers import SITK, doubtful
from nnunet_flare.listing import label_maps
from nnunet_flare.outputs import check_outputs
from nnunet_flare.parallel import Workers
from nnunet_flare.postprocessing.pipeline import Pipeline


@dataclass(frozen=True)
class Change:
    """What a pipeline did to a case: volume erased, and volume given to a label that it did not have."""

    case: str
    erased_ml: float
    relabelled_ml: float


@dataclass(frozen=True)
class FolderResult:
    """Changes of the cases that were written, and (case, reason) of those that could not be, both sorted."""

    changes: tuple[Change, ...]
    failed: tuple[tuple[str, str], ...]


def postprocess_folder(
    source: Path,
    target: Path,
    pipeline: Pipeline,
    *,
    images: Path | None = None,
    processes: int | None = None,
    progress: bool = True,
) -> FolderResult:
    """Apply a pipeline to every label map of ``source`` (or to one file) and write them to ``target``, by rename.

    Args:
        source: folder of ``<case>.nii.gz``, or a single file.
        target: another folder; existing files of the same names are replaced.
        pipeline: what to apply.
        images: folder of the images ``<case>_0000.nii.gz`` (or ``<case>.nii.gz``), whose spacing and orientation are
            used and written instead of the label maps' own, for maps that lost their header.
        processes: workers; default one per core.
        progress: show a bar where there is a terminal.

    Raises:
        InputError: when there is no label map, or target and source are the same folder.
    """
    files, left = label_files(source, besides=[target])
    if target.exists() and any(target.resolve() == path.parent.resolve() for path in files):
        raise InputError(f"-o {target}: is the input folder; choose another, so that nothing is processed twice")
    if images is not None and not images.is_dir():
        raise InputError(f"--image {images}: no such folder of images")
    pictures = [] if images is None else [_image_of(stem_of(path), images) for path in files]
    check_outputs([target / _output_name(path) for path in files], [*files, *pictures, Path(pipeline.name)])
    target.mkdir(parents=True, exist_ok=True)
    work = partial(_postprocess_file, target=target, pipeline=pipeline, images=images)
    changes, failed = [], list(left.items())
    with Workers(processes, progress=progress) as workers:
        for _, outcome in workers.each_case(work, files, description="post-processing"):
            if isinstance(outcome, CaseError):
                failed.append((outcome.case, outcome.reason))
            else:
                changes.append(outcome)
    return FolderResult(tuple(sorted(changes, key=lambda change: change.case)), tuple(sorted(failed)))


def label_files(source: Path, *, besides: Collection[Path] = ()) -> tuple[list[Path], dict[str, str]]:
    """The label maps of a folder, sorted, and why other files were not taken; a file is a folder of one.

    Raises:
        InputError: when there is none.
    """
    if source.is_file():
        return [source], {}
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder of label maps")
    maps, left = label_maps(source, "label maps", besides=besides)
    return list(maps.values()), left


def _output_name(path: Path) -> str:
    """The input's name with its ending in small letters, which is how formats are known."""
    return f"{stem_of(path)}{suffix_of(path)}"


def _postprocess_file(path: Path, *, target: Path, pipeline: Pipeline, images: Path | None) -> Change:
    case = stem_of(path)
    volume = read_labels_alone(path, case, allowed=sorted(pipeline.labels.allowed))
    if images is not None:
        volume = _on_grid_of_image(volume, case, images)
    result = pipeline.apply(volume.array, volume.spacing_mm, direction=volume.direction)
    write_labels(target / _output_name(path), result, volume)
    changed = result != volume.array
    erased = np.count_nonzero(changed & (result == 0))
    millilitres = volume.voxel_mm3 / 1000
    return Change(case, erased * millilitres, (np.count_nonzero(changed) - erased) * millilitres)


def _on_grid_of_image(labels: Volume, case: str, images: Path) -> Volume:
    path = _image_of(case, images)
    if path is None:
        raise CaseError(case, f"no image {case}_0000{SUFFIXES[0]} (or {case}{SUFFIXES[0]}) in {images}")
    image = read_volume(path, case)
    if image.doubt:
        raise CaseError(case, f"{path}: {image.doubt}; {doubtful(SITK)}")
    if image.array.shape != labels.array.shape:
        raise CaseError(
            case,
            f"label map has shape (z, y, x) {labels.array.shape}, but {path} has {image.array.shape}; expected the "
            "same",
        )
    return image.with_array(labels.array)


def _image_of(case: str, images: Path) -> Path | None:
    names = [f"{case}{channel}{suffix}" for channel in ("_0000", "") for suffix in SUFFIXES]
    return next((images / name for name in names if (images / name).is_file()), None)
