"""Preprocessing of the whole-volume systems: a scan, or a crop of one, resized to one fixed grid.

Fosun Aitrox (S1) and SZTU (S4) show their networks a whole volume at once: background removed, resized to the network's
size whatever its spacing, clipped, and standardised by its own mean and standard deviation. In nnU-Net's terms the
configuration's ``patch_size`` is that size, and resampling goes there instead of to a spacing. Stock nnU-Net inverts
all of it on export; the canonical orientation and its inverse belong to the reader that the plans name.

Here the volume is resized, then clipped and standardised, as both systems do inside their networks.

Training cases are larger than the network's input where the papers crop at random: they have the size that the plans
give as ``median_image_size_in_voxels``, of which nnU-Net's loader takes patches. What is predicted is resized to the
patch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import cc3d
import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

BODY_ABOVE_HU = -500.0
"""Anything above is body or table (S1)."""

EPSILON = 1e-5
"""Added to the standard deviation (S1)."""

MARGIN_KEY = "crop_margin_mm"
"""Of a configuration: what is left around the organs of a training case."""

WINDOWS_KEY = "windows"
"""Of a case's properties: per channel what is left of HU after normalisation (lowest value, highest value, HU of 1.0);
None for a channel that another scheme normalised."""

Range = tuple[int, int]


class FlareClip500Normalization(ImageNormalization):
    """Fosun's: clipped to +-500 HU, minus the mean, by the standard deviation of the volume at hand."""

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = False
    bound_hu: ClassVar[float] = 500.0

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Of an image in HU, any shape; ``seg`` is not looked at."""
        clipped, mean, unit = self._standard(image)
        return ((clipped - mean) / unit).astype(self.target_dtype, copy=False)

    @classmethod
    def window(cls, image: np.ndarray) -> tuple[float, float, float]:
        """Lowest and highest value of the normalised image, and the HU of 1.0."""
        _, mean, unit = cls._standard(image)
        return (-cls.bound_hu - mean) / unit, (cls.bound_hu - mean) / unit, unit

    @classmethod
    def _standard(cls, image: np.ndarray) -> tuple[np.ndarray, float, float]:
        clipped = np.clip(image.astype(np.float32), -cls.bound_hu, cls.bound_hu)
        return clipped, float(clipped.mean(dtype=np.float64)), float(clipped.std(dtype=np.float64)) + EPSILON


class FlareClip325Normalization(FlareClip500Normalization):
    """SZTU's: the same with +-325 HU."""

    bound_hu = 325.0


NORMALISATIONS = {scheme.__name__: scheme for scheme in (FlareClip500Normalization, FlareClip325Normalization)}


class FlareFixedSizePreprocessor(DefaultPreprocessor):
    """Resizes to one size: for the fine networks, which see the organs' box with a margin.

    A case with labels is cropped to the box of its labels. A case without is taken as it is: it is the crop that a
    coarse model found.
    """

    makes_training_cases: bool = False
    """Whether cases without labels get the size of training cases too: pseudo-labels follow."""

    def run_case_npy(
        self,
        data: np.ndarray,
        seg: np.ndarray | None,
        properties: dict[str, Any],
        plans_manager: Any,
        configuration_manager: Any,
        dataset_json: dict[str, Any] | str,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As stock's: image (C, z, y, x), labels (1, z, y, x) and the notes that export inverts.

        Raises:
            ValueError: when labels and image differ in shape.
        """
        if seg is not None and seg.shape[1:] != data.shape[1:]:
            raise ValueError(f"image of shape {data.shape[1:]} and labels of shape {seg.shape[1:]} do not fit")
        forward = [0, *(axis + 1 for axis in plans_manager.transpose_forward)]
        spacing = [float(properties["spacing"][axis]) for axis in plans_manager.transpose_forward]
        data = data.transpose(forward)
        labels = np.zeros((1, *data.shape[1:]), np.int8) if seg is None else seg.transpose(forward)
        properties["shape_before_cropping"] = data.shape[1:]
        box = self.box(data[0], None if seg is None else labels[0], spacing, configuration_manager)
        inside = (slice(None), *(slice(low, high) for low, high in box))
        data, labels = data[inside].astype(np.float32), labels[inside]
        properties["bbox_used_for_cropping"] = [list(edge) for edge in box]
        properties["shape_after_cropping_and_before_resampling"] = data.shape[1:]
        is_training = seg is not None or self.makes_training_cases
        size = training_size(configuration_manager) if is_training else list(configuration_manager.patch_size)
        grid = [step * n / new for step, n, new in zip(spacing, data.shape[1:], size, strict=True)]
        data = configuration_manager.resampling_fn_data(data, size, spacing, grid)
        nowhere = np.zeros((1, *size), np.int8)
        properties[WINDOWS_KEY] = [
            NORMALISATIONS[scheme].window(channel) if scheme in NORMALISATIONS else None
            for channel, scheme in zip(data, configuration_manager.normalization_schemes, strict=True)
        ]
        data = self._normalize(
            data, nowhere, configuration_manager, plans_manager.foreground_intensity_properties_per_channel
        )
        if seg is None:
            return data, nowhere, properties
        labels = configuration_manager.resampling_fn_seg(labels, size, spacing, grid)
        manager = plans_manager.get_label_manager(dataset_json)
        wanted = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        if manager.has_ignore_label:
            wanted.append([-1, *manager.all_labels])
        properties["class_locations"] = self._sample_foreground_locations(labels, wanted, verbose=self.verbose)
        labels = self.modify_seg_fn(labels, plans_manager, dataset_json, configuration_manager)
        return data, labels.astype(np.int16 if np.max(labels) > 127 else np.int8), properties

    def box(
        self, image: np.ndarray, labels: np.ndarray | None, spacing_mm: Sequence[float], configuration_manager: Any
    ) -> list[Range]:
        """What of an image (z, y, x) in HU is resized: with labels their box and the configuration's margin."""
        if labels is None:
            return [(0, n) for n in image.shape]
        return label_box(labels, spacing_mm, margin_mm=configuration_manager.configuration.get(MARGIN_KEY, 0.0))


class FlareWholeVolumePreprocessor(FlareFixedSizePreprocessor):
    """Removes the background first: for whole scans, as the coarse networks want them."""

    def box(
        self, image: np.ndarray, labels: np.ndarray | None, spacing_mm: Sequence[float], configuration_manager: Any
    ) -> list[Range]:
        """The body's box."""
        return body_box(image)


def training_size(configuration_manager: Any) -> list[int]:
    """Size (z, y, x) of the training cases of a configuration of fixed size; at least its patch."""
    sizes = zip(configuration_manager.median_image_size_in_voxels, configuration_manager.patch_size, strict=True)
    return [max(round(median), int(patch)) for median, patch in sizes]


def label_box(labels: np.ndarray, spacing_mm: Sequence[float], *, margin_mm: float) -> list[Range]:
    """The box of labels (z, y, x) above 0 with a margin on every side, inside the image; all of it without a label."""
    found = labels > 0
    if not found.any():
        return [(0, n) for n in labels.shape]
    box = []
    for axis, (spacing, size) in enumerate(zip(spacing_mm, labels.shape, strict=True)):
        margin = int(np.ceil(margin_mm / spacing))
        first, last = _planes(found, axis)
        box.append((max(0, first - margin), min(size, last + margin)))
    return box


def body_box(image: np.ndarray) -> list[Range]:
    """The box (first, one past last, per axis) of the body in an image (z, y, x) in HU; all of it where there is none.

    The body is the 6-connected component above -500 HU that holds the volume's centre, else the largest one (S1). S1
    takes the last index as the end and so loses the last plane of each axis; this does not.
    """
    components = cc3d.connected_components(image > BODY_ABOVE_HU, connectivity=6)
    body = components[tuple(n // 2 for n in image.shape)]
    if body == 0:
        counts = np.bincount(components.ravel())
        counts[0] = 0
        body = counts.argmax()
    if body == 0:
        return [(0, n) for n in image.shape]
    mask = components == body
    return [_planes(mask, axis) for axis in range(3)]


def _planes(mask: np.ndarray, axis: int) -> Range:
    """First and one past last plane along an axis that a mask which is not empty reaches."""
    planes = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
    return int(planes[0]), int(planes[-1]) + 1
