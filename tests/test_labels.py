"""What dataset.json's labels say: organs, regions and how these are drawn, and voxels that nobody annotated."""

from __future__ import annotations

from typing import Any

import pytest

from nnunet_flare.labels import drawn_ids, label_ids, label_names, label_problems, organs_of, sampled_groups

BRATS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
PAIR = {"background": 0, "pair": [1, 2], "left": 1, "right": 2, "liver": 3}
"""A pair that is neither left nor right shows where no label of it is as likely."""
KITS = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2, "ignore": 4}


@pytest.mark.parametrize(("labels", "order"), [(BRATS, [1, 2, 3]), (KITS, [1, 3, 2])])
def test_orders_that_nnunet_documents_are_possible(labels: dict[str, Any], order: list[int]) -> None:
    assert label_problems({"labels": labels, "regions_class_order": order}) == []


def test_labels_that_no_region_tells_apart_may_be_drawn_as_one() -> None:
    labels = {"background": 0, "kidneys": [1, 2], "liver": 3}
    assert label_problems({"labels": labels, "regions_class_order": [1, 3]}) == []


@pytest.mark.parametrize(
    ("labels", "order", "told"),
    [
        (BRATS, [3, 2, 1], "a voxel of label 1 lies in whole, and would be drawn as 3"),
        (
            BRATS,
            [1, 2, 5],
            "a voxel of label 3 lies in whole, core, enhancing, and would be drawn as 5, which is in no",
        ),
        (BRATS, [1, 2], "expected one label id for each of 3 regions"),
        (BRATS, None, "regions_class_order is missing"),
        (PAIR, [3, 1, 2, 3], "draws pair [1, 2] as 3, which then lies outside it"),
        (PAIR, [7, 1, 2, 3], "draws pair [1, 2] as 7"),
        (dict(reversed(BRATS.items())), [3, 2, 1], "label 2 lies in core, whole, and would be drawn as 1"),
    ],
)
def test_impossible_orders_are_told(labels: dict[str, Any], order: Any, told: str) -> None:
    assert told in "\n".join(label_problems({"labels": labels, "regions_class_order": order}))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ({"background": 0, "liver": 2}, "without gaps"),
        ({"background": 1, "liver": 0}, "'background' is 1"),
        ({"background": 0, "liver": 1, "ignore": [2]}, "'ignore' is [2]"),
        ({"background": 0, "ignore": 1, "liver": 2}, "the highest number, 2"),
        ({"background": 0, "liver": []}, "expected whole numbers"),
    ],
)
def test_labels_that_nnunet_would_refuse_are_told(labels: dict[str, Any], told: str) -> None:
    assert told in "\n".join(label_problems({"labels": labels}))


def test_organs_regions_and_ignore_are_told_apart() -> None:
    assert organs_of(KITS) == {"kidney": (1, 2, 3), "tumour": (2,), "masses": (2, 3)}
    assert label_ids(KITS) == (1, 2, 3)
    assert sampled_groups(KITS, organs_of(KITS)) == [(1, 2, 3), 2, (2, 3), (-1, 0, 1, 2, 3)]
    document = {"labels": KITS, "regions_class_order": [1, 3, 2]}
    assert drawn_ids(document) == {"kidney": 1, "masses": 3, "tumour": 2}
    assert label_names(document) == {1: "kidney", 2: "tumour", 3: "masses"}
    brats = {"labels": BRATS, "regions_class_order": [1, 2, 3]}
    assert drawn_ids(brats) == {"whole": 1, "core": 2, "enhancing": 3}, "in the order of dataset.json, not of names"


def test_lists_of_one_id_each_are_organs() -> None:
    labels = {"background": 0, "liver": [1], "spleen": [2]}
    assert label_problems({"labels": labels}) == [] and label_names({"labels": labels}) == {1: "liver", 2: "spleen"}
