"""The prediction itself: one or several trained models applied to a scan.

Free of stock nnU-Net's predictor, whose import costs more than a small scan's prediction; ``predictor.FlarePredictor``
offers the same under stock's interface.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume
from nnunet_flare.images.readers import reader_of_plans
from nnunet_flare.inference.arrays import Array, fetched, to_host
from nnunet_flare.inference.attempts import Way
from nnunet_flare.inference.choices import DEFAULT_CHECKPOINT, Fold
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.export import SliceExporter
from nnunet_flare.inference.exported import Exported, is_exported, refuse_without_manifest
from nnunet_flare.inference.fitting import Fitting
from nnunet_flare.inference.forms import Receiver
from nnunet_flare.inference.labels import Labels
from nnunet_flare.inference.made_with import origin_of
from nnunet_flare.inference.members import Member, find_folds
from nnunet_flare.inference.memory import (
    FLOAT_BYTES,
    unless_memory_is_short,
    volume_device,
)
from nnunet_flare.inference.networks import Networks
from nnunet_flare.inference.opened import Opened, check_same_task, check_stands_alone
from nnunet_flare.inference.opening import open_members
from nnunet_flare.inference.places import place_at, place_of
from nnunet_flare.inference.preprocessing import prepares_stored
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.runtimes import averaged, stacked
from nnunet_flare.inference.scans import PreparedScan, prepare_scan, value_oddities
from nnunet_flare.inference.scores import ScoreExporter
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.sliding import Slider
from nnunet_flare.inference.spare import Spare, Views
from nnunet_flare.inference.windows import Forward

log = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Told the number of windows done since its last call."""

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class MembersPrediction:
    """Each member's label map (z, y, x), uint8, and the mean of their softmax (K, z, y, x), on the network's grid.

    The mean is a tensor on the GPU where it was made there.
    """

    labels: list[np.ndarray]
    mean_softmax: Array


class Segmenter:
    """Applies the members of an ensemble to scans. Members share preprocessing and labels; networks are kept ready."""

    def __init__(self, models: Sequence[Opened], settings: PredictionSettings, profile: Profile | None = None) -> None:
        if not models:
            raise InputError("no model was given")
        for other in models[1:]:
            check_same_task(models[0], other)
        self.models = list(models)
        self.settings = settings
        self.profile = profile or Profile()
        self.plans_manager = models[0].plans_manager
        self.configuration_manager = models[0].configuration_manager
        self._slider = Slider(models[0], settings, self.profile)
        self._networks = Networks(self.models, settings, self.profile, patch=self.patch, two_d=self._slider.two_d)
        self.fitting = Fitting(self._networks, self._slider, settings)

    @classmethod
    def from_model_folder(
        cls,
        folder: Path,
        settings: PredictionSettings,
        *,
        folds: Sequence[Fold] | None = None,
        checkpoint: str = DEFAULT_CHECKPOINT,
        profile: Profile | None = None,
        second_stage: bool = False,
    ) -> Segmenter:
        """The folds of one model, trained or exported. Without ``folds`` all numbered ones found, else ``all``.

        ``second_stage`` opens that of a cascade too, of whose scans the first stage's labels are channels.

        Raises:
            InputError: when something is missing, damaged or unknown.
        """
        if is_exported(folder):
            if folds or checkpoint != DEFAULT_CHECKPOINT or settings.trust_checkpoint:
                raise InputError(
                    f"{folder}: is an exported model, which always uses all its folds; -f, -chk and "
                    "--trust-checkpoint are for a trained model's folder"
                )
            return cls.from_exported(Exported.read(folder), settings, profile=profile, second_stage=second_stage)
        refuse_without_manifest(folder)
        members = [Member(Path(folder), fold, checkpoint) for fold in find_folds(Path(folder), folds, checkpoint)]
        return cls.from_members(members, settings, profile=profile, second_stage=second_stage)

    @classmethod
    def from_exported(
        cls,
        exported: Exported,
        settings: PredictionSettings,
        *,
        profile: Profile | None = None,
        second_stage: bool = False,
    ) -> Segmenter:
        """A model that ``flare-export`` wrote, whose files are checked first.

        Raises:
            InputError: when something is missing or damaged, or the settings ask for what it does not have.
        """
        exported.check()
        models = exported.models()
        if not second_stage:
            check_stands_alone(models[0])
        return cls(models, exported.settings(settings), profile)

    @classmethod
    def from_members(
        cls,
        members: Sequence[Member],
        settings: PredictionSettings,
        *,
        profile: Profile | None = None,
        second_stage: bool = False,
    ) -> Segmenter:
        """Any members that share preprocessing and labels.

        Raises:
            InputError: when something is missing, damaged or unknown, or two members do not fit together.
        """
        return cls(open_members(members, settings, second_stage=second_stage), settings, profile)

    @property
    def stages(self) -> tuple[Segmenter, ...]:
        """The models that see a scan one after the other: this one."""
        return (self,)

    @cached_property
    def origin(self) -> list[Any]:
        """By which files and settings it segments, as they were first asked for: files may be replaced meanwhile.

        See :mod:`nnunet_flare.inference.made_with`.
        """
        return origin_of(self.models, self.settings)

    @property
    def labels(self) -> Labels:
        """What the network's outputs stand for."""
        return self.models[0].labels

    @property
    def label_manager(self) -> Any:
        """Stock nnU-Net's label manager, of a trained model's folder."""
        return self.plans_manager.get_label_manager(self.models[0].dataset_json)

    @property
    def channels(self) -> int:
        """Number of image channels that the model wants."""
        return self.models[0].channels

    @property
    def reader(self) -> str:
        """The reader of images that the plans name."""
        return reader_of_plans(self.plans_manager.plans)

    @property
    def heads(self) -> int:
        """Number of classes or regions."""
        return self._slider.heads

    @property
    def patch(self) -> tuple[int, ...]:
        """Window size (z, y, x); one slice for 2-D models."""
        return self._slider.patch

    def load(self) -> None:
        """Build the networks now and not at the first scan; on a GPU each is tried on a window, too."""
        self._networks.load()
        self._networks.warm_up((self._slider.batch * self.patch[0], *self.patch[1:]))

    def release(self) -> None:
        """Give back what the networks' windows took on the CPU; they stay ready, and the next window takes it again."""
        self._networks.release()

    @property
    def _forwards(self) -> list[Forward]:
        """The members' networks on the chosen device, in the chosen precision."""
        return self._networks.forwards(self._networks.device, self._networks.precision)

    def prepare(
        self,
        volumes: Sequence[Volume],
        case: str = "image",
        there: Views | None = None,
        labels: np.ndarray | None = None,
        *,
        part: bool = False,
    ) -> PreparedScan:
        """Check a scan's channels and bring them to the network's grid.

        Args:
            volumes: one per channel.
            case: its name, for messages.
            there: their arrays on the GPU, where they lie there already.
            labels: what a cascade's first stage says (Z, Y, X); it counts as image for masked normalisations.
            part: the volumes are a part of a scan, which may have one value only.

        Raises:
            CaseError: when the scan cannot be predicted with this model.
        """
        return prepare_scan(
            volumes,
            case,
            channels=self.channels,
            patch=self.patch,
            plans_manager=self.plans_manager,
            configuration_manager=self.configuration_manager,
            profile=self.profile,
            device_for=self.fitting.device_for,
            there=there,
            labels=labels,
            part=part,
        )

    def value_oddities(self, volumes: Sequence[Volume]) -> tuple[str, ...]:
        """What is unusual about a scan's values and spacing, for models of CTs."""
        return value_oddities(volumes, self.plans_manager, self.configuration_manager)

    def windows(self, scan: PreparedScan) -> int:
        """How many windows :meth:`segment` runs the network on at most."""
        return self._slider.windows(scan.shape)

    def segment(
        self,
        scan: PreparedScan,
        *,
        members: bool = False,
        progress: Progress | None = None,
        receivers: Sequence[Receiver] = (),
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The label map (Z, Y, X), uint8, on the scan's own grid, of the members' averaged logits.

        Args:
            scan: as :meth:`prepare` made it.
            members: whether to make the label map of every member too.
            progress: told the number of windows done since its last call.
            receivers: get the scores on the image's grid, slice by slice.

        Returns:
            The label map, and those of the members (none without ``members``).

        Raises:
            CaseError: when that would need more memory than allowed.
        """
        if members and self.settings.windows != "all":
            raise InputError(f"--save_members needs --windows all, not {self.settings.windows}")
        if receivers and self.settings.windows != "all":
            raise InputError(f"scores need --windows all; {self.settings.windows} leaves windows out")
        apart = members or any(receiver.apart for receiver in receivers)
        count = len(self.models) if apart and len(self.models) > 1 else 1
        maps = count + 1 if members and count > 1 else 1

        def work(forwards: list[Forward], way: Way, policy: str) -> list[np.ndarray]:
            exporters = [self._exporter(scan) for _ in range(maps)]
            scores = ScoreExporter.of(scan, self.models[0], receivers, members=count) if receivers else None

            def consume(block: Array, rows: slice | None = None) -> None:
                with self.profile.stage("export"):
                    if scores is not None:
                        scores.consume(block)
                    if count == 1:
                        exporters[0].consume(block, rows)
                        return
                    each = block.reshape((count, self.heads, *block.shape[1:]))
                    exporters[0].consume(each.mean(0), rows)
                    for exporter, one in zip(exporters[1:], each, strict=False):  # none without ``members``
                        exporter.consume(one, rows)

            self._slider.run(
                scan.prepared.at(way.volume),
                averaged(forwards) if count == 1 else stacked(forwards),
                consume,
                device=way.sums,
                network=way.device,
                members=count,
                policy=policy,
                progress=progress,
                by_rows=not receivers,
            )
            return [np.ascontiguousarray(scan.turn.undo(exporter.finish())) for exporter in exporters]

        policies = ("skip-empty", "all") if self.settings.windows == "skip-empty" else (self.settings.windows,)
        by_rows = not receivers
        labels = self.fitting.within_limits(
            scan, policies, count * self.heads, maps + len(receivers), work, by_rows=by_rows
        )
        return labels[0], labels if members and count == 1 else labels[1:]

    def network_labels(self, scan: PreparedScan, *, progress: Progress | None = None) -> np.ndarray:
        """The label map (z, y, x), uint8, of the members' averaged logits on the network's grid, all windows visited.

        Raises:
            CaseError: when that would need more memory than allowed.
        """

        def work(forwards: list[Forward], way: Way, policy: str) -> np.ndarray:
            labels = place_at(way.sums).labels(scan.shape)
            done = 0

            def consume(block: Array) -> None:
                nonlocal done
                labels[done : done + block.shape[1]] = self.labels.decided(block)
                done += block.shape[1]

            self._slider.run(
                scan.prepared.at(way.volume),
                averaged(forwards),
                consume,
                device=way.sums,
                network=way.device,
                policy=policy,
                progress=progress,
            )
            return fetched(labels)

        return self.fitting.within_limits(scan, ("all",), self.heads, 1, work)

    def logits(self, data: Array) -> np.ndarray:
        """The members' averaged logits (K, z, y, x), float32, of a preprocessed scan (C, z, y, x)."""

        def work(forwards: list[Forward], way: Way) -> np.ndarray:
            blocks: list[np.ndarray] = []
            self._slider.run(
                place_at(way.volume).packed(data),
                averaged(forwards),
                lambda block: blocks.append(to_host(block).copy()),
                device=way.sums,
                network=way.device,
            )
            return np.concatenate(blocks, axis=1)

        return self.fitting.on_best_device(data, work)

    def predict_members(self, data: Array, *, only: Sequence[int] | None = None) -> MembersPrediction:
        """Every member's label map and the mean of their softmax (sigmoid for regions), in one call.

        The mean is made, and left, on the GPU where it has room for it.

        Args:
            data: a preprocessed scan (C, z, y, x), float32.
            only: the label ids that the members were trained for; see :meth:`Labels.without`.
        """
        shape = (self.heads, *data.shape[1:])

        def work(forwards: list[Forward], way: Way) -> MembersPrediction:
            volume, kept = place_at(way.volume).packed(data), way.sums
            if kept.type != "cpu":
                beside = self.fitting.need(shape[1:], shape[1:], self.heads, 1, self.settings.windows).scores
                kept = volume_device(kept, self.settings.gpu_memory_gb, FLOAT_BYTES * math.prod(shape), beside)
            mean = place_at(kept).zeros(shape)
            labels = [self._add_member(volume, forward, way, mean, only) for forward in forwards]
            mean /= len(forwards)
            return MembersPrediction(labels, mean)

        return self.fitting.on_best_device(data, work)

    def _add_member(
        self, data: Array, forward: Forward, way: Way, mean: Array, only: Sequence[int] | None
    ) -> np.ndarray:
        """A member's label map; its probabilities, of ``only`` some label ids, are added to ``mean``."""
        labels, kept = place_at(way.sums).labels(data.shape[1:]), place_of(mean)
        done = 0

        def consume(block: Array) -> None:
            nonlocal done
            last = done + block.shape[1]
            probabilities = self.labels.probabilities(block)
            if only is not None:
                self.labels.without(probabilities, only)
            labels[done:last] = self.labels.decided(probabilities, probabilities=True)
            mean[:, done:last] += kept.take(probabilities)
            done = last

        self._slider.run(data, forward, consume, device=way.sums, network=way.device)
        return fetched(labels)

    def _exporter(self, scan: PreparedScan) -> SliceExporter:
        return SliceExporter(
            scan.shape, scan.prepared.properties, self.plans_manager, self.configuration_manager, self.labels
        )


def stored_there(volumes: Sequence[Volume], segmenters: Sequence[Segmenter]) -> Spare:
    """A scan's channels on the GPU, once for several models; none where they have no room or would save nothing."""
    needed = sum(max(volume.array.nbytes, FLOAT_BYTES * volume.array.size) for volume in volumes)
    saves = all(prepares_stored(segmenter.configuration_manager) for segmenter in segmenters)
    device = segmenters[-1].fitting.device_for(needed) if saves else CPU
    if device.type == "cpu":
        return Spare()
    from nnunet_flare.inference.torch_arrays import upload

    return Spare(unless_memory_is_short(device, lambda: [upload(volume.array, device) for volume in volumes]))
