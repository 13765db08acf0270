"""The recipe mean_teacher from end to end, tiny: the scans are preprocessed, one online training, what opens it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_process import do_all, phantom, started

from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.model import open_model
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.preview import preview
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.start import Plan
from nnunet_flare.rounds.status import status

UNLABELLED = ["FLAREPhantom_Un_0000", "FLAREPhantom_Un_0001", "FLAREPhantom_Un_0002"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("mean_teacher")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=2, unlabelled=3, test=1)
        held_out = {f"eval_{kind}": folder / "test" / kind for kind in ("images", "labels")}
        run = started(folder, folders, "mean_teacher", {"training.save_every": "1"}, **held_out)
        do_all(run, monkeypatch)
    return run


def test_the_recipe() -> None:
    recipe = load_recipe("mean_teacher")
    assert recipe.is_online
    assert [recipe.planner, recipe.member_folds(0)] == ["nnUNetPlannerFlare", ["all"]]
    settings = recipe.settings(0, run="x", unlabelled="folder")
    found = settings.mean_teacher
    assert found is not None
    assert (found.decay, found.threshold, found.weight, found.ramp_up) == (0.999, 0.9, 1.0, 0.25)
    assert (found.unlabelled, settings.adversarial) == ("folder", None)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("members.count", "5", "members.count: found 5, .* expected 1"),
        ("training.mean_teacher.unlabelled", "other", "training.mean_teacher.unlabelled: is set by the loop"),
        ("training.mean_teacher.decay", "1.0", "training.mean_teacher.decay: found 1.0"),
        ("training.mean_teacher.weight", "-1", "training.mean_teacher.weight: found -1"),
        ("training.mean_teacher.dcay", "0.5", "training.mean_teacher.dcay: unknown key"),
    ],
)
def test_what_one_online_training_has_no_use_for_is_refused(key: str, value: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_recipe("mean_teacher", {key: value})


def test_one_training_follows_the_preprocessing(finished: Run) -> None:
    names = [name for name in graph(finished) if not name.startswith(("report", "evaluate"))]
    assert names == ["plan", "unlabelled", "build-r0", "train-r0-fall"]
    assert all(finished.paths.done(name).is_file() for name in graph(finished))
    table = read_json(finished.preprocessed / f"flare_cases.{finished.round(0).configuration}.json")["cases"]
    assert [case for case, entry in table.items() if entry["role"] == "unlabelled"] == UNLABELLED
    (log,) = (finished.final.model / "fold_all").glob("training_log_*.txt")
    assert "Unlabelled: 3 scans" in log.read_text() and "sure_share" in log.read_text()
    assert 0 <= read_json(finished.paths.evaluation(0) / "dice.json")["mean"] <= 1
    assert "final" in status(finished)


def test_the_final_model_is_the_average_and_opens(finished: Run) -> None:
    model = open_model(Member(finished.final.model, "all"))
    assert model.trainer_name == "nnUNetTrainerFlareMeanTeacher"
    shape = (1, 1, *model.configuration_manager.patch_size)
    assert torch.isfinite(model.network()(torch.zeros(shape))).all()
    best = torch.load(finished.final.model / "fold_all" / "checkpoint_best.pth", weights_only=False)
    assert best["flare_state"]["updates"] == 2
    for name, weight in model.weights.items():  # after the only epoch, the best is the last
        assert torch.equal(weight, best["network_weights"][name]), name
    student = best["flare_state"]["student_weights"]
    assert any(not torch.equal(weight, student[name]) for name, weight in model.weights.items())


def test_a_preview_times_both_batches(finished: Run) -> None:
    labelled = tuple(sorted(path.name for path in (finished.raw / "labelsTr").iterdir()))
    text = preview(Plan(finished, labelled, 1, ".nii.gz"))
    assert "train-r0-fall" in text and Path(finished.root).name in text
