"""The benchmark of all recipes: the same steps a network, sound statistics, kept results. Nothing is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe_evidence as evidence
import recipe_picture as picture
import recipe_statistics as statistics
import recipe_systems as systems
import recipes as benchmark

from nnunet_flare.errors import TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.organs import FLARE22

SEEDS = (1, 2, 3)
CASES = ("a", "b", "c", "d")
RULES = {"mean-organ": (0.9, 0.95), "min-organ": (0.4, 0.7)}


def document(
    name: str, seed: int, mean: float, *, networks: int = 1, rules: dict[str, tuple[float, float]] | None = None
) -> dict[str, Any]:
    """A result file as the benchmark writes it; the test cases differ by -.03, -.01, .01 and .03."""
    ranks = {rule: {"spearman": rho, "auc": auc} for rule, (rho, auc) in (rules or {}).items()}
    rounds = [
        {"taken": 12, "pseudo_labels": 24, "true_dice": 0.6, "true_dice_of_taken": 0.7, "test_dice": 0.58,
         "ranking": ranks, "organ_ranking": dict.fromkeys(ranks, 0.3)}
    ]  # fmt: skip
    values = {case: mean + shift for case, shift in zip(CASES, (-0.03, -0.01, 0.01, 0.03), strict=True)}
    return {
        "system": name,
        "title": f"title of {name}",
        "seed": seed,
        "augmentation": "stock",
        "networks": networks,
        "steps": [400] * networks,
        "cases": {"labelled": 4, "unlabelled": 24, "test": 12},
        "size": [32, 48, 64],
        "dice": {
            "mean": mean,
            "organs": {organ.name: mean for organ in FLARE22},
            "cases": {case: {"liver": value - 0.1, "spleen": value + 0.1} for case, value in values.items()},
        },
        "rounds": rounds if rules else [],
        "seconds": 100.0,
        "environment": {"machine": "a machine", "cores": 2},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three seeds: one arm .05 above the control, but below one of four times the steps; one not told apart from it."""
    for seed in SEEDS:
        control = 0.5 + 0.02 * seed
        for name, mean, networks, ranks in (
            ("supervised", control, 1, None),
            ("supervised_x4", control + 0.08, 1, None),
            ("unfiltered", control + 0.05, 4, RULES),
            ("uncertainty", control + (0.03 if seed == 1 else -0.02), 4, RULES),
        ):
            write_json(tmp_path / f"{name}_seed{seed}.json", document(name, seed, mean, networks=networks, rules=ranks))
    return tmp_path


def test_the_interval_covers_seeds_and_cases():
    """Two levels, by hand: the variance is that of seeds plus that of a mean over n cases and k seeds."""
    stream = np.random.default_rng(3)
    seeds = [stream.normal(mean, 0.05, 40) for mean in (0.4, 0.5, 0.6, 0.55, 0.45)]
    found = statistics.bootstrap(seeds)
    means = np.array([values.mean() for values in seeds])
    spread = math.sqrt((means.var() + np.mean([values.var() / 40 for values in seeds])) / 5)
    assert found.mean == pytest.approx(means.mean()) and found.values == pytest.approx(means)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * spread, rel=0.08)
    one = statistics.bootstrap([[0.4, 0.5, 0.6]])
    assert 0.4 <= one.low < 0.5 < one.high <= 0.6, "of one seed the cases alone are drawn"
    assert str(statistics.bootstrap([[0.5]])) == "0.500 (0.500 to 0.500)"
    assert math.isnan(statistics.bootstrap([]).mean)


def test_arms_are_compared_test_case_by_test_case(folder):
    results = statistics.read_results(folder)
    found = statistics.difference(results, "unfiltered", "supervised")
    assert (found.mean, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05)), "the cases' own spread falls out"
    arm = statistics.dice(results, "unfiltered")
    assert arm.high - arm.low > 0.01
    (folder / "supervised_seed2.json").unlink()
    assert len(statistics.difference(statistics.read_results(folder), "unfiltered", "supervised").values) == 2


def test_the_two_questions_have_two_answers(folder):
    text = evidence.page(statistics.read_results(folder))
    papers, total = text.split("## The whole cost")
    assert "| title" not in papers.split("| supervised only (control)")[0]
    row = "| all pseudo-labels | 3 | 4 |"
    assert row + " 0.590 (" in papers and "| 0.050 (0.050 to 0.050) |" in papers.split(row)[1].splitlines()[0]
    assert "-0.030 (-0.030 to -0.030) |" in total.split(row)[1].splitlines()[0]
    assert "Above the control: all pseudo-labels." in papers
    assert "Below the control: all pseudo-labels; uncertainty" in total.split("## By organ")[0]
    assert "Not distinguishable from the control: uncertainty" in papers
    assert "Not measured yet: three supervised folds together; oracle" in papers
    assert "400 optimiser steps per network" in papers


def test_what_is_not_as_in_the_other_arms_is_said(folder):
    """Fewer seeds, another precision, and loops in place of rounds, which no test scan is predicted with."""
    for name, mean, rules in (("partial", 0.56, RULES), ("supervised_fp32", 0.51, None)):
        found = document(name, 1, mean, networks=4 if rules else 1, rules=rules)
        for each in found["rounds"]:
            each["test_dice"] = None
        found["environment"]["has_bf16"] = False
        write_json(folder / f"{name}_seed1.json", found)
    text = evidence.page(statistics.read_results(folder))
    partial = "partial: a loop for each of three groups of organs"
    row = next(line for line in text.splitlines() if line.startswith(f"| {partial} | 1 | 4 | 0.560 ("))
    assert row.endswith(" | 0.040 (0.040 to 0.040) |")
    assert f"- {partial}: has fewer seeds than the control; its difference is from the control of those seeds." in text
    single = f"- Computed in single precision, all others in bfloat16: {partial}. The control of 1 seed in single "
    assert f"{single}precision minus the same in bfloat16: -0.010 (-0.010 to -0.010)." in text
    assert "The rounds of `partial` are its loops" in text and "| partial | 0 | 12.0 of 24 | 0.600 | 0.700 |  |" in text
    assert "Why labels that are made online" not in text and "supervised_fp32" not in text


def test_an_arm_with_a_teacher_of_its_own_is_also_told_against_that(folder):
    for seed in SEEDS:
        write_json(folder / f"selective_seed{seed}.json", document("selective", seed, 0.61, networks=2, rules=RULES))
    text = evidence.page(statistics.read_results(folder))
    assert "its teacher is trained by its own recipe and has 0.580; it gains 0.030 over that." in text
    assert text.count("trained by its own recipe") == 1, "other arms are taught by a control that is in the table"


def test_labels_that_arms_share_are_ranked_once(folder):
    text = evidence.page(statistics.read_results(folder))
    row = "| labels of ensemble | mean-organ | 0.90 (0.90 to 0.90) | 0.95 (0.95 to 0.95) | 0.30 (0.30 to 0.30) |"
    assert text.count(row) == 1


def test_ranks_that_nobody_knows_are_left_out(folder):
    """JSON has no NaN; labels that are all alike have no rank."""
    assert benchmark.known({"spearman": math.nan, "auc": 0.5}) == {"spearman": None, "auc": 0.5}
    for name in ("unfiltered", "uncertainty"):
        path = folder / f"{name}_seed1.json"
        found = read_json(path)
        found["rounds"][0]["ranking"]["mean-organ"]["spearman"] = None
        found["rounds"][0]["organ_ranking"]["mean-organ"] = None
        write_json(path, found)
    row = "| labels of ensemble | mean-organ | 0.90 (0.90 to 0.90) | 0.95 (0.95 to 0.95) | 0.30 (0.30 to 0.30) |"
    assert row in evidence.page(statistics.read_results(folder))


def test_a_difference_that_means_nothing_is_no_finding(folder):
    for seed in SEEDS:
        path = folder / f"unfiltered_seed{seed}.json"
        write_json(path, document("unfiltered", seed, 0.5 + 0.02 * seed + 0.005, networks=4, rules=RULES))
    assert "Above the control" not in evidence.page(statistics.read_results(folder))


def test_strong_augmentation_has_a_table_and_a_control_of_its_own(folder):
    for seed in SEEDS:
        for name, mean in (("supervised_strong", 0.7), ("unfiltered_strong", 0.72)):
            write_json(folder / f"{name}_seed{seed}.json", document(name, seed, mean, rules=RULES))
    text = evidence.page(statistics.read_results(folder)).split("## The same with strong augmentation")[1]
    row = next(line for line in text.splitlines() if line.startswith("| all pseudo-labels"))
    assert row.endswith("0.020 (0.020 to 0.020) |")


def test_the_picture_is_drawn(tmp_path):
    found = statistics.bootstrap([[0.4, 0.5], [0.5, 0.6]])
    picture.draw([("an arm", found, False)], [("a rule", found)], tmp_path / "picture.png", control=0.5)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def loaded(system: systems.System) -> Any:
    return system.load(1, systems.FULL)


@pytest.mark.parametrize("system", systems.SYSTEMS, ids=lambda system: system.name)
def test_every_network_of_every_arm_has_the_same_steps_plan_optimiser_and_augmentation(system):
    recipe, reference = loaded(system), loaded(systems.SYSTEMS[0])
    last = 0 if system.is_supervised else recipe.final_round
    settings = [recipe.settings(number, run=None) for number in range(last + 1)]
    own = reference.settings(0, run=None)
    for each in settings:
        assert set(each.augmentation.model_dump().values()) == {system.augmentation}
        for key in ("optimizer", "initial_lr", "lr_schedule", "weight_decay", "class_weights", "warmup_iterations"):
            assert getattr(each, key) == getattr(own, key), key
        assert each.labelled_to_pseudo == (1, 1) and each.class_weights == "inverse-sqrt-frequency"
        assert each.oversample_foreground == 0 and not each.mirroring
    longer = {"x2": 2, "x4": 4}.get(system.arm.rpartition("_")[2], 1)
    *teachers, kept = benchmark.steps_of_arm(system, 1, systems.FULL)
    assert kept == longer * systems.STEPS and set(teachers) <= {systems.STEPS} and systems.STEPS == 1200
    assert recipe.plan == reference.plan
    assert (recipe.planner, recipe.configuration) == (reference.planner, reference.configuration)
    assert recipe.base_changes(final=True) == recipe.base_changes(final=False)


def test_every_number_of_networks_has_a_control_of_as_many_steps():
    controls = {1: "supervised", 2: "supervised_x2", 4: "supervised_x4"}
    for system in systems.SYSTEMS:
        steps = benchmark.steps_of_arm(system, 1, systems.FULL)
        if not system.is_supervised:
            control = statistics.control_of(system, {system.name: {1: {"steps": steps}}}, total=True)
            if system.arm.endswith("_x4"):
                assert control is None, "nothing was trained for as long as teachers and student together"
                assert statistics.control_of(system, {}, total=False) == "supervised_x4"
                continue
            assert control == controls[len(steps)] + ("" if system.augmentation == "stock" else "_strong")


def test_students_that_are_trained_to_the_end_have_a_table_and_a_control_of_their_own(folder):
    for seed in SEEDS:
        found = document("unfiltered_x4", seed, 0.5 + 0.02 * seed + 0.11, networks=4, rules=RULES)
        write_json(folder / f"unfiltered_x4_seed{seed}.json", {**found, "steps": [400, 400, 400, 1600]})
    text = evidence.page(statistics.read_results(folder))
    before, after = text.split("## Trained to the end")
    (row,) = (line for line in after.split("## By organ")[0].splitlines() if line.startswith("| all pseudo-labels"))
    assert row.startswith("| all pseudo-labels | 3 | 4 | 0.650 (") and row.endswith(" | 0.030 (0.030 to 0.030) |")
    assert (
        "- all pseudo-labels minus the best control (supervised only, four times the steps): 0.030 (0.030 to" in after
    )
    assert before.count("| all pseudo-labels |") == 2 and "400 optimiser steps per network" in before


def test_arms_that_explain_others_stand_beside_them_and_run_only_where_they_are_named(folder):
    assert not {system.name for system in systems.find_systems([])} & {system.name for system in systems.VARIANTS}
    assert [system.name for system in systems.find_systems(["adversarial_off", "oracle"])] == [
        "oracle",
        "adversarial_off",
    ]
    for name, seed, mean in (("adversarial", 1, 0.4), ("adversarial", 2, 0.5), ("adversarial_off", 2, 0.6)):
        write_json(folder / f"{name}_seed{seed}.json", document(name, seed, mean))
    text = evidence.page(statistics.read_results(folder))
    rows = text.split("## Why labels")[1].splitlines()
    assert "| supervised only (control) | 400 | 0.540 |" in rows and "| adversarial | 400 | 0.500 |" in rows
    assert any(row.startswith("| the same without lessons") and row.endswith("| 400 | 0.600 |") for row in rows)
    assert text.count("| adversarial: the discriminator picks, online |") == 2, "in the two tables of all arms"


def test_every_variant_is_explained():
    assert {system.name for system in systems.VARIANTS} - {systems.SINGLE} < set(evidence.EXPLAINED)
    for system in systems.VARIANTS:
        benchmark.steps_of_arm(system, 1, systems.FULL)


def test_what_teaches_is_an_arm_that_has_as_many_members_as_its_students_ask_for():
    arms = {system.name: system for system in systems.SYSTEMS}
    for system in systems.SYSTEMS:
        if system.teacher is not None:
            teacher = arms[system.teacher]
            assert teacher.is_supervised and teacher.augmentation == system.augmentation
            assert loaded(system).member_folds(0) == loaded(teacher).member_folds(0)


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


def test_arms_that_teach_come_first_seed_by_seed():
    wanted = [(seed, system) for seed in (2, 1) for system in systems.SYSTEMS]
    order = benchmark.teachers_first(wanted)
    assert [seed for seed, _ in order] == sorted(seed for seed, _ in wanted)
    for number, (seed, system) in enumerate(order):
        if system.teacher is not None:
            assert (seed, system.teacher) in [(other, arm.name) for other, arm in order[:number]]
    assert len(order) == len(wanted)


def test_an_unknown_arm_is_refused_with_the_names_that_there_are():
    with pytest.raises(KeyError, match=r"no arm magic; there are supervised, ensemble"):
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
    assert benchmark.steps_of_networks(run.recipe, is_supervised=True) == [systems.EPOCHS]


def test_two_of_the_three_steps_of_adversarial_training_count():
    recipe = loaded(next(system for system in systems.SYSTEMS if system.name == "adversarial"))
    settings = recipe.settings(0, run=None)
    assert settings.num_epochs * settings.iterations_per_epoch == 750, "9 of 15 epochs have both"
    assert benchmark.steps_of_networks(recipe, is_supervised=False) == [6 * 50 + 9 * 50 * 2] == [systems.STEPS]


def test_networks_of_teachers_count(tmp_path):
    generations = next(system for system in systems.SYSTEMS if system.name == "generations")
    assert len(benchmark.steps_of_networks(loaded(generations), is_supervised=False)) == 4
    run = _started(tmp_path, systems.SYSTEMS[1])
    assert benchmark.steps_of_networks(run.recipe, is_supervised=True) == [systems.EPOCHS] * 3
    assert not any(task.stage == "report" for task in benchmark.needed_tasks(run, is_supervised=False))


def _started(folder: Path, system: systems.System):
    benchmark.make_data(folder, 5, systems.QUICK)
    return benchmark.start(folder, system, 5, systems.QUICK, None)
