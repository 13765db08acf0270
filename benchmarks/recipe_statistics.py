"""The figures of ``recipe_evidence.py``: results read, differences by test case, and intervals from a bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recipe_systems import CONTROL, EPOCHS, SYSTEMS, VARIANTS, System

from nnunet_flare.files import read_json

CONFIDENCE = 0.95
DRAWS = 10_000

Results = Mapping[str, Mapping[int, dict[str, Any]]]
"""Result files by arm and seed."""


@dataclass(frozen=True)
class Interval:
    """Mean of values by seed and its interval, NaN ends where there is nothing to draw from."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(by_seed: Sequence[Sequence[float]]) -> Interval:
    """Mean over seeds and cases, and its interval: seeds are drawn with replacement, then the cases of each of them.

    A seed has scans and random streams of its own, so that both are drawn. With one seed the cases alone are, and the
    interval says nothing about other seeds.
    """
    seeds = [np.asarray(values, dtype=float) for values in by_seed if len(values)]
    if not seeds:
        return Interval(float("nan"), float("nan"), float("nan"), ())
    means = tuple(float(values.mean()) for values in seeds)
    stream = np.random.default_rng(0)
    drawn = np.zeros(DRAWS)
    for _ in seeds:
        chosen = stream.integers(len(seeds), size=DRAWS)
        for seed, values in enumerate(seeds):
            rows = np.flatnonzero(chosen == seed)
            drawn[rows] += values[stream.integers(values.size, size=(rows.size, values.size))].mean(axis=1)
    low, high = np.quantile(drawn / len(seeds), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.mean(means)), float(low), float(high), means)


def read_results(folder: Path) -> Results:
    """All result files, arms in the order of :data:`SYSTEMS` and :data:`VARIANTS`."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for system in (*SYSTEMS, *VARIANTS):
        for path in sorted(folder.glob(f"{system.name}_seed*.json")):
            document = read_json(path)
            found.setdefault(system.name, {})[int(document["seed"])] = document
    return found


def case_dice(document: Mapping[str, Any]) -> dict[str, float]:
    """Mean Dice of every test case over the organs that it has."""
    return {
        case: float(np.mean([value for value in row.values() if value is not None]))
        for case, row in document["dice"]["cases"].items()
    }


def dice(results: Results, name: str) -> Interval:
    """Mean test Dice of an arm."""
    return bootstrap([list(case_dice(found).values()) for found in results[name].values()])


def difference(results: Results, name: str, other: str) -> Interval:
    """An arm minus another, test case by test case, over the seeds that both have."""
    pairs = [(found, results[other][seed]) for seed, found in results[name].items() if seed in results.get(other, {})]
    rows = []
    for mine, theirs in pairs:
        a, b = case_dice(mine), case_dice(theirs)
        rows.append([a[case] - b[case] for case in a])
    return bootstrap(rows)


def control_of(system: System, results: Results, *, total: bool) -> str | None:
    """The supervised arm that an arm is compared with: of the same steps per network, or of the same in all.

    None where there is no such arm.
    """
    times = {system.epochs // EPOCHS if system.epochs > EPOCHS else 1}
    if total:
        times = {sum(found["steps"]) // min(found["steps"]) for found in results[system.name].values()}
    suffix = "" if system.augmentation == "stock" else f"_{system.augmentation}"
    names = [f"{CONTROL}{suffix}" if count == 1 else f"{CONTROL}_x{count}{suffix}" for count in times]
    return names[0] if len(names) == 1 and names[0] in {each.name for each in SYSTEMS} else None
