"""Learning curves of a run's trainings, from their logs, as lines of a picture that the page draws itself (SVG)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.run.training_log import Epoch, read_epochs

WIDTH, HEIGHT = 300, 150
"""Of one panel, in units of the picture."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Of fold 0, 1, ...: Okabe and Ito's, told apart by most eyes."""

POINTS = 200
"""A long training is shown by this many of its epochs."""


@dataclass(frozen=True)
class Line:
    """One training's curve: its name, colour, and ``points`` as SVG has them; ``dashed`` for validation."""

    name: str
    colour: str
    points: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves of one kind over one epoch axis; ``ticks`` are (height in the picture, value)."""

    title: str
    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]
    epochs: int


@dataclass(frozen=True)
class Curves:
    """The trainings of a round: their fold names with colours, and the panels of loss and Dice."""

    name: str
    folds: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]


def learning_curves(run: Run) -> list[Curves]:
    """The curves of every round that has trained at least two epochs; the coarse model's first."""
    found: dict[str, dict[str, list[Epoch]]] = {}
    for task in graph(run).values():
        if task.stage != "train":
            continue
        of = None if task.round is None else run.round(task.round)
        folder = (run.coarse_model if of is None else of.model) / f"fold_{task.fold}"
        epochs = read_epochs(folder)
        if len(epochs) > 1:
            found.setdefault("coarse" if of is None else of.name, {})[f"fold {task.fold}"] = epochs
    return [_curves(name, folds) for name, folds in found.items()]


def _curves(name: str, folds: dict[str, list[Epoch]]) -> Curves:
    colours = {fold: COLOURS[index % len(COLOURS)] for index, fold in enumerate(folds)}
    losses: list[tuple[str, Callable[[Epoch], float], bool]] = [
        ("training loss", lambda epoch: epoch.train_loss, False),
        ("validation loss", lambda epoch: epoch.val_loss, True),
    ]
    dice: list[tuple[str, Callable[[Epoch], float], bool]] = [("moving Dice", lambda epoch: epoch.moving_dice, False)]
    panels = [_panel("loss", folds, colours, losses, None), _panel("moving Dice", folds, colours, dice, (0.0, 1.0))]
    return Curves(name, tuple(colours.items()), tuple(panel for panel in panels if panel.lines))


def _panel(
    title: str,
    folds: dict[str, list[Epoch]],
    colours: dict[str, str],
    kinds: Sequence[tuple[str, Callable[[Epoch], float], bool]],
    span: tuple[float, float] | None,
) -> Panel:
    last = max(epochs[-1].number for epochs in folds.values())
    values = [value for epochs in folds.values() for _, of, _ in kinds for e in epochs if math.isfinite(value := of(e))]
    if not values:
        return Panel(title, (), (), last + 1)
    low, high = span or (min(values), max(values))
    high = high if high > low else low + 1.0

    def place(epoch: Epoch, value: float) -> str:
        return f"{WIDTH * epoch.number / max(1, last):.1f},{HEIGHT * (high - value) / (high - low):.1f}"

    lines = []
    for fold, epochs in folds.items():
        step = max(1, math.ceil(len(epochs) / POINTS))
        shown = [*epochs[::step], *([epochs[-1]] if (len(epochs) - 1) % step else [])]
        for kind, of, dashed in kinds:
            points = " ".join(place(e, of(e)) for e in shown if math.isfinite(of(e)))
            if points:
                lines.append(Line(f"{fold}, {kind}", colours[fold], points, dashed))
    ticks = tuple((HEIGHT * share, f"{high - share * (high - low):.2f}") for share in (0.0, 0.5, 1.0))
    return Panel(title, tuple(lines), ticks, last + 1)
