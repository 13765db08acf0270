"""Agreement of the members of an ensemble: the Dice of every pair of their label maps, organ by organ.

Radboud's FLARE22 system takes a pseudo-label when, over all pairs of five folds, the mean Dice of its worst organ is at
least 0.9. Counting is done once for all pairs and organs: only voxels where some member sees an organ matter, and there
the members' labels, packed into one number, are counted with a single histogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

MAX_PACKED_BINS = 1 << 22
"""Largest histogram of packed labels (32 MiB of counts); with more members or labels the pairs are counted singly."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Pairwise Dice of label maps.

    Attributes:
        pairs: indices of the compared members.
        dice: (pairs, organs) Dice. Absent in both members: 1, in one: 0.
        present: (organs,) whether any member sees the organ.
        voxels: (members, organs) voxel counts.
    """

    pairs: tuple[tuple[int, int], ...]
    dice: np.ndarray
    present: np.ndarray
    voxels: np.ndarray

    @property
    def per_organ(self) -> np.ndarray:
        """(organs,) mean over the pairs."""
        return self.dice.mean(axis=0)

    @property
    def with_last(self) -> np.ndarray:
        """(organs,) mean over the pairs of the last member: how stable checkpoints of one training are (Fosun)."""
        return self.dice[self._pairs_of_last()].mean(axis=0)

    @property
    def absent(self) -> np.ndarray:
        """(organs,) share of the pairs that both lack the organ, whose Dice is 1 by definition."""
        return self._both_lack().mean(axis=0)

    @property
    def absent_with_last(self) -> np.ndarray:
        """(organs,) the same of the pairs of the last member."""
        return self._both_lack()[self._pairs_of_last()].mean(axis=0)

    def _both_lack(self) -> np.ndarray:
        lacks = self.voxels == 0
        return np.array([lacks[a] & lacks[b] for a, b in self.pairs])

    def _pairs_of_last(self) -> list[bool]:
        last = max(member for pair in self.pairs for member in pair)
        return [last in pair for pair in self.pairs]


def pairwise_dice(
    labels: Sequence[np.ndarray], num_labels: int, organs: Sequence[Sequence[int]] | None = None
) -> Agreement:
    """Dice of every pair of label maps, organ by organ.

    Args:
        labels: at least two integer arrays of one shape, ids from 0 to ``num_labels`` - 1.
        num_labels: number of labels, background included.
        organs: label ids of each organ; several for a region, whose labels count as one. None: one organ for each
            label above 0.

    Raises:
        ValueError: for fewer than two maps, differing shapes or ids out of range.
    """
    if len(labels) < 2:
        raise ValueError(f"found {len(labels)} label map, expected at least two to compare")
    if len({array.shape for array in labels}) != 1:
        raise ValueError(f"label maps differ in shape: {[array.shape for array in labels]}")
    members = len(labels)
    flat = [np.ascontiguousarray(array).reshape(-1) for array in labels]
    foreground = flat[0] != 0
    for array in flat[1:]:
        np.logical_or(foreground, array, out=foreground)
    seen = np.flatnonzero(foreground)
    values = [array[seen] for array in flat]
    top = max((int(v.max()) for v in values if v.size), default=0)
    if top >= num_labels or any(v.size and v.min() < 0 for v in values if v.dtype.kind == "i"):
        raise ValueError(f"label ids must lie in 0 .. {num_labels - 1}, found {top}")
    pairs = tuple(combinations(range(members), 2))
    if num_labels**members <= MAX_PACKED_BINS:
        tables = _packed_tables(values, num_labels, pairs)
    else:
        tables = [_pair_table(values[a], values[b], num_labels) for a, b in pairs]
    belongs = membership(organs, num_labels)
    dice = np.empty((len(pairs), len(belongs)))
    voxels = np.zeros((members, len(belongs)), dtype=np.int64)
    for row, ((a, b), table) in enumerate(zip(pairs, tables, strict=True)):
        both = ((belongs @ table) * belongs).sum(axis=1)
        size_a, size_b = belongs @ table.sum(axis=1), belongs @ table.sum(axis=0)
        voxels[a], voxels[b] = size_a, size_b
        total = size_a + size_b
        dice[row] = np.where(total > 0, 2.0 * both / np.maximum(total, 1), 1.0)
    return Agreement(pairs, dice, np.asarray(voxels.any(axis=0)), voxels)


def membership(organs: Sequence[Sequence[int]] | None, num_labels: int) -> np.ndarray:
    """(organs, num_labels) 1 where a label belongs to an organ; None: each label above 0 is one."""
    if organs is None:
        return np.eye(num_labels, dtype=np.int64)[1:]
    table = np.zeros((len(organs), num_labels), dtype=np.int64)
    for row, ids in enumerate(organs):
        table[row, list(ids)] = 1
    return table


def _packed_tables(values: list[np.ndarray], num_labels: int, pairs: tuple[tuple[int, int], ...]) -> list[np.ndarray]:
    """Contingency tables (num_labels, num_labels) of all pairs from one histogram over all members."""
    code = values[0].astype(np.int32)
    for array in values[1:]:
        code *= num_labels
        code += array
    members = len(values)
    joint = np.bincount(code, minlength=num_labels**members).reshape((num_labels,) * members)
    return [joint.sum(axis=tuple(m for m in range(members) if m not in pair)) for pair in pairs]


def _pair_table(a: np.ndarray, b: np.ndarray, num_labels: int) -> np.ndarray:
    code = a.astype(np.int32) * num_labels + b
    return np.bincount(code, minlength=num_labels**2).reshape(num_labels, num_labels)
