"""What a round's rule judges its cases by: a value for every organ of every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_flare.recipes.parts import RoundSelection
from nnunet_flare.rounds.run.labelled_case import LabelledCase
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.labelled_anatomy import labelled_anatomy
from nnunet_flare.selection.absence import with_absence
from nnunet_flare.selection.anatomy import presence


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


def judge(run: Run, cases: Sequence[LabelledCase], organs: Mapping[str, int], selection: RoundSelection) -> Judgement:
    """Judge labelled cases by the agreement of their members.

    Args:
        run: the run, whose labelled cases say which absences are likely.
        cases: as labelled.
        organs: names and ids of the round's organs, the columns.
        selection: how the round selects.
    """
    shape = (len(cases), len(organs))
    agreement = np.array([[case.value(organ) for organ in organs] for case in cases]).reshape(shape)
    absent = np.array([[case.absence(organ) for organ in organs] for case in cases]).reshape(shape)
    expected = None
    if selection.absent == "expected" and (absent > 0).any():
        found = np.array([[case.present.get(organ, True) for organ in organs] for case in cases]).reshape(shape)
        expected = presence(labelled_anatomy(run, list(organs.values())), found)
    how = selection.absent if expected is not None or selection.absent != "expected" else "one"  # nothing is absent
    values = with_absence(agreement, absent, how, presence=expected)
    return Judgement(values, np.isnan(values) & ~np.isnan(agreement))
