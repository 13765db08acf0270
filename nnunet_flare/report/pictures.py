"""Pictures of scans and label maps: soft-tissue window, organs in the same colour-blind-safe colours everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.files import replacing
from nnunet_flare.images import Volume, read_labels, read_volume
from nnunet_flare.organs import FLARE23

WINDOW_HU = (-160.0, 240.0)
"""The usual soft-tissue window."""

COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7",
    "#882255", "#44AA99", "#AA4499", "#DDCC77", "#999933", "#EE7733", "#FFFFFF",
)  # fmt: skip
"""Colour of organ 1, 2, ...: Okabe and Ito's palette, then Tol's muted one."""


def colour(organ: int) -> str:
    """The colour of an organ id, as ``#RRGGBB``."""
    return COLOURS[(organ - 1) % len(COLOURS)]


def rgb(hexadecimal: str) -> tuple[float, float, float]:
    """``#RRGGBB`` as three numbers in 0 .. 1."""
    red, green, blue = (int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def overlay(plane: np.ndarray, labels: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """An RGB picture in 0 .. 1 of a CT plane (H, W) in HU with its labels on top."""
    low, high = WINDOW_HU
    grey = np.clip((plane.astype(float) - low) / (high - low), 0, 1)
    picture = np.repeat(grey[..., None], 3, axis=-1)
    for organ in np.unique(labels[labels > 0]):
        where = labels == organ
        picture[where] = (1 - opacity) * picture[where] + opacity * np.array(rgb(colour(int(organ))))
    return picture


def upright(volume: Volume) -> Volume:
    """The volume with its axes ordered and flipped so that index 0 is superior, anterior and the patient's right
    (radiological view), at origin 0. Oblique directions are shown by their main axes.
    """
    direction = np.array(volume.direction).reshape(3, 3)
    order, signs = [], []
    for world in (2, 1, 0):  # z, y, x of the patient (LPS)
        axis = int(np.abs(direction[world]).argmax())
        order.append(2 - axis)
        signs.append(np.sign(direction[world, axis]))
    order = order if sorted(order) == [0, 1, 2] else [0, 1, 2]
    wanted = (-1, 1, 1)  # superior first; anterior first; the patient's right first
    flips = tuple(slice(None, None, int(s * w) or 1) for s, w in zip(signs, wanted, strict=True))
    z, y, x = (volume.spacing_mm[axis] for axis in order)
    return Volume(volume.array.transpose(order)[flips], (z, y, x))


def compare(scan: Path, maps: Mapping[str, Path], output: Path) -> None:
    """Draw label maps of one scan side by side, in an axial and a coronal plane through most of their organs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    volume = upright(read_volume(scan))
    array, spacing_mm = volume.array, volume.spacing_mm
    labels = {name: upright(read_labels(path)).array for name, path in maps.items()}
    first = next(iter(labels.values()))
    axial, coronal = _fullest_plane(first, 0), _fullest_plane(first, 1)
    planes: list[tuple[str, Any, float]] = [
        ("axial", np.s_[axial], spacing_mm[1] / spacing_mm[2]),
        ("coronal", np.s_[:, coronal], spacing_mm[0] / spacing_mm[2]),
    ]
    figure, axes = plt.subplots(2, 1 + len(labels), figsize=(3.2 * (1 + len(labels)), 6.2), squeeze=False)
    for row, (plane, where, aspect) in enumerate(planes):
        none = np.zeros_like(first[where])
        for column, (name, shown) in enumerate([("scan", none), *((n, m[where]) for n, m in labels.items())]):
            axis = axes[row][column]
            axis.imshow(overlay(array[where], shown), aspect=aspect, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=10)
            if column == 0:
                axis.set_ylabel(plane)
    present = sorted({int(organ) for m in labels.values() for organ in np.unique(m)} - {0})
    names = {organ.id: organ.name.replace("_", " ") for organ in FLARE23}
    handles = [Patch(color=colour(organ), label=names.get(organ, str(organ))) for organ in present]
    figure.legend(handles=handles, loc="lower center", ncols=7, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _fullest_plane(labels: np.ndarray, axis: int) -> int:
    """Index of the plane across ``axis`` with the most different organs, of those the one with most organ voxels."""
    planes = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    kinds = [len(np.unique(plane)) for plane in planes]
    voxels = (planes > 0).sum(axis=1)
    return int(np.lexsort((voxels, kinds))[-1])
