"""A scan as the network sees it, and the way back to its own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, check_values, geometry_difference, oddities, rounding_difference
from nnunet_flare.images.orientation import Turn, turn_for_reader
from nnunet_flare.images.readers import reader_of_plans
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.places import place_of
from nnunet_flare.inference.preprocessing import DeviceFor, Prepared, preprocess
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.spare import Views

CT_SCHEMES = frozenset({"CTNormalization", "FlareClip500Normalization", "FlareClip325Normalization"})
"""Normalisations of models that were trained on CT numbers."""


@dataclass(frozen=True, eq=False)
class PreparedScan:
    """A scan on the network's grid, and the way back: how it was turned and the grid it came from (without voxels).

    ``oddities`` says in words what is unusual about it.
    """

    prepared: Prepared
    turn: Turn
    grid: Volume
    oddities: tuple[str, ...] = ()
    name: str = "image"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (z, y, x) on the network's grid."""
        return tuple(self.prepared.data.shape[1:])


def prepare_scan(
    volumes: Sequence[Volume],
    case: str,
    *,
    channels: int,
    patch: Sequence[int],
    plans_manager: Any,
    configuration_manager: Any,
    profile: Profile,
    device_for: DeviceFor = lambda needed: CPU,
    there: Views | None = None,
    labels: np.ndarray | None = None,
    part: bool = False,
) -> PreparedScan:
    """Check a scan's channels and bring them to the network's grid.

    Args:
        volumes: one per channel.
        case: its name, for messages.
        channels: how many the model wants.
        patch: window size (z, y, x), one slice for 2-D models, which take scans of one slice too.
        plans_manager: stock nnU-Net's.
        configuration_manager: stock nnU-Net's.
        profile: gets the time of every stage.
        device_for: as :func:`nnunet_flare.inference.preprocessing.preprocess`.
        there: the volumes' arrays on the GPU, where they lie there already.
        labels: a label map (Z, Y, X) on the scan's grid, as :func:`nnunet_flare.inference.preprocessing.preprocess`.
        part: the volumes are a part of a scan, which may have one value only.

    Raises:
        CaseError: when the scan cannot be predicted with this model.
    """
    if len(volumes) != channels:
        raise CaseError(case, f"has {len(volumes)} channels, the model was trained on {channels}")
    with profile.stage("check"):
        for volume in volumes:
            check_values(volume, case, flat=patch[0] == 1, part=part)
        found = list(value_oddities(volumes, plans_manager, configuration_manager))
    for number, volume in enumerate(volumes[1:], start=1):
        difference = geometry_difference(volumes[0], volume)
        if difference is not None:
            raise CaseError(case, f"channels 0000 and {number:04d} are on different grids: {difference}")
        rounding = rounding_difference(volumes[0], volume)
        if rounding is not None:
            found.append(f"channels 0000 and {number:04d} are on nearly the same grid: {rounding}")
    turn = turn_for_reader(reader_of_plans(plans_manager.plans), volumes[0])
    try:
        prepared = preprocess(
            [turn.apply(volume.array) for volume in volumes],
            turn.spacing_mm(volumes[0].spacing_mm),
            plans_manager,
            configuration_manager,
            profile,
            device_for,
            None if there is None else [_turned(one, turn) for one in there],
            None if labels is None else turn.apply(labels),
        )
    except ValueError as error:
        raise CaseError(case, str(error)) from error
    shape = prepared.data.shape[1:]
    if any(n < p for n, p in zip(shape, patch, strict=True)):
        found.append(
            f"shape {tuple(shape)} on the network's grid, smaller than its patch {tuple(patch)}; padded with zeros"
        )
    nothing = np.broadcast_to(np.uint8(0), volumes[0].array.shape)
    return PreparedScan(prepared, turn, volumes[0].with_array(nothing), tuple(found), case)


def _turned(there: Array, turn: Turn) -> Array:
    """As ``turn.apply``, of a tensor on a GPU, which knows no negative steps."""
    turned = there.permute(turn.axes)
    reversed_axes = [axis for axis, is_flipped in enumerate(turn.flipped) if is_flipped]
    return place_of(turned).flip(turned, reversed_axes) if reversed_axes else turned


def value_oddities(volumes: Sequence[Volume], plans_manager: Any, configuration_manager: Any) -> tuple[str, ...]:
    """What readers disagree about, and for models of CTs what is unusual about a scan's values and spacing."""
    reader = reader_of_plans(plans_manager.plans)
    found = [f"{volume.doubt}; read as the model's {reader} reads it" for volume in volumes if volume.doubt]
    if CT_SCHEMES.intersection(configuration_manager.normalization_schemes):
        found += [odd for volume in volumes for odd in oddities(volume)]
    return tuple(dict.fromkeys(found))
