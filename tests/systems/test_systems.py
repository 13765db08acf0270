"""Published systems from end to end, tiny: from the recipe's name to a final model, stopped in between."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import do_all, phantom, started

from nnunet_flare.files import read_json
from nnunet_flare.recipes.load import shipped_recipes
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.tasks import graph

SYSTEMS = {
    "uncertainty": {"rounds": "1", "members.count": "2", "selection.threshold": "0.0", "final.start": "member"},
    "noisy_student": {"rounds": "2"},
}
"""``--set`` values that make each system small, beyond those of the tiny network."""

ELSEWHERE = {
    "demo": "test_loop.py",
    "selective": "test_selective_run.py",
    "partial": "test_partial_recipe.py",
    "adversarial": "test_adversarial_run.py",
    "mean_teacher": "test_mean_teacher_run.py",
    "resenc": "test_resenc_run.py",
    "blackbean": "test_blackbean.py",
    "distill": "test_blackbean.py",
    "adaptation": "test_adaptation_run.py",
    "laptop": "test_laptop_run.py",
    "pancancer": "test_pancancer_run.py",
}
"""Recipes that tests of ``tests/rounds`` run from end to end."""

UNLABELLED = 3


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_runs_from_its_name_to_a_final_model_and_goes_on_where_it_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=UNLABELLED, test=1)
    held_out = {f"eval_{kind}": tmp_path / "test" / kind for kind in ("images", "labels")}
    run = started(tmp_path, folders, name, SYSTEMS[name], **held_out)
    tasks = list(graph(run))
    before = do_all(run, monkeypatch, until=lambda task: task == "select-r0")
    assert before == tasks[: tasks.index("select-r0")]

    again = started(tmp_path, folders, name, SYSTEMS[name], **held_out)
    assert again.root == run.root
    assert do_all(again, monkeypatch) == tasks[len(before) :], "what was done is not done again"

    assert (again.final.model / "fold_all" / "checkpoint_final.pth").is_file()
    (log,) = (again.final.model / "fold_all").glob("training_log_*.txt")
    teacher = again.round(again.final.number - 1).model / "fold_0" / "checkpoint_final.pth"
    goes_on = again.recipe.final.start == "member"
    assert (f"Started from the weights of {teacher}" in log.read_text()) == goes_on
    for number in range(again.final.number):
        taken = [entry.case for entry in read_decisions(again.paths, number) if entry.decision == "taken"]
        assert len(taken) == UNLABELLED
        table = read_json(again.preprocessed / f"flare_cases.{again.round(number + 1).configuration}.json")["cases"]
        assert {case for case, entry in table.items() if entry["role"] == "pseudo"} == set(taken)
    for number in range(again.final.number + 1):
        assert 0 <= read_json(again.paths.evaluation(number) / "dice.json")["mean"] <= 1


def test_every_shipped_recipe_is_run_from_end_to_end_by_some_test() -> None:
    assert set(shipped_recipes()) == {*SYSTEMS, *ELSEWHERE}
    for file in ELSEWHERE.values():
        assert (Path(__file__).resolve().parents[1] / "rounds" / file).is_file()
