"""The prediction itself: one or several trained models applied to a scan.

Free of stock nnU-Net's predictor, whose import costs more than a small scan's prediction; ``predictor.FlarePredictor``
offers the same under stock's interface.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import Volume, check_values, oddities
from nnunet_flare.inference.augment import HALF_TURN, Flips, all_flips, average_with, central_crop, flipped
from nnunet_flare.inference.export import SliceExporter
from nnunet_flare.inference.memory import GIGABYTE, Need, need, process_bytes, sums_fit_on_gpu
from nnunet_flare.inference.model import (
    DEFAULT_CHECKPOINT,
    Fold,
    Member,
    Model,
    check_same_task,
    find_folds,
    open_model,
)
from nnunet_flare.inference.orientation import Orientation, orientation_for
from nnunet_flare.inference.preprocessing import Prepared, check_channels, preprocess
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.runtimes import (
    TorchRuntime,
    averaged,
    choose_backend,
    choose_precision,
    stacked,
)
from nnunet_flare.inference.settings import Settings, open_device
from nnunet_flare.inference.skipping import BODY_HU, Huang, slide_growing
from nnunet_flare.inference.windows import Consume, Forward, count_windows, slide

log = logging.getLogger(__name__)

CT_SCHEMES = frozenset({"CTNormalization", "FlareClip500Normalization", "FlareClip325Normalization"})
"""Normalisations of models that were trained on CT numbers."""


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan on the network's grid, and the way back: its orientation and the grid it came from (without voxels).

    ``oddities`` says in words what is unusual about it.
    """

    prepared: Prepared
    orientation: Orientation
    grid: Volume
    oddities: tuple[str, ...] = ()
    name: str = "image"


@dataclass(frozen=True, eq=False)
class MembersPrediction:
    """Each member's label map (z, y, x), uint8, and the mean of their softmax (K, z, y, x), on the network's grid."""

    labels: list[np.ndarray]
    mean_softmax: torch.Tensor


class Segmenter:
    """Applies the members of an ensemble to scans. Members share preprocessing and labels; networks are kept ready."""

    def __init__(self, models: Sequence[Model], settings: Settings, profile: Profile | None = None) -> None:
        if not models:
            raise InputError("no model was given")
        for other in models[1:]:
            check_same_task(models[0], other)
        self.models = list(models)
        self.settings = settings
        self.profile = profile or Profile()
        self.device = open_device(settings.device)
        self.precision = choose_precision(settings.precision, self.device)
        self.backend = choose_backend(settings.backend, self.device)
        self.plans_manager = models[0].plans_manager
        self.configuration_manager = models[0].configuration_manager
        self.label_manager = models[0].label_manager
        patch = tuple(int(p) for p in self.configuration_manager.patch_size)
        self._two_d = len(patch) == 2
        if settings.windows == "huang" and (self._two_d or self.label_manager.has_regions):
            raise InputError("--windows huang is made for 3-D models with exclusive labels; use all or skip-empty")
        self.patch = (1, *patch) if self._two_d else patch
        self._forwards: list[Forward] = []

    @classmethod
    def from_model_folder(
        cls,
        folder: Path,
        settings: Settings,
        *,
        folds: Sequence[Fold] | None = None,
        checkpoint: str = DEFAULT_CHECKPOINT,
        profile: Profile | None = None,
    ) -> Segmenter:
        """The folds of one trained model. Without ``folds`` all numbered ones found, else ``all``.

        Raises:
            InputError: when something is missing, damaged or unknown.
        """
        members = [Member(Path(folder), fold, checkpoint) for fold in find_folds(Path(folder), folds, checkpoint)]
        return cls.from_members(members, settings, profile=profile)

    @classmethod
    def from_members(
        cls, members: Sequence[Member], settings: Settings, *, profile: Profile | None = None
    ) -> Segmenter:
        """Any members that share preprocessing and labels.

        Raises:
            InputError: when something is missing, damaged or unknown, or two members do not fit together.
        """
        models = [open_model(member, trust_checkpoint=settings.trust_checkpoint) for member in members]
        return cls(models, settings, profile)

    @property
    def channels(self) -> int:
        """Number of image channels that the model wants."""
        return self.models[0].channels

    @property
    def heads(self) -> int:
        """Number of classes or regions."""
        return int(self.label_manager.num_segmentation_heads)

    def load(self) -> None:
        """Build the networks now and not at the first scan."""
        if self._forwards:
            return
        if self.settings.tta == "mirror" and not any(model.mirroring_axes for model in self.models):
            log.warning("trained without mirroring, so that --tta mirror changes nothing")
        self._forwards = [flipped(self._runtime(model), self._flips(model)) for model in self.models]

    def prepare(self, volumes: Sequence[Volume], case: str = "image") -> Scan:
        """Check a scan's channels and bring them to the network's grid.

        Raises:
            CaseError: when the scan cannot be predicted with this model.
        """
        if len(volumes) != self.channels:
            raise CaseError(case, f"has {len(volumes)} channels, the model was trained on {self.channels}")
        for volume in volumes:
            check_values(volume, case)
        check_channels(list(volumes), case)
        orientation = orientation_for(self.plans_manager.plans["image_reader_writer"], volumes[0])
        try:
            prepared = preprocess(
                [orientation.apply(volume.array) for volume in volumes],
                orientation.spacing(volumes[0].spacing_mm),
                self.plans_manager,
                self.configuration_manager,
            )
        except ValueError as error:
            raise CaseError(case, str(error)) from error
        nothing = np.broadcast_to(np.uint8(0), volumes[0].array.shape)
        grid = volumes[0].with_array(nothing)
        return Scan(prepared, orientation, grid, self._oddities(volumes, prepared.data.shape[1:]), case)

    def windows(self, scan: Scan) -> int:
        """How many windows :meth:`segment` runs the network on at most."""
        shape = scan.prepared.data.shape[1:]
        shapes = [shape]
        if self.settings.tta == "crop-rotate":
            shapes.append(tuple(part.stop - part.start for part in central_crop(shape)))
        return sum(count_windows(shape, self.patch, self.settings.step_size) for shape in shapes)

    def segment(
        self, scan: Scan, *, members: bool = False, progress: Callable[[int], None] | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The label map (Z, Y, X), uint8, on the scan's own grid, of the members' averaged logits.

        Args:
            scan: as :meth:`prepare` made it.
            members: whether to make the label map of every member too.
            progress: told the number of windows done since its last call.

        Returns:
            The label map, and those of the members (none without ``members``).
        """
        self.load()
        if members and self.settings.windows != "all":
            raise InputError(f"--save_members needs --windows all, not {self.settings.windows}")
        count = len(self._forwards) if members and len(self._forwards) > 1 else 1
        maps = count + (count > 1)
        wanted = self._need(scan, count * self.heads, maps, whole_volume=self.settings.windows == "skip-empty")
        policy = self._policy(scan, wanted, count * self.heads, maps)
        device = self._sums_device(wanted)
        try:
            labels = self._segment(scan, count, maps, policy=policy, device=device, progress=progress)
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
            log.warning("%s: out of GPU memory; once more with the sums on the CPU", scan.name)
            torch.cuda.empty_cache()
            cpu = torch.device("cpu")
            labels = self._segment(scan, count, maps, policy=policy, device=cpu, progress=progress)
        return labels[0], labels if members and count == 1 else labels[1:]

    def _segment(
        self,
        scan: Scan,
        count: int,
        maps: int,
        *,
        policy: str,
        device: torch.device,
        progress: Callable[[int], None] | None,
    ) -> list[np.ndarray]:
        exporters = [self._exporter(scan) for _ in range(maps)]

        def consume(block: torch.Tensor) -> None:
            with self.profile.stage("export"):
                if count == 1:
                    exporters[0].consume(block)
                    return
                each = block.unflatten(0, (count, self.heads))
                exporters[0].consume(each.mean(0))
                for exporter, scores in zip(exporters[1:], each, strict=True):
                    exporter.consume(scores)

        forward = averaged(self._forwards) if count == 1 else stacked(self._forwards)
        data = scan.prepared.data
        self._slide(data, forward, consume, members=count, progress=progress, policy=policy, device=device)
        return [np.ascontiguousarray(scan.orientation.revert(exporter.finish())) for exporter in exporters]

    def logits(self, data: np.ndarray) -> torch.Tensor:
        """The members' averaged logits (K, z, y, x), float32, of a preprocessed scan (C, z, y, x)."""
        self.load()
        return self._collect(data, averaged(self._forwards))

    def network_labels(self, scan: Scan, *, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """The label map (z, y, x), uint8, of the members' averaged logits on the network's grid, all windows visited.

        Raises:
            CaseError: when that would need more memory than allowed.
        """
        self.load()
        wanted = self._need(scan, self.heads, 1, whole_volume=False)
        self._policy(scan, wanted, self.heads, 1)
        labels = np.empty(scan.prepared.data.shape[1:], np.uint8)
        done = 0

        def consume(block: torch.Tensor) -> None:
            nonlocal done
            decided = self.label_manager.convert_logits_to_segmentation(block.float().cpu())
            labels[done : done + block.shape[1]] = np.asarray(decided)
            done += block.shape[1]

        self._slide(
            scan.prepared.data,
            averaged(self._forwards),
            consume,
            progress=progress,
            policy="all",
            device=self._sums_device(wanted),
        )
        return labels

    def predict_members(self, data: np.ndarray) -> MembersPrediction:
        """Every member's label map and the mean of their softmax (sigmoid for regions), in one call.

        Args:
            data: a preprocessed scan (C, z, y, x), float32.
        """
        self.load()
        mean = torch.zeros((self.heads, *data.shape[1:]), dtype=torch.float32)
        labels = []
        for forward in self._forwards:
            mine = np.zeros(data.shape[1:], np.uint8)
            done = 0

            def consume(block: torch.Tensor, mine: np.ndarray = mine) -> None:
                nonlocal done
                last = done + block.shape[1]
                probabilities = self.label_manager.apply_inference_nonlin(block)
                decided = self.label_manager.convert_probabilities_to_segmentation(probabilities.cpu())
                mine[done:last] = np.asarray(decided)
                mean[:, done:last] += probabilities.cpu()
                done = last

            self._slide(data, forward, consume)
            labels.append(mine)
        return MembersPrediction(labels, mean.div_(len(self._forwards)))

    def _collect(self, data: np.ndarray, forward: Forward) -> torch.Tensor:
        blocks: list[torch.Tensor] = []
        self._slide(data, forward, lambda block: blocks.append(block.cpu().clone()))
        return torch.cat(blocks, dim=1)

    def _exporter(self, scan: Scan) -> SliceExporter:
        return SliceExporter(
            scan.prepared.data.shape[1:],
            scan.prepared.properties,
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
        )

    def value_oddities(self, volumes: Sequence[Volume]) -> tuple[str, ...]:
        """What is unusual about a scan's values and spacing, for models of CTs."""
        is_ct = CT_SCHEMES.intersection(self.configuration_manager.normalization_schemes)
        return tuple(dict.fromkeys(odd for volume in volumes for odd in oddities(volume))) if is_ct else ()

    def _oddities(self, volumes: Sequence[Volume], shape: Sequence[int]) -> tuple[str, ...]:
        found = list(self.value_oddities(volumes))
        if any(n < p for n, p in zip(shape, self.patch, strict=True)):
            found.append(
                f"shape {tuple(shape)} on the network's grid, smaller than its patch {self.patch}; padded with zeros"
            )
        return tuple(found)

    def _slide(
        self,
        data: np.ndarray,
        forward: Forward,
        consume: Consume,
        *,
        members: int = 1,
        progress: Callable[[int], None] | None = None,
        policy: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Hand the scores of a preprocessed scan to ``consume``; with ``crop-rotate``, averaged with the crop's."""
        run = partial(
            self._pass,
            forward=forward,
            members=members,
            progress=progress,
            policy=policy or self.settings.windows,
            device=device or self.device,
        )
        if self.settings.tta == "crop-rotate":
            box = central_crop(data.shape[1:])
            blocks: list[torch.Tensor] = []
            middle = (slice(None), *box)
            run(data[middle], lambda block: blocks.append(block.clone()))
            consume = average_with(torch.cat(blocks, dim=1), box, consume)
        run(data, consume)

    def _pass(
        self,
        data: np.ndarray,
        consume: Consume,
        *,
        forward: Forward,
        members: int,
        progress: Callable[[int], None] | None,
        policy: str,
        device: torch.device,
    ) -> None:
        def timed(window: torch.Tensor) -> torch.Tensor:
            with self.profile.stage("network"):
                return forward(window)

        tensor = torch.from_numpy(np.ascontiguousarray(data, np.float32))
        common: dict[str, Any] = {
            "heads": members * self.heads,
            "patch": self.patch,
            "step_size": self.settings.step_size,
            "device": device,
            "gaussian": self.settings.gaussian,
            "progress": progress,
        }
        with torch.inference_mode():
            if policy == "all":
                slide(tensor, timed, consume, **common)
            elif policy == "huang":
                shape = [max(n, p) for n, p in zip(data.shape[1:], self.patch, strict=True)]
                visit = Huang(shape, self.patch)
                slide(tensor, lambda window: timed(window).float().softmax(0), consume, visit=visit, **common)
            else:
                slide_growing(
                    tensor, timed, consume, foreground=self._foreground, body_above=self._body_above(), **common
                )

    def _need(self, scan: Scan, heads: int, maps: int, *, whole_volume: bool) -> Need:
        return need(
            scan.prepared.data.shape[1:],
            scan.grid.array.shape,
            self.patch,
            heads=heads,
            maps=maps,
            whole_volume=whole_volume,
        )

    def _policy(self, scan: Scan, wanted: Need, heads: int, maps: int) -> str:
        """The window policy that keeps to the memory limit.

        Raises:
            CaseError: when none does.
        """
        limit = self.settings.max_memory_gb
        policy = self.settings.windows
        if limit is None:
            return policy
        held = process_bytes()
        if policy == "skip-empty" and held + wanted.total > limit * GIGABYTE:
            log.warning("--windows skip-empty would need more than %.3g GB; all windows are visited instead", limit)
            policy = "all"
            wanted = self._need(scan, heads, maps, whole_volume=False)
        if held + wanted.total > limit * GIGABYTE:
            raise CaseError(
                scan.name,
                f"needs about {(held + wanted.total) / GIGABYTE:.2f} GB, --max_memory allows {limit:g} GB; "
                f"{held / GIGABYTE:.2f} GB of it are the program and the model",
            )
        return policy

    def _sums_device(self, wanted: Need) -> torch.device:
        """Where the sums lie: on the GPU when they leave room for the network there, else on the CPU."""
        if self.device.type != "cuda":
            return self.device
        free, total = torch.cuda.mem_get_info(self.device)
        limit = self.settings.gpu_memory_gb
        budget = free if limit is None else min(free, int(limit * GIGABYTE))
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIGABYTE / total), self.device)
        if sums_fit_on_gpu(wanted.sums, budget):
            return self.device
        log.info("sums of %.2f GB go to the CPU", wanted.sums / GIGABYTE)
        return torch.device("cpu")

    def _foreground(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores > 0).any(0) if self.label_manager.has_regions else scores.argmax(0) > 0

    def _body_above(self) -> float | None:
        """The body threshold on the network's scale, or None where values are no CT numbers."""
        if self.configuration_manager.normalization_schemes[0] != "CTNormalization":
            return None
        values = self.plans_manager.foreground_intensity_properties_per_channel["0"]
        threshold = max(BODY_HU, float(values["percentile_00_5"]))
        return (threshold - float(values["mean"])) / max(float(values["std"]), 1e-8)

    def _runtime(self, model: Model) -> Forward:
        network = model.network()
        if self.backend == "openvino":
            from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

            try:
                return OpenVinoRuntime(model, network, patch=self.patch, precision=self.precision, two_d=self._two_d)
            except RuntimeError as error:
                if self.settings.backend == "openvino":
                    raise InputError(f"{model.member}: OpenVINO does not run this network ({error})") from error
                log.warning("OpenVINO does not run this network (%s); PyTorch does", str(error).splitlines()[0])
        return TorchRuntime(network, device=self.device, precision=self.precision, two_d=self._two_d)

    def _flips(self, model: Model) -> Flips:
        if self.settings.tta == "mirror":
            return all_flips([axis + self._two_d for axis in model.mirroring_axes or ()])
        return HALF_TURN if self.settings.tta == "crop-rotate" else all_flips(())
