"""``round-change``: how little the label map changed from round to round (blackbean, FLARE22).

The score is 1 / (1 + mean change), of a table (cases, pairs of consecutive rounds) of
:func:`nnunet_flare.selection.change.label_change`: in 0 .. 1, higher is better, in the order of the paper's
uncertainty. One NaN is enough to refuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_flare.selection.rule import Rule

if TYPE_CHECKING:
    import numpy as np


def steadiness(table: np.ndarray) -> np.ndarray:
    import numpy as np

    return 1.0 / (1.0 + np.nan_to_num(table.mean(axis=1), nan=np.inf))


def any_value_missing(table: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.isnan(table).any(axis=1)


RULE = Rule(
    "round-change", "how little the label map changed (blackbean)", "rounds", "rounds", steadiness, any_value_missing
)
