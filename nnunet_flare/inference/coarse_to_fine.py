"""Coarse to fine: a coarse model finds the organs' box, a fine model sees that part of the scan alone.

The scan is cropped before preprocessing, so that everything outside the box costs nothing more. The fine model's
result on the crop is what it would say about the crop as a scan of its own; outside the box all is background.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import Volume
from nnunet_flare.images.readers import library
from nnunet_flare.inference.cascade import CascadeSegmenter
from nnunet_flare.inference.choices import ROI_RULES
from nnunet_flare.inference.core import Segmenter, stored_there
from nnunet_flare.inference.forms import Receiver, View
from nnunet_flare.inference.roi import MARGIN_MM, Box, find_box, to_image_box, widened
from nnunet_flare.inference.scans import PreparedScan
from nnunet_flare.inference.spare import Spare

log = logging.getLogger(__name__)

SLICES = (0.0, 0.0, 1.0)
"""The patient's axis from feet to head in SimpleITK's world (x, y, z)."""


@dataclass(frozen=True, eq=False)
class CroppableScan:
    """A scan as the coarse model sees it, with its stored voxels for the fine one, ``there`` on a GPU."""

    volumes: tuple[Volume, ...]
    coarse: PreparedScan
    oddities: tuple[str, ...]
    there: Spare

    @property
    def name(self) -> str:
        """The case."""
        return self.coarse.name

    @property
    def grid(self) -> Volume:
        """The scan's grid, without voxels."""
        return self.coarse.grid


class RoiSegmenter:
    """Offers what :class:`Segmenter` offers for folders of scans: prepare, count windows, segment."""

    def __init__(
        self,
        coarse: Segmenter,
        fine: Segmenter | CascadeSegmenter,
        *,
        rule: str = "union",
        margin_mm: float = MARGIN_MM,
        on_crop: Callable[[str, Sequence[Volume]], None] | None = None,
    ) -> None:
        """``on_crop`` gets the name and the cropped channels of every scan.

        Raises:
            InputError: when the models take different channels, or rule or margin are unknown.
        """
        if coarse.channels != fine.channels:
            raise InputError(
                f"roi: the coarse model takes {coarse.channels} channels, the fine one {fine.channels}; "
                "expected the same number"
            )
        if rule not in ROI_RULES:
            raise InputError(f"roi rule {rule!r}: expected one of {', '.join(ROI_RULES)}")
        if not margin_mm >= 0:
            raise InputError(f"roi margin {margin_mm}: expected a number of mm, 0 or more")
        self.coarse, self.fine = coarse, fine
        self.rule, self.margin_mm = rule, margin_mm
        self._on_crop = on_crop

    @property
    def channels(self) -> int:
        """Number of image channels that both models want."""
        return self.fine.channels

    @property
    def origin(self) -> list[Any]:
        """By which files and settings both models segment, and how the box is found."""
        return [self.rule, self.margin_mm, self.coarse.origin, self.fine.origin]

    def load(self) -> None:
        """Build the networks now and not at the first scan."""
        self.coarse.load()
        self.fine.load()

    def prepare(self, volumes: Sequence[Volume], case: str = "image") -> CroppableScan:
        """Check a scan's channels and bring them to the coarse network's grid.

        Raises:
            CaseError: when the scan cannot be predicted with these models.
        """
        if library(self.coarse.reader) != library(self.fine.reader):
            for doubt in (volume.doubt for volume in volumes if volume.doubt):
                raise CaseError(
                    case, f"{doubt}; the coarse model uses {self.coarse.reader}, the fine one {self.fine.reader}"
                )
        there = stored_there(volumes, (self.coarse, *self.fine.stages))
        coarse = self.coarse.prepare(volumes, case, there.part())
        return CroppableScan(tuple(volumes), coarse, self.fine.value_oddities(volumes), there)

    def windows(self, scan: CroppableScan) -> int:
        """How many windows the coarse pass takes; those of the fine one, known only after it, come on top."""
        return self.coarse.windows(scan.coarse)

    def segment(
        self,
        scan: CroppableScan,
        *,
        members: bool = False,
        progress: Callable[[int], None] | None = None,
        receivers: Sequence[Receiver] = (),
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """As :meth:`Segmenter.segment`: the label map (Z, Y, X) on the scan's own grid, and the members'.

        ``receivers`` get the scores of the crop, and where it lies.
        """
        profile = self.fine.profile
        with profile.stage("coarse pass"):
            box = self.box(scan, progress)
        self.coarse.release()  # the fine network needs as much
        shape = scan.grid.array.shape
        crops = [cropped(volume, box) for volume in scan.volumes]
        share = crops[0].array.size / max(1, int(np.prod(shape)))
        log.debug("%s: box %s of shape %s", scan.name, box, shape)
        profile.share("volume seen by the fine model", share)
        if self._on_crop is not None:
            self._on_crop(scan.name, crops)
        inside = tuple(slice(low, high) for low, high in box)
        there = scan.there.part(lambda channel: channel[inside])
        fine: Any = self.fine.prepare(crops, scan.name, there, part=True)
        scan.there.give_up()
        placed = [_Placed(receiver, scan.grid, box) for receiver in receivers]
        labels, others = self.fine.segment(fine, members=members, progress=progress, receivers=placed)
        return pasted(labels, box, shape), [pasted(one, box, shape) for one in others]

    def box(self, scan: CroppableScan, progress: Callable[[int], None] | None = None) -> Box:
        """The box of stored voxels (Z, Y, X) that the fine model sees: the whole scan where nothing was found."""
        found = organs_box(self.coarse, scan.coarse, rule=self.rule, margin_mm=self.margin_mm, progress=progress)
        if found is not None:
            return found
        log.warning("%s: the coarse model found nothing; the fine model predicts the whole scan", scan.name)
        return tuple((0, n) for n in scan.grid.array.shape)


def organs_box(
    coarse: Segmenter,
    scan: PreparedScan,
    *,
    rule: str = "union",
    margin_mm: float = MARGIN_MM,
    progress: Callable[[int], None] | None = None,
) -> Box | None:
    """The box of stored voxels (Z, Y, X) around what a coarse model calls organ; None where that is nothing.

    Args:
        coarse: the model.
        scan: as it prepared it.
        rule: what counts, one of :data:`ROI_RULES`.
        margin_mm: added on every side.
        progress: told the number of windows done.
    """
    labels = coarse.network_labels(scan, progress=progress)
    plans, properties = coarse.plans_manager, scan.prepared.properties
    # each network axis as an axis of the stored scan
    stored = [scan.turn.axes[axis] for axis in plans.transpose_forward]
    inner = properties["shape_after_cropping_and_before_resampling"]
    spacing = [
        scan.grid.spacing_mm[axis] * before / after
        for axis, before, after in zip(stored, inner, labels.shape, strict=True)
    ]
    found = find_box(labels, spacing, rule=rule, slice_axis=stored.index(_slice_axis(scan.grid)))
    if found is None:
        return None
    box = to_image_box(found, labels.shape, properties, plans.transpose_backward, scan.turn)
    return widened(box, scan.grid.array.shape, scan.grid.spacing_mm, margin_mm)


class _Placed:
    """A receiver of a crop's scores, told where in its scan the crop lies."""

    def __init__(self, receiver: Receiver, grid: Volume, box: Box) -> None:
        self._receiver, self._grid, self._box = receiver, grid, box
        self.take = receiver.take

    @property
    def apart(self) -> bool:
        return self._receiver.apart

    def begin(self, view: View) -> None:
        self._receiver.begin(replace(view, grid=self._grid, placed=tuple(self._box)))


def cropped(volume: Volume, box: Box) -> Volume:
    """The part of a scan inside a box, at its place in space: spacing and direction stay, the origin moves."""
    part = volume.array[tuple(slice(low, high) for low, high in box)]
    old_index = np.eye(4)
    old_index[:3, 3] = [low for low, _ in box][::-1]
    return volume.moved(np.ascontiguousarray(part), old_index, volume.spacing_mm)


def pasted(labels: np.ndarray, box: Box, shape: Sequence[int]) -> np.ndarray:
    """The label map of a box on the full grid (Z, Y, X), background elsewhere."""
    full = np.zeros(shape, labels.dtype)
    full[tuple(slice(low, high) for low, high in box)] = labels
    return full


def open_coarse(name: str, fine: Segmenter | CascadeSegmenter) -> Segmenter:
    """The coarse model that ``--roi`` names, with all its folds, all windows and no test-time augmentation.

    Raises:
        InputError: when there is no such model, or it cannot be opened.
    """
    folder = coarse_model_folder(name, fine.models[0].folder)
    settings = replace(fine.settings, tta="none", windows="all")
    return Segmenter.from_model_folder(folder, settings, profile=fine.profile.part("coarse "))


def coarse_model_folder(name: str, fine: Path) -> Path:
    """The folder that ``--roi`` names: a model's, or the configuration of the fine model's plans beside it.

    Raises:
        InputError: when there is no such model.
    """
    folder = Path(name)
    if (folder / "plans.json").is_file():
        return folder
    fine = fine.resolve()
    stem, _, _ = fine.name.rpartition("__")
    beside = fine.parent / f"{stem}__{name}"
    if stem and "/" not in name and (beside / "plans.json").is_file():
        return beside
    there = sorted(path.name.rpartition("__")[2] for path in fine.parent.glob(f"{stem}__*") if path != fine)
    raise InputError(
        f"roi {name}: is not a trained model's folder, and not a configuration trained next to {fine.name} "
        f"(there: {', '.join(there) or 'none'})"
    )


def _slice_axis(grid: Volume) -> int:
    """The stored axis (Z, Y, X) closest to the patient's length."""
    along = np.abs(np.asarray(SLICES) @ np.reshape(grid.direction, (3, 3)))
    return 2 - int(np.argmax(along))
