"""What a round's rule judges its cases by: a value for every organ of every case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_flare.recipes.parts import RoundSelection
from nnunet_flare.rounds.run.labelled_case import LabelledCase
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.labelled_anatomy import labelled_anatomy
from nnunet_flare.selection.absence import with_absence
from nnunet_flare.selection.anatomy import presence
from nnunet_flare.selection.rule import Evidence


@dataclass(frozen=True, eq=False)
class Judgement:
    """Of the cases and organs of a round, each (cases, organs).

    Attributes:
        values: agreement, organs that members missed together counted as ``selection.absent`` says; NaN where it could
            not be computed or does not count.
        skipped: bool, where it does not count because no member found the organ.
    """

    values: np.ndarray
    skipped: np.ndarray

    def rows(self, rows: Sequence[int]) -> Judgement:
        """Some of the cases."""
        return Judgement(self.values[rows], self.skipped[rows])


def judge(
    run: Run, cases: Sequence[LabelledCase], organs: Mapping[str, Sequence[int]], selection: RoundSelection
) -> Judgement:
    """Judge labelled cases by the agreement of their members.

    Args:
        run: the run, whose labelled cases say which absences are likely.
        cases: as labelled.
        organs: names and ids of the round's organs, the columns.
        selection: how the round selects.
    """
    expected = _presence(run, cases, organs, selection)
    agreement = _table(cases, organs, lambda case, organ: case.value(organ))
    absent = _table(cases, organs, lambda case, organ: case.absence(organ))
    steady = _table(cases, organs, lambda case, organ: case.steadiness(organ))
    absent_copies = _table(cases, organs, lambda case, organ: case.absent_copies.get(organ, 0.0))
    found = Evidence(
        with_absence(agreement, absent, selection.absent, presence=expected),
        with_absence(steady, absent_copies, selection.absent, presence=expected),
    )
    values = selection.rule.organs(found)
    unknown = np.isnan(agreement) | (np.isnan(steady) if selection.rule.copies else False)
    return Judgement(values, np.isnan(values) & ~unknown)


def _table(
    cases: Sequence[LabelledCase], organs: Mapping[str, Sequence[int]], value: Callable[[LabelledCase, str], float]
) -> np.ndarray:
    """(cases, organs) of one value."""
    return np.array([[value(case, organ) for organ in organs] for case in cases], dtype=float).reshape(-1, len(organs))


def _presence(
    run: Run, cases: Sequence[LabelledCase], organs: Mapping[str, Sequence[int]], selection: RoundSelection
) -> np.ndarray | None:
    """(cases, organs) probability that an organ is there, where the round asks for it; 1 where none was missed."""
    if selection.absent != "expected":
        return None
    missed = any(case.absence(organ) or case.absent_copies.get(organ) for case in cases for organ in organs)
    if not missed:  # the labelled cases need not be read
        return np.ones((len(cases), len(organs)))
    found = _table(cases, organs, lambda case, organ: case.present.get(organ, True))
    return presence(labelled_anatomy(run, list(organs.values())), found > 0)
