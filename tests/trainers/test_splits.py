"""Pseudo cases never validate; folds over true cases are stock's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_flare.errors import InputError
from nnunet_flare.trainers.splits import fold_cases, new_splits

TRUE = [f"FLARE22_Tr_{k:04d}" for k in range(1, 11)]
PSEUDO = [f"Case_{k:05d}" for k in range(1, 24)]


def test_new_splits_are_stocks_over_the_true_cases() -> None:
    stock = generate_crossval_split(sorted(TRUE), seed=12345, n_splits=5)
    assert new_splits(TRUE[::-1]) == [{key: [str(c) for c in fold[key]] for key in ("train", "val")} for fold in stock]


def test_fewer_cases_than_folds_is_refused_with_a_way_out() -> None:
    with pytest.raises(InputError, match=r"4 labelled and partial cases .* too few for 5 folds.*fold 'all'"):
        new_splits(TRUE[:4])
    assert len(new_splits(TRUE[:5])) == 5


def test_each_fold_trains_on_four_fifths_of_the_pseudo_cases() -> None:
    splits = new_splits(TRUE)
    left_out = []
    for fold in range(5):
        cases = fold_cases(fold, splits, true_cases=TRUE, pseudo_cases=PSEUDO, pseudo_folds="split")
        used = set(cases.training) & set(PSEUDO)
        assert abs(len(used) - 0.8 * len(PSEUDO)) < 1
        left_out += sorted(set(PSEUDO) - used)
        assert set(cases.training) - used == set(splits[fold]["train"])
        assert cases.validation == sorted(splits[fold]["val"])
    assert sorted(left_out) == sorted(PSEUDO), "each pseudo case is left out of exactly one fold"


def test_all_pseudo_cases_can_train_every_fold() -> None:
    for fold in (0, 4):
        cases = fold_cases(fold, new_splits(TRUE), true_cases=TRUE, pseudo_cases=PSEUDO, pseudo_folds="all")
        assert set(PSEUDO) <= set(cases.training)


def test_a_split_of_one_fold_leaves_no_pseudo_case_out() -> None:
    """A user's own training and validation cases: there is no other fold that could train on the rest."""
    splits = [{"train": TRUE[:8], "val": TRUE[8:]}]
    for fold in (0, 3):
        cases = fold_cases(fold, splits, true_cases=TRUE, pseudo_cases=PSEUDO, pseudo_folds="split")
        assert set(PSEUDO) <= set(cases.training)


def test_fold_all_trains_on_everything_and_validates_on_true_cases() -> None:
    cases = fold_cases("all", None, true_cases=TRUE, pseudo_cases=PSEUDO, pseudo_folds="split")
    assert cases.training == sorted(TRUE + PSEUDO)
    assert cases.validation == sorted(TRUE)


def test_without_true_cases_pseudo_cases_train_and_nobody_validates() -> None:
    cases = fold_cases(1, None, true_cases=[], pseudo_cases=PSEUDO, pseudo_folds="split")
    assert abs(len(cases.training) - 0.8 * len(PSEUDO)) < 1
    assert cases.validation == []


def test_pseudo_ids_in_a_users_split_do_not_validate() -> None:
    splits = [{"train": TRUE[:5], "val": [*TRUE[5:], *PSEUDO]}]
    cases = fold_cases(0, splits, true_cases=TRUE, pseudo_cases=PSEUDO, pseudo_folds="all")
    assert cases.validation == sorted(TRUE[5:])
    assert set(PSEUDO) <= set(cases.training)


def test_a_users_split_may_validate_on_training_cases_as_in_stock() -> None:
    cases = fold_cases(0, [{"train": TRUE, "val": TRUE}], true_cases=TRUE, pseudo_cases=PSEUDO[:1], pseudo_folds="all")
    assert cases.training == sorted([*TRUE, PSEUDO[0]])
    assert cases.validation == sorted(TRUE)


def test_a_split_with_cases_that_are_not_there_is_refused_by_name() -> None:
    splits = [{"train": [*TRUE[:9], "ghost"], "val": TRUE[9:]}]
    with pytest.raises(InputError, match="ghost"):
        fold_cases(0, splits, true_cases=TRUE, pseudo_cases=[], pseudo_folds="split")


def test_a_fold_beyond_the_file_is_stocks_random_split() -> None:
    cases = fold_cases(7, new_splits(TRUE), true_cases=TRUE, pseudo_cases=[], pseudo_folds="split")
    assert len(cases.training) == 8
    assert sorted(cases.training + cases.validation) == sorted(TRUE)
    again = fold_cases(7, new_splits(TRUE), true_cases=TRUE[::-1], pseudo_cases=[], pseudo_folds="split")
    assert cases == again


ids = st.lists(st.text("abc01", min_size=1, max_size=6), unique=True, max_size=30)


@given(true_cases=ids, pseudo_cases=ids, fold=st.integers(0, 6), pseudo_folds=st.sampled_from(["split", "all"]))
def test_a_fold_never_validates_on_pseudo_cases_nor_trains_on_its_validation(
    true_cases: list[str], pseudo_cases: list[str], fold: int, pseudo_folds: str
) -> None:
    pseudo_cases = [case + "_p" for case in pseudo_cases]
    splits = new_splits(true_cases) if len(true_cases) >= 5 else None
    cases = fold_cases(
        fold,
        splits,
        true_cases=true_cases if splits else [],
        pseudo_cases=pseudo_cases,
        pseudo_folds=pseudo_folds,  # type: ignore[arg-type]
    )
    assert not set(cases.validation) & set(pseudo_cases)
    assert not set(cases.validation) & set(cases.training)
    assert set(cases.training) <= set(true_cases) | set(pseudo_cases)
    reordered = fold_cases(
        fold,
        splits,
        true_cases=(true_cases if splits else [])[::-1],
        pseudo_cases=pseudo_cases[::-1],
        pseudo_folds=pseudo_folds,  # type: ignore[arg-type]
    )
    assert reordered == cases
