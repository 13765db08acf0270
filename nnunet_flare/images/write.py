"""Writing volumes and label maps by rename, on the grid they were read with."""

from __future__ import annotations

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.disks import naming_disk_errors
from nnunet_flare.images.file_names import NIFTI_SUFFIXES, suffix_of
from nnunet_flare.images.nifti import is_whole
from nnunet_flare.images.nifti_write import (
    axis_aligned_header,
    described,
    nibabel_header,
    simpleitk_header,
    write_nifti,
)
from nnunet_flare.images.views import last_line
from nnunet_flare.images.volume import Volume
from nnunet_flare.names import is_plain, plain_folder


def to_sitk(volume: Volume) -> Any:
    """The SimpleITK image of a volume."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(tuple(volume.spacing_mm[::-1]))
    image.SetOrigin(volume.origin)
    image.SetDirection(volume.direction)
    return image


def write_volume(path: Path, volume: Volume, *, description: str = "") -> None:
    """Write an image by rename, compressed where the format allows it; as nibabel's readers write what they read.

    A NIfTI file's header has ``description`` as its free text, where one is given (up to 79 ASCII characters).

    Raises:
        OSError: when it cannot be written whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, because the header of .mhd names its second file: both must have their final names.
    with plain_folder(beside=path.parent) as folder, naming_disk_errors(path):
        name = _name_for_libraries(path)
        if suffix_of(path) in NIFTI_SUFFIXES:
            start = _nifti_start(volume, folder, path)
            write_nifti(folder / name, described(start, description) if description else start, volume.array)
            if not is_whole(folder / name):
                raise OSError(f"{path}: could not be written completely")
        else:
            _write_by_simpleitk(folder / name, volume, path)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == name):
            os.replace(file, path if file.name == name else path.with_name(file.name))


def write_labels(path: Path, labels: np.ndarray, like: Volume, *, description: str = "") -> None:
    """Write a label map (Z, Y, X) as uint8 on the grid of ``like`` as :func:`write_volume` writes."""
    if labels.max(initial=0) > 255:
        raise ValueError(f"label id {labels.max()} does not fit uint8")
    write_volume(path, like.with_array(labels.astype(np.uint8, copy=False)), description=description)


def _name_for_libraries(path: Path) -> str:
    """A plain name with a suffix in lower case; .mhd keeps its own where it can, as its voxels' file is named alike."""
    if path.name.endswith(".mhd") and is_plain(path.name):
        return path.name
    return f"image-{sha256(os.fsencode(path.name)).hexdigest()[:12]}{suffix_of(path) or path.suffix}"


def _write_by_simpleitk(file: Path, volume: Volume, path: Path) -> None:
    import SimpleITK as sitk

    try:
        sitk.WriteImage(to_sitk(volume), str(file), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({last_line(error)})") from error


def _nifti_start(volume: Volume, folder: Path, path: Path) -> bytes:
    """A NIfTI file's bytes before the voxels, as the library writes them by which the volume's grid was read."""
    if volume.affine is not None:
        return nibabel_header(volume.array.dtype, volume.affine)
    plain = axis_aligned_header(volume.array.dtype, volume.spacing_mm, volume.origin, volume.direction)
    if plain is not None:
        return plain
    try:
        voxel = np.zeros((1, 1, 1), volume.array.dtype)
        return simpleitk_header(to_sitk(replace(volume, array=voxel)), folder)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({last_line(error)})") from error
