"""Merging label maps of several sources and the ground truth of partly annotated cases (HKUST, FLARE23).

All functions take and give label maps (Z, Y, X) of one case on one grid. What the paper's scripts do is a choice of
arguments here; the ground truth wins over everything, and its silence counts too: an organ that is annotated lies
exactly where the annotation says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

OnDisagree = Literal["ignore", "zero", "first"]


@dataclass(frozen=True, eq=False)
class Source:
    """A label map, and the ids that whoever made it knows (None: all); it abstains from the others."""

    labels: np.ndarray
    knows: frozenset[int] | None = None

    def abstains_from(self, labels: np.ndarray) -> np.ndarray:
        """Where this source is silent about the organ that ``labels`` names."""
        if self.knows is None:
            return np.zeros(labels.shape, dtype=bool)
        unknown = np.ones(256, dtype=bool)
        unknown[[0, *self.knows]] = False
        return (self.labels == 0) & unknown[labels]

    def without(self, ids: Collection[int]) -> Source:
        """The same source silent about ``ids``."""
        return Source(np.where(np.isin(self.labels, list(ids)), 0, self.labels).astype(np.uint8), self.knows)


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged label map (uint8), and how many voxels the sources disagreed on and the ground truth decided."""

    labels: np.ndarray
    disagreeing: int = 0
    from_truth: int = 0

    @property
    def is_constant(self) -> bool:
        """Whether the map holds one value only, so that nothing can be learnt from it."""
        return bool(self.labels.min() == self.labels.max())


def consensus(sources: Sequence[Source], *, on_disagree: OnDisagree, ignore_label: int) -> tuple[np.ndarray, int]:
    """The label on which all sources agree; the order of the sources does not matter, except for ``first``.

    Sources that do not know an organ do not vote on it: they agree with the others where they say background.

    Args:
        sources: at least one.
        on_disagree: what a voxel becomes where they differ: ``ignore_label``, background (the paper's, which teaches
            false negatives), or the label of the first source.
        ignore_label: one above the highest label.

    Returns:
        The label map, uint8, and the number of voxels on which the sources disagree.
    """
    named = np.maximum.reduce([source.labels for source in sources])
    differ = np.zeros(named.shape, dtype=bool)
    for source in sources:
        differ |= (source.labels != named) & ~source.abstains_from(named)
    labels = named.astype(np.uint8)
    if on_disagree == "first":
        labels[differ] = sources[0].labels[differ]
    else:
        labels[differ] = ignore_label if on_disagree == "ignore" else 0
    return labels, int(differ.sum())


def complete(truth: np.ndarray, pseudo: np.ndarray, *, annotated: Collection[int]) -> np.ndarray:
    """A training label (nnU-Net's ``_seg``, -1 outside the crop) whose missing organs a pseudo-label fills in.

    Args:
        truth: the annotation.
        pseudo: a model's label, -1 outside.
        annotated: ids that are annotated; what the model says of them is not taken, here or elsewhere.

    Returns:
        ``truth`` wherever it names an organ, else what ``pseudo`` says of the other organs.
    """
    filled = np.where(np.isin(pseudo, list(annotated)), 0, pseudo)
    labels: np.ndarray = np.where(truth > 0, truth, np.where(filled > 0, filled, truth))
    return labels.astype(truth.dtype, copy=False)


def union(sources: Sequence[Source], ids: Sequence[int]) -> np.ndarray:
    """The first source, over which every further one writes its voxels of ``ids``, in that order (``ensembleV2``).

    With ``ids`` the tumour alone and the tumour model second this is the paper's tumour over organ.
    """
    labels = sources[0].labels.astype(np.uint8, copy=True)
    for source in sources[1:]:
        for number in ids:
            labels[source.labels == number] = number
    return labels


def merge(
    sources: Sequence[Source],
    *,
    truth: np.ndarray | None = None,
    annotated: Collection[int] = (),
    union_of: Sequence[int] = (),
    on_disagree: OnDisagree = "ignore",
    ignore_label: int,
    protect: Sequence[int] = (),
) -> Merged:
    """One label map of several sources and a partial ground truth.

    Args:
        sources: label maps, the base first.
        truth: the ground truth, 0 where it says nothing.
        annotated: ids that are annotated in it; its voxels of ``ignore_label`` nobody annotated.
        union_of: ids of which the union is taken, the rest being the base's; empty: consensus of the sources.
        on_disagree: see :func:`consensus`.
        ignore_label: one above the highest label.
        protect: ids that one source suffices for, wherever it has them (a later one wins over an earlier); only the
            ground truth overrules them.

    Returns:
        The merged map. For every annotated id it is equal to ``truth`` in every voxel, and it is ignored where the
        truth is.
    """
    if truth is not None:
        sources = [source.without(annotated) for source in sources]
    disagreeing = 0
    if union_of:
        labels = union(sources, union_of)
    else:
        labels, disagreeing = consensus(sources, on_disagree=on_disagree, ignore_label=ignore_label)
    for number in protect:
        for source in sources:
            labels[source.labels == number] = number
    if truth is None:
        return Merged(labels, disagreeing)
    decided = np.isin(truth, [*annotated, ignore_label])
    labels[decided] = truth[decided]
    return Merged(labels, disagreeing, int(decided.sum()))
