"""Every trainer on regions: the loss, and what teachers teach, against references written out by hand."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from tiny_dataset import write_case
from torch.nn import functional as F

from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.iteration_time import _adversarial_cost
from nnunet_flare.trainers import adversarial_steps as steps
from nnunet_flare.trainers.distillation import soft_loss
from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.known_regions import KnownRegionsLoss, RegionDice
from nnunet_flare.trainers.settings import AdversarialSettings
from nnunet_flare.trainers.soft_dice import SquaredSoftDice

LABELS = {"background": 0, "all": [1, 2, 3], "pair": [2, 3], "spleen": 3}
REGIONS, ORDER = ((1, 2, 3), (2, 3), (3,)), (1, 2, 3)
IGNORE = 4
PLAIN, IGNORING = Heads(None, REGIONS, ORDER), Heads(IGNORE, REGIONS, ORDER)
SHAPE = (3, 4, 5)


def maps_of(labels: torch.Tensor, *, ignore: bool = False) -> torch.Tensor:
    """Stock's target of a label map (B, 1, ...): a map per region, and one of *ignore*."""
    maps = [torch.stack([labels[:, 0] == label for label in ids]).any(0) for ids in REGIONS]
    return torch.stack([*maps, labels[:, 0] == IGNORE] if ignore else maps, dim=1)


def example(seed: int = 0, *, ignore: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two cases, and their label maps."""
    stream = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((2, 3, *SHAPE), generator=stream)
    return logits, torch.randint(0, 5 if ignore else 4, (2, 1, *SHAPE), generator=stream)


# What outputs stand for


def test_what_is_drawn_is_the_label_map_that_stock_draws() -> None:
    logits, _ = example()
    manager = LabelManager(LABELS, list(ORDER))
    heads = Heads.of(manager)
    assert heads == PLAIN
    drawn = heads.drawn(heads.probabilities(logits))
    for case, found in zip(logits, drawn, strict=True):
        labels = torch.as_tensor(np.asarray(manager.convert_logits_to_segmentation(case.numpy())).astype(np.int64))
        assert torch.equal(found, maps_of(labels[None, None])[0])
    alone = torch.sigmoid(logits) > 0.5
    assert not torch.equal(drawn, alone), "a spleen that lies in no pair is drawn, and then lies in it"


def test_a_target_is_read_with_and_without_ignored_voxels() -> None:
    _, labels = example(ignore=True)
    target = maps_of(labels, ignore=True)
    assert torch.equal(IGNORING.counted(target), labels != IGNORE)
    assert torch.equal(IGNORING.certain(target, 3), maps_of(labels))
    wrong = target.clone()
    wrong[:, :3] |= (labels == IGNORE).expand(-1, 3, -1, -1, -1)
    assert torch.equal(IGNORING.certain(wrong, 3), maps_of(labels)), "whatever an ignored voxel says"
    assert PLAIN.counted(maps_of(labels)) is None


# Losses by hand


@pytest.mark.parametrize("ignore", [False, True])
def test_the_soft_dice_of_the_papers_has_a_sigmoid_per_region(ignore: bool) -> None:
    logits, labels = example(ignore=ignore)
    target = maps_of(labels, ignore=ignore)
    found = SquaredSoftDice(IGNORING if ignore else PLAIN)(logits, target)
    terms = []
    for case, region in itertools.product(range(2), range(3)):
        counted = (labels[case, 0] != IGNORE).double()
        p = torch.sigmoid(logits[case, region].double()) * counted
        g = target[case, region].double() * counted
        terms.append((2 * (p * g).sum() + 1e-8) / ((p**2).sum() + (g**2).sum() + 1e-8))
    assert found.item() == pytest.approx(1 - float(np.mean(terms)), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_loss_is_the_mean_over_regions_of_the_entropy_to_the_teachers_sigmoid(temperature: float) -> None:
    (ours, _), (theirs, _) = example(0), example(1)
    ours.requires_grad_()
    p, q = (torch.sigmoid(logits.double() / temperature) for logits in (theirs, ours))
    cross = -(p * q.log() + (1 - p) * (1 - q).log())
    own = -(p * p.log() + (1 - p) * (1 - p).log())
    expected = temperature**2 * (cross - own).mean()
    found = soft_loss(ours, theirs, temperature, PLAIN)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, ours, retain_graph=True)[0] for loss in (found, cross.mean())]
    torch.testing.assert_close(gradients[0], temperature**2 * gradients[1], rtol=1e-4, atol=1e-7)


def known_by_hand(label: int, region: int, annotated: set[int], positive: set[int]) -> bool | None:
    """Whether a voxel lies in a region, of all that its true label may be; None where that is not known."""
    possible = {label} if label in annotated | positive else {0, *({1, 2, 3} - annotated)}
    says = {each in REGIONS[region] for each in possible}
    return says.pop() if len(says) == 1 else None


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(
    ("annotated", "positive"),
    [(({1}, {2, 3}), (set(), set())), (({3}, {1}), ({1}, {2})), (({1, 3}, {1, 2, 3}), ({2}, set()))],
)
def test_partial_cases_teach_what_their_labels_say_of_each_region(
    annotated: Any, positive: Any, batch_dice: bool, ignore: bool
) -> None:
    logits, labels = example(ignore=ignore)
    heads = IGNORING if ignore else PLAIN
    dice = RegionDice(batch_dice=batch_dice, smooth=1e-5, ddp=False)
    loss = KnownRegionsLoss(dice, heads, [1, 2, 3], weight_ce=0.7)
    tables = [torch.tensor([[each in known for each in (1, 2, 3)] for known in some]) for some in (annotated, positive)]
    found = loss(logits, maps_of(labels, ignore=ignore), *tables)

    entropies: list[float] = []
    sums, counted = np.zeros((2, 3, 3)), np.zeros((2, 3), bool)
    probability = torch.sigmoid(logits.double()).numpy()
    for case, region in itertools.product(range(2), range(3)):
        counted[case, region] = set(REGIONS[region]) <= annotated[case]
        for voxel in np.ndindex(*SHAPE):
            label, p = int(labels[(case, 0, *voxel)]), probability[(case, region, *voxel)]
            if label == IGNORE:
                continue
            inside = known_by_hand(label, region, annotated[case], positive[case])
            if inside is None:
                continue
            entropies.append(-np.log(p if inside else 1 - p))
            sums[case, region] += (p * inside, p, inside)
            counted[case, region] |= inside
    if batch_dice:
        sums, counted = sums.sum(0, keepdims=True), counted.any(0, keepdims=True)
    terms = (2 * sums[..., 0] + 1e-5) / (sums[..., 1] + sums[..., 2] + 1e-5)
    assert found.item() == pytest.approx(0.7 * np.mean(entropies) - terms[counted].mean(), rel=1e-5)


@pytest.mark.parametrize("ignore", [False, True])
def test_with_all_labels_annotated_it_is_stocks_loss(ignore: bool) -> None:
    logits, labels = example(ignore=ignore)
    target = maps_of(labels, ignore=ignore)
    options = {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False}
    stock = DC_and_BCE_loss({}, options, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    heads = IGNORING if ignore else PLAIN
    ours = KnownRegionsLoss(
        RegionDice(batch_dice=False, smooth=1e-5, ddp=False), heads, [1, 2, 3], weight_ce=3 if ignore else 1
    )
    everything = torch.ones((2, 3), dtype=torch.bool)
    assert ours(logits, target, everything).item() == pytest.approx(stock(logits, target).item(), rel=1e-5)


def test_a_batch_of_nothing_known_has_no_gradient() -> None:
    logits, _ = example()
    loss = KnownRegionsLoss(RegionDice(batch_dice=False, smooth=1e-5, ddp=False), PLAIN, [1, 2, 3], weight_ce=1)
    nothing = torch.zeros((2, 3), dtype=torch.bool)
    logits.requires_grad_()
    found = loss(logits, maps_of(torch.zeros((2, 1, *SHAPE), dtype=torch.int64)), nothing)
    found.backward()
    assert found.item() == 0 and not logits.grad.any()


# Masks of the discriminator


def test_the_discriminator_sees_every_region() -> None:
    p = torch.sigmoid(example()[0])
    assert torch.equal(steps.shown_masks(p, heads=PLAIN, poison=False), p)
    torch.manual_seed(0)
    shown = steps.shown_masks(p, heads=PLAIN, poison=True)
    torch.manual_seed(0)
    first, second = (torch.empty((2, 2, 3, *SHAPE)).uniform_(0.5, 1) for _ in range(2))
    scores = (np.e * torch.stack((1 - p, p), 1) + first) * second
    torch.testing.assert_close(shown, torch.sigmoid(scores[:, 1] - scores[:, 0]))


def test_the_loser_learns_what_the_winner_draws() -> None:
    image = torch.randn(2, 1, *SHAPE)
    (first, _), (second, _) = example(0), example(1)
    choice = steps.Choice(second_wins=torch.tensor([False, True]), score=torch.tensor([0.7, 0.8]))
    _, target = steps.lesson(choice, image, image, torch.sigmoid(first), torch.sigmoid(second), heads=PLAIN)
    for found, winner in zip(target, (first[0], second[1]), strict=True):
        labels = LabelManager(LABELS, list(ORDER)).convert_logits_to_segmentation(winner.numpy())
        assert torch.equal(found, maps_of(torch.as_tensor(np.asarray(labels).astype(np.int64))[None, None])[0])


# Trainers

TINY = {"background": 0, "both": [1, 2], "spleen": 2}
SETTINGS = {"num_epochs": 1, "iterations_per_epoch": 2, "final_validation": False, "seed": 3}


@pytest.fixture
def data(tiny: Any, one_thread: None) -> Any:
    """Two labelled and two unlabelled scans of a data set with two regions, one in the other."""
    tiny.dataset_json |= {"labels": TINY, "regions_class_order": [1, 2]}
    tiny.add("a", "b")
    folder = tiny.data.with_name(f"{tiny.data.name}_un")
    folder.mkdir()
    for number, case in enumerate(("u", "v")):
        write_case(folder, case, seed=number, seg=np.zeros((1, 10, 20, 20), np.int8))
    return tiny


def batch_of(*keys: str, ignore: bool = False) -> dict[str, Any]:
    stream = torch.Generator().manual_seed(5)
    data = torch.randn((len(keys), 1, 8, 16, 16), generator=stream)
    labels = torch.randint(0, 3, (len(keys), 1, 8, 16, 16), generator=stream)
    maps = [labels > 0, labels == 2, *([torch.zeros_like(labels, dtype=torch.bool)] if ignore else [])]
    target = torch.cat(maps, 1)
    return {"data": data, "target": [target, target[..., ::2, ::2]], "keys": np.array(keys)}


def stock_bce_dice(logits: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Dice and the mean cross-entropy over the counted voxels and both regions."""
    mask = torch.ones_like(target[:, :1]) if counted is None else counted
    p, g = torch.sigmoid(logits) * mask, target.float() * mask
    dice = (2 * (p * g).sum((2, 3, 4)) + 1e-5) / (p.sum((2, 3, 4)) + g.sum((2, 3, 4)) + 1e-5)
    entropy = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none") * mask
    return entropy.sum() / (2 * mask.sum()) - dice.mean()


def test_a_mean_teacher_step_is_the_one_written_by_hand(data: Any) -> None:
    trainer = data.trainer(
        name="nnUNetTrainerFlareMeanTeacher",
        **SETTINGS,
        mean_teacher={"threshold": 0.55, "weight": 0.5, "ramp_up": 0, "decay": 0.75},
    )
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.network.train()
    student, teacher = copy.deepcopy(trainer.network), copy.deepcopy(trainer.average.network).eval()
    views = torch.randn((1, 2, 8, 16, 16), generator=torch.Generator().manual_seed(9))
    trainer.dataloader_unlabelled = iter([{"data": views, "keys": ("u",)}])
    batch = batch_of("a", "b", ignore=True)
    result = trainer.train_step(batch)

    p = torch.sigmoid(teacher(views[:, :1])[0]).detach()
    spleen = p[:, 1:] > 0.5
    drawn = torch.cat(((p[:, :1] > 0.5) | spleen, spleen), 1)
    sure = (torch.where(drawn, p, 1 - p) >= 0.55).all(1, keepdim=True)
    assert 0 < sure.float().mean() < 1, "some are sure, some are not"
    assert result["sure_share"] == pytest.approx(sure.float().mean().item())
    output = student(torch.cat([batch["data"], views[:, 1:]]))[0]  # the lower resolution has no weight
    hard = stock_bce_dice(output[:2], batch["target"][0][:, :2])
    soft = stock_bce_dice(output[2:], drawn, sure)
    assert result["labelled_loss"] == pytest.approx(hard.item(), rel=1e-5), "as without a label to ignore"
    assert result["unlabelled_loss"] == pytest.approx(soft.item(), rel=1e-5)
    assert result["loss"] == pytest.approx((hard + 0.5 * soft).item(), rel=1e-5)


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_a_label_that_a_round_ignores_leaves_the_labelled_loss_as_it_is(data: Any, ignore_label: int | None) -> None:
    trainer = data.trainer(**SETTINGS, ignore_label=ignore_label)
    trainer.initialize()
    batch = batch_of("a", "b", ignore=ignore_label is not None)
    with torch.no_grad():
        output = trainer.network(batch["data"])
    expected = stock_bce_dice(output[0], batch["target"][0][:, :2])
    assert trainer.loss(output, batch["target"]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_partial_case_is_silent_about_the_regions_that_hold_other_labels(data: Any) -> None:
    data.add("part")
    data.table({"part": {"role": "partial", "annotated": [1]}})
    trainer = data.trainer(name="nnUNetTrainerFlarePartial", **SETTINGS)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    batch = batch_of("a", "part")
    logits, target = torch.randn((2, 2, 8, 16, 16)).requires_grad_(), batch["target"][0]
    # The lower resolution has no weight. Of the second case only voxels of label 1 say anything.
    found = trainer.compute_loss([logits, logits[..., ::2, ::2]], batch["target"], batch)
    known = torch.ones_like(target)
    known[1] = target[1, :1] & ~target[1, 1:]
    entropy = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none") * known
    p, g = torch.sigmoid(logits) * known, target.float() * known
    dice = (2 * (p * g).sum((2, 3, 4)) + 1e-5) / (p.sum((2, 3, 4)) + g.sum((2, 3, 4)) + 1e-5)
    expected = entropy.sum() / known.sum() - (dice.sum() - dice[1, 1]) / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert not logits.grad[~known].any()


def test_every_trainer_trains_regions(data: Any) -> None:
    data.add("part")
    for name, settings in (
        ("nnUNetTrainerFlareSelective", {}),
        ("nnUNetTrainerFlareMeanTeacher", {"mean_teacher": {}}),
        ("nnUNetTrainerFlareAdversarial",
         {"adversarial": {"discriminator_features": 2, "warmup": 0, "finish": 0, "poison_masks": True}}),
        ("nnUNetTrainerFlarePartial", {}),
    ):  # fmt: skip
        if name == "nnUNetTrainerFlarePartial":
            data.table({"part": {"role": "partial", "annotated": [1]}})
        trainer = data.trainer(name=name, results=name, **SETTINGS, **settings)
        trainer.run_training()
        for curve in ("train_losses", "val_losses", *(c for c in trainer.curves if c.startswith("unl"))):
            assert np.isfinite(trainer.logger.get_value(curve, step=-1)), (name, curve)
        data.plans["configurations"]["3d_fullres"].pop("flare")


def test_the_adversarial_steps_see_the_regions(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"discriminator_features": 2, "warmup": 0, "finish": 0}
    trainer = data.trainer(name="nnUNetTrainerFlareAdversarial", **SETTINGS, adversarial=settings)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    batch = batch_of("a", "b")
    batch["target"] = batch["target"][0]
    seen: list[torch.Tensor] = []
    told = steps.discriminator_loss

    def spied(judge: Any, image: Any, truth: Any, prediction: Any, *, truth_first: bool) -> torch.Tensor:
        seen.extend((truth, prediction))
        return told(judge, image, truth, prediction, truth_first=truth_first)

    monkeypatch.setattr(steps, "discriminator_loss", spied)
    guess = torch.sigmoid(copy.deepcopy(trainer.network).eval()(batch["data"])).detach()
    trainer.discriminator_step(batch)
    assert torch.equal(seen[0], batch["target"].float())
    torch.testing.assert_close(seen[1], guess)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_dry_run_costs_the_three_steps_on_regions(device: str) -> None:
    class Network(torch.nn.Conv3d):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [super().forward(image)]

    document = {"labels": LABELS, "regions_class_order": list(ORDER)}
    with torch.device(device):
        network, image = Network(1, 3, 1), torch.randn((2, 1, 8, 16, 16))
    done: list[str] = []
    settings = AdversarialSettings(discriminator_features=2, warmup=0.25, finish=0.25)
    cost = _adversarial_cost(
        network, image, document, settings, 10.0, lambda step: (done.append("steps"), step(), 2)[-1]
    )
    assert done == ["steps"] and cost == 0.5 * 2 + 0.5 * 10


# Distillation


def test_a_student_learns_the_regions_of_a_teacher_of_the_same_regions(data: Any) -> None:
    trained = data.trainer(name="nnUNetTrainer", results="teachers")
    torch.manual_seed(1)
    trained.initialize()
    folder = Path(trained.output_folder_base)
    write_json(folder / "plans.json", data.plans)
    write_json(folder / "dataset.json", data.dataset_json)
    trained.save_checkpoint(str(Path(trained.output_folder, "checkpoint_final.pth")))
    given = {"folder": str(folder), "temperature": 2.0, "weight": 0.25}
    trainer = data.trainer(name="nnUNetTrainerFlareDistill", **SETTINGS, teacher=given)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.network.train()
    batch = batch_of("a", "b")
    with torch.no_grad():
        output, taught = trainer.network(batch["data"]), trainer.teacher(batch["data"])
        p, q = torch.sigmoid(taught / 2).double(), torch.sigmoid(output[0] / 2).double()
        soft = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        expected = 0.75 * stock_bce_dice(output[0], batch["target"][0]) + 0.25 * soft
    assert trainer.train_step(batch)["loss"] == pytest.approx(expected.item(), rel=1e-5)

    document = read_json(folder / "dataset.json")
    document["labels"] = {"background": 0, "spleen": 2, "both": [1, 2]}
    write_json(folder / "dataset.json", document)
    with pytest.raises(InputError, match="its labels is"):
        data.trainer(name="nnUNetTrainerFlareDistill", results="other", **SETTINGS, teacher=given).initialize()
