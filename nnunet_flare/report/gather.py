"""Everything the report shows, read from a run's folder: nothing is written and nothing heavy is imported."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.documents import flat
from nnunet_flare.errors import FlareError, InputError
from nnunet_flare.files import read_json
from nnunet_flare.labels import drawn_ids
from nnunet_flare.recipes.load import load_recipe, shipped_recipes
from nnunet_flare.rounds.run.configurations import read_plans
from nnunet_flare.rounds.run.dataset import base_table, dataset_json, foreground_ids, organ_ids
from nnunet_flare.rounds.run.labelled_case import LabelledCase, read_labelled_case
from nnunet_flare.rounds.run.ledger import DECISIONS, Entry, read_decisions
from nnunet_flare.rounds.run.loops import annotated_of
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import MARKER, is_marked
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.stages.arrays import network_spacing_mm, read_array, read_properties
from nnunet_flare.rounds.stages.evaluate import held_out_dice, held_out_organs
from nnunet_flare.rounds.stages.label_maps import ignore_label
from nnunet_flare.selection.agreement import membership

log = logging.getLogger(__name__)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Whiskers, box and median of the agreement plots."""


@dataclass(frozen=True)
class Row:
    """One case in one round, as the table shows it. ``least`` is the organ that the members agree on least;
    ``mean`` the agreement over the organs, None for an ensemble of one; ``absent`` the organs that no member found, of
    which there is no agreement to show.
    """

    entry: Entry
    mean: float | None
    least: str | None
    volume_ml: dict[str, float]
    outside: tuple[str, ...]
    members: int
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoundFigures:
    """One round's figures; ``validation`` is the members' mean Dice on their own validation folds.

    ``absent`` says in how many cases no member found an organ; ``agreement`` leaves these out. ``held_out_organs`` is
    the Dice on the held-out cases by organ.
    """

    number: int
    name: str
    counts: dict[str, int]
    mean_agreement: float | None
    held_out: float | None
    validation: float | None
    agreement: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, int] = field(default_factory=dict)
    held_out_organs: dict[str, float] = field(default_factory=dict)

    @property
    def set_aside(self) -> int:
        """Cases that are not judged: their scan is odd, or could not be read or labelled."""
        return self.counts.get("odd", 0) + self.counts.get("failed", 0)


@dataclass(frozen=True)
class RunReport:
    """What there is to show of a run.

    ``organs`` are the label ids of each organ or region, ``drawn`` the one that it is drawn with; ``ranges`` the
    smallest and largest volume (ml) in the labelled set.
    """

    run: Run
    organs: dict[str, tuple[int, ...]]
    drawn: dict[str, int]
    rows: list[Row]
    rounds: list[RoundFigures]
    ranges: dict[str, tuple[float, float]]
    seconds: dict[str, float]
    settings: list[tuple[str, str, str | None]]


def gather(run: Run) -> RunReport:
    """Read a run.

    Raises:
        InputError: when the run has no dataset yet.
    """
    try:
        organs, drawn = organ_ids(run), drawn_ids(dataset_json(run))
    except OSError as error:
        raise InputError(f"{run.root}: its dataset cannot be read ({error})") from error
    ranges = labelled_volumes(run, organs)
    rows, rounds = [], []
    for number in range(len(run.rounds)):
        entries = read_decisions(run.paths, number)
        rows += [_row(run, entry, organs, ranges) for entry in entries]
        rounds.append(_round(run, number, rows[len(rows) - len(entries) :], list(organs)))
    return RunReport(run, organs, drawn, rows, rounds, ranges, _seconds(run), _settings(run))


def _row(run: Run, entry: Entry, organs: Collection[str], ranges: dict[str, tuple[float, float]]) -> Row:
    path = run.paths.case(entry.round, entry.case)
    remedy = (
        f"remove it, and its volumes are left out; or label the case again with flare-pseudolabel retry -o {run.root}"
    )
    labelled = read_labelled_case(path, remedy=remedy) if path.is_file() else LabelledCase()
    volumes = {organ: float(mm3) / 1000 for organ, mm3 in labelled.volume_mm3.items() if organ in organs}
    absent = tuple(o for o in entry.agreement if o in organs and not _is_present(entry, labelled, o))
    seen = {o: v for o, v in entry.agreement.items() if o in organs and v is not None and o not in absent}
    outside = [o for o, ml in volumes.items() if o in ranges and not ranges[o][0] <= ml <= ranges[o][1]]
    least = min(seen, key=lambda organ: seen[organ]) if seen else None
    return Row(entry, _mean(entry), least, volumes, tuple(outside), labelled.members, absent)


def _is_present(entry: Entry, labelled: LabelledCase, organ: str) -> bool:
    """Whether any member found an organ; ledgers of older versions leave that to the case's own file."""
    return entry.present.get(organ, labelled.present.get(organ, True))


def _mean(entry: Entry) -> float | None:
    return entry.mean_organ if any(value is not None for value in entry.agreement.values()) else None


def _round(run: Run, number: int, rows: Sequence[Row], organs: Sequence[str]) -> RoundFigures:
    entries = [row.entry for row in rows]
    means = [mean for entry in entries if (mean := _mean(entry)) is not None]
    agreement: dict[str, list[float]] = {}
    absent: dict[str, int] = {}
    for organ in organs:
        found = [row.entry.agreement.get(organ) for row in rows if organ not in row.absent]
        values = [value for value in found if value is not None]
        absent[organ] = sum(organ in row.absent for row in rows)
        if values:
            agreement[organ] = [float(q) for q in np.quantile(values, QUANTILES)]
    return RoundFigures(
        number=number,
        name=run.round(number).name,
        counts={d: sum(entry.decision == d for entry in entries) for d in DECISIONS} if entries else {},
        mean_agreement=float(np.mean(means)) if means else None,
        held_out=held_out_dice(run, number),
        validation=_validation_dice(run, number),
        agreement=agreement,
        absent=absent,
        held_out_organs=held_out_organs(run, number),
    )


def _validation_dice(run: Run, number: int) -> float | None:
    """Mean foreground Dice over the round's folds, from nnU-Net's own ``summary.json``; fold ``all`` has none."""
    values, of = [], run.round(number)
    paths = [of.model / f"fold_{fold}" / "validation" / "summary.json" for fold in of.folds if fold != "all"]
    for path in filter(Path.is_file, paths):
        shape = {"foreground_mean": {"Dice": object}}
        value = read_json(path, shape, remedy="remove it, and the report works without it")["foreground_mean"]["Dice"]
        if isinstance(value, (int, float)) and np.isfinite(value):  # NaN where no validation case has an organ
            values.append(float(value))
    return float(np.mean(values)) if values else None


def labelled_volumes(run: Run, organs: Mapping[str, Sequence[int]]) -> dict[str, tuple[float, float]]:
    """Smallest and largest volume in ml of each organ over the labelled cases that have it, on the network grid.

    Cases with voxels that nobody annotated are left out: how large their organs are is not known. So is a region of a
    partial case that does not have all of it annotated.
    """
    if not run.plans_file.is_file():
        return {}
    transpose = read_plans(run.plans_file, {"transpose_forward": [int]})["transpose_forward"]
    belongs, ignored = membership(list(organs.values()), ignore_label(run)), ignore_label(run)
    cases, every = base_table(run), foreground_ids(run)
    measured = []
    for path in sorted(run.base_data.glob("*_seg.b2nd")):
        name = path.name.removesuffix("_seg.b2nd")
        annotated = set(annotated_of(cases[name], every))
        known = [annotated.issuperset(ids) for ids in organs.values()]
        try:
            label = read_array(path)[0]
            properties = read_properties(path.with_name(f"{name}.pkl"))
        except OSError as error:
            log.warning("%s; left out of the volume ranges", error)
            continue
        counts = np.bincount(label[label > 0].astype(np.int64), minlength=ignored + 1)
        if not counts[ignored]:
            voxel_ml = float(np.prod(network_spacing_mm(properties, transpose, label.shape))) / 1000
            measured.append(belongs @ counts[:ignored] * voxel_ml * known)
    ranges = {}
    for column, organ in enumerate(organs):
        volumes = [float(found[column]) for found in measured if found[column]]
        if volumes:
            ranges[organ] = (min(volumes), max(volumes))
    return ranges


def _seconds(run: Run) -> dict[str, float]:
    """Time of the finished tasks by stage."""
    used: dict[str, float] = {}
    for task in graph(run).values():
        path = run.paths.done(task.name)
        if is_marked(path):
            used[task.stage] = used.get(task.stage, 0.0) + float(read_json(path, MARKER)["seconds"])
    return used


def _settings(run: Run) -> list[tuple[str, str, str | None]]:
    """(key, value, value of the shipped recipe where it differs) of every setting of the recipe."""
    mine = flat(run.recipe.model_dump(mode="json"))
    shipped: dict[str, Any] = mine
    if run.recipe.name in shipped_recipes():
        try:
            shipped = flat(load_recipe(run.recipe.name).model_dump(mode="json"))
        except FlareError as error:
            log.warning("the shipped recipe %s cannot be compared: %s", run.recipe.name, error)
    rows = []
    for key in mine | shipped:
        value, original = shown(mine.get(key)), shown(shipped.get(key))
        rows.append((key, value, original if original != value else None))
    return rows


def shown_as(decision: str) -> str:
    """A decision for people: the difference between odd scans and failed ones stands in the reason alone."""
    return "set aside" if decision in ("odd", "failed") else decision


def shown(value: Any) -> str:
    """A setting's value for people."""
    if value is None or value in ({}, []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
