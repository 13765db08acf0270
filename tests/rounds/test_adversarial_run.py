"""The recipe adversarial from end to end, tiny: coarse model, boxes, one online training, and what opens its model."""

from __future__ import annotations

import logging
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import stock_prediction
import torch
from in_process import TINY_COARSE_TO_FINE, do_all, phantom

from nnunet_flare.cli import predict
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import read_volume
from nnunet_flare.inference import runtimes
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.model import open_model
from nnunet_flare.networks.discriminator import Discriminator
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.preview import preview
from nnunet_flare.rounds.run.decisions import keep_reviews
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.stages.build import build_round
from nnunet_flare.rounds.stages.preprocess import state_file
from nnunet_flare.rounds.start import Plan, plan_run, start_run
from nnunet_flare.rounds.status import status

TINY = {
    **TINY_COARSE_TO_FINE,
    "training.adversarial.discriminator_features": "2",
    "training.adversarial.warmup": "0.3",
    "training.adversarial.finish": "0.34",
}
UNLABELLED = ["FLAREPhantom_Un_0000", "FLAREPhantom_Un_0001", "FLAREPhantom_Un_0002"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two labelled, three unlabelled scans and one that cannot be read, one held-out scan."""
    folder = tmp_path_factory.mktemp("adversarial")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=2, unlabelled=3, test=1)
        (folder / "unlabelled" / "truncated_0000.nii.gz").write_bytes(b"\x1f\x8b not a scan")
        request = Request(
            dataset="22",
            unlabelled=folder / "unlabelled",
            device="cpu",
            eval_images=folder / "test" / "images",
            eval_labels=folder / "test" / "labels",
        )
        run = start_run(plan_run(request, load_recipe("adversarial", TINY), folders))
        do_all(run, monkeypatch)
    return run


# The recipe


def test_the_papers_numbers() -> None:
    recipe = load_recipe("adversarial")
    assert (recipe.planner, recipe.configuration) == ("nnUNetPlannerFlareFine", "3d_sztu")
    settings = recipe.settings(0, run="x")
    assert (settings.num_epochs, settings.optimizer, settings.betas) == (500, "Adam", (0.9, 0.99))
    assert (settings.initial_lr, settings.weight_decay, settings.lr_schedule) == (1e-3, 1e-5, "steps")
    assert settings.augmentation.labelled == "shift" and not settings.mirroring
    adversarial = settings.adversarial
    assert adversarial is not None
    assert (adversarial.warmup, adversarial.finish, adversarial.noise_std) == (0.1, 0.1, 0.1)
    assert (adversarial.discriminator_features, adversarial.discriminator_lr) == (64, 1e-3)
    assert not adversarial.poison_masks
    assert recipe.roi is not None
    assert (recipe.roi.rule, recipe.roi.margin_mm, recipe.roi.test_margin_mm) == ("sztu", 20, 20)
    assert recipe.coarse_settings(run=None).num_epochs == 300


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("rounds", "2", "rounds: found 2, .* expected 1"),
        ("members.count", "5", "members.count: found 5, .* expected 1"),
        ("selection.rule", "min-organ", "selection.rule: found 'min-organ', .* expected 'all'"),
        ("selection.threshold", "0.5", "selection.threshold: found 0.5"),
        ("fusion.uncertain_organs", "ignore", "fusion.uncertain_organs: found 'ignore'"),
        ("final.num_epochs", "7", "final.num_epochs: found 7"),
        ("stop.patience", "1", "stop.patience: found 1"),
        ("training.adversarial.unlabelled", "other", "set by the loop"),
        ("training.adversarial.warmup", "1.5", "training.adversarial.warmup: found 1.5"),
        ("training.adversarial.wrmup", "0.5", "training.adversarial.wrmup: unknown key"),
    ],
)
def test_keys_that_one_online_training_has_no_use_for_are_refused(key: str, value: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_recipe("adversarial", {key: value})


def test_another_length_by_the_trainers_name_is_online_too() -> None:
    assert load_recipe("adversarial", {"trainer": "nnUNetTrainerFlareAdversarial_7epochs"}).is_online
    assert not load_recipe("adversarial", {"trainer": "nnUNetTrainerFlareST", "training.adversarial": "null"}).is_online


# The run


def test_the_scans_are_cropped_and_one_training_follows(finished: Run) -> None:
    names = [name for name in graph(finished) if not name.startswith(("report", "evaluate"))]
    assert names == ["plan", "plan-coarse", "train-coarse", "locate-p0", "unlabelled", "build-r0", "train-r0-fall"]
    assert all(finished.paths.done(name).is_file() for name in graph(finished))
    for case in UNLABELLED:
        assert read_array(finished.unlabelled_data / f"{case}.b2nd").shape == (1, 16, 32, 32)
    text = status(finished)
    assert "final" in text and "mean agreement" not in text
    assert 0 <= read_json(finished.paths.evaluation(0) / "dice.json")["mean"] <= 1


def test_the_training_knew_the_labelled_and_the_readable_unlabelled_scans(finished: Run) -> None:
    table = read_json(finished.preprocessed / f"flare_cases.{finished.round(0).configuration}.json")["cases"]
    assert [case for case, entry in table.items() if entry["role"] == "unlabelled"] == UNLABELLED
    settings = read_json(finished.plans_file)["configurations"][finished.round(0).configuration]["flare"]
    assert settings["adversarial"]["unlabelled"] == finished.unlabelled_data.name
    assert settings["iterations_per_epoch"] == 1, "a pass over two labelled scans in batches of two"
    (log,) = (finished.round(0).model / "fold_all").glob("training_log*.txt")
    assert "Training on 2 labelled cases" in log.read_text()
    assert f"Unlabelled: 3 scans of {finished.unlabelled_data}, in batches of 1" in log.read_text()
    checkpoint = torch.load(finished.round(0).model / "fold_all" / "checkpoint_final.pth", weights_only=False)
    scores = checkpoint["logging"]["winner_score"]
    assert np.isnan(scores).tolist() == [True, False, True], "warm-up, the three steps, finish"


def test_rejected_and_odd_scans_take_no_part(finished: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = finished.preprocessed / f"flare_cases.{finished.round(0).configuration}.json"
    marker, before = finished.paths.done("build-r0"), table.read_text()
    oddity = state_file(finished.unlabelled_data, UNLABELLED[1])
    state = read_json(oddity)
    decisions = tmp_path / "decisions.csv"
    decisions.write_text(f"case,decision,organ,comment\n{UNLABELLED[0]},reject,,metal\n{UNLABELLED[2]},accept,,\n")
    done = marker.read_text()
    try:
        marker.unlink()
        write_json(oddity, {**state, "odd": ["spacing"]})
        with caplog.at_level(logging.INFO):
            keep_reviews(finished, decisions)
            assert build_round(finished, finished.round(0))["unlabelled"] == 1
        assert "the training leaves out the rejected ones" in caplog.text
        assert "1 of 4 unlabelled scans take part" in caplog.text
        roles = {case: entry["role"] for case, entry in read_json(table)["cases"].items()}
        assert [case for case, role in roles.items() if role == "unlabelled"] == [UNLABELLED[2]]
        write_json(state_file(finished.unlabelled_data, UNLABELLED[2]), {**state, "odd": ["spacing"]})
        with pytest.raises(TaskError, match=r"none of .* takes part.*selection.keep_odd=true"):
            build_round(finished, finished.round(0))
    finally:
        for case in UNLABELLED[1:]:
            write_json(state_file(finished.unlabelled_data, case), state)
        finished.paths.reviews.unlink(missing_ok=True)
        marker.write_text(done)
        table.write_text(before)


def test_the_dry_run_times_all_three_steps(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    forward = Discriminator.forward
    monkeypatch.setattr(
        Discriminator,
        "forward",
        lambda self, *given: (seen.append((torch.is_grad_enabled(), len(given[0]))), forward(self, *given))[1],
    )
    text = preview(Plan(finished, ("a", "b"), 1, ".nii.gz"))
    assert "3 passes over 2 samples" in text
    assert seen == [(True, 2), (False, 1), (False, 1)] * 2, "once for set-up"


def test_a_given_model_has_nothing_to_label(finished: Run) -> None:
    folder = finished.raw.parents[1]
    request = Request(
        dataset="22", unlabelled=folder / "unlabelled", run_dir=folder / "other", device="cpu",
        init_model=finished.round(0).model, init_folds=["all"],
    )  # fmt: skip
    folders = {name: Path(path) for name, path in finished.settings.folders.items()}
    with pytest.raises(InputError, match="no round that a given model could label"):
        plan_run(request, finished.recipe, folders)


# The model


def test_flare_predict_and_stock_open_the_models_that_the_run_trained(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNUNET_FLARE_CACHE", str(tmp_path / "cache"))
    images, fine = finished.raw.parents[1] / "test" / "images", finished.round(0).model
    words = ["-i", images, "-o", tmp_path / "out", "-m", fine, "--roi", finished.coarse_model, "--roi_rule", "sztu",
             "--save_roi", "--backend", "torch", "--precision", "fp32"]  # fmt: skip
    assert predict.main([str(word) for word in words]) == 0
    (result,) = (tmp_path / "out").glob("*.nii.gz")
    (scan,) = images.glob("*_0000.nii.gz")
    assert read_volume(result).array.shape == read_volume(scan).array.shape
    (crop,) = (tmp_path / "out" / "roi").glob("*_0000.nii.gz")
    (tmp_path / "stock").mkdir()
    stock = stock_prediction.predictor(fine, ["all"])
    assert type(stock.network).__name__ == "EfficientSegNet"
    with redirect_stdout(StringIO()):
        stock.predict_from_files_sequential([[str(crop)]], [str(tmp_path / "stock" / "a")], overwrite=True)
    assert read_volume(tmp_path / "stock" / "a.nii.gz").array.shape == read_volume(crop).array.shape


@pytest.mark.skipif(
    runtimes.choose_backend("auto", torch.device("cpu")) != "openvino", reason="OpenVINO is not installed"
)
def test_openvino_gives_the_networks_logits(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNUNET_FLARE_CACHE", str(tmp_path / "cache"))
    from nnunet_flare.inference.openvino_conversion import openvino_network
    from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

    model = open_model(Member(finished.round(0).model, "all"))
    network = model.network().float().eval()
    window = torch.randn(1, 1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    converted = openvino_network(model, network, patch=(16, 32, 32), two_d=False)
    runtime = OpenVinoRuntime(converted, precision="fp32", two_d=False)
    with torch.no_grad():
        found = torch.from_numpy(runtime(window.numpy()))
        torch.testing.assert_close(found, network(window)[0], atol=1e-3, rtol=1e-3)
