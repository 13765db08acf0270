"""``steady``: the organs' mean of two agreements, of the members with each other and of the label with itself.

The second is between the labels of a scan and of copies of it that are moved, brighter or darker
(:mod:`nnunet_flare.selection.perturb`). Members that learnt from the same cases share errors, and then agree and are
wrong; their label often does not survive such a change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_flare.selection.rule import Evidence, Rule

if TYPE_CHECKING:
    import numpy as np


def both(evidence: Evidence) -> np.ndarray:
    return (evidence.agreement + evidence.steadiness) / 2


def mean_of_organs(table: np.ndarray) -> np.ndarray:
    return table.mean(axis=1)


RULE = Rule(
    "steady",
    "the organs' mean of two agreements: of members, and of labels of changed copies of the scan",
    "members",
    "pairs",
    mean_of_organs,
    absent="expected",
    organs=both,
    copies=True,
)
