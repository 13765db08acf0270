"""From a scan as stored to the network's grid: axis order, crop to nonzero, normalisation, resampling.

The steps, their order and their results are stock nnU-Net's ``DefaultPreprocessor``; normalisation is done by the
classes that the plans name. What is spared: the hole filling of the nonzero mask where no normalisation asks for the
mask (it does not change the mask's box), the resampling of that mask, and for voxel-wise normalisations the slices
that resampling does not look at.

For a GPU the scan is cropped on the CPU, where looking for its zero border costs a few planes, goes there once as it is
stored, and is normalised and resampled there. What is left to the CPU: normalisations that look at more than one voxel
(the scan then goes over normalised), resampling that the plans name otherwise, and scans for which there is no room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnunet_flare import trusted_names
from nnunet_flare.errors import InputError
from nnunet_flare.inference import normalisation
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.devices import CPU, Device
from nnunet_flare.inference.grids import new_shape
from nnunet_flare.inference.memory import CHUNK_BYTES, FLOAT_BYTES, unless_memory_is_short
from nnunet_flare.inference.places import place_at
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.resampling import NO_RESAMPLING, Normalise, is_ours, resample_image
from nnunet_flare.inference.spare import Views

STOCK_PREPROCESSOR = "DefaultPreprocessor"

VOXELWISE = frozenset({"CTNormalization", "NoNormalization"})
"""Normalisations whose result in one voxel depends on that voxel alone."""

OUTSIDE = -1
"""Marks voxels outside the nonzero mask, as stock nnU-Net marks them for masked normalisations."""

CROP, RESAMPLE = "crop", "normalise + resample"
"""Stages of the profile."""

MAX_NETWORK_VOXELS = 2**31
"""A scan with more voxels on the network's grid has a spacing that cannot be meant."""


DeviceFor = Callable[[int], Device]
"""So many bytes to the device where a scan that needs them is normalised and resampled."""


@dataclass(frozen=True, eq=False)
class Channel:
    """A channel (Z, Y, X) inside the crop, the name of its normalisation, and that normalisation on the CPU."""

    array: np.ndarray
    scheme: str
    intensities: Mapping[str, Any]
    normalise: Normalise
    there: Array | None = None
    """The same on the GPU, where it lies there already."""


@dataclass(eq=False)
class Prepared:
    """A scan on the network's grid: ``data`` (C, z, y, x) float32, and how to come back (stock's properties).

    ``data`` is an array, or a tensor on the GPU where it was made there.
    """

    data: Array
    properties: dict[str, Any]

    def at(self, device: Device) -> Array:
        """``data`` on a device. What goes from a GPU to the CPU stays there, and the GPU's memory is free again."""
        data = place_at(device).packed(self.data)
        if device.type == "cpu":
            self.data = data
        return data


def preprocess(
    channels: list[np.ndarray],
    spacing_mm: tuple[float, ...],
    plans_manager: Any,
    configuration_manager: Any,
    profile: Profile | None = None,
    device_for: DeviceFor = lambda needed: CPU,
    there: Views | None = None,
    labels: np.ndarray | None = None,
) -> Prepared:
    """Bring a scan to the network's grid.

    Args:
        channels: one array (Z, Y, X) per channel, all of one shape; they are not changed.
        spacing_mm: (z, y, x).
        plans_manager: stock nnU-Net's.
        configuration_manager: stock nnU-Net's.
        profile: gets the time of both stages; of a preprocessor that is not stock's, of all of it as one.
        device_for: where a scan is normalised and resampled that needs so many bytes there.
        there: the channels on the GPU, where they lie there already.
        labels: a label map (Z, Y, X); for normalisations, voxels that have one are inside of the image.

    Raises:
        InputError: when the plans ask for a preprocessor or normalisation that is not stock nnU-Net's.
        ValueError: when the scan has fewer than one voxel along an axis of the network's grid.
    """
    profile = profile or Profile()
    if configuration_manager.preprocessor_name != STOCK_PREPROCESSOR:
        with profile.stage("preprocess"):
            return _with_plans_preprocessor(channels, spacing_mm, plans_manager, configuration_manager)
    forward = list(plans_manager.transpose_forward)
    arrays = [channel.transpose(forward) for channel in channels]
    spacing = [float(spacing_mm[axis]) for axis in forward]
    with profile.stage(CROP):
        box = nonzero_box(arrays)
    inside = tuple(slice(low, high) for low, high in box)
    properties: dict[str, Any] = {
        "spacing": tuple(float(s) for s in spacing_mm),
        "shape_before_cropping": tuple(arrays[0].shape),
        "bbox_used_for_cropping": [list(b) for b in box],
    }
    mask = _outside_mask(arrays, inside) if asks_for_mask(configuration_manager) else None
    if mask is not None and labels is not None:
        mask[labels.transpose(forward)[inside] > 0] = 0
    channels_inside = [
        _channel(array[inside], k, plans_manager, configuration_manager, mask) for k, array in enumerate(arrays)
    ]
    if there is not None:
        channels_inside = [
            replace(channel, there=one.permute(forward)[inside])
            for channel, one in zip(channels_inside, there, strict=True)
        ]
    shape_before = tuple(channels_inside[0].array.shape)
    properties["shape_after_cropping_and_before_resampling"] = shape_before
    target = target_spacing(spacing, configuration_manager.spacing)
    keeps = configuration_manager.configuration["resampling_fn_data"] == NO_RESAMPLING
    shape = shape_before if keeps else network_shape(shape_before, spacing, target)
    device = (
        device_for(bytes_needed([channel.array for channel in channels_inside], shape))
        if is_ours(configuration_manager.configuration)
        else CPU
    )
    with profile.stage(RESAMPLE):
        if device.type != "cpu":
            from nnunet_flare.inference.torch_resampling import resampled_there

            grids = (shape, spacing, target, configuration_manager.configuration)
            moved = unless_memory_is_short(device, lambda: resampled_there(channels_inside, *grids, device=device))
            if moved is not None:
                profile.settle(moved)
                return Prepared(moved, properties)
        data = np.empty((len(arrays), *shape), np.float32)
        for into, channel in zip(data, channels_inside, strict=True):
            array, normalise = channel.array, channel.normalise
            if channel.scheme in VOXELWISE:
                into[...] = resample_image(array, shape, spacing, target, configuration_manager, normalise)
            else:
                into[...] = resample_image(normalise(array), shape, spacing, target, configuration_manager)
    return Prepared(data, properties)


def asks_for_mask(configuration_manager: Any) -> bool:
    """Whether a normalisation looks at the nonzero mask; one that is not known here always gets it, as from stock."""
    known = normalisation.BY_NAME.keys() >= set(configuration_manager.normalization_schemes)
    return any(configuration_manager.use_mask_for_norm) or not known


def prepares_stored(configuration_manager: Any) -> bool:
    """Whether a GPU is given the voxels as they are stored, and neither the CPU's normalised ones nor a grid's."""
    configuration = configuration_manager.configuration
    voxelwise = VOXELWISE.issuperset(configuration_manager.normalization_schemes)
    return voxelwise and configuration_manager.preprocessor_name == STOCK_PREPROCESSOR and is_ours(configuration)


def bytes_needed(channels: Sequence[np.ndarray], shape: Sequence[int]) -> int:
    """What normalising and resampling hold on a GPU: the result, a channel as stored, and halfway to its new grid."""
    halfway = max(len(channels[0]), int(shape[0])) * math.prod(shape[1:])
    stored = max(channel.nbytes for channel in channels)
    return FLOAT_BYTES * (len(channels) * math.prod(shape) + halfway) + stored + CHUNK_BYTES


def target_spacing(spacing: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """The network's spacing of three axes; a 2-D configuration keeps a scan's first."""
    return [*spacing[: len(spacing) - len(wanted)], *wanted]


def network_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Shape of a scan on the network's grid, known before anything of that size is made.

    Raises:
        ValueError: when it has fewer than one voxel along an axis, or more than can be meant.
    """
    found = new_shape(shape, spacing, target)
    is_none = min(found) < 1
    if is_none or float(np.prod(found, dtype=float)) > MAX_NETWORK_VOXELS:
        raise ValueError(
            f"shape {tuple(shape)} at spacing {tuple(spacing)} mm becomes {found} at the model's "
            f"{tuple(target)} mm, which is {'no voxel' if is_none else 'too large to predict'}; check the spacing"
        )
    return found


def nonzero_box(arrays: list[np.ndarray]) -> list[tuple[int, int]]:
    """The smallest box (first, one past last, per axis) that holds every voxel that is not 0 in some channel.

    Planes are looked at from the outside, so that a scan without a zero border costs six planes.
    """
    box: list[tuple[int, int]] = []
    for axis in range(3):
        size = arrays[0].shape[axis]
        low = next((i for i in range(size) if any(np.any(a.take(i, axis)) for a in arrays)), None)
        if low is None:
            return [(0, n) for n in arrays[0].shape]
        high = next(i for i in range(size - 1, -1, -1) if any(np.any(a.take(i, axis)) for a in arrays))
        box.append((low, high + 1))
    return box


def outside_nonzero(arrays: Sequence[np.ndarray], box: Sequence[Sequence[int]]) -> np.ndarray | None:
    """Where a crop of some channels is outside of the image, in stock's sense, or None where it is nowhere.

    Outside are zeros of all channels that touch the edge of the array, or others outside.
    """
    faces = [array.take(at, axis) for axis in range(3) for at in (0, -1) for array in arrays[:1]]
    if all(face.all() for face in faces):  # as in nearly every CT
        return None
    mask = _outside_mask(list(arrays), tuple(slice(int(low), int(high)) for low, high in box))
    return mask != 0 if mask.any() else None


def _outside_mask(arrays: list[np.ndarray], inside: tuple[slice, ...]) -> np.ndarray:
    from scipy.ndimage import binary_fill_holes

    nonzero = arrays[0] != 0
    for array in arrays[1:]:
        nonzero |= array != 0
    return np.where(binary_fill_holes(nonzero)[inside], np.int8(0), np.int8(OUTSIDE))


def _channel(
    array: np.ndarray, channel: int, plans_manager: Any, configuration_manager: Any, mask: np.ndarray | None
) -> Channel:
    """A channel inside the crop, with the plans' normalisation of it."""
    name = configuration_manager.normalization_schemes[channel]
    properties = plans_manager.foreground_intensity_properties_per_channel[str(channel)]
    masked = configuration_manager.use_mask_for_norm[channel]
    if name in normalisation.BY_NAME:
        known, inside = normalisation.BY_NAME[name], mask if masked else None
        return Channel(array, name, properties, lambda array: known(array.astype(np.float32), inside, properties))
    found = trusted_names.check_name("normalisation", name, "the plans' normalization_schemes")
    scheme = found(use_mask_for_norm=masked, intensityproperties=properties)
    return Channel(array, name, properties, lambda array: scheme.run(array.astype(np.float32), mask))


def _with_plans_preprocessor(
    channels: list[np.ndarray], spacing_mm: tuple[float, ...], plans_manager: Any, configuration_manager: Any
) -> Prepared:
    """Another preprocessor than stock's, which is run as it is."""
    preprocessor = configuration_manager.preprocessor_class
    if preprocessor is None:
        raise InputError(f"the plans preprocess with {configuration_manager.preprocessor_name}, not installed here")
    data, _, properties = preprocessor(verbose=False).run_case_npy(
        np.stack(channels).astype(np.float32),
        None,
        {"spacing": tuple(float(s) for s in spacing_mm)},
        plans_manager,
        configuration_manager,
        {},
    )
    return Prepared(np.asarray(data, np.float32), properties)
