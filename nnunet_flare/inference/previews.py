"""One picture a case: the planes with most organs, axial, coronal and sagittal, and the organs' names.

Seen as radiologists see them: the patient's right on the left, the front and the head above.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.drawing import WINDOW_HU, Panel, colour, fullest_plane, organs_in, overlay, upright
from nnunet_flare.files import replacing
from nnunet_flare.images import Volume
from nnunet_flare.inference.forms import Finished, Form
from nnunet_flare.inference.inputs import InputCase

PANEL, LEGEND_ROW = 320, 16
"""Pixels of a square panel, and of a line of the legend."""

LEGEND_COLUMNS = 5

SIDES = (("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I"))
"""What is left, right, above and below in the axial, coronal and sagittal panel."""

SUFFIX = ".png"


def preview_form(output: Path, names: Mapping[int, str], *, ct: bool) -> Form:
    """Writes ``output/<case>.png``; ``names`` are those of the label ids, ``ct`` says whether values are CT numbers."""

    def file(case: InputCase) -> Path:
        return output / f"{case.name}{SUFFIX}"

    def write(finished: Finished, _: Any) -> None:
        assert finished.image is not None
        picture = draw_preview(finished.image, finished.labels, names, ct=ct)
        file(finished.case).parent.mkdir(parents=True, exist_ok=True)
        with replacing(file(finished.case)) as temporary:
            picture.save(temporary, format="PNG")

    return Form(
        "png", "previews", lambda case: (file(case),), write, lambda case: _is_png(file(case)), wants_image=True
    )


def draw_preview(scan: Volume, labels: np.ndarray, names: Mapping[int, str], *, ct: bool = True) -> Any:
    """The picture (Pillow's) of a scan and its label map (Z, Y, X): three square panels, all at one scale.

    Args:
        scan: with its stored voxels.
        labels: on the same grid.
        names: of the label ids.
        ct: whether the soft-tissue window is used; else from the 1st to the 99th percentile.
    """
    from PIL import Image

    shown, map_ = upright(scan), upright(scan.with_array(labels))
    window = WINDOW_HU if ct else _window(shown.array)
    width_mm = max(n * mm for n, mm in zip(shown.array.shape, shown.spacing_mm, strict=True))
    panels = []
    for axis in range(3):
        index = fullest_plane(map_.array, axis)
        spacing = [mm for a, mm in enumerate(shown.spacing_mm) if a != axis]
        plane, organs = shown.array.take(index, axis).astype(np.float32), map_.array.take(index, axis)
        centre = [n * mm / 2 for n, mm in zip(plane.shape, spacing, strict=True)]
        panel = Panel(spacing, centre, width_mm, PANEL)
        panels.append(overlay(panel.scan(plane, outside=window[0]), panel.labels(organs), window=window))
    pixels = (np.concatenate(panels, axis=1) * 255).round().astype(np.uint8)
    present = organs_in(labels)
    lines = -(-len(present) // LEGEND_COLUMNS)
    picture = Image.new("RGB", (3 * PANEL, PANEL + LEGEND_ROW * lines))
    picture.paste(Image.fromarray(pixels), (0, 0))
    _annotate(picture, [(number, names.get(number, str(number))) for number in present])
    return picture


def _annotate(picture: Any, organs: list[tuple[int, str]]) -> None:
    """Letters of the sides, and the legend below."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(picture)
    for panel, (left, right, above, below) in enumerate(SIDES):
        x = panel * PANEL
        draw.text((x + 3, PANEL // 2 - 6), left, fill="white")
        draw.text((x + PANEL - 10, PANEL // 2 - 6), right, fill="white")
        draw.text((x + PANEL // 2 - 3, 2), above, fill="white")
        draw.text((x + PANEL // 2 - 3, PANEL - 13), below, fill="white")
    width = 3 * PANEL // LEGEND_COLUMNS
    for place, (number, name) in enumerate(organs):
        x, y = place % LEGEND_COLUMNS * width + 4, PANEL + place // LEGEND_COLUMNS * LEGEND_ROW + 3
        draw.rectangle((x, y, x + 9, y + 9), fill=colour(number))
        plain = name.replace("_", " ").encode("latin-1", "replace").decode("latin-1")  # the font has no more
        draw.text((x + 14, y - 1), plain[: width // 7], fill="white")


def _window(array: np.ndarray) -> tuple[float, float]:
    stride = max(1, array.size // 1_000_000) | 1
    low, high = np.percentile(array[:: max(1, array.shape[0] // 64)].ravel()[::stride], (1, 99))
    return float(low), float(max(high, low + 1e-6))


def _is_png(path: Path) -> bool:
    """Whether a picture was written whole."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.format == "PNG"
    except (OSError, SyntaxError, ValueError):
        return False
