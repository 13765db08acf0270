"""Who trains and who validates in a fold.

Validation folds hold labelled and partial cases, never pseudo ones, and ``splits_final.json`` knows only those, so that
it stays the same while rounds come and go. Pseudo cases take part in training: all of them in every fold, or, as in a
cross-validation over labelled and pseudo cases, all but one part per fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_flare.errors import InputError

NUM_FOLDS = 5
"""Folds of nnU-Net's own split."""
STOCK_SEED = 12345
"""Seed of nnU-Net's splits."""

Split = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class FoldCases:
    """Case ids of a fold, sorted. ``validation`` may be empty; where the user's split says so, the two overlap."""

    training: list[str]
    validation: list[str]


def new_splits(true_cases: Sequence[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's five seeded folds over the labelled and partial cases.

    Raises:
        InputError: for fewer cases than folds.
    """
    if len(true_cases) < NUM_FOLDS:
        raise InputError(
            f"{len(true_cases)} labelled and partial cases ({', '.join(sorted(true_cases)) or 'none'}) are too few "
            f"for {NUM_FOLDS} folds. Train fold 'all', or write a splits_final.json with fewer folds"
        )
    return [
        {"train": [str(case) for case in split["train"]], "val": [str(case) for case in split["val"]]}
        for split in generate_crossval_split(sorted(true_cases), seed=STOCK_SEED, n_splits=NUM_FOLDS)
    ]


def fold_cases(
    fold: int | str,
    splits: Sequence[Split] | None,
    *,
    true_cases: Sequence[str],
    pseudo_cases: Sequence[str],
    pseudo_folds: Literal["split", "all"],
) -> FoldCases:
    """The cases of a fold.

    Args:
        fold: a number, or ``all``: every case trains, and the labelled and partial ones validate too.
        splits: content of ``splits_final.json``; None where there is no labelled or partial case at all.
        true_cases: labelled and partial cases that are preprocessed.
        pseudo_cases: pseudo cases that are preprocessed.
        pseudo_folds: ``split`` keeps one part of the pseudo cases, as many parts as there are folds, out of each fold
            of several.

    Raises:
        InputError: when the split names a labelled or partial case that is not preprocessed.
    """
    if fold == "all":
        return FoldCases(sorted([*true_cases, *pseudo_cases]), sorted(true_cases))
    number = int(fold)
    pseudo = set(pseudo_cases)
    if splits is None:
        training, validation = [], []
    elif number < len(splits):
        training = [case for case in splits[number]["train"] if case not in pseudo]
        validation = [case for case in splits[number]["val"] if case not in pseudo]
        absent = sorted(set(training + validation) - set(true_cases))
        if absent:
            raise InputError(
                f"splits_final.json, fold {number}: {len(absent)} case(s) are neither labelled nor partial cases of "
                f"the preprocessed data: {', '.join(absent[:10])}. Preprocess them, or delete the file for a new split"
            )
    else:
        training, validation = _random_split(true_cases, number)
    if pseudo_folds == "all":
        added = list(pseudo_cases)
    else:
        added = _without_part(pseudo_cases, number, parts=len(splits) if splits else NUM_FOLDS)
    return FoldCases(sorted({*training, *added}), sorted(validation))


def _random_split(cases: Sequence[str], fold: int) -> tuple[list[str], list[str]]:
    """Stock's seeded 80:20 split for a fold that the split file does not have."""
    ordered = sorted(cases)
    stream = np.random.RandomState(seed=STOCK_SEED + fold)
    chosen = {int(index) for index in stream.choice(len(ordered), int(len(ordered) * 0.8), replace=False)}
    return (
        [case for index, case in enumerate(ordered) if index in chosen],
        [case for index, case in enumerate(ordered) if index not in chosen],
    )


def _without_part(cases: Sequence[str], fold: int, *, parts: int) -> list[str]:
    """The cases without the part that this fold leaves out; which one a case belongs to depends on the ids alone.

    A single fold leaves none out.
    """
    if parts == 1:
        return list(cases)
    ordered = sorted(cases)
    order = np.random.default_rng(STOCK_SEED).permutation(len(ordered))
    return [case for case, rank in zip(ordered, order, strict=True) if rank % parts != fold % parts]
