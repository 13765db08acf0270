"""``stability``: how well earlier checkpoints of a training agree with its last, as mean over organs (Fosun, FLARE22).

Its table compares with the last checkpoint alone (:attr:`nnunet_flare.selection.agreement.Agreement.with_last`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_flare.selection.rule import Rule

if TYPE_CHECKING:
    import numpy as np


def mean_of_organs(table: np.ndarray) -> np.ndarray:
    return table.mean(axis=1)


RULE = Rule(
    "stability",
    "earlier checkpoints' mean agreement with the last (Fosun)",
    "checkpoints",
    "last",
    mean_of_organs,
    absent="skip",
)
