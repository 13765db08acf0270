"""The end of ``flare-pseudolabel demo``: arms, ranking, table and picture, on the tiny run in place of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.files import read_json
from nnunet_flare.rounds import demo
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.true_dice import RANKED, rule_scores
from nnunet_flare.selection.rules import RULES


@pytest.fixture
def finished_demo(copied_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's folder after its trainings; what a student predicts are the final model's label maps."""
    output = tmp_path / "flare_demo"
    output.mkdir()
    (output / "data").symlink_to(copied_run.raw.parents[1])
    (output / "data.json").write_text("{}")

    def predicted(run: Run, model: Path, members: object, folder: Path) -> list[str]:
        made = sorted(run.paths.evaluation(run.final.number).glob("*.nii.gz"))
        folder.mkdir(parents=True)
        for path in made:
            shutil.copy(path, folder)
        return [path.name.removesuffix(".nii.gz") for path in made]

    monkeypatch.setattr(demo, "plan_run", lambda *given: None)
    monkeypatch.setattr(demo, "start_run", lambda plan: copied_run)
    monkeypatch.setattr(demo, "run_local", lambda run, cpu_tasks: None)
    monkeypatch.setattr(demo, "_train_arm", lambda run, arm, taken: f"tiny_{arm}")
    monkeypatch.setattr(demo, "predict_held_out", predicted)
    return output


def test_the_demo_ends_with_its_table_its_ranking_and_a_picture(finished_demo, copied_run, capsys) -> None:
    assert main(["demo", "-o", str(finished_demo)]) == 0
    told, document = capsys.readouterr().out, read_json(finished_demo / "demo.json")
    final = read_json(copied_run.paths.evaluation(copied_run.final.number) / "dice.json")
    control, everything, selected = list(document["arms"].values())[1:]
    assert selected["mean"] == final["mean"] and control == everything == pytest.approx(selected)
    ranking = told.partition("Rank correlation")[2].splitlines()
    rows = {words[0]: words[1] for line in ranking if len(words := line.split()) == 2}
    assert rows == {rule: "-" if v is None else f"{v:.2f}" for rule, v in document["spearman"].items()}
    ranked = [rule for rule in RANKED if rule in rule_scores(copied_run, 0)]
    assert list(rows) == ranked and not [rule for rule in ranked if RULES[rule].copies]  # of which the demo makes none
    assert (finished_demo / "demo.txt").read_text().strip() in told
    assert (finished_demo / "demo.png").read_bytes()[:4] == b"\x89PNG" and "demo.png (a test case)" in told
