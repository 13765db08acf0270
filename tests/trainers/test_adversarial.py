"""The adversarial trainer: each of its three steps against a reference written out by hand, its course, its stream."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from test_resume import Killed, kill_in
from tiny_dataset import write_case
from torch import nn
from torch.nn import functional as F

from nnunet_flare.checkpoints import load_checkpoint
from nnunet_flare.errors import InputError
from nnunet_flare.trainers.halves import HalvedConv3d
from nnunet_flare.trainers.sampling import stop_augmenter
from nnunet_flare.trainers.settings import AdversarialSettings
from nnunet_flare.trainers.transforms.organ_shift import OrganShiftTransform
from nnunet_flare.trainers.transforms.painting import PaintingTransform
from nnunet_flare.trainers.transforms.shift import ShiftTransform

CASES = ["a", "b", "c"]
UNLABELLED = ["u", "v", "w"]
SETTINGS = {
    "num_epochs": 1,
    "iterations_per_epoch": 2,
    "final_validation": False,
    "seed": 3,
    "adversarial": {"discriminator_features": 2, "warmup": 0, "finish": 0},
}
CURVES = ("discriminator_loss", "unlabelled_loss", "winner_score")


@pytest.fixture
def data(tiny: Any, one_thread: None) -> Any:
    """Three labelled and three unlabelled scans, in a network with dropout."""
    tiny.add(*CASES)
    folder = tiny.data.with_name(f"{tiny.data.name}_un")
    folder.mkdir()
    for number, case in enumerate(UNLABELLED):
        write_case(folder, case, seed=number, seg=np.zeros((1, 10, 20, 20), np.int8))
    tiny.unlabelled = folder
    return tiny


def with_dropout(data: Any) -> None:
    arch = data.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arch["dropout_op"], arch["dropout_op_kwargs"] = "torch.nn.modules.dropout.Dropout3d", {"p": 0.3, "inplace": True}


def adversarial(data: Any, name: str = "nnUNetTrainerFlareAdversarial", **settings: Any) -> Any:
    changes = {**SETTINGS["adversarial"], **settings.pop("adversarial", {})}
    return data.trainer(name=name, **{**SETTINGS, **settings, "adversarial": changes})


def started(data: Any, **settings: Any) -> Any:
    """A trainer in front of its first step."""
    with_dropout(data)
    trainer = adversarial(data, **settings)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.network.train()
    return trainer


def batch_of(*keys: str, deep_supervision: bool = False) -> dict[str, Any]:
    stream = torch.Generator().manual_seed(5)
    data = torch.randn((len(keys), 1, 8, 16, 16), generator=stream)
    target = torch.randint(0, 3, (len(keys), 1, 8, 16, 16), generator=stream).to(torch.int16)
    return {"data": data, "target": [target, target[..., ::2, ::2]] if deep_supervision else target, "keys": keys}


# ------------------------------------------------------------------------------------------------ by hand


def dice_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 - (2 sum(pg) + s) / (sum(p^2) + sum(g^2) + s) over the organs."""
    p = torch.softmax(logits, 1)[:, 1:]
    g = F.one_hot(labels[:, 0].long(), logits.shape[1]).movedim(-1, 1)[:, 1:].float()
    both = (2 * (p * g).sum((2, 3, 4)) + 1e-8) / ((p**2).sum((2, 3, 4)) + (g**2).sum((2, 3, 4)) + 1e-8)
    return 1 - both.mean()


def adam_step(network: nn.Module, loss: torch.Tensor, state: Any) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=1e-5)
    optimizer.load_state_dict(copy.deepcopy(state))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    optimizer.step()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, msg=name)


def assert_untouched(network: nn.Module, before: nn.Module) -> None:
    assert_same_weights(network, before)
    assert all(weight.grad is None for weight in network.parameters()), "it got gradients"


def full(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (list, tuple)) else output


def prefer(trainer: Any, mask: str, logit: float = 0.8) -> None:
    """Makes the discriminator sure of one of the two masks, whatever it sees."""
    nn.init.zeros_(trainer.discriminator.head.weight)
    trainer.discriminator.head.bias.data = torch.tensor([logit, 0.0] if mask == "first" else [0.0, logit])


def seed_for(heads: bool) -> int:
    for seed in range(50):
        torch.manual_seed(seed)
        if (torch.rand(1).item() < 0.5) == heads:
            return seed
    raise AssertionError("no seed throws the coin that way")


# ------------------------------------------------------------------------------------------------ the three steps


@pytest.mark.parametrize("heads", [True, False], ids=["truth first", "prediction first"])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_the_discriminator_learns_to_tell_the_truth(data: Any, heads: bool, deep_supervision: bool) -> None:
    trainer = started(data, adversarial={"deep_supervision": deep_supervision})
    batch = batch_of("a", "b", deep_supervision=deep_supervision)
    before, judge = copy.deepcopy(trainer.network), copy.deepcopy(trainer.discriminator)
    state = trainer.discriminator_optimizer.state_dict()
    seed = seed_for(heads)
    torch.manual_seed(seed)
    loss = trainer.discriminator_step(batch)

    with torch.no_grad():
        guess = torch.softmax(full(copy.deepcopy(before).eval()(batch["data"])), 1)[:, 1:]
    truth = F.one_hot(full(batch["target"])[:, 0].long(), 3).movedim(-1, 1)[:, 1:].float()
    torch.manual_seed(seed)
    assert (torch.rand(1).item() < 0.5) == heads
    first, second = (truth, guess) if heads else (guess, truth)
    opinions = judge.train()(batch["data"], first, second)
    expected = -torch.log_softmax(opinions, 1)[:, 0 if heads else 1].mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    adam_step(judge, expected, state)
    assert_same_weights(trainer.discriminator, judge)
    assert_untouched(trainer.network, before)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_the_generator_learns_the_labels(data: Any, deep_supervision: bool) -> None:
    trainer = started(data, adversarial={"deep_supervision": deep_supervision, "warmup": 0.5}, num_epochs=2)
    assert not trainer.is_adversarial(0), "so that this epoch has this step alone"
    batch = batch_of("a", "b", deep_supervision=deep_supervision)
    network, judge = copy.deepcopy(trainer.network), copy.deepcopy(trainer.discriminator)
    state = trainer.optimizer.state_dict()
    torch.manual_seed(1)
    loss = trainer.train_step(batch)["loss"]

    torch.manual_seed(1)
    output = network(batch["data"])
    if deep_supervision:  # stock's weights: 1 and 1/2 by resolution, but the lowest has none
        expected = dice_by_hand(output[0], batch["target"][0])
    else:
        expected = dice_by_hand(output, batch["target"])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    adam_step(network, expected, state)
    assert_same_weights(trainer.network, network)
    assert_untouched(trainer.discriminator, judge)


@pytest.mark.parametrize("winner", ["first", "second"])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_the_generator_learns_the_winners_mask_on_the_losers_image(
    data: Any, winner: str, deep_supervision: bool
) -> None:
    trainer = started(data, adversarial={"deep_supervision": deep_supervision, "noise_std": 0.5})
    prefer(trainer, winner)
    clean = batch_of("u", "v")["data"]
    network, judge = copy.deepcopy(trainer.network), copy.deepcopy(trainer.discriminator)
    state = trainer.optimizer.state_dict()
    torch.manual_seed(1)
    values = trainer.unlabelled_step({"data": clean, "target": torch.zeros(2, 1, 8, 16, 16), "keys": ("u", "v")})

    torch.manual_seed(1)
    noised = clean + torch.rand(2, 1, 1, 1, 1) * 0.5 * torch.randn(clean.shape)
    with torch.no_grad():  # dropout is active in both
        of_noised, of_clean = full(network(noised)).argmax(1), full(network(clean)).argmax(1)
    score = torch.sigmoid(torch.tensor(0.8))
    image, mask = (clean, of_noised) if winner == "first" else (noised, of_clean)
    output = full(network(image))
    expected = sum(score * dice_by_hand(output[i : i + 1], mask[i : i + 1, None]) for i in range(2)) / 2
    assert values["unlabelled_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert values["winner_score"] == pytest.approx(score.item(), rel=1e-6)
    adam_step(network, expected, state)
    assert_same_weights(trainer.network, network)
    assert_untouched(trainer.discriminator, judge)


def test_who_is_in_training_mode_when(data: Any) -> None:
    """Step 1: the generator without dropout, the discriminator with; step 3 the other way round."""
    trainer = started(data)
    seen: list[tuple[str, bool, bool]] = []
    for name, network in (("generator", trainer.network), ("discriminator", trainer.discriminator)):
        network.register_forward_pre_hook(
            lambda module, _, name=name: seen.append((name, module.training, torch.is_grad_enabled()))
        )
    trainer.discriminator_step(batch_of("a", "b"))
    assert seen == [("generator", False, False), ("discriminator", True, True)]
    seen.clear()
    trainer.unlabelled_step(batch_of("u"))
    assert seen == [("generator", True, False)] * 2 + [("discriminator", False, False)] * 2 + [
        ("generator", True, True)
    ]


@pytest.mark.parametrize(("scaler", "precision"), [("stock's", torch.float16), (None, None)], ids=["fp16", "bf16"])
def test_without_a_gradient_scaler_the_discriminator_computes_in_single_precision(
    data: Any, scaler: Any, precision: Any
) -> None:
    """On a GPU too, where bf16 has none: its infinite gradients would not be skipped."""
    trainer = adversarial(data, cuda_precision="fp16" if scaler else "bf16")
    trainer.device, trainer.grad_scaler = torch.device("cuda"), scaler
    assert getattr(trainer._judging(), "fast_dtype", None) == precision


def test_on_the_cpu_the_discriminator_computes_in_single_precision_whatever_the_generator_does(
    data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnunet_flare.trainers.base.computes_bf16", lambda device: True)  # so small a one may be slow
    trainer = started(data, cpu_precision="bf16")
    seen: dict[str, set[torch.dtype]] = {"generator": set(), "discriminator": set()}
    for name, network in (("generator", trainer.network), ("discriminator", trainer.discriminator)):
        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.register_forward_hook(lambda _, __, output, name=name: seen[name].add(output.dtype))
    trainer.discriminator_step(batch_of("a", "b"))
    trainer.unlabelled_step(batch_of("u"))
    assert seen == {"generator": {torch.bfloat16}, "discriminator": {torch.float32}}


def test_an_iteration_has_the_three_steps_in_the_papers_order(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = started(data)
    order: list[str] = []
    for name in ("discriminator_step", "unlabelled_step", "compute_loss"):
        step = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *given, n=name, s=step: (order.append(n), s(*given))[1])
    trainer.dataloader_unlabelled = iter([batch_of("u")])
    result = trainer.train_step(batch_of("a", "b"))
    assert order == ["discriminator_step", "compute_loss", "unlabelled_step"]
    assert set(CURVES) < set(result)
    assert result["labelled_loss"] == pytest.approx(float(result["loss"]))


# ------------------------------------------------------------------------------------------------ course


def test_warm_up_and_finish_are_supervised_only(data: Any) -> None:
    trainer = adversarial(data, num_epochs=10, iterations_per_epoch=1, adversarial={"warmup": 0.1, "finish": 0.2})
    trainer.run_training()
    logged = trainer.logger.local_logger.my_fantastic_logging
    for curve in CURVES:
        known = [epoch for epoch, value in enumerate(logged[curve]) if not np.isnan(value)]
        assert known == [1, 2, 3, 4, 5, 6, 7], curve
    assert not np.isnan(logged["labelled_loss"]).any()
    assert "winner_score" in Path(trainer.log_file).read_text()


def test_without_an_adversarial_epoch_the_discriminator_is_not_trained(data: Any) -> None:
    trainer = adversarial(data, num_epochs=2, adversarial={"warmup": 0.5, "finish": 0.49})
    trainer.initialize()
    before = copy.deepcopy(trainer.discriminator)
    trainer.current_epoch = 0
    trainer.num_epochs = 1
    trainer.run_training()
    assert_untouched(trainer.discriminator, before)


def test_generator_and_discriminator_compute_a_batch_of_one_in_halves(data: Any) -> None:
    trainer = started(data)
    for network in (trainer.network, trainer.discriminator):
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
        assert convolutions
        assert all(isinstance(module, HalvedConv3d) for module in convolutions)


def test_the_papers_numbers_are_the_trainers_own(data: Any) -> None:
    data.plans["configurations"]["3d_fullres"].pop("flare", None)
    trainer = data.trainer(name="nnUNetTrainerFlareAdversarial")
    trainer.initialize()
    settings = trainer.settings
    assert (settings.num_epochs, settings.iterations_per_epoch) == (500, 20)
    assert isinstance(trainer.optimizer, torch.optim.Adam)
    assert trainer.optimizer.defaults | {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 1e-5} == (
        trainer.optimizer.defaults
    )
    assert (settings.lr_schedule, settings.mirroring, trainer.enable_deep_supervision) == ("steps", False, False)
    assert trainer.oversample_foreground_percent == 0
    assert trainer.discriminator.head.weight.shape == (2, 1536)
    assert [epoch for epoch in range(500) if trainer.is_adversarial(epoch)] == list(range(50, 450))


# ------------------------------------------------------------------------------------------------ the stream


def drawn(trainer: Any, batches: int) -> list[str]:
    return [str(case) for _ in range(batches) for case in next(trainer.dataloader_unlabelled)["keys"]]


@pytest.mark.parametrize("seed", [3, None])
def test_the_unlabelled_scans_come_in_turn(data: Any, seed: int | None) -> None:
    trainer = adversarial(data, seed=seed, adversarial={"unlabelled_batch_size": 2})
    trainer.on_train_start()
    cases = drawn(trainer, 9)
    passes = [cases[start : start + 3] for start in range(0, 18, 3)]
    assert all(sorted(one) == UNLABELLED for one in passes), "every scan once a pass"
    assert len({tuple(one) for one in passes}) > 1, "in an order that changes"


def test_the_stream_goes_on_where_a_resumed_training_left_it(data: Any) -> None:
    settings = {"num_epochs": 6, "iterations_per_epoch": 2, "adversarial": {"warmup": 0.2}}
    whole, later = adversarial(data, **settings), adversarial(data, **settings)
    whole.on_train_start()
    later.initialize()
    later.current_epoch = 4
    later.on_train_start()
    # Epochs 2 and 3 of 0 to 3 were adversarial.
    assert drawn(whole, 8)[4:] == drawn(later, 4)


def test_the_case_table_says_which_scans_take_part(data: Any) -> None:
    data.table({"u": "unlabelled", "w": "unlabelled"})
    trainer = adversarial(data)
    trainer.on_train_start()
    assert Counter(drawn(trainer, 4)) == {"u": 2, "w": 2}
    assert sorted(trainer.do_split()[0]) == CASES
    assert "Unlabelled: 2 scans" in Path(trainer.log_file).read_text()


# ------------------------------------------------------------------------------------------------ settings


def loader_of(trainer: Any) -> Any:
    trainer.on_train_start()
    return trainer.dataloader_unlabelled.data_loader


def kinds_of(transform: Any) -> set[type]:
    found = {type(transform)}
    for part in [*getattr(transform, "transforms", []), getattr(transform, "transform", None)]:
        found |= kinds_of(part) if part is not None else set()
    return found


def check_unlabelled(data: Any) -> None:
    trainer = adversarial(data, adversarial={"unlabelled": "cropped_un"})
    with pytest.raises(InputError, match="cropped_un: holds no unlabelled scan"):
        trainer.run_training()
    data.unlabelled.rename(data.unlabelled.with_name("cropped_un"))
    assert next(loader_of(trainer))["data"].shape[0] == 1


def check_unlabelled_batch_size(data: Any) -> None:
    assert next(loader_of(adversarial(data)))["data"].shape[0] == 1, "half of two"
    assert next(loader_of(adversarial(data, adversarial={"unlabelled_batch_size": 3})))["data"].shape[0] == 3


def check_augmentation(data: Any) -> None:
    assert {ShiftTransform, OrganShiftTransform} <= kinds_of(loader_of(adversarial(data)).transforms)
    strong = kinds_of(loader_of(adversarial(data, adversarial={"augmentation": "strong"})).transforms)
    assert PaintingTransform in strong and ShiftTransform not in strong
    next(loader_of(adversarial(data, adversarial={"augmentation": "stock"})))


def check_noise_std(data: Any) -> None:
    images = []
    for std in (0.0, 0.4):
        trainer = started(data, adversarial={"noise_std": std})
        seen: list[torch.Tensor] = []
        trainer.network.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        trainer.unlabelled_step(batch_of("u"))
        images.append(seen[:2])
    assert torch.equal(*images[0])
    assert not torch.equal(*images[1])


def check_warmup(data: Any) -> None:
    trainer = adversarial(data, num_epochs=10, adversarial={"warmup": 0.3})
    assert [trainer.is_adversarial(epoch) for epoch in (2, 3)] == [False, True]


def check_finish(data: Any) -> None:
    trainer = adversarial(data, num_epochs=10, adversarial={"finish": 0.3})
    assert [trainer.is_adversarial(epoch) for epoch in (6, 7)] == [True, False]


def check_deep_supervision(data: Any) -> None:
    assert not adversarial(data).enable_deep_supervision
    trainer = adversarial(data, adversarial={"deep_supervision": True})
    trainer.run_training()
    assert len(trainer.network(torch.zeros(1, 1, 8, 16, 16))) == 2
    assert np.isfinite(trainer.logger.get_value("unlabelled_loss", step=-1))


def check_poison_masks(data: Any) -> None:
    sums = {}
    for poison in (False, True):
        trainer = started(data, adversarial={"poison_masks": poison})
        seen: list[torch.Tensor] = []
        trainer.discriminator.register_forward_pre_hook(lambda _, given, seen=seen: seen.extend(given[1:]))
        trainer.discriminator_step(batch_of("a", "b"))
        trainer.unlabelled_step(batch_of("u"))
        sums[poison] = [bool(((mask == 0) | (mask == 1)).all()) for mask in seen]
        assert len(seen) == 6
    assert sum(sums[False]) == 1, "the truth, and it alone, is 0 and 1"
    assert sum(sums[True]) == 0


def check_discriminator_features(data: Any) -> None:
    trainer = started(data, adversarial={"discriminator_features": 3})
    assert trainer.discriminator.head.weight.shape == (2, 3 * 8 * 3)


def check_discriminator_lr(data: Any) -> None:
    trainer = adversarial(data, num_epochs=4, iterations_per_epoch=1, adversarial={"discriminator_lr": 0.004})
    trainer.run_training()
    assert trainer.discriminator_optimizer.param_groups[0]["lr"] == 0.004, "constant"
    assert trainer.logger.get_value("lrs", step=None) == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4])


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def test_every_setting_has_a_check() -> None:
    assert set(CHECKS) == set(AdversarialSettings.model_fields)


@pytest.mark.parametrize("key", sorted(CHECKS))
def test_a_setting_has_its_effect(data: Any, key: str) -> None:
    CHECKS[key](data)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_the_final_checkpoint_is_the_generator_alone(data: Any) -> None:
    trainer = adversarial(data, num_epochs=2, checkpoints_at=[0.5, 1.0])
    trainer.run_training()
    folder = Path(trainer.output_folder)
    kept, final = (load_checkpoint(folder / name) for name in ("checkpoint_1of2.pth", "checkpoint_final.pth"))
    assert "flare_state" not in final
    assert set(kept["flare_state"]) == {
        "discriminator_weights",
        "discriminator_optimizer",
        "discriminator_scaler",
    }
    assert (folder / "checkpoint_1of2.pth").stat().st_size > (folder / "checkpoint_final.pth").stat().st_size
    stock = data.trainer(name="nnUNetTrainer", results="stock")
    stock.load_checkpoint(str(folder / "checkpoint_1of2.pth"))
    for name, weight in stock.network.state_dict().items():
        assert torch.equal(weight, kept["network_weights"][name]), name


RESUMED = {
    "num_epochs": 6,
    "iterations_per_epoch": 3,
    "save_every": 1,
    "warmup_iterations": 2,
    "adversarial": {"warmup": 0.2, "finish": 0.2},
}


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("epoch", [1, 3], ids=["killed in warm-up", "killed among the three steps"])
def test_a_killed_and_resumed_training_equals_an_undisturbed_one(data: Any, workers: str, epoch: int) -> None:
    data.environment.setenv("nnUNet_n_proc_DA", workers)
    with_dropout(data)
    undisturbed = adversarial(data, results="undisturbed", **RESUMED)
    undisturbed.run_training()
    killed = adversarial(data, results="killed", **RESUMED)
    kill_in(killed, epoch=epoch, iteration=1)
    with pytest.raises(Killed):
        killed.run_training()
    for augmenter in (killed.dataloader_train, killed.dataloader_val, killed.dataloader_unlabelled):
        stop_augmenter(augmenter)
    again = adversarial(data, results="killed", continued=True, **RESUMED)
    maybe_load_checkpoint(again, continue_training=True, validation_only=False)
    assert again.current_epoch == epoch
    again.run_training()
    for one, other in ((undisturbed.network, again.network), (undisturbed.discriminator, again.discriminator)):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name]), name
    states = [t.discriminator_optimizer.state_dict()["state"] for t in (undisturbed, again)]
    for index, state in states[0].items():
        assert torch.equal(state["exp_avg_sq"], states[1][index]["exp_avg_sq"])
    for curve in (*CURVES, "train_losses", "labelled_loss"):
        values = [t.logger.get_value(curve, step=None) for t in (undisturbed, again)]
        np.testing.assert_array_equal(*values, err_msg=curve)
    assert "no discriminator" not in Path(again.log_file).read_text()


def test_a_training_without_a_saved_discriminator_says_that_it_starts_anew(data: Any) -> None:
    trainer = adversarial(data, num_epochs=2)
    trainer.run_training()
    longer = adversarial(data, num_epochs=3, continued=True)
    maybe_load_checkpoint(longer, continue_training=True, validation_only=False)
    assert (
        "This checkpoint has no discriminator: the discriminator starts from random weights."
        in Path(longer.log_file).read_text()
    )
    ended = adversarial(data, num_epochs=2, continued=True)
    log = Path(ended.log_file)
    before = log.read_text()
    maybe_load_checkpoint(ended, continue_training=True, validation_only=False)
    assert "no discriminator" not in log.read_text()[len(before) :]


# ------------------------------------------------------------------------------------------------ refusals


def test_without_unlabelled_scans_it_is_refused(data: Any) -> None:
    for path in data.unlabelled.iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"_un: holds no unlabelled scan.*flare-pseudolabel preprocess"):
        adversarial(data).run_training()
    data.unlabelled.rmdir()
    with pytest.raises(InputError, match="holds no unlabelled scan"):
        adversarial(data).run_training()


def test_a_scan_that_the_table_names_must_be_there(data: Any) -> None:
    data.table({"u": "unlabelled", "gone": "unlabelled"})
    with pytest.raises(InputError, match="_un: lacks gone"):
        adversarial(data).run_training()


def test_partial_cases_are_refused(data: Any) -> None:
    data.table({"b": {"role": "partial", "annotated": [1]}})
    with pytest.raises(InputError, match=r"1 training cases are partial \(b\).*complete labels"):
        adversarial(data).run_training()


def test_labels_that_the_discriminator_cannot_compare_are_refused(data: Any) -> None:
    data.dataset_json["labels"] = {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    with pytest.raises(InputError, match="has an ignore label"):
        adversarial(data).initialize()


def test_two_dimensions_are_refused(data: Any) -> None:
    configuration = data.plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = configuration["patch_size"][1:]
    with pytest.raises(InputError, match=r"configuration '3d_fullres': is 2-D"):
        adversarial(data).initialize()


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_class_weights_add_a_cross_entropy_to_the_generators_loss(data: Any, deep_supervision: bool) -> None:
    changes = {"adversarial": {"deep_supervision": deep_supervision}}
    plain = started(data, **changes)
    weighted = started(data, class_weights=[1, 2, 5], **changes)
    batch = batch_of("a", "b", deep_supervision=deep_supervision)
    output = weighted.network(batch["data"])
    # stock's weights: 1 and 1/2 by resolution, but the lowest has none
    logits, target = (output[0], batch["target"][0]) if deep_supervision else (output, batch["target"])
    added = F.cross_entropy(logits, target[:, 0].long(), weight=torch.tensor([1.0, 2, 5]))
    difference = weighted.loss(output, batch["target"]) - plain.loss(output, batch["target"])
    assert float(difference) == pytest.approx(float(added), rel=1e-4)


def test_a_patch_as_large_as_the_volume_holds_all_of_it(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's oversampling centres the second sample of a batch on an organ, half of the volume outside the patch."""
    data.plans["configurations"]["3d_fullres"]["patch_size"] = [10, 20, 20]
    data.plans["configurations"]["3d_fullres"]["batch_size"] = 2
    monkeypatch.setattr(ShiftTransform, "get_parameters", lambda self, **_: {"shift": [0, 0, 0]})
    trainer = adversarial(data)
    trainer.initialize()
    trainer.on_train_start()
    loaders = {"training": trainer.dataloader_train, "validation": trainer.dataloader_val}
    for name, loader in loaders.items():
        for _ in range(4):
            for target in torch.as_tensor(next(loader)["target"]):
                assert target.shape[1:] == (10, 20, 20)
                sizes = [int((target == organ).sum()) for organ in (1, 2)]
                assert sizes == [5 * 8 * 8, 5 * 6 * 8], f"{name}: a part of the organs lies outside the patch"


def test_other_trainers_have_no_discriminator(data: Any) -> None:
    with pytest.raises(InputError, match=r"flare\.adversarial: nnUNetTrainerFlareST has no discriminator"):
        adversarial(data, name="nnUNetTrainerFlareST")
