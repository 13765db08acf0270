"""A killed training goes on where it stopped, to the same weights, from the newest checkpoint that is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_flare.trainers.sampling import stop_augmenter

CASES = ["a", "b", "c"]
PSEUDO = ["p", "q"]
EPOCHS = 4
SETTINGS = {
    "num_epochs": EPOCHS,
    "iterations_per_epoch": 3,
    "save_every": 1,
    "seed": 11,
    "labelled_to_pseudo": [1, 1],
    "warmup_iterations": 5,
    "optimizer": "AdamW",
    "checkpoints_at": [0.5, 1.0],
    "final_validation": False,
}


@pytest.fixture(autouse=True)
def one_thread_always(one_thread: None) -> None:
    """Sums over threads differ in their last digits."""


@pytest.fixture
def data(tiny: Any) -> Any:
    tiny.add(*CASES, *PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    return tiny


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer catches it."""


def kill_in(trainer: Any, *, epoch: int, iteration: int) -> None:
    step = trainer.train_step

    def dying(batch: dict) -> dict:
        if (trainer.current_epoch, trainer._iteration) == (epoch, iteration):
            raise Killed
        result: dict = step(batch)
        return result

    trainer.train_step = dying


def resumed(data: Any, results: str, **changes: Any) -> Any:
    """A new trainer as ``nnUNetv2_train --c`` makes it."""
    trainer = data.trainer(continued=True, results=results, **{**SETTINGS, **changes})
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    return trainer


def start_and_kill(data: Any, results: str, *, epoch: int, iteration: int, **changes: Any) -> Any:
    trainer = data.trainer(results=results, **{**SETTINGS, **changes})
    kill_in(trainer, epoch=epoch, iteration=iteration)
    with pytest.raises(Killed):
        trainer.run_training()
    for augmenter in (trainer.dataloader_train, trainer.dataloader_val):
        stop_augmenter(augmenter)
    return trainer


def assert_same_training(one: Any, other: Any) -> None:
    for name, weight in one.network.state_dict().items():
        assert torch.equal(weight, other.network.state_dict()[name]), name
    for key in ("train_losses", "val_losses", "lrs", "mean_fg_dice", "ema_fg_dice", "pseudo_share"):
        assert one.logger.get_value(key, step=None) == other.logger.get_value(key, step=None), key


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_and_resumed_training_equals_an_undisturbed_one(data: Any, workers: str) -> None:
    data.environment.setenv("nnUNet_n_proc_DA", workers)
    undisturbed = data.trainer(results="undisturbed", **SETTINGS)
    undisturbed.run_training()
    start_and_kill(data, "killed", epoch=2, iteration=1)
    again = resumed(data, "killed")
    assert again.current_epoch == 2
    again.run_training()
    assert_same_training(undisturbed, again)
    for name in ("checkpoint_1of2.pth", "checkpoint_final.pth"):
        weights = [
            torch.load(Path(trainer.output_folder, name), weights_only=False)["network_weights"]
            for trainer in (undisturbed, again)
        ]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), name


def test_a_seeded_training_does_not_time_its_transforms(data: Any) -> None:
    """Stock's blur picks a convolution or a Fourier transform by a stopwatch; their last digits differ."""
    for seed, timed in ((None, True), (3, False)):
        trainer = data.trainer(**{**SETTINGS, "seed": seed})
        trainer.initialize()
        loader, _ = trainer.get_dataloaders()
        chains = loader.data_loader.transforms.chains
        blurs = [
            part.transform
            for chain in chains.values()
            for part in chain.transforms
            if isinstance(getattr(part, "transform", None), GaussianBlurTransform)
        ]
        assert [blur.benchmark for blur in blurs] == [timed], "the stock chain of the labelled cases has one blur"


def test_members_of_an_ensemble_differ(data: Any) -> None:
    weights = []
    for fold, number in ((0, 1), (1, 1), (0, 2)):
        data.splits((["a", "b"], ["c"]), (["b", "c"], ["a"]))
        data.table(
            {**dict.fromkeys(CASES, "labelled"), **dict.fromkeys(PSEUDO, "pseudo")}, name="flare_cases.3d_fullres.json"
        )
        trainer = data.trainer(fold=fold, results=f"f{fold}r{number}", **{**SETTINGS, "round": number})
        trainer.initialize()
        weights.append(next(trainer.network.parameters()).detach().clone())
    assert not any(torch.equal(one, other) for one, other in ((weights[0], weights[1]), (weights[0], weights[2])))


def test_a_resumed_training_has_the_epochs_learning_rate(data: Any) -> None:
    changes = {"warmup_iterations": 0, "optimizer": "SGD"}
    start_and_kill(data, "killed", epoch=3, iteration=0, **changes)
    again = resumed(data, "killed", **changes)
    again.run_training()
    expected = [0.01 * (1 - epoch / EPOCHS) ** 0.9 for epoch in range(EPOCHS)]
    assert again.logger.get_value("lrs", step=None) == pytest.approx(expected)


def test_a_broken_latest_falls_back_to_the_newest_good_one(data: Any) -> None:
    killed = start_and_kill(data, "killed", epoch=3, iteration=0)
    latest = Path(killed.output_folder, "checkpoint_latest.pth")
    latest.write_bytes(latest.read_bytes()[:1000])
    undisturbed = data.trainer(results="undisturbed", **SETTINGS)
    undisturbed.run_training()
    again = resumed(data, "killed")
    log = Path(again.log_file).read_text()
    assert "checkpoint_latest.pth" in log
    assert "Training continues from the newest good checkpoint" in log
    assert 1 <= again.current_epoch <= 3
    again.run_training()
    assert_same_training(undisturbed, again)


def test_when_no_checkpoint_can_be_read_training_starts_anew_and_says_so(data: Any) -> None:
    killed = start_and_kill(data, "killed", epoch=1, iteration=0)
    for path in Path(killed.output_folder).glob("*.pth"):
        path.write_bytes(b"broken")
    again = resumed(data, "killed")
    assert "training starts from the beginning" in Path(again.log_file).read_text()
    assert again.current_epoch == 0
    again.run_training()
    undisturbed = data.trainer(results="undisturbed", **SETTINGS)
    undisturbed.run_training()
    assert_same_training(undisturbed, again)


def test_a_broken_file_is_not_replaced_when_only_validating(data: Any) -> None:
    trainer = data.trainer(results="whole", **SETTINGS)
    trainer.run_training()
    Path(trainer.output_folder, "checkpoint_final.pth").write_bytes(b"broken")
    validating = data.trainer(results="whole", **SETTINGS)
    with pytest.raises(Exception, match=r"(?i)invalid|pickle|unpickling|load"):
        maybe_load_checkpoint(validating, continue_training=False, validation_only=True)


def test_a_resumed_training_does_not_load_its_initial_weights_again(data: Any) -> None:
    source = data.trainer(results="source", **SETTINGS)
    source.run_training()
    init = Path(source.output_folder, "checkpoint_final.pth").rename(data.root / "init.pth")
    killed = start_and_kill(data, "killed", epoch=2, iteration=0, init_from=str(init))
    assert "segmentation head included" in Path(killed.log_file).read_text()
    init.unlink()
    resumed(data, "killed", init_from=str(init)).run_training()


def test_a_missing_initial_checkpoint_is_refused(data: Any) -> None:
    with pytest.raises(Exception, match="no such checkpoint"):
        data.trainer(**{**SETTINGS, "init_from": str(data.root / "none.pth")}).initialize()


def test_a_save_that_fails_half_way_leaves_the_previous_checkpoint(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = data.trainer(**SETTINGS)
    trainer.run_training()
    final = Path(trainer.output_folder, "checkpoint_final.pth")
    before = final.read_bytes()

    def disk_full(checkpoint: dict, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.torch.save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(str(final))
    assert final.read_bytes() == before


def test_a_training_removes_what_a_kill_left(data: Any) -> None:
    trainer = data.trainer(**SETTINGS)
    leftover = Path(trainer.output_folder, ".tmp-0123-checkpoint_latest.pth")
    leftover.write_bytes(b"half")
    trainer.run_training()
    assert not leftover.exists()


def test_a_long_epoch_is_saved_after_fifteen_minutes(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("nnunet_flare.trainers.base.time.monotonic", lambda: now[0])
    trainer = data.trainer(**{**SETTINGS, "save_every": 100})
    saved = []
    save = trainer.save_checkpoint
    trainer.save_checkpoint = lambda name: (saved.append((Path(name).name, trainer.current_epoch)), save(name))
    end = trainer.on_epoch_end

    def epoch_of_eight_minutes() -> None:
        now[0] += 8 * 60
        end()

    trainer.on_epoch_end = epoch_of_eight_minutes
    trainer.run_training()
    assert [epoch for name, epoch in saved if name == "checkpoint_latest.pth"] == [1]


def test_checkpoints_are_stocks(data: Any) -> None:
    """Same keys, tensors and numbers only: stock nnU-Net and ``weights_only`` readers open them."""
    from nnunet_flare.checkpoints import load_checkpoint

    trainer = data.trainer(**SETTINGS)
    trainer.run_training()
    stock = data.trainer(name="nnUNetTrainer", results="stock")
    stock.num_epochs = stock.num_iterations_per_epoch = stock.num_val_iterations_per_epoch = 1
    stock.run_training()
    ours, theirs = (load_checkpoint(Path(t.output_folder, "checkpoint_final.pth")) for t in (trainer, stock))
    assert set(ours) == set(theirs)
    assert ours["trainer_name"] == "nnUNetTrainerFlareST"
    assert set(theirs["logging"]) < set(ours["logging"])


KILLED_WHILE_SAVING = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import nnunet_flare.trainers.checkpoints as checkpoints

class Slow:
    def __reduce__(self):
        print("saving", flush=True)
        time.sleep(60)

path = Path(sys.argv[2])
with checkpoints.written_whole(path) as temporary:
    torch.save({"weights": torch.zeros(10), "slow": Slow()}, temporary)
"""


def test_kill_9_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    path.write_text("the previous one")
    script = tmp_path / "save.py"
    script.write_text(KILLED_WHILE_SAVING)
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, str(script), root, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "saving"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_text() == "the previous one"
    assert len(list(tmp_path.glob(".tmp-*"))) == 1, "the half-written one has another name"
