"""One pass of a network over a preprocessed scan, as the settings say: window policy, second look, profile."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.attempts import Watch
from nnunet_flare.inference.augment import average_with, central_crop, filling
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.opened import Opened
from nnunet_flare.inference.places import is_on_gpu, place_at, place_of
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.skipping import BODY_HU, Huang, slide_growing
from nnunet_flare.inference.windows import Consume, Forward, count_windows, slide

BATCH_VOXELS = 2**21
"""Of the slices that a 2-D network on a GPU gets at a time: 8 of 512 x 512."""


class Slider:
    """Runs networks of one preprocessing and label set over scans, and hands their scores on slice by slice."""

    def __init__(self, model: Opened, settings: PredictionSettings, profile: Profile) -> None:
        """``model`` is any of the members.

        Raises:
            InputError: for a window policy that was not made for this kind of model.
        """
        self._plans, self._configuration = model.plans_manager, model.configuration_manager
        self._labels = model.labels
        self._settings, self._profile = settings, profile
        patch = tuple(int(p) for p in model.configuration_manager.patch_size)
        self.two_d = len(patch) == 2
        self.patch = (1, *patch) if self.two_d else patch
        self.batch = max(1, BATCH_VOXELS // math.prod(patch)) if self.two_d else 1
        if settings.windows == "huang" and (self.two_d or self._labels.has_regions):
            raise InputError("--windows huang is only for 3-D models with exclusive labels; use all or skip-empty")

    @property
    def heads(self) -> int:
        """Number of classes or regions."""
        return self._labels.heads

    def windows(self, shape: tuple[int, ...]) -> int:
        """How many windows a pass over a scan of this shape (z, y, x) takes at most."""
        shapes = [shape]
        if self._settings.tta == "crop-rotate":
            shapes.append(tuple(part.stop - part.start for part in central_crop(shape)))
        return sum(count_windows(one, self.patch, self._settings.step_size) for one in shapes)

    def run(
        self,
        data: Array,
        forward: Forward,
        consume: Consume,
        *,
        device: Any,
        network: Any = CPU,
        members: int = 1,
        policy: str | None = None,
        progress: Callable[[int], None] | None = None,
        by_rows: bool = False,
    ) -> None:
        """Hand the scores of a preprocessed scan to ``consume``; with ``crop-rotate``, averaged with its middle's.

        Args:
            data: the scan (C, z, y, x), on any device; on a GPU a 2-D network gets several of its slices at a time.
            forward: a window (1, C, z, y, x) to the scores (members * heads, z, y, x).
            consume: gets the scores of the next slices, float32, in order.
            device: where the sums lie.
            network: where ``forward`` wants its windows.
            members: how many members' scores ``forward`` returns one after the other.
            policy: which windows are visited; the settings' without it.
            progress: told the number of windows done since its last call.
            by_rows: whether ``consume`` takes rows of all slices too, see :func:`windows.slide`.

        Raises:
            NotFiniteError: when a network gave infinite scores or NaN, before they are handed on.
        """

        common: dict[str, Any] = {
            "heads": members * self.heads,
            "patch": self.patch,
            "step_size": self._settings.step_size,
            "device": device,
            "network": network,
            "gaussian": self._settings.gaussian,
            "progress": progress,
        }
        is_twice = self._settings.tta == "crop-rotate"
        every = {"batch": self.batch if is_on_gpu(data) else 1, "by_rows": by_rows and not is_twice}
        data = place_of(data).take(data)

        def one_pass(part: Array, consume: Consume) -> None:
            self._pass(part, forward, consume, policy or self._settings.windows, common, every)

        if is_twice:
            box = central_crop(data.shape[1:])
            inside = (slice(None), *box)
            middle = data[inside]
            kept = place_at(device).zeros((common["heads"], *middle.shape[1:]))
            one_pass(middle, filling(kept))
            consume = average_with(kept, box, consume)
        one_pass(data, consume)

    def _pass(
        self,
        data: Array,
        forward: Forward,
        consume: Consume,
        policy: str,
        common: dict[str, Any],
        every: dict[str, Any],
    ) -> None:
        watch = Watch()
        watching, consume = watch.watched(forward), watch.before(consume)

        def timed(window: Array) -> Array:
            with self._profile.stage("network"):
                scores = watching(window)
                self._profile.settle(scores)
                return scores

        if policy == "all":
            slide(data, timed, consume, **every, **common)
        elif policy == "huang":
            shape = [max(n, p) for n, p in zip(data.shape[1:], self.patch, strict=True)]
            slide(data, lambda window: _softmax(timed(window)), consume, visit=Huang(shape, self.patch), **common)
        else:
            slide_growing(data, timed, consume, foreground=self._foreground, body_above=self._body_above(), **common)

    def _foreground(self, scores: Array) -> Array:
        return (scores > 0).any(0) if self._labels.has_regions else scores.argmax(0) > 0

    def _body_above(self) -> float | None:
        """The body threshold on the network's scale, or None where values are no CT numbers."""
        if self._configuration.normalization_schemes[0] != "CTNormalization":
            return None
        values = self._plans.foreground_intensity_properties_per_channel["0"]
        threshold = max(BODY_HU, float(values["percentile_00_5"]))
        return (threshold - float(values["mean"])) / max(float(values["std"]), 1e-8)


def _softmax(scores: Array) -> Array:
    return place_of(scores).softmax(scores)
