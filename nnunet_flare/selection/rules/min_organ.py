"""``min-organ``: a case is as good as its worst organ (Radboud, FLARE22)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_flare.selection.rule import Rule

if TYPE_CHECKING:
    import numpy as np


def worst_organ(table: np.ndarray) -> np.ndarray:
    return table.min(axis=1)


RULE = Rule("min-organ", "the worst organ's agreement (Radboud)", "members", "pairs", worst_organ)
