"""Boxes around the organs of a scan, and the preprocessing of that part of it alone.

A box is one ``(first, one past last)`` per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_flare.files import read_json

if TYPE_CHECKING:
    from nnunet_flare.images.orientation import Turn
    from nnunet_flare.rounds.run.manifest import Run

Box = Sequence[Sequence[int]]

BOX = ({"failed": str}, {"box": ([[int]], None)})
"""What is kept of a coarse pass: why it failed, or the box, null where nothing was found."""


def read_box(run: Run, case: str) -> dict[str, Any]:
    """What the coarse pass found in a case."""
    remedy = f"flare-pseudolabel retry -o {run.root} locates the organs again"
    document: dict[str, Any] = read_json(run.paths.box(case), BOX, remedy=remedy)
    return document


def turned(box: Box, shape: Sequence[int], turn: Turn) -> list[list[int]]:
    """A box of a stored array (Z, Y, X) of some shape, in the array that a turn makes of it."""
    edges = [(*box[axis], shape[axis]) for axis in turn.axes]
    return [
        [size - high, size - low] if flip else [low, high]
        for (low, high, size), flip in zip(edges, turn.flipped, strict=True)
    ]


def preprocess_box(
    preprocessor: Any, files: Sequence[str], box: Box, plans: Any, manager: Any, dataset: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """As stock's ``run_case`` without labels, of the part of a scan inside a box.

    Args:
        preprocessor: of the plans.
        files: the scan's channels.
        box: of voxels as the plans' reader gives the scan.
        plans: stock nnU-Net's ``PlansManager``.
        manager: its configuration.
        dataset: dataset.json.

    Returns:
        Arrays of the part, and properties from which export pastes into the whole scan.
    """
    scan, properties = plans.image_reader_writer_class().read_images(list(files))
    z, y, x = (slice(low, high) for low, high in box)
    part = scan[:, z, y, x]
    data, seg, properties = preprocessor.run_case_npy(part, None, properties, plans, manager, dataset)
    forward = plans.transpose_forward
    properties["shape_before_cropping"] = tuple(scan.shape[1 + axis] for axis in forward)
    properties["bbox_used_for_cropping"] = [
        [int(low) + box[axis][0], int(high) + box[axis][0]]
        for (low, high), axis in zip(properties["bbox_used_for_cropping"], forward, strict=True)
    ]
    return data, seg, properties
