"""In-painting and out-painting with random values (S1's painting block, from Models Genesis).

In-painting fills a few small boxes with noise; out-painting keeps a few large boxes and fills the rest. Labels stay, so
the network has to infer what it cannot see. Models Genesis paints into images of [0, 1], noise over all of their range.
S1 maps its window to [-1, 1] and keeps that noise, U[0, 1]: the upper half of the window. So it is here, with the
plan's window (a channel that is not CT: the range of its values in the patch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform

from nnunet_flare.trainers.transforms.window import Window

Box = tuple[slice, ...]

MAX_BOXES = 3
P_NEXT_BOX = 0.95
"""S1 (code): another box is tried with this probability, up to three."""
IN_SIDES = (0.10, 0.20)
OUT_SIDES = (0.80, 0.90)
"""Sides of the boxes as shares of the axis."""
BORDER = 3
"""Voxels between a box and the border of the patch, where the patch is large enough."""


def random_boxes(shape: Sequence[int], sides: tuple[float, float]) -> list[Box]:
    """Up to three boxes within a patch of this spatial shape; none with probability 0.05."""
    boxes: list[Box] = []
    while len(boxes) < MAX_BOXES and torch.rand(1).item() < P_NEXT_BOX:
        boxes.append(tuple(_random_side(edge, sides) for edge in shape))
    return boxes


def _random_side(edge: int, sides: tuple[float, float]) -> slice:
    share = sides[0] + (sides[1] - sides[0]) * torch.rand(1).item()
    length = max(1, round(edge * share))
    border = min(BORDER, (edge - length) // 2)
    start = int(torch.randint(border, edge - length - border + 1, (1,)))
    return slice(start, start + length)


class PaintingTransform(ImageOnlyTransform):
    """In-paints a sample with probability ``p_in``, otherwise out-paints it; all channels at the same place.

    Args:
        windows: the window of each image channel.
        p_in: probability of in-painting rather than out-painting.
    """

    def __init__(self, windows: Sequence[Window | None], p_in: float = 0.5) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.p_in = p_in

    def get_parameters(self, **data_dict: Any) -> dict:
        inside = torch.rand(1).item() < self.p_in
        shape = data_dict["image"].shape[1:]
        return {"inside": inside, "boxes": random_boxes(shape, IN_SIDES if inside else OUT_SIDES)}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        inside: bool = params["inside"]
        boxes: list[Box] = params["boxes"]
        for index, channel in enumerate(img):
            window = self.windows[index] if index < len(self.windows) else None
            low, high = (window.low, window.high) if window is not None else _range_of(channel)
            middle = (low + high) / 2
            if inside:
                for box in boxes:
                    channel[box].uniform_(middle, high)
            elif boxes:
                kept = [channel[box].clone() for box in boxes]
                channel.uniform_(middle, high)
                for box, values in zip(boxes, kept, strict=True):
                    channel[box] = values
        return img


def _range_of(channel: torch.Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(channel)
    return float(low), float(high)
