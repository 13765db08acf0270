"""The benchmark of the recipe adaptation: equal arms, figures by modality, kept results. Nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adaptation as benchmark
import pytest
import recipe_systems as systems
from recipes import steps_of_networks

from nnunet_flare.errors import TaskError
from nnunet_flare.files import read_json, write_json

ARMS = {arm.name: arm for arm in benchmark.ARMS}


def document(name: str, mr: float, pet: float) -> dict[str, Any]:
    """A result file whose two cases of each modality lie .1 beside its mean, with an organ that one lacks."""
    cases = {
        f"FLAREPhantom_Ts_{domain}_{number:04d}": {"liver": value + shift, "gallbladder": None}
        for number, (domain, value, shift) in enumerate(
            [("mr", mr, 0.1), ("pet", pet, 0.1), ("mr", mr, -0.1), ("pet", pet, -0.1)]
        )
    }
    return {"system": name, "dice": {"cases": cases}, "networks": 1, "seconds": 10.0}


def test_every_network_of_every_arm_has_the_same_steps_plan_and_optimiser() -> None:
    recipes = {name: arm.load(1, benchmark.FULL) for name, arm in ARMS.items()}
    reference = recipes["source_only"]
    counts = {}
    for name, recipe in recipes.items():
        steps = steps_of_networks(recipe, is_supervised=ARMS[name].is_supervised)
        assert set(steps) == {systems.STEPS}
        counts[name] = len(steps)
        assert (recipe.planner, recipe.plan) == ("nnUNetPlannerFlareModality", reference.plan)
        for key in ("optimizer", "initial_lr", "class_weights", "mirroring"):
            assert getattr(recipe.settings(0, run=None), key) == getattr(reference.settings(0, run=None), key)
    assert counts == {"source_only": 1, "source_contrasts": 1, "adapted": 4, "oracle": 1}
    assert {name for name, recipe in recipes.items() if recipe.matches_histograms(0)} == {"source_contrasts", "adapted"}
    assert recipes["adapted"].selection.per_domain and recipes["adapted"].domains


def test_figures_are_means_of_each_modality_over_the_seeds_that_are_there(tmp_path: Path) -> None:
    assert benchmark.by_domain(document("oracle", 0.6, 0.4)) == pytest.approx({"mr": 0.6, "pet": 0.4})
    for seed, mr in ((1, 0.5), (10, 0.7)):
        write_json(tmp_path / f"oracle_seed{seed}.json", document("oracle", mr, 0.4))
    (row,) = benchmark.summary(tmp_path)["results"]
    assert (row["arm"], row["seeds"], row["dice_mr"], row["dice_pet"]) == (ARMS["oracle"].title, 2, 0.6, 0.4)
    assert row["dice_mr_of_each_seed"] == [0.5, 0.7]


def test_quick_runs_every_arm_goes_on_after_a_failure_and_repeats_nothing(tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []

    def run_arm(folder: Path, arm: systems.System, seed: int, budget: systems.Budget) -> dict[str, Any]:
        asked.append(arm.name)
        assert (seed, budget) == (1, benchmark.QUICK)
        if arm.name == "adapted" and asked.count("adapted") == 1:
            raise TaskError("as the test asked")
        return document(arm.name, 0.5, 0.5)

    monkeypatch.setattr(benchmark, "run_arm", run_arm)
    monkeypatch.setattr(benchmark, "make_data", lambda *given, domain: None)
    assert benchmark.main(["--quick", "-o", str(tmp_path)]) == 1
    assert benchmark.main(["--quick", "-o", str(tmp_path)]) == 0
    assert asked == [*ARMS, "adapted"]
    assert len(read_json(tmp_path / "quick" / "results.json")["results"]) == len(ARMS)
    (tmp_path / "quick" / "results.json").unlink()  # as after a kill in front of it
    assert benchmark.main(["--quick", "-o", str(tmp_path)]) == 0
    assert len(read_json(tmp_path / "quick" / "results.json")["results"]) == len(ARMS)
