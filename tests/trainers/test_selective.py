"""``nnUNetTrainerFlareSelective``: Fosun's loss, optimiser, sampling and augmentation, against references by hand."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_flare.errors import InputError
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.rounds.stages.arrays import write_properties
from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.sampling import stop_augmenter
from nnunet_flare.trainers.soft_dice import SoftDiceCE, SquaredSoftDice
from nnunet_flare.trainers.transforms.organ_shift import OrganShiftTransform
from nnunet_flare.trainers.transforms.painting import PaintingTransform
from nnunet_flare.trainers.transforms.window import Window, common_windows

NAME = "nnUNetTrainerFlareSelective"
CASES, PSEUDO = ["a", "b", "c"], ["p", "q"]
DROPOUT = {"dropout_op": "torch.nn.modules.dropout.Dropout3d", "dropout_op_kwargs": {"p": 0.2, "inplace": True}}


@pytest.fixture(autouse=True)
def one_thread_always(one_thread: None) -> None:
    """Sums over threads differ in their last digits."""


@pytest.fixture
def data(tiny: Any) -> Any:
    """The tiny data set with Fosun's network, three stages of it."""
    tiny.add(*CASES, *PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    set_network(tiny)
    return tiny


def set_network(tiny: Any, **more: Any) -> None:
    configuration = tiny.plans["configurations"]["3d_fullres"]
    before = configuration["architecture"]["arch_kwargs"]
    shared = {key: before[key] for key in ("n_stages", "features_per_stage", "strides", "kernel_sizes")}
    configuration["architecture"] = {
        "network_class_name": "nnunet_flare.networks.residual_unet.ResidualUNet",
        "arch_kwargs": {**shared, "n_blocks_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [2, 2], **more},
        "_kw_requires_import": [key for key in more if key == "dropout_op"],
    }


def dice_by_hand(logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """The paper's formula, case by case and organ by organ."""
    probabilities = logits.double().softmax(1)
    terms = []
    for case in range(len(logits)):
        for organ in range(1, logits.shape[1]):
            p, g = probabilities[case, organ], (labels[case, 0] == organ).double()
            if counted is not None:
                p, g = p[counted[case, 0]], g[counted[case, 0]]
            terms.append((2 * (p * g).sum() + 1e-8) / ((p**2).sum() + (g**2).sum() + 1e-8))
    return 1 - torch.stack(terms).mean()


def patch(seed: int, organs: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    data = torch.randn((2, 1, 8, 16, 16), generator=stream)
    return data, torch.randint(0, organs + 1, (2, 1, 8, 16, 16), generator=stream).float()


# Loss


@pytest.mark.parametrize("present", [2, 1], ids=["both organs", "an organ is absent"])
def test_the_loss_is_the_papers_formula(present):
    _, labels = patch(0, organs=present)
    logits = torch.randn(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(SquaredSoftDice(Heads())(logits, labels).double(), dice_by_hand(logits, labels))
    sure = torch.nn.functional.one_hot(labels[:, 0].long(), 3).movedim(-1, 1).float() * 100
    if present == 2:
        assert SquaredSoftDice(Heads())(sure, labels) < 1e-6, "a perfect prediction"


@pytest.mark.parametrize("ignored", [None, 3])
def test_class_weights_add_a_weighted_cross_entropy(ignored):
    """-sum(w[y] log p[y]) / sum(w[y]) over the voxels that count, beside the paper's Dice."""
    stream = torch.Generator().manual_seed(2)
    logits = torch.randn((2, 3, 2, 3, 4), generator=stream)
    labels = torch.randint(0, 3, (2, 1, 2, 3, 4), generator=stream)
    if ignored:
        labels[0, 0, 0] = ignored
    weights = torch.tensor([0.5, 1.0, 3.0])
    log_p = torch.log_softmax(logits, 1).movedim(1, -1).reshape(-1, 3)
    y = labels.flatten()
    log_p, y = log_p[y != 3], y[y != 3]
    expected = -(weights[y] * log_p[range(len(y)), y]).sum() / weights[y].sum()
    dice = SquaredSoftDice(Heads(ignored))
    found = SoftDiceCE(dice, weights, ignore_label=ignored)(logits, labels.to(torch.int16))
    assert found - dice(logits, labels) == pytest.approx(float(expected), rel=1e-5)


def test_a_patch_of_ignored_voxels_alone_has_a_finite_loss():
    logits = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    loss = SoftDiceCE(SquaredSoftDice(Heads(3)), torch.ones(3), ignore_label=3)
    found = loss(logits, torch.full((1, 1, 2, 2, 2), 3))
    found.backward()
    assert torch.isfinite(found) and (logits.grad == 0).all()


def test_without_class_weights_the_loss_is_the_papers_alone(data):
    for settings, kind in (({}, SquaredSoftDice), ({"class_weights": "inverse-sqrt-frequency"}, SoftDiceCE)):
        trainer = data.trainer(name=NAME, **settings)
        trainer.initialize()
        assert type(trainer.loss) is kind
    assert trainer.loss.ce.weight[0] < trainer.loss.ce.weight[1:].min(), "background is the most frequent class"


def test_ignored_voxels_count_nowhere():
    _, labels = patch(0)
    labels[:, :, :3] = 3
    logits = torch.randn(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = SquaredSoftDice(Heads(3))(logits, labels)
    torch.testing.assert_close(loss.double(), dice_by_hand(logits, labels, labels != 3))
    loss.backward()
    assert not logits.grad[:, :, :3].any() and logits.grad[:, :, 3:].any()


# One step


def test_one_step_is_the_reference_written_by_hand(data):
    trainer = data.trainer(name=NAME)
    trainer.initialize()
    trainer.on_train_epoch_start()
    before = deepcopy(trainer.network)
    image, labels = patch(3)
    loss = dice_by_hand(before(image), labels)
    gradients = dict(
        zip((n for n, _ in before.named_parameters()), torch.autograd.grad(loss, before.parameters()), strict=True)
    )
    assert torch.sqrt(sum(g.square().sum() for g in gradients.values())) < 12, "nnU-Net's clipping has no part in it"
    found = trainer.train_step({"data": image, "target": labels, "keys": ["a", "p"]})["loss"]
    assert float(found) == pytest.approx(loss.item(), abs=1e-6)
    after = dict(trainer.network.named_parameters())
    lr, decay, compared = 1e-3, 1e-5, []
    for name, weight in before.named_parameters():
        gradient = gradients[name]
        assert gradient.abs().sum() > 0, f"{name} learns"
        # AdamW's first step: the means are the gradient and its square, the bias corrections undo (1 - beta)
        expected = weight * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        close = torch.isclose(after[name], expected, rtol=0, atol=2e-6)
        # where normalisation undoes a weight, only rounding is left of its gradient
        is_sure = gradient.abs() > 1e-6
        assert close[is_sure].all(), name
        compared.append(is_sure.flatten())
    assert torch.cat(compared).float().mean() > 0.9
    group = trainer.optimizer.param_groups[0]
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 1e-5)


def test_the_defaults_hold_without_settings_and_settings_win(data):
    plain = data.trainer(name=NAME)
    assert not plain.enable_deep_supervision
    assert (plain.settings.labelled_to_pseudo, plain.oversample_foreground_percent) == ((1, 1), 0)
    assert plain.settings.augmentation.model_dump() == {"labelled": "weak", "pseudo": "strong", "partial": "weak"}
    rates = []
    plain.initialize()
    for epoch in (0, 659, 660, 859, 860, 999):
        plain.lr_scheduler.step(epoch)
        rates.append(plain.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 5e-5, 5e-5])
    changed = data.trainer(name=f"{NAME}_7epochs", optimizer="SGD", initial_lr=0.5, labelled_to_pseudo=None)
    assert (changed.num_epochs, changed.initial_lr, changed.settings.labelled_to_pseudo) == (7, 0.5, None)
    changed.initialize()
    assert type(changed.optimizer) is torch.optim.SGD


def test_what_has_no_place_in_the_loss_is_refused(data):
    with pytest.raises(InputError, match=r"flare\.class_weights: found 2 weights, expected 3"):
        data.trainer(name=NAME, class_weights=[1, 1]).initialize()


# Training


def settings(**changes: Any) -> dict[str, Any]:
    return {"num_epochs": 3, "iterations_per_epoch": 2, "seed": 5, "save_every": 1, **changes}


class Killed(BaseException):
    """Nothing in the trainer catches it."""


def test_a_killed_training_ends_as_one_that_was_not_and_predicts(data, tmp_path):
    """With dropout, whose random stream must go on as well, and a step of the rate between kill and end."""
    set_network(data, **DROPOUT)
    calm = data.trainer(name=NAME, fold=0, results="calm", **settings(final_validation=False))
    data.splits((["a", "b"], ["c"]))
    calm.run_training()
    killed = data.trainer(name=NAME, fold=0, results="killed", **settings(final_validation=False))
    step = killed.train_step

    def dying(batch: dict) -> dict:
        if killed.current_epoch == 2:
            raise Killed
        return step(batch)

    killed.train_step = dying
    with pytest.raises(Killed):
        killed.run_training()
    for augmenter in (killed.dataloader_train, killed.dataloader_val):
        stop_augmenter(augmenter)
    again = data.trainer(name=NAME, fold=0, continued=True, results="killed", **settings(final_validation=False))
    maybe_load_checkpoint(again, continue_training=True, validation_only=False)
    again.run_training()
    for name, weight in calm.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name]), name
    lrs = again.logger.get_value("lrs", step=None)
    assert lrs == calm.logger.get_value("lrs", step=None) == pytest.approx([1e-3, 1e-3, 1e-4])
    folder = Path(get_output_folder("Dataset022_Tiny", NAME, data.plans["plans_name"], "3d_fullres"))
    opened = Segmenter.from_model_folder(folder, PredictionSettings(precision="fp32", backend="torch"), folds=[0])
    image = np.random.default_rng(0).normal(size=(1, 10, 20, 20)).astype(np.float32)
    first = opened.predict_members(image).mean_softmax
    np.testing.assert_allclose(first, opened.predict_members(image).mean_softmax, rtol=1e-5, err_msg="dropout is off")


def test_strong_augmentation_is_for_pseudo_labels_and_half_of_the_samples(data):
    trainer = data.trainer(name=NAME, **settings(num_epochs=1, iterations_per_epoch=40, final_validation=False))
    trainer.run_training()
    chains = trainer.dataloader_train.data_loader.transforms.chains

    def has(role: str, kind: type) -> bool:
        return any(isinstance(getattr(part, "transform", part), kind) for part in chains[role].transforms)

    assert has("pseudo", PaintingTransform) and not has("labelled", PaintingTransform)
    assert has("pseudo", OrganShiftTransform) and has("labelled", OrganShiftTransform)
    share = trainer.logger.get_value("pseudo_share", step=-1)
    assert 0.3 < share < 0.7, "80 samples of three labelled and two pseudo-labelled cases, 1:1"


def test_jitter_is_weak_with_noise_and_without_painting(data):
    trainer = data.trainer(name=NAME, **settings(augmentation={"labelled": "jitter", "pseudo": "weak"}))
    trainer.initialize()
    chains = trainer.get_dataloaders()[0].data_loader.transforms.chains

    def kinds(role: str) -> set[type]:
        parts = [getattr(part, "transform", part) for part in chains[role].transforms]
        return {type(each) for part in parts for each in [part, *getattr(part, "list_of_transforms", [])]}

    assert GaussianNoiseTransform in kinds("labelled") and GaussianNoiseTransform not in kinds("pseudo")
    assert PaintingTransform not in kinds("labelled")


# Windows of volumes that are normalised one by one


def test_the_common_window_clips_no_case_and_has_the_median_unit():
    cases = [[(-1.5, 2.0, 200.0)], [(-1.0, 2.5, 300.0)], [(-1.2, 1.8, 260.0)]]
    assert common_windows(cases) == (Window(-1.5, 2.5, 260.0),)
    assert common_windows([[None, (0, 1, 2)], [(0, 1, 2), (0, 1, 2)]]) == (None, Window(0, 1, 2))


def test_an_organ_shift_in_hu_knows_the_unit_of_volumes_with_their_own_z_score(data):
    configuration = data.plans["configurations"]["3d_fullres"]
    configuration["normalization_schemes"] = ["FlareClip500Normalization"]
    with pytest.raises(InputError, match=r"no 'windows'; an older version preprocessed this case"):
        data.trainer(name=NAME, **settings())._windows()
    for number, case in enumerate([*CASES, *PSEUDO]):
        path = data.data / f"{case}.pkl"
        write_properties(path, {**load_pickle(str(path)), "windows": [(-2.0 - number, 2.0, 200.0 + number)]})
    trainer = data.trainer(name=NAME, **settings())
    assert trainer._windows() == (Window(-6.0, 2.0, 202.0),)
    trainer.initialize()
    chain = trainer.get_dataloaders()[0].data_loader.transforms.chains["labelled"]
    shifts = [part.transform for part in chain.transforms if hasattr(part, "transform")]
    assert any(isinstance(each, OrganShiftTransform) and each.windows[0].hu == 202 for each in shifts)
