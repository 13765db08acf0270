"""``mean-organ``: the mean over organs, which ranked true quality best in our trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_flare.selection.rule import Rule

if TYPE_CHECKING:
    import numpy as np


def mean_of_organs(table: np.ndarray) -> np.ndarray:
    return table.mean(axis=1)


RULE = Rule("mean-organ", "the organs' mean agreement", "members", "pairs", mean_of_organs, absent="expected")
