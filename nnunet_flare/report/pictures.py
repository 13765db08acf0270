"""Label maps of one scan side by side, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.drawing import colour, fullest_plane, overlay, upright
from nnunet_flare.files import replacing
from nnunet_flare.images import read_labels, read_volume
from nnunet_flare.organs import FLARE23


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
    axial, coronal = fullest_plane(first, 0), fullest_plane(first, 1)
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
