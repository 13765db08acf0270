"""A page that compares two runs: rounds, held-out Dice by organ, cases that they decide otherwise, and settings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.documents import flat
from nnunet_flare.errors import InputError
from nnunet_flare.files import write_text
from nnunet_flare.report.gather import RoundFigures, RunReport, gather, shown, shown_as
from nnunet_flare.report.rendering import environment, static_text
from nnunet_flare.rounds.run.manifest import Run

SHOWN_CASES = 200
"""Cases that are decided otherwise; of more, the rest is counted."""


@dataclass(frozen=True)
class Pair:
    """A value of both runs, None where one has none."""

    name: str
    a: float | None
    b: float | None

    @property
    def gain(self) -> float | None:
        """By how much the second is larger."""
        return None if self.a is None or self.b is None else self.b - self.a


def write_comparison(a: Run, b: Run) -> Path:
    """Write a page into the first run's report folder that compares it with the second; returns it.

    Raises:
        InputError: as :func:`check_comparable`.
    """
    check_comparable(a, b)
    first, second = gather(a), gather(b)
    page = a.paths.report / f"compared_with_{b.root.resolve().name}.html"
    text = environment().get_template("compare.html.j2").render(
        a=a,
        b=b,
        rounds=_rounds(first, second),
        held_out=organ_pairs(_last_held_out(first), _last_held_out(second)),
        decided=(differing := decided_otherwise(first, second))[:SHOWN_CASES],
        more=max(0, len(differing) - SHOWN_CASES),
        common=len({row.entry.case for row in first.rows} & {row.entry.case for row in second.rows}),
        settings=different_settings(a, b),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )  # fmt: skip
    write_text(a.paths.report / "report.css", static_text("report.css"))
    write_text(page, text)
    return page


def check_comparable(a: Run, b: Run) -> None:
    """Whether a page of both makes sense.

    Raises:
        InputError: when both are the same run, or are of different datasets.
    """
    if a.root.resolve() == b.root.resolve():
        raise InputError(f"--compare {b.root}: is the run itself; give another run")
    if a.settings.dataset != b.settings.dataset:
        raise InputError(
            f"--compare {b.root}: is a run on {b.settings.dataset}, this one on {a.settings.dataset}; their cases and "
            "scores cannot be compared"
        )


def _rounds(a: RunReport, b: RunReport) -> list[tuple[str, RoundFigures | None, RoundFigures | None]]:
    """Rounds of both by name, the final ones last."""
    found = [{r.name: r for r in report.rounds} for report in (a, b)]
    numbers = {r.name: r.number for report in (a, b) for r in report.rounds}
    names = sorted(numbers, key=lambda name: (not name.startswith("r"), numbers[name]))
    return [(name, found[0].get(name), found[1].get(name)) for name in names]


def _last_held_out(report: RunReport) -> RoundFigures | None:
    """The last round that was measured on held-out cases."""
    return next((r for r in reversed(report.rounds) if r.held_out is not None), None)


def organ_pairs(a: RoundFigures | None, b: RoundFigures | None) -> list[Pair]:
    """Held-out Dice of both by organ, with the mean first; empty where neither was measured."""
    if a is None and b is None:
        return []
    values: list[Mapping[str, float]] = [{} if r is None else r.held_out_organs for r in (a, b)]
    means = [None if r is None else r.held_out for r in (a, b)]
    organs = dict.fromkeys([*values[0], *values[1]])
    return [Pair("mean", *means), *(Pair(organ, values[0].get(organ), values[1].get(organ)) for organ in organs)]


def decided_otherwise(a: RunReport, b: RunReport) -> list[tuple[str, str, str, str, str]]:
    """(case, decision and reason of the first, of the second) of cases that only one of them takes at last."""
    last = [{row.entry.case: row.entry for row in report.rows} for report in (a, b)]  # rows come round by round
    both = sorted(last[0].keys() & last[1].keys())
    entries = [(case, last[0][case], last[1][case]) for case in both]
    return [
        (case, shown_as(one.decision), one.reason, shown_as(other.decision), other.reason)
        for case, one, other in entries
        if (one.decision == "taken") != (other.decision == "taken")
    ]


def different_settings(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """(key, value of the first, of the second) of every setting of the recipes that differs."""
    values = [flat(run.recipe.model_dump(mode="json")) for run in (a, b)]
    return [
        (key, shown(values[0].get(key)), shown(values[1].get(key)))
        for key in dict.fromkeys([*values[0], *values[1]])
        if shown(values[0].get(key)) != shown(values[1].get(key))
    ]
