"""``trimmed-min``: the third smallest organ, which forgives two hard ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_flare.selection.rule import Rule

if TYPE_CHECKING:
    import numpy as np


RANK = 3
"""The smallest organ that counts; of fewer organs the largest of them."""


def third_smallest_organ(table: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.sort(table, axis=1)[:, min(RANK, table.shape[1]) - 1]


RULE = Rule(
    "trimmed-min", "the third smallest organ's agreement", "members", "pairs", third_smallest_organ, absent="expected"
)
