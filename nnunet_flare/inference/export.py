"""From scores on the network's grid to a label map on the image's grid, without full-resolution scores.

Stock nnU-Net interpolates all classes to the image's grid and takes the argmax there: 14 classes of a 512 x 512 x 400
scan are 6 GB in half precision, and one thread works on them for a minute. Interpolation is separable and the argmax
works voxel by voxel, so that one slice of scores after the other gives the same labels: where the slice axis takes
nearest neighbours, only the slices of the network's grid are interpolated, once each; where it is linear, neighbouring
slices are mixed on the network's grid first. Within a slice a running maximum over the classes needs one plane.
On a GPU batches of slices are done together, the label map stays there, and comes to the CPU once, when it is complete.

Equal to stock but for ties: stock rounds the interpolated scores to half precision first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunet_flare.errors import InputError
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.grids import ANISOTROPY_THRESHOLD, linear, nearest, separate_axis
from nnunet_flare.inference.memory import there_or_on_cpu
from nnunet_flare.inference.places import is_on_gpu, place_of
from nnunet_flare.inference.planes import Axis, HostPlanes
from nnunet_flare.inference.resampling import NO_RESAMPLING
from nnunet_flare.inference.workers import in_parallel, split

SEPARABLE = ("resample_data_or_seg_to_shape", "resample_torch_fornnunet")
"""Stock resampling functions whose result for scores :class:`SliceExporter` reproduces."""


def labels_on_image_grid(
    scores: Array,
    properties: dict[str, Any],
    plans_manager: Any,
    configuration_manager: Any,
    label_manager: Any,
    *,
    probabilities: bool = False,
) -> np.ndarray:
    """The label map (Z, Y, X), uint8, of scores (K, z, y, x) on the network's grid.

    Args:
        scores: logits, or probabilities with ``probabilities=True`` (for softmax models there is no difference).
        properties: what preprocessing noted: spacing, shapes and crop, as stock nnU-Net names them.
        probabilities: for region-based models, whether the sigmoid was already taken.

    Raises:
        InputError: when the plans name a resampling of scores that is not separable linear interpolation.
    """

    def labels(scores: Array) -> np.ndarray:
        exporter = SliceExporter(
            tuple(scores.shape[1:]),
            properties,
            plans_manager,
            configuration_manager,
            label_manager,
            probabilities=probabilities,
        )
        exporter.consume(scores)
        return exporter.finish()

    return there_or_on_cpu(scores, labels)


class SliceExporter:
    """Takes the scores slice by slice along the network's first axis and fills the label map on the image's grid."""

    in_order = False
    """Whether slices must come one after the other, to the CPU."""

    def __init__(
        self,
        shape: Sequence[int],
        properties: dict[str, Any],
        plans_manager: Any,
        configuration_manager: Any,
        label_manager: Any,
        *,
        probabilities: bool = False,
    ) -> None:
        check_resampling(configuration_manager)
        target = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
        axis = score_axis(properties, plans_manager, configuration_manager)
        self._backward = list(plans_manager.transpose_backward)
        regions = list(label_manager.regions_class_order) if label_manager.has_regions else None
        self._slices, self._rows = int(shape[0]), int(shape[1])
        in_plane = [Axis.of(shape[one], target[one], by_nearest=axis == one) for one in (1, 2)]
        self._planes = HostPlanes(in_plane[0], in_plane[1], regions, sigmoid=not probabilities)
        self._depth = Axis.of(self._slices, target[0], by_nearest=axis == 0)
        self._nearest = nearest(shape[0], target[0]) if axis == 0 or shape[0] == target[0] else None
        self._linear = linear(shape[0], target[0])
        self._there: Any = None
        self._previous: Array | None = None
        self._seen = 0
        self._canvas = np.zeros([int(n) for n in properties["shape_before_cropping"]], np.uint8)
        box = properties["bbox_used_for_cropping"]
        self._labels = self._into = self._canvas[tuple(slice(int(low), int(high)) for low, high in box)]

    def consume(self, scores: Array, rows: slice | None = None) -> None:
        """Take the next slices (K, n, y, x) along the network's first axis, from the CPU or a GPU.

        On the CPU threads share them: every slice has output slices of its own. With ``rows`` these are all slices, and
        of each the next rows, the last one of those before first.
        """
        own: slice = slice(None)
        planes: Any = self._planes
        if is_on_gpu(scores):
            if self._there is None:
                self._there = self._on_gpu(scores.device)
            if not self.in_order:
                self._there.consume(scores, self._seen)
                self._seen += int(scores.shape[1])
                return
            planes = self._there
        elif rows is not None:
            own, planes = self._planes.of_rows(rows)
        self._into, place = self._labels[:, own], place_of(scores)
        scores, count = place.take(scores), int(scores.shape[1])
        previous, seen = self._previous, self._seen

        def one(index: int) -> None:
            before = scores[:, index - 1] if index else previous
            self._consume_plane(seen + index, before, scores[:, index], planes)

        is_small = len(split(count, self._into.size * count // self._slices)) == 1
        if is_small or self.in_order:
            for index in range(count):
                one(index)
        else:
            in_parallel(one, range(count))
        if rows is not None and rows.stop < self._rows:
            return
        self._seen += count
        if count and rows is None and self._nearest is None:
            self._previous = place.copy(scores[:, -1])  # the caller may use its memory again

    def finish(self) -> np.ndarray:
        """The label map (Z, Y, X), uint8, crop and transposition undone."""
        if self._seen != self._slices:
            raise ValueError(f"{self._seen} of {self._slices} slices of scores were given")
        if self._there is not None and not self.in_order:
            self._labels[...] = self._there.fetch()
        return np.ascontiguousarray(self._canvas.transpose(self._backward))

    def _on_gpu(self, device: Any) -> Any:
        """What makes labels, or for slices in order scores, on a GPU."""
        from nnunet_flare.inference.torch_planes import DeviceLabels, DevicePlanes

        planes = DevicePlanes(self._planes, device)
        return planes if self.in_order else DeviceLabels(planes, self._depth, self._labels.shape, device)

    def _consume_plane(self, number: int, before: Array | None, plane: Array, planes: Any) -> None:
        """Output slices for which a slice, and the one before it, are all that is needed."""
        if self._nearest is not None:
            targets = np.flatnonzero(self._nearest == number)
            if targets.size:
                self._take(targets, plane, planes)
            return
        low, high, weight = self._linear
        targets = np.flatnonzero(high == number)
        is_here = low[targets] == number
        between = targets[~is_here]
        if between.size:
            assert before is not None  # high > low, hence a slice came before
            self._take_between(between, before, plane, weight[between], planes)
        if is_here.any():
            self._take(targets[is_here], plane, planes)

    def _take(self, targets: np.ndarray, plane: Array, planes: Any) -> None:
        """What becomes of output slices that all have the scores (K, y, x), still in the network's in-plane size."""
        self._into[targets] = planes.labels(plane)

    def _take_between(self, targets: np.ndarray, one: Array, other: Array, shares: np.ndarray, planes: Any) -> None:
        """What becomes of output slices between two slices; ``shares``: of the other one, for each of them."""
        for target, labels in zip(targets, planes.between(one, other, shares), strict=True):
            self._into[target] = labels


def score_axis(properties: dict[str, Any], plans_manager: Any, configuration_manager: Any) -> int | None:
    """The axis of the network's grid along which scores take nearest neighbours, or None."""
    spacing = [float(properties["spacing"][axis]) for axis in plans_manager.transpose_forward]
    current = list(configuration_manager.spacing)
    if len(current) < len(spacing):
        current = [spacing[0], *current]
    kwargs = configuration_manager.configuration["resampling_fn_probabilities_kwargs"]
    return separate_axis(
        current,
        spacing,
        force=kwargs.get("force_separate_z", _default_force(configuration_manager)),
        threshold=kwargs.get("separate_z_anisotropy_threshold", ANISOTROPY_THRESHOLD),
    )


def check_resampling(configuration_manager: Any) -> None:
    """Refuse plans whose scores are not resampled linearly (nearest neighbours along a separate axis).

    Raises:
        InputError: with the function and arguments that the plans name.
    """
    name = configuration_manager.configuration["resampling_fn_probabilities"]
    kwargs = configuration_manager.configuration["resampling_fn_probabilities_kwargs"]
    if name == NO_RESAMPLING:
        if configuration_manager.configuration["resampling_fn_data"] != NO_RESAMPLING:
            raise InputError(f"the plans resample images, but predictions with {name}; these would not fit the images")
        return
    linear_in_plane = kwargs.get("order", 3) == 1 if name == SEPARABLE[0] else kwargs.get("mode", "linear") == "linear"
    nearest_between = (
        kwargs.get("order_z", 0) == 0
        if name == SEPARABLE[0]
        else kwargs.get("aniso_axis_mode", "nearest-exact") == "nearest-exact"
    )
    if name not in SEPARABLE or kwargs.get("is_seg", False) or not linear_in_plane or not nearest_between:
        raise InputError(
            f"the plans resample predictions with {name}({kwargs}); flare-predict knows {SEPARABLE[0]} of order 1 and "
            f"order_z 0, and {SEPARABLE[1]} in linear mode: predict this model with nnUNetv2_predict"
        )


def _default_force(configuration_manager: Any) -> bool | None:
    """What the stock functions assume where the plans do not say ``force_separate_z``."""
    name = configuration_manager.configuration["resampling_fn_probabilities"]
    return False if name == SEPARABLE[0] else None
