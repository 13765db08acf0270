"""The benchmark of all recipes: one budget for every arm, sound statistics, kept results. Nothing is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe_evidence as evidence
import recipe_systems as systems
import recipes as benchmark
from scipy.stats import ttest_1samp, ttest_rel

from nnunet_flare.errors import TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.organs import FLARE22

CONTROL = {1: 0.50, 2: 0.52, 3: 0.55}
RULES = {"mean-organ": (0.9, 0.95), "min-organ": (0.4, 0.7)}


def document(
    name: str, seed: int, mean: float, *, rules: dict[str, tuple[float, float]] | None = None
) -> dict[str, Any]:
    """A result file as the benchmark writes it."""
    ranks = {rule: {"spearman": rho, "auc": auc} for rule, (rho, auc) in (rules or {}).items()}
    rounds = [
        {"taken": 12, "pseudo_labels": 24, "predictions": 72, "true_dice": 0.6, "true_dice_of_taken": 0.7,
         "test_dice": 0.58, "ranking": ranks}
    ]  # fmt: skip
    return {
        "system": name,
        "title": f"title of {name}",
        "seed": seed,
        "optimiser_steps": {"total": 1400},
        "unlabelled_predictions": 72 if rules else 0,
        evidence.CHARGED: name in ("unfiltered", "uncertainty"),
        "augmentation": {"labelled": "stock"},
        "cases": {"labelled": 4, "unlabelled": 24, "test": 12},
        "size": [32, 48, 64],
        "dice": {"mean": mean, "organs": {organ.name: mean for organ in FLARE22}},
        "rounds": rounds if rules else [],
        "seconds": 100.0,
        "environment": {"machine": "a machine", "cores": 2},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of three arms and seeds: one far above the control, one not told apart from it."""
    for seed, control in CONTROL.items():
        for name, mean, ranks in (
            ("supervised", control, None),
            ("unfiltered", control + 0.05 + 0.001 * seed, RULES),
            ("uncertainty", control + (0.03 if seed == 1 else -0.03), RULES),
        ):
            write_json(tmp_path / f"{name}_seed{seed}.json", document(name, seed, mean, rules=ranks))
    return tmp_path


def test_the_interval_is_the_t_test_s():
    values = [0.51, 0.58, 0.55]
    found = evidence.t_interval(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), expected.low, expected.high))
    assert str(evidence.t_interval([0.5])) == "0.500", "one seed has no interval"
    assert evidence.t_interval([0.5, math.nan, 0.7]).mean == pytest.approx(0.6), "what is not known does not count"


def test_arms_are_compared_seed_by_seed(folder):
    results = evidence.read_results(folder)
    found = evidence.difference(results, "unfiltered")
    arm, control = evidence.dice(results, "unfiltered"), evidence.dice(results, "supervised")
    expected = ttest_rel(list(arm.values()), list(control.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    (folder / "supervised_seed2.json").unlink()
    assert len(evidence.difference(evidence.read_results(folder), "unfiltered").values) == 2


def test_the_page_says_what_the_figures_say(folder):
    text = evidence.page(evidence.read_results(folder))
    assert "Above the control: title of unfiltered." in text
    assert "Not told apart from the control: title of uncertainty." in text
    assert "Not measured yet: noisy student" in text and "title of supervised" in text
    assert "1400 optimiser steps and 72 unlabelled predictions" in text
    assert text.count("three folds | mean-organ | 0.90") == 1, "labels that two arms share are judged once"
    assert "| three folds | min-organ | 0.40 (0.40 to 0.40) | 0.70 (0.70 to 0.70) |" in text
    for seed in CONTROL:
        write_json(
            folder / f"unfiltered_seed{seed}.json", document("unfiltered", seed, CONTROL[seed] - 0.05, rules=RULES)
        )
    assert "Below the control: title of unfiltered." in evidence.page(evidence.read_results(folder))


def test_a_difference_that_means_nothing_is_no_finding(folder):
    for seed in CONTROL:
        path = folder / f"unfiltered_seed{seed}.json"
        write_json(path, document("unfiltered", seed, CONTROL[seed] + 0.005, rules=RULES))
    assert "Above the control" not in evidence.page(evidence.read_results(folder))


def test_the_picture_is_drawn(folder, tmp_path):
    evidence.draw(evidence.read_results(folder), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("system", [systems.ENSEMBLE, *systems.SYSTEMS], ids=lambda system: system.name)
def test_every_arm_has_the_same_budget_network_and_augmentation(system):
    recipe, reference = (each.load(1, systems.FULL) for each in (system, systems.SYSTEMS[0]))
    last = 0 if system.is_supervised else recipe.final_round
    augmentation = reference.settings(0, run=None).augmentation
    assert all(recipe.settings(number, run=None).augmentation == augmentation for number in range(last + 1))
    steps = benchmark.optimiser_steps(recipe, is_supervised=system.is_supervised)
    assert steps["total"] == systems.EPOCHS * systems.FULL.epoch_steps
    predictions = sum(len(benchmark_members(recipe, number)) for number in range(last)) * systems.FULL.unlabelled
    asks = not system.is_supervised and not recipe.is_online
    assert predictions == (systems.MEMBERS * systems.FULL.unlabelled if asks else 0)
    assert recipe.plan == reference.plan
    assert (recipe.planner, recipe.configuration) == (reference.planner, reference.configuration)
    assert recipe.base_changes(final=True) == recipe.base_changes(final=False)


def benchmark_members(recipe: Any, number: int) -> list[tuple[str, str]]:
    return [(fold, at) for fold in recipe.member_folds(number) for at in recipe.member_checkpoints(number)]


def test_quick_runs_every_arm_goes_on_after_a_failure_and_repeats_nothing(tmp_path, monkeypatch):
    asked = []

    def arm(folder, system, seed, budget):
        asked.append(system.name)
        assert (seed, budget) == (1, systems.QUICK)
        if system.name == "unfiltered" and asked.count("unfiltered") == 1:
            raise TaskError("as the test asked")
        return document(system.name, seed, 0.5)

    monkeypatch.setattr(benchmark, "run_arm", arm)
    monkeypatch.setattr(benchmark, "make_data", lambda *given: None)
    assert benchmark.main(["--quick", "-o", str(tmp_path)]) == 1
    assert asked == [system.name for system in systems.SYSTEMS]
    assert benchmark.main(["--quick", "-o", str(tmp_path)]) == 0
    assert asked[len(systems.SYSTEMS) :] == ["unfiltered"]
    assert read_json(tmp_path / "quick" / "results" / "supervised_seed1.json")["dice"]["mean"] == 0.5


def test_several_arms_at_a_time_each_in_a_process(tmp_path, monkeypatch):
    """A stand-in for this command writes what each process was asked, and fails for one arm."""
    command = tmp_path / "command.py"
    command.write_text(
        "import sys; from pathlib import Path\n"
        "seed, arm = sys.argv[-3], sys.argv[-1]\n"
        "Path(__file__).with_name(f'{arm}-{seed}').write_text(' '.join(sys.argv[1:]))\n"
        "sys.exit(arm == 'oracle' and seed == '2')\n"
    )
    monkeypatch.setattr(benchmark, "__file__", str(command))
    monkeypatch.setattr(benchmark, "make_data", lambda *given: None)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    write_json(tmp_path / "results" / "oracle_seed1.json", {})
    words = ["--jobs", "2", "--seeds", "1", "2", "-o", str(tmp_path)]
    assert benchmark.main([*words, "--systems", "supervised", "oracle"]) == 1
    asked = {path.name: path.read_text() for path in tmp_path.glob("*-?")}
    assert sorted(asked) == ["oracle-2", "supervised-1", "supervised-2"], "what has its file is not run again"
    assert asked["oracle-2"] == f"-o {tmp_path} --seeds 2 --systems oracle"


def test_one_arm_of_a_seed_trains_the_ensemble_before_the_others_want_it():
    wanted = [(seed, system) for seed in (1, 2) for system in systems.SYSTEMS]
    order = [(seed, system.name) for seed, system in benchmark.members_once(wanted)]
    assert order[:2] == [(1, "unfiltered"), (2, "unfiltered")]
    others = {system.name for system in systems.SYSTEMS if system.ensemble} - {"unfiltered"}
    assert {name for _, name in order[-2 * len(others) :]} == others
    assert sorted(order) == sorted((seed, system.name) for seed, system in wanted)


def test_an_unknown_arm_is_refused_with_the_names_that_there_are():
    with pytest.raises(KeyError, match=r"no arm magic; there are supervised, unfiltered"):
        systems.find_systems(["magic"])
    assert [system.name for system in systems.find_systems(["oracle", "supervised"])] == ["supervised", "oracle"]


def test_the_oracle_s_data_set_has_the_truth_of_the_unlabelled_scans(tmp_path):
    budget = systems.Budget(labelled=1, unlabelled=2, test=0, size=(8, 12, 16), epoch_steps=1)
    benchmark.make_data(tmp_path, 5, budget)
    oracle = tmp_path / "nnUNet_raw" / "Dataset023_FLAREPhantomOracle"
    names = sorted(path.name for path in (oracle / "labelsTr").iterdir())
    assert names == ["FLAREPhantom_Tr_0000.nii.gz", "FLAREPhantom_True_0000.nii.gz", "FLAREPhantom_True_0001.nii.gz"]
    truth = tmp_path / "unlabelled_truth" / "FLAREPhantom_Un_0001.nii.gz"
    assert (oracle / "labelsTr" / names[-1]).read_bytes() == truth.read_bytes()
    assert read_json(oracle / "dataset.json")["numTraining"] == 3


def test_a_supervised_arm_trains_and_measures_round_0_alone(tmp_path):
    run = _started(tmp_path, systems.SYSTEMS[0])
    names = [task.name for task in benchmark.needed_tasks(run, is_supervised=True)]
    assert names == ["plan", "build-r0", "train-r0-fall", "evaluate-r0"]
    assert benchmark.optimiser_steps(run.recipe, is_supervised=True) == {"r0": 28, "total": 28}


def test_two_of_the_three_steps_of_adversarial_training_count():
    recipe = next(system for system in systems.SYSTEMS if system.name == "adversarial").load(1, systems.FULL)
    settings = recipe.settings(0, run=None)
    assert settings.num_epochs * settings.iterations_per_epoch == 800, "12 of 16 epochs have both"
    assert benchmark.optimiser_steps(recipe, is_supervised=False)["total"] == 4 * 50 + 12 * 50 * 2


def test_an_arm_of_the_ensemble_is_charged_for_it(tmp_path):
    run = _started(tmp_path, systems.ENSEMBLE)
    assert benchmark.optimiser_steps(run.recipe, is_supervised=False) == {"r0": 12, "r1": 16, "total": 28}
    assert not any(task.stage == "report" for task in benchmark.needed_tasks(run, is_supervised=False))


def _started(folder: Path, system: systems.System):
    benchmark.make_data(folder, 5, systems.QUICK)
    return benchmark.start(folder, system, 5, systems.QUICK, None)
