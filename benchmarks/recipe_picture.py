"""The picture of ``recipe_evidence.py``: the arms' Dice with intervals and seeds, and how well the rules rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recipe_statistics import Interval

from nnunet_flare.files import replacing

BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "0.45"
"""Of Okabe and Ito's colours: told apart by colour-blind readers and in grey."""


def draw(
    arms: Sequence[tuple[str, Interval, bool]],
    ranks: Sequence[tuple[str, Interval]],
    path: Path,
    *,
    control: float | None,
) -> None:
    """Draw to a PNG file.

    Args:
        arms: title, Dice, and whether it is one that the others are compared with (grey).
        ranks: what ranks which labels, and Spearman's correlation.
        path: the file.
        control: where a dotted line stands for the control's Dice.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.6 + 0.32 * (len(arms) + len(ranks))), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=(max(1, len(arms)), max(1, len(ranks))))
    rows = [(title, found, GREY if is_reference else BLUE) for title, found, is_reference in arms]
    _dots(upper, rows, "mean Dice on the test scans (line: 95 % interval)", has_interval=True)
    ranked = [(title, found, BLUE) for title, found in ranks]
    _dots(lower, ranked, "Spearman of a rule's score and the true Dice", has_interval=False)
    if control is not None:
        upper.axvline(control, color=GREY, linewidth=0.8, linestyle=":")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _dots(axis: Any, rows: Sequence[tuple[str, Interval, str]], label: str, *, has_interval: bool) -> None:
    for place, (_, interval, colour) in enumerate(rows):
        if has_interval and not np.isnan(interval.low):
            axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
        axis.plot(interval.values, [place] * len(interval.values), "o", color=VERMILION, markersize=3.5, zorder=3)
        axis.plot(interval.mean, place, "D", color=colour, markersize=6)
    axis.set_yticks(range(len(rows)), [title for title, *_ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(f"{label}; diamond: mean, dots: seeds", fontsize="small")
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
