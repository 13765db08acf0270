"""What a prediction needs of an opened model, whether it is a trained one's folder or an exported one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nnunet_flare.errors import InputError
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.devices import Device
from nnunet_flare.inference.labels import Labels
from nnunet_flare.inference.normalisation import OF_FOREGROUND, intensities_read
from nnunet_flare.labels import channel_names, outputs_of


@dataclass(frozen=True)
class Execution:
    """How a network is executed for windows of one size.

    Attributes:
        backend: ``torch`` or ``openvino``.
        fall_back: whether PyTorch takes over a network that OpenVINO does not run.
        device: where PyTorch runs it.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        patch: window size (z, y, x).
        two_d: whether the network takes single slices.
    """

    backend: str
    fall_back: bool
    device: Device
    precision: str
    patch: Sequence[int]
    two_d: bool


class WindowBytes(NamedTuple):
    """Bytes on the CPU: what a network's next window takes and keeps for those that follow, and what it gives back."""

    kept: int
    passing: int


class Runtime(Protocol):
    """A network that is ready: a :data:`nnunet_flare.inference.windows.Forward` whose memory can be told."""

    def __call__(self, window: Array) -> Array:
        """A window to its scores."""
        ...

    def window_bytes(self, window: Sequence[int]) -> WindowBytes:
        """What the next window (1, C, z, y, x) takes beyond what the process holds, nothing computed for it.

        Raises:
            RuntimeError: when it cannot be told.
        """
        ...


class Opened(Protocol):
    """A model: plans, data set, and a network that can be made ready. ``str`` of it names it in messages."""

    @property
    def folder(self) -> Path:
        """The model's folder."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files whose content tells the model from every other."""
        ...

    @property
    def plans_manager(self) -> Any:
        """Axis orders, reader and intensities, under stock nnU-Net's names."""
        ...

    @property
    def configuration_manager(self) -> Any:
        """Spacing, patch, normalisation and resampling, under stock nnU-Net's names."""
        ...

    @property
    def dataset_json(self) -> dict[str, Any]:
        """Channels, labels and file ending."""
        ...

    @property
    def labels(self) -> Labels:
        """What the network's outputs stand for."""
        ...

    @property
    def channels(self) -> int:
        """Number of image channels."""
        ...

    @property
    def network_channels(self) -> int:
        """Number of the network's input channels: one more for each label of a cascade's first stage."""
        ...

    @property
    def mirroring_axes(self) -> tuple[int, ...] | None:
        """Axes that were mirrored in training."""
        ...

    def runtime(self, how: Execution) -> Runtime:
        """What executes the network.

        Raises:
            InputError: when the weights do not fit the network, or the backend cannot run it.
        """
        ...


def is_second_stage(model: Opened) -> bool:
    """Whether a model is the second stage of a cascade, which also sees the labels of the first one."""
    return model.configuration_manager.previous_stage_name is not None


def check_stands_alone(model: Opened) -> None:
    """Refuse the second stage of a cascade.

    Raises:
        InputError: naming it.
    """
    if is_second_stage(model):
        raise InputError(
            f"{model.folder}: is the second stage of a cascade, which sees the labels of the first one too; it cannot "
            "be used alone (flare-predict -m predicts with both stages)"
        )


def check_intensities(model: Opened) -> None:
    """Refuse plans whose intensities of the foreground are no numbers where a normalisation reads them.

    Stock's planner writes NaN where a training scan has such voxels; all that it normalises by them is NaN, too.

    Raises:
        InputError: naming the channel.
    """
    schemes = model.configuration_manager.normalization_schemes
    read = intensities_read(schemes, model.plans_manager.foreground_intensity_properties_per_channel)
    for channel, scheme in enumerate(schemes):
        bad = [key for key, value in read[str(channel)].items() if not math.isfinite(value)]
        if scheme in OF_FOREGROUND and bad:
            raise InputError(
                f"{model.folder}: plans.json: {', '.join(bad)} of channel {channel} are not finite, and {scheme} needs "
                "them; plan and train again without the training scans that have voxels which are no numbers"
            )


class OfDocuments:
    """What an :class:`Opened` model's documents say, whichever way it was opened."""

    configuration_manager: Any
    dataset_json: dict[str, Any]

    @cached_property
    def labels(self) -> Labels:
        """What the network's outputs stand for."""
        return Labels(self.dataset_json)

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return len(channel_names(self.dataset_json))

    @property
    def network_channels(self) -> int:
        """Number of the network's input channels; the second stage of a cascade also sees each label of the first."""
        is_second = self.configuration_manager.previous_stage_name is not None
        return self.channels + (len(self.labels.foreground) if is_second else 0)


def check_same_task(first: Opened, other: Opened) -> None:
    """Refuse members that do not share one preprocessing and one label set.

    Raises:
        InputError: naming both members and what differs.
    """
    for name, of in _SHARED.items():
        one, two = of(first), of(other)
        if one != two:
            raise InputError(f"{first} and {other} cannot be averaged: their {name} differ, {one} and {two}")


_SHARED = {
    "labels": lambda model: outputs_of(model.dataset_json),
    "channels": lambda model: channel_names(model.dataset_json),
    "spacings": lambda model: list(model.configuration_manager.spacing),
    "patch sizes": lambda model: list(model.configuration_manager.patch_size),
    "axis orders": lambda model: list(model.plans_manager.transpose_forward),
    "readers": lambda model: model.plans_manager.plans["image_reader_writer"],
    "normalisations": lambda model: (
        list(model.configuration_manager.normalization_schemes),
        list(map(bool, model.configuration_manager.use_mask_for_norm)),
        intensities_read(
            model.configuration_manager.normalization_schemes,
            model.plans_manager.foreground_intensity_properties_per_channel,
        ),
    ),
    "resamplings": lambda model: {
        key: model.configuration_manager.configuration[key]
        for stage in ("data", "probabilities")
        for key in (f"resampling_fn_{stage}", f"resampling_fn_{stage}_kwargs")
    },
}
