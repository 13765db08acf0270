"""Published systems from end to end, tiny: from the recipe's name to a final model, stopped in between."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from nnunet_flare.files import read_json
from nnunet_flare.phantom import write_phantom
from nnunet_flare.rounds.ledger import read_decisions
from nnunet_flare.rounds.manifest import Run
from nnunet_flare.rounds.recipe import load_recipe, shipped_recipes
from nnunet_flare.rounds.start import Request, plan_run, start_run
from nnunet_flare.rounds.tasks import Task, graph, is_done
from nnunet_flare.rounds.work import TASK_VARIABLE, do_task

TINY = {
    "plan.spacing_mm": "[8.5, 5.0, 5.2]",
    "plan.patch_size": "[16, 32, 32]",
    "plan.base_features": "4",
    "plan.stages": "3",
    "training.num_epochs": "1",
    "training.iterations_per_epoch": "2",
    "training.validation_iterations": "1",
    "training.final_validation": "false",
    "predict.precision": "fp32",
    "predict.tta": "none",
    "rounds": "1",
}
SYSTEMS = {
    "uncertainty": {**TINY, "members.count": "2", "selection.threshold": "0.0"},
    "noisy_student": {**TINY, "rounds": "2"},
}
"""``--set`` values that make each system tiny."""

ELSEWHERE = {"demo": "rounds/test_loop.py"}
"""Recipes that other tests run from end to end."""

UNLABELLED = 3


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    write_phantom(tmp_path, labelled=2, unlabelled=UNLABELLED, test=1, size=(20, 32, 32), seed=3)
    made = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in made.items():
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(folder))
    for name, value in {"nnUNet_n_proc_DA": "0", "NNUNET_FLARE_THREADS": "1", TASK_VARIABLE: ""}.items():
        monkeypatch.setenv(name, value)  # what tasks set in this process is put back, too
    return made


def start(name: str, folders: dict[str, Path]) -> Run:
    base = folders["nnUNet_raw"].parent
    request = Request(
        "22",
        base / "unlabelled",
        device="cpu",
        eval_images=base / "test" / "images",
        eval_labels=base / "test" / "labels",
    )
    return start_run(plan_run(request, load_recipe(name, SYSTEMS[name]), folders))


def work(run: Run, tasks: Iterable[Task]) -> None:
    for task in tasks:
        if task.stage != "report":  # a process of its own, tested with the report
            do_task(run, task)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_runs_from_its_name_to_a_final_model_and_goes_on_where_it_stopped(name, folders):
    run = start(name, folders)
    tasks = list(graph(run).values())
    middle = next(place for place, task in enumerate(tasks) if task.name == "select-r0")
    work(run, tasks[:middle])
    assert not any(is_done(run, task) for task in tasks[middle:])
    before = {task.name: os.stat(run.paths.done(task.name)).st_mtime_ns for task in tasks[:middle]}

    again = start(name, folders)
    assert again.root == run.root
    work(again, graph(again).values())

    after = {task: os.stat(run.paths.done(task)).st_mtime_ns for task in before}
    assert after == before, "what was done is not done again"
    final = again.model(again.last_round)
    assert (final / "fold_all" / "checkpoint_final.pth").is_file()
    for number in range(again.last_round):
        taken = [entry.case for entry in read_decisions(again.paths, number) if entry.decision == "taken"]
        assert len(taken) == UNLABELLED
        table = read_json(again.preprocessed / f"flare_cases.{again.configuration(number + 1)}.json")["cases"]
        assert {case for case, entry in table.items() if entry["role"] == "pseudo"} == set(taken)
    for number in range(again.last_round + 1):
        assert 0 <= read_json(again.paths.evaluation(number) / "dice.json")["mean"] <= 1


def test_every_shipped_recipe_is_run_from_end_to_end_by_some_test():
    assert set(shipped_recipes()) == {*SYSTEMS, *ELSEWHERE}
    for file in ELSEWHERE.values():
        assert (Path(__file__).resolve().parents[1] / file).is_file()
