"""A partial case is scored on its annotated organs only."""

from __future__ import annotations

import math

from nnunet_flare.trainers.validation import is_annotated, without_unannotated


def summary() -> dict:
    """Two cases, three organs, as nnU-Net writes it; of "part" only organ 1 is annotated."""

    def case(name: str, *dice: float) -> dict:
        return {
            "prediction_file": f"/results/validation/{name}.nii.gz",
            "metrics": {organ: {"Dice": value} for organ, value in enumerate(dice, start=1)},
        }

    return {
        "metric_per_case": [case("full", 0.9, 0.8, 0.7), case("part", 0.5, 0.0, 0.0)],
        "mean": {1: {"Dice": 0.7}, 2: {"Dice": 0.4}, 3: {"Dice": 0.35}},
        "foreground_mean": {"Dice": 0.4833},
    }


def test_organs_without_annotation_leave_the_means() -> None:
    before = summary()
    after = without_unannotated(before, {"part": (1,)})
    assert after["mean"] == {1: {"Dice": 0.7}, 2: {"Dice": 0.8}, 3: {"Dice": 0.7}}
    assert math.isclose(after["foreground_mean"]["Dice"], (0.7 + 0.8 + 0.7) / 3)
    assert math.isnan(after["metric_per_case"][1]["metrics"][2]["Dice"])
    assert after["metric_per_case"][0] == before["metric_per_case"][0]
    assert before == summary(), "the given summary stays as it was"


def test_an_organ_that_no_case_has_annotated_has_no_mean() -> None:
    after = without_unannotated(summary(), {"part": (1,), "full": (1, 2)})
    assert math.isnan(after["mean"][3]["Dice"])
    assert math.isclose(after["foreground_mean"]["Dice"], (0.7 + 0.8) / 2)


def test_a_region_is_annotated_when_all_its_labels_are() -> None:
    assert is_annotated((1, 2), (1, 2, 5))
    assert not is_annotated((1, 2), (1, 5))
    assert is_annotated(3, None)
