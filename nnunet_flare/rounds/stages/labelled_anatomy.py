"""What the labelled cases of a run say of each organ, from their preprocessed arrays (``selection.anatomy``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_flare.rounds.run.configurations import read_plans
from nnunet_flare.rounds.run.loops import annotated_of, true_cases
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import network_spacing_mm, read_array, read_properties
from nnunet_flare.rounds.stages.label_maps import ignore_label
from nnunet_flare.selection.agreement import membership
from nnunet_flare.selection.anatomy import Anatomy, anatomy_of

MAX_CASES = 50
"""Labelled cases that are read, evenly spread: more would cost minutes on thousands and change little."""


def labelled_anatomy(run: Run, organs: Sequence[Sequence[int]]) -> Anatomy:
    """Prevalence, neighbours and volumes of some organs in the labelled and partial cases of the run.

    A case with voxels that nobody annotated says nothing: what lies there is not known.

    Args:
        run: the run.
        organs: label ids of each.

    Raises:
        OSError: for an array that is missing or damaged; the message names the file.
    """
    cases, every = true_cases(run), sorted({label for ids in organs for label in ids})
    names = [name for name, case in cases.items() if annotated_of(case, every)]
    names = [names[index * len(names) // MAX_CASES] for index in range(MAX_CASES)] if len(names) > MAX_CASES else names
    ignored = ignore_label(run)
    transpose = read_plans(run.plans_file)["transpose_forward"]
    volumes = np.zeros((len(names), len(organs)))
    slices = np.zeros((len(names), len(organs), 2))
    annotated = np.zeros((len(names), len(organs)), dtype=bool)
    for row, name in enumerate(names):
        labels = read_array(run.base_data / f"{name}_seg.b2nd")[0]
        voxel_mm3 = np.prod(network_spacing_mm(read_properties(run.base_data / f"{name}.pkl"), transpose, labels.shape))
        volumes[row], slices[row] = sizes_and_slices(labels, organs, axis=list(transpose).index(0))
        volumes[row] *= voxel_mm3
        known = set(annotated_of(cases[name], every))
        annotated[row] = [known.issuperset(ids) and ignored not in labels for ids in organs]
    return anatomy_of(volumes, slices, annotated)


def sizes_and_slices(
    labels: np.ndarray, organs: Sequence[Sequence[int]], *, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """(organs,) voxels of each organ, and (organs, 2) its first slice along ``axis`` and the one after its last.

    Slices of an absent organ are 0 and 0.
    """
    lines = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    highest = max(max(ids) for ids in organs) + 1
    counts = np.array([np.bincount(line[(line > 0) & (line < highest)], minlength=highest) for line in lines])
    counts = counts @ membership(organs, highest).T
    slices = np.zeros((len(organs), 2))
    for column in np.flatnonzero(counts.any(axis=0)):
        found = np.flatnonzero(counts[:, column])
        slices[column] = found[0], found[-1] + 1
    return counts.sum(axis=0).astype(float), slices
