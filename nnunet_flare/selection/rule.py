"""What a selection rule is: a value that says what it judges a case by, and how.

Listing rules imports no NumPy, so that commands can name them; the functions of a rule are called with arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Need = Literal["members", "checkpoints", "rounds", "nothing"]
"""What must be there to compare: two or more members, the checkpoints of one training, an earlier round, or nothing."""

Table = Literal["pairs", "last", "rounds"]
"""The columns of a rule's table (cases, columns): the organs' Dice over all pairs of members, their Dice over the pairs
with the last member, or how much the label map changed from each round to the next."""

Absent = Literal["one", "skip", "zero", "expected"]
"""What pairs of members count that both lack an organ (:mod:`nnunet_flare.selection.absence`)."""


def every_value_missing(table: np.ndarray) -> np.ndarray:
    """(cases,) whether nothing is known of a case."""
    import numpy as np

    return np.isnan(table).all(axis=1)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of a round's organs, each (cases, organs) in 0 .. 1, absences counted as the round says.

    ``agreement`` is that of the members; ``steadiness`` that of a label with the labels of the scan's changed copies
    (:mod:`nnunet_flare.selection.perturb`), NaN unless the rule asks for copies. NaN is what is not known or skipped.
    """

    agreement: np.ndarray
    steadiness: np.ndarray


def agreement_alone(evidence: Evidence) -> np.ndarray:
    """(cases, organs) what most rules judge an organ by."""
    return evidence.agreement


@dataclass(frozen=True)
class Rule:
    """One selection rule.

    Attributes:
        name: as in ``selection.rule`` and ``--rule``.
        summary: one line on what a case's score is.
        needs: what must be there to compare.
        table: what it judges.
        score: (cases,) scores in 0 .. 1, higher is better, of a table (cases, columns). Agreements have 0 in place of
            NaN; changes come as they are.
        absent: what pairs that both lack an organ count, unless ``selection.absent`` says otherwise.
        organs: (cases, organs) values that ``score``, thresholds of single organs and organ-wise acceptance go by.
        copies: whether scans are labelled again in changed copies, which costs as many predictions.
        unknown: (cases,) which cases cannot be judged, of the table with its NaN.
    """

    name: str
    summary: str
    needs: Need
    table: Table
    score: Callable[[np.ndarray], np.ndarray]
    unknown: Callable[[np.ndarray], np.ndarray] = every_value_missing
    absent: Absent = "one"
    organs: Callable[[Evidence], np.ndarray] = agreement_alone
    copies: bool = False

    @property
    def judges_agreement(self) -> bool:
        """Whether a single model, which agrees with nobody, cannot be judged by it."""
        return self.needs in ("members", "checkpoints")
