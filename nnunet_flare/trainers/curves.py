"""Our own curves in ``progress.png``: panels below stock's, which knows only its own.

Values reach nnU-Net's loggers as stock's do, one per epoch, and so Weights & Biases where ``nnUNet_wandb_enabled=1``,
and TensorBoard where ``nnUNet_tensorboard_enabled=1`` (:mod:`nnunet_flare.trainers.tensorboard`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.files import replacing

PANEL_INCHES = (30, 18)
FONT_SIZE = 30
"""As stock draws its panels: 3000 x 1800 pixels each."""


def add_panels(picture: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Add the curves below a ``progress.png``: losses in one panel, shares and scores in another.

    Args:
        picture: the file, which is replaced; nothing happens where stock drew none.
        curves: one value per epoch; without a number where a curve has no value. A curve without any is left out.
    """
    known = {name: np.asarray(values, float) for name, values in curves.items()}
    known = {name: values for name, values in known.items() if np.isfinite(values).any()}
    losses = {name: values for name, values in known.items() if name.endswith("loss")}
    others = {name: values for name, values in known.items() if name not in losses}
    panels = [(label, part) for label, part in (("loss", losses), ("share or score", others)) if part]
    if not panels or not picture.is_file():
        return
    from PIL import Image

    with Image.open(picture) as stock:
        parts = [stock.convert("RGB"), *(_panel(label, part) for label, part in panels)]
    whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    with replacing(picture) as temporary:
        whole.save(temporary, format="PNG")


def _panel(label: str, curves: Mapping[str, np.ndarray]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=PANEL_INCHES, dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(np.arange(len(values)), values, label=name, linewidth=4, marker="o" if len(values) == 1 else None)
    axes.set_xlabel("epoch", fontsize=FONT_SIZE)
    axes.set_ylabel(label, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.legend(loc=(0, 1), ncols=4, fontsize=FONT_SIZE)
    figure.tight_layout()
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
