"""Pictures of scores and of resource curves, as PNG."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.evaluation.table import MEASURES, ScoreTable
from nnunet_flare.files import replacing

log = logging.getLogger(__name__)

COLOURS: tuple[str, ...] = ("#0072b2", "#d55e00")
"""Blue and vermilion of Okabe and Ito: told apart by colour-blind readers and in grey."""

POINTS_UP_TO = 200
"""Single cases are drawn as points up to this many; more would hide the boxes."""


def draw(drawing: Callable[[], None], picture: Path) -> bool:
    """Draw a picture of results that are written already; where it cannot be drawn that is said, and nothing else.

    matplotlib needs fonts and a folder to write to, which a locked-down account may lack. A picture of an earlier call,
    which no longer shows the results, is removed.
    """
    try:
        drawing()
        return True
    except Exception as error:
        log.warning(
            "%s was not drawn (%s: %s)", picture, type(error).__name__, " ".join(str(error).split()) or "no reason"
        )
        with suppress(OSError):
            picture.unlink()
        return False


def box_plots(tables: Mapping[str, ScoreTable], path: Path) -> None:
    """Box plots of DSC and NSD per structure, one box per table (at most two) side by side, written by rename."""
    figure = _figure(11, 7.5)
    axes = figure.subplots(len(MEASURES), 1, sharex=True)
    first = next(iter(tables.values()))
    for axis, measure in zip(axes, MEASURES, strict=True):
        for place, table in enumerate(tables.values()):
            _boxes(axis, table.values(measure), place, len(tables))
        axis.set_ylabel(measure)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(axis="y", color="0.85", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[-1].set_xticks(range(len(first.structures)), [s.short for s in first.structures], rotation=35, ha="right")
    axes[-1].set_xlim(-0.6, len(first.structures) - 0.4)
    for place, (name, table) in enumerate(tables.items()):
        means = ", ".join(f"mean {measure} {table.mean(measure):.4f}" for measure in MEASURES)
        label = f"{name}: {means} ({len(table.rows)} cases)"
        axes[0].plot([], [], color=COLOURS[place], linewidth=6, label=label)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    _save(figure, path)


def _boxes(axis: Any, values: np.ndarray, place: int, of: int) -> None:
    width = 0.6 / of
    positions = np.arange(values.shape[1]) + (place - (of - 1) / 2) * width
    colour = COLOURS[place]
    axis.boxplot(
        values,
        positions=positions,
        widths=width * 0.85,
        showfliers=len(values) > POINTS_UP_TO,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": colour, "alpha": 0.3, "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 1.6},
        whiskerprops={"color": colour},
        capprops={"color": colour},
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": colour},
    )
    if len(values) <= POINTS_UP_TO:
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(values)) * width
        for position, column in zip(positions, values.T, strict=True):
            axis.plot(position + spread, column, ".", color=colour, markersize=3, alpha=0.6)


def curves(
    seconds: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float | None]]], title: str, path: Path
) -> None:
    """Curves over time, one panel per unit with its named curves, written by rename; unknown values are gaps."""
    figure = _figure(9, 2.4 * len(panels) + 0.6)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (unit, lines) in zip(axes, panels.items(), strict=True):
        for colour, (name, values) in zip(COLOURS, lines.items(), strict=False):
            axis.plot(seconds, [np.nan if v is None else v for v in values], color=colour, linewidth=1.2, label=name)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0, top=1.08 * max(1.0, *(v for line in lines.values() for v in line if v is not None)))
        axis.grid(color="0.9", linewidth=0.6)
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize="small")
    axes[0].set_title(title, fontsize="medium", loc="left")
    axes[-1].set_xlabel("time [s]")
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
