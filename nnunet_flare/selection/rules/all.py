"""``all``: every case that was labelled is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_flare.selection.rule import Rule

if TYPE_CHECKING:
    import numpy as np


def one(table: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.ones(len(table))


def never(table: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.zeros(len(table), dtype=bool)


RULE = Rule("all", "every case that was labelled", "nothing", "pairs", one, never)
