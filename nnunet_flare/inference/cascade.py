"""Cascades: the second stage sees the scan and, a channel per label, what the first stage says about it.

Both stages run in this process: the first one's label map goes from its scan's own grid to the second one's as stock
nnU-Net takes it there from the files of ``-prev_stage_predictions``, without a file in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import Volume
from nnunet_flare.inference.choices import DEFAULT_CHECKPOINT, Fold
from nnunet_flare.inference.core import Segmenter, stored_there
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.exported import AGAIN, FIRST_STAGE, MANIFEST, is_exported
from nnunet_flare.inference.forms import Receiver
from nnunet_flare.inference.label_resampling import resample_labels
from nnunet_flare.inference.opened import Opened
from nnunet_flare.inference.preprocessing import (
    OUTSIDE,
    STOCK_PREPROCESSOR,
    asks_for_mask,
    outside_nonzero,
    target_spacing,
)
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.scans import PreparedScan
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.spare import Views
from nnunet_flare.labels import channel_names


@dataclass(frozen=True, eq=False)
class CascadeScan:
    """A scan as both stages see it; the second one's labels are still missing.

    ``outside`` (z, y, x) is true where stock nnU-Net marks the background as outside of the image, in the axis order of
    the network, inside its crop; None where it marks nothing. ``volumes`` are the channels, where a normalisation looks
    at that mark too: there the second stage's image depends on the labels.
    """

    first: PreparedScan
    second: PreparedScan
    outside: np.ndarray | None
    volumes: tuple[Volume, ...] = ()

    @property
    def name(self) -> str:
        """The case."""
        return self.second.name

    @property
    def grid(self) -> Volume:
        """The scan's grid, without voxels."""
        return self.second.grid

    @property
    def oddities(self) -> tuple[str, ...]:
        """What is unusual about the scan."""
        return tuple(dict.fromkeys((*self.second.oddities, *self.first.oddities)))


class CascadeSegmenter:
    """Offers what :class:`Segmenter` offers for folders of scans: prepare, count windows, segment."""

    def __init__(self, first: Segmenter, second: Segmenter) -> None:
        """The stages of one cascade.

        Raises:
            InputError: when they take other channels, have other labels or read images otherwise.
        """
        one, other = first.models[0], second.models[0]
        for what, of in _SHARED.items():
            if of(one) != of(other):
                raise InputError(
                    f"{one.folder} is not a first stage for {other.folder}: their {what} differ, {of(one)} and "
                    f"{of(other)}"
                )
        if second.configuration_manager.preprocessor_name != STOCK_PREPROCESSOR:
            name = second.configuration_manager.preprocessor_name
            raise InputError(
                f"{other.folder}: is a cascade's second stage that preprocesses with {name}, expected "
                f"{STOCK_PREPROCESSOR}"
            )
        self.first, self.second = self.stages = first, second
        self.models, self.settings, self.profile = second.models, second.settings, second.profile
        self.reader, self.channels = second.reader, second.channels
        self.value_oddities = second.value_oddities

    @property
    def origin(self) -> list[Any]:
        """By which files and settings both stages segment."""
        return [stage.origin for stage in self.stages]

    def load(self) -> None:
        """Build the networks now and not at the first scan."""
        self.first.load()
        self.second.load()

    def prepare(
        self, volumes: Sequence[Volume], case: str = "image", there: Views | None = None, *, part: bool = False
    ) -> CascadeScan:
        """Check a scan's channels and bring them to both networks' grids; arguments as for :class:`Segmenter`.

        Raises:
            CaseError: when the scan cannot be predicted with these models.
        """
        there = there or stored_there(volumes, self.stages).part()
        first, second = (stage.prepare(volumes, case, there, part=part) for stage in self.stages)
        forward = list(self.second.plans_manager.transpose_forward)
        arrays = [second.turn.apply(volume.array).transpose(forward) for volume in volumes]
        outside = outside_nonzero(arrays, second.prepared.properties["bbox_used_for_cropping"])
        depends = outside is not None and asks_for_mask(self.second.configuration_manager)
        return CascadeScan(first, second, outside, tuple(volumes) if depends else ())

    def windows(self, scan: CascadeScan) -> int:
        """How many windows both stages take at most."""
        return self.first.windows(scan.first) + self.second.windows(scan.second)

    def segment(
        self,
        scan: CascadeScan,
        *,
        members: bool = False,
        progress: Callable[[int], None] | None = None,
        receivers: Sequence[Receiver] = (),
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """As :meth:`Segmenter.segment`, of the second stage; the first one's members are averaged."""
        with self.profile.stage("first stage"):
            labels, _ = self.first.segment(scan.first, progress=progress)
        self.first.release()  # the second network needs as much
        with self.profile.stage("labels to channels"):
            second = self.with_labels(scan, labels)
        return self.second.segment(second, members=members, progress=progress, receivers=receivers)

    def with_labels(self, cascade: CascadeScan, labels: np.ndarray) -> PreparedScan:
        """The second stage's scan with a channel (0 or 1) per foreground label of a label map (Z, Y, X) on its grid."""
        scan = cascade.second
        plans, configuration = self.second.plans_manager, self.second.configuration_manager
        properties = scan.prepared.properties
        forward = list(plans.transpose_forward)
        turned = scan.turn.apply(labels).transpose(forward)
        box = tuple(slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"])
        inside = turned[box].astype(np.int16)
        if cascade.outside is not None:  # a label of its own to stock's resampling, which changes edges beside it
            if cascade.volumes and inside[cascade.outside].any():  # stock's mask does not hold what has a label
                scan = self.second.prepare(cascade.volumes, scan.name, labels=labels, part=True)
            inside[cascade.outside & (inside == 0)] = OUTSIDE
        data = scan.prepared.at(CPU)
        spacing = [float(properties["spacing"][axis]) for axis in forward]
        wanted = target_spacing(spacing, configuration.spacing)
        seen = resample_labels(inside, data.shape[1:], spacing, wanted, configuration)
        if seen.shape != data.shape[1:]:
            raise CaseError(scan.name, f"labels of shape {seen.shape} do not fit the image's {data.shape[1:]}")
        foreground = self.second.labels.foreground
        with_channels = np.empty((len(data) + len(foreground), *data.shape[1:]), np.float32)
        with_channels[: len(data)] = data
        for channel, label in enumerate(foreground, start=len(data)):
            np.equal(seen, label, out=with_channels[channel], casting="unsafe")
        return replace(scan, prepared=replace(scan.prepared, data=with_channels))


def open_any(
    folder: Path,
    settings: PredictionSettings,
    *,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    profile: Profile | None = None,
    previous: Path | None = None,
) -> Segmenter | CascadeSegmenter:
    """A trained model, with its first stage where it is a cascade's second one.

    Args:
        folder: the model's.
        settings: of both stages.
        folds: to average, of the model; of the first stage all that are there.
        checkpoint: file name.
        profile: gets the time of every stage.
        previous: the first stage's folder; without it that trained beside the model (same trainer and plans).

    Raises:
        InputError: when something is missing, damaged or unknown.
    """
    segmenter = Segmenter.from_model_folder(
        folder, settings, folds=folds, checkpoint=checkpoint, profile=profile, second_stage=True
    )
    stage = segmenter.configuration_manager.previous_stage_name
    if stage is None:
        if previous is not None:
            raise InputError(
                f"--prev_stage {previous}: {folder} is not the second stage of a cascade; leave out --prev_stage"
            )
        return segmenter
    before = previous or (exported_first_stage(folder) if is_exported(folder) else first_stage_folder(folder, stage))
    first = Segmenter.from_model_folder(
        before, settings, checkpoint=checkpoint, profile=segmenter.profile.part("first stage ")
    )
    return CascadeSegmenter(first, segmenter)


def exported_first_stage(folder: Path) -> Path:
    """The folder of the first stage in an exported cascade.

    Raises:
        InputError: when it is not there.
    """
    inside = folder / FIRST_STAGE
    if is_exported(inside):
        return inside
    raise InputError(
        f"{folder}: holds the second stage of a cascade, but not the first ({FIRST_STAGE}/{MANIFEST}); {AGAIN}"
    )


def first_stage_folder(folder: Path, stage: str) -> Path:
    """The folder of a cascade's first stage, trained beside the second one.

    Raises:
        InputError: when it is not there.
    """
    real = folder.resolve()
    stem, _, configuration = real.name.rpartition("__")
    beside = real.with_name(f"{stem}__{stage}")
    if (beside / "plans.json").is_file():
        return beside
    raise InputError(
        f"{folder}: {configuration} is the second stage of a cascade and needs the first, {beside.name}, next to "
        "it; put it there, or give its folder with --prev_stage"
    )


def _labels(model: Opened) -> object:
    return model.dataset_json["labels"]


def _channels(model: Opened) -> object:
    return channel_names(model.dataset_json)


def _reader(model: Opened) -> object:
    return model.plans_manager.plans["image_reader_writer"]


_SHARED: dict[str, Callable[[Opened], object]] = {"labels": _labels, "channels": _channels, "readers": _reader}
