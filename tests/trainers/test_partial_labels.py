"""Marginal loss and nnUNetTrainerFlarePartial: partial cases are silent about what nobody annotated in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from two_processes import leave_together

from nnunet_flare.trainers.marginal import (
    MarginalDice,
    MarginalDiceCE,
    drop_unannotated,
    merge_into_background,
    with_positives,
)

ORGANS = 4
IGNORE = ORGANS + 1
SHAPE = (3, 4, 5)


def marginal_loss(*, batch_dice: bool = False, ignore: bool = False, ddp: bool = False) -> MarginalDiceCE:
    ce = RobustCrossEntropyLoss(**({"ignore_index": IGNORE} if ignore else {}))
    dice = MarginalDice(batch_dice=batch_dice, smooth=1e-5, ddp=ddp)
    return MarginalDiceCE(ce, dice, ignore_label=IGNORE if ignore else None)


def stock_loss(*, batch_dice: bool, ignore: bool) -> DC_and_CE_loss:
    return DC_and_CE_loss(
        {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        ignore_label=IGNORE if ignore else None,
        dice_class=MemoryEfficientSoftDiceLoss,
    )


def example(seed: int = 0, *, batch: int = 2, ignore: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((batch, ORGANS + 1, *SHAPE), generator=stream)
    highest = IGNORE + 1 if ignore else IGNORE
    target = torch.randint(0, highest, (batch, 1, *SHAPE), generator=stream).to(torch.int16)
    return logits.requires_grad_(), target


def reference(
    logits: np.ndarray, target: np.ndarray, annotated: np.ndarray, *, batch_dice: bool, ignore: bool
) -> float:
    """The loss voxel by voxel in float64, from probabilities and not from logits."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probability = shifted / shifted.sum(axis=1, keepdims=True)
    entropies: list[float] = []
    sums = np.zeros((len(logits), ORGANS, 3))
    for case in range(len(logits)):
        known = [0, *(organ for organ in range(1, ORGANS + 1) if annotated[case, organ - 1])]
        for voxel in np.ndindex(*SHAPE):
            label = int(target[(case, 0, *voxel)])
            if ignore and label == IGNORE:
                continue
            label = label if label in known else 0
            values = probability[(case, slice(None), *voxel)]
            background = sum(values[k] for k in range(ORGANS + 1) if k == 0 or k not in known)
            entropies.append(-np.log(background if label == 0 else values[label]))
            for organ in known[1:]:
                sums[case, organ - 1] += (values[organ] * (label == organ), values[organ], label == organ)
    if batch_dice:
        sums, annotated = sums.sum(0, keepdims=True), annotated.any(0, keepdims=True)
    dice = (2 * sums[..., 0] + 1e-5) / (sums[..., 1] + sums[..., 2] + 1e-5)
    mean = dice[annotated].mean() if annotated.any() else 0.0
    return float((np.mean(entropies) if entropies else 0.0) - mean)


@pytest.mark.parametrize("ignore", [False, True], ids=["no ignore", "ignore label"])
@pytest.mark.parametrize("batch_dice", [False, True], ids=["Dice per case", "batch Dice"])
def test_the_loss_is_the_one_written_by_hand(batch_dice: bool, ignore: bool) -> None:
    logits, target = example(ignore=ignore)
    annotated = torch.tensor([[True, False, True, False], [False, False, True, True]])
    loss = marginal_loss(batch_dice=batch_dice, ignore=ignore)(logits, target, annotated)
    expected = reference(
        logits.detach().numpy(), target.numpy(), annotated.numpy(), batch_dice=batch_dice, ignore=ignore
    )
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ignore", [False, True], ids=["no ignore", "ignore label"])
@pytest.mark.parametrize("batch_dice", [False, True], ids=["Dice per case", "batch Dice"])
def test_with_all_organs_annotated_it_is_stocks_loss_to_the_last_bit(batch_dice: bool, ignore: bool) -> None:
    losses, gradients = [], []
    for ours in (True, False):
        logits, target = example(ignore=ignore)
        if ours:
            everything = torch.ones((2, ORGANS), dtype=torch.bool)
            loss = marginal_loss(batch_dice=batch_dice, ignore=ignore)(logits, target, everything)
        else:
            loss = stock_loss(batch_dice=batch_dice, ignore=ignore)(logits, target)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(logits.grad)
    assert torch.equal(*losses)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)


def test_logits_without_annotation_are_moved_as_background_alone() -> None:
    """d loss / d logit of an unannotated organ = d loss / d merged logit times its share of the merged background."""
    logits, target = example()
    annotated = torch.tensor([[True, False, True, False], [True, True, False, False]])
    merged = merge_into_background(logits, annotated).detach().requires_grad_()
    known = drop_unannotated(target, annotated)
    marginal_loss()(logits, target, annotated).backward()
    stock = DC_and_CE_loss({"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, weight_dice=0)
    (marginal_loss().dc(merged, known, None, annotated) + stock(merged, known)).backward()
    assert logits.grad is not None and merged.grad is not None
    probabilities = logits.detach().softmax(1)
    background = merged.detach().softmax(1)[:, 0]
    for case in range(2):
        for organ in range(ORGANS):
            found = logits.grad[case, organ + 1]
            if annotated[case, organ]:
                assert torch.allclose(found, merged.grad[case, organ + 1], atol=1e-6)
            else:
                share = probabilities[case, organ + 1] / background[case]
                assert torch.allclose(found, merged.grad[case, 0] * share, atol=1e-6)
                assert found.abs().max() > 0


def test_of_a_positive_organ_only_the_voxels_that_name_it_are_learnt() -> None:
    """Written out voxel by voxel: -log p(organ) where the map names it, elsewhere it counts as background."""
    logits, target = (part.detach() for part in example())
    annotated = torch.tensor([[True, True, False, True]] * 2)
    positive = torch.tensor([[False, False, True, False], [False] * 4])
    loss = marginal_loss()
    p = torch.softmax(logits.detach().double(), dim=1)
    total, voxels = 0.0, 0
    for case in range(2):
        merged = p[case].clone()
        merged[0] += merged[3]
        for voxel in np.ndindex(*target.shape[2:]):
            label = int(target[(case, 0, *voxel)])
            named = label == 3 and case == 0
            label = 0 if label == 3 and case == 1 else label  # of the second case organ 3 is not known at all
            total -= float(torch.log((p[case] if named else merged)[(label, *voxel)]))
            voxels += 1
    known = drop_unannotated(target, annotated | positive)
    separate = with_positives(annotated, positive, known)
    assert float(loss.ce(merge_into_background(logits, separate), known[:, 0])) == pytest.approx(
        total / voxels, rel=1e-5
    )
    # What the map does not name says nothing: moving probability between the organ and background there is free.
    logits = logits.detach().requires_grad_()
    loss(logits, target, annotated, positive).backward()
    softmax = torch.softmax(logits.detach(), dim=1)
    elsewhere = target[0, 0] != 3
    ratio = logits.grad[0, 3][elsewhere] / softmax[0, 3][elsewhere]
    assert torch.allclose(ratio, (logits.grad[0, 0] / softmax[0, 0])[elsewhere], rtol=1e-3, atol=1e-6)
    assert bool((logits.grad[0, 3][~elsewhere] < 0).all()), "where it is named it must rise"


def test_a_positive_organ_without_a_voxel_changes_nothing() -> None:
    logits, target = example()
    target = torch.where(target == 3, 0, target)
    annotated = torch.tensor([[True, True, False, True]] * 2)
    positive = torch.tensor([[False, False, True, False]] * 2)
    loss = marginal_loss(batch_dice=True)
    assert torch.equal(loss(logits, target, annotated, positive), loss(logits, target, annotated))


def test_where_an_unannotated_organ_lies_does_not_matter() -> None:
    logits, target = example()
    annotated = torch.tensor([[True, True, False, True]] * 2)
    without = torch.where(target == 3, torch.zeros_like(target), target)
    assert not torch.equal(target, without)
    loss = marginal_loss()
    assert torch.equal(loss(logits, target, annotated), loss(logits, without, annotated))


def test_the_order_of_the_cases_does_not_matter() -> None:
    logits, target = example(batch=3)
    annotated = torch.tensor([[True, False, True, False], [True] * 4, [False, True, True, False]])
    order = [2, 0, 1]
    for batch_dice in (False, True):
        loss = marginal_loss(batch_dice=batch_dice)
        assert torch.allclose(
            loss(logits, target, annotated), loss(logits[order], target[order], annotated[order]), atol=1e-6
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=ORGANS, max_size=ORGANS), min_size=2, max_size=2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 1e2, 4e3]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["mixed", "one organ", "all ignored"]),
)
def test_any_subset_of_organs_gives_finite_loss_and_gradients(
    rows: list[list[bool]], batch_dice: bool, ignore: bool, scale: float, dtype: torch.dtype, kind: str
) -> None:
    logits, target = example(ignore=ignore)
    if kind == "one organ":
        target = torch.full_like(target, 2)
    elif kind == "all ignored" and ignore:
        target = torch.full_like(target, IGNORE)
    logits = (logits.detach() * scale).to(dtype).requires_grad_()
    loss = marginal_loss(batch_dice=batch_dice, ignore=ignore)(logits, target, torch.tensor(rows))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def _one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    logits, target = example()
    annotated = torch.tensor([[True, False, True, False], [False, False, False, True]])
    logits = logits.detach()[rank : rank + 1].requires_grad_()
    loss = MarginalDice(batch_dice=True, smooth=1e-5, ddp=True)(
        merge_into_background(logits, annotated[rank : rank + 1]),
        drop_unannotated(target[rank : rank + 1], annotated[rank : rank + 1]),
        None,
        annotated[rank : rank + 1],
    )
    loss.backward()
    torch.save((loss.detach(), logits.grad), f"{folder}/rank{rank}.pt")
    leave_together(folder, rank)


def test_batch_dice_over_two_processes_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    logits, target = example()
    annotated = torch.tensor([[True, False, True, False], [False, False, False, True]])
    whole = MarginalDice(batch_dice=True, smooth=1e-5, ddp=False)(
        merge_into_background(logits, annotated), drop_unannotated(target, annotated), None, annotated
    )
    whole.backward()
    for rank, (loss, gradient) in enumerate(results):
        assert torch.allclose(loss, whole, atol=1e-6)
        # Each process differentiates the same sum; DDP then averages over the two.
        assert torch.allclose(gradient / 2, logits.grad[rank : rank + 1], atol=1e-7)


# ---------------------------------------------------------------------------------------------------- the trainer


CASES = ["full0", "full1", "part0", "part1"]


def with_partial(tiny: Any, **settings: Any) -> Any:
    tiny.add(*CASES, "pseudo0")
    tiny.table(
        {
            "part0": {"role": "partial", "annotated": [1]},
            "part1": {"role": "partial", "annotated": [2]},
            "pseudo0": "pseudo",
        }
    )
    trainer = tiny.trainer(name="nnUNetTrainerFlarePartial", **settings)
    torch.manual_seed(0)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    return trainer


def batch_of(*keys: str) -> dict[str, Any]:
    stream = torch.Generator().manual_seed(5)
    data = torch.randn((len(keys), 1, 8, 16, 16), generator=stream)
    target = torch.randint(0, 3, (len(keys), 1, 8, 16, 16), generator=stream).to(torch.int16)
    return {"data": data, "target": [target, target[..., ::2, ::2]], "keys": list(keys)}


def test_one_step_is_that_of_a_loss_written_from_probabilities(tiny: Any, one_thread: None) -> None:
    trainer = with_partial(tiny)
    batch = batch_of("part0", "full0")
    twin = tiny.trainer(name="nnUNetTrainer")
    twin.initialize()
    twin.network.load_state_dict(trainer.network.state_dict())
    twin.optimizer.zero_grad()
    (output, *_), target = twin.network(batch["data"]), batch["target"][0].long()
    probability = output.double().softmax(1)
    part = torch.stack([probability[0, 0] + probability[0, 2], probability[0, 1]])
    seen = torch.where(target[0, 0] == 1, 1, 0)
    entropy = -torch.cat([part.gather(0, seen[None])[0].ravel(), probability[1].gather(0, target[1])[0].ravel()]).log()

    def dice(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (2 * (values * labels).sum() + 1e-5) / (values.sum() + labels.sum() + 1e-5)

    pairs = [(part[1], seen == 1), *((probability[1, organ], target[1, 0] == organ) for organ in (1, 2))]
    loss = entropy.mean() - torch.stack([dice(*pair) for pair in pairs]).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.network.parameters(), 12)
    twin.optimizer.step()
    assert trainer.train_step(batch)["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    for (name, one), other in zip(twin.network.named_parameters(), trainer.network.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


@pytest.mark.parametrize("keys", [("full0", "full1"), ("pseudo0", "full0")], ids=["labelled", "pseudo"])
def test_labelled_and_pseudo_cases_are_supervised_fully(tiny: Any, keys: tuple[str, str]) -> None:
    trainer = with_partial(tiny)
    stock = tiny.trainer(name="nnUNetTrainer")
    stock.initialize()
    stock.network.load_state_dict(trainer.network.state_dict())
    batch = batch_of(*keys)
    with torch.no_grad():
        ours = trainer.validation_step(batch)["loss"]
        assert ours == stock.validation_step(batch)["loss"]
        assert trainer.validation_step(batch_of("part0", "full0"))["loss"] != ours


def test_class_weights_reach_the_marginal_cross_entropy(tiny: Any) -> None:
    trainer = with_partial(tiny, class_weights=[0.5, 2.0, 1.0])
    assert trainer.loss.loss.ce.weight.tolist() == [0.5, 2.0, 1.0]


def test_batch_dice_of_the_plans_is_taken(tiny: Any) -> None:
    tiny.plans["configurations"]["3d_fullres"]["batch_dice"] = True
    assert with_partial(tiny).loss.loss.dc.batch_dice


def test_a_training_runs_and_says_what_it_does(tiny: Any) -> None:
    tiny.add(*CASES)
    tiny.table({"part0": {"role": "partial", "annotated": [1]}})
    trainer = tiny.trainer(name="nnUNetTrainerFlarePartial_1epochs", iterations_per_epoch=2, final_validation=False)
    trainer.run_training()
    log = Path(trainer.log_file).read_text()
    assert "Training on 3 labelled, 1 partial cases" in log
    assert "the loss leaves that open" in log
    assert "for background." not in log
    assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()


def test_without_deep_supervision_the_loss_takes_single_outputs(tiny: Any) -> None:
    trainer = with_partial(tiny)
    trainer.enable_deep_supervision = False
    trainer.loss = trainer._build_loss()
    logits, target = torch.randn(1, 3, 8, 16, 16), torch.ones((1, 1, 8, 16, 16), dtype=torch.int16)
    annotated = torch.tensor([[True, False]])
    loss = trainer.compute_loss(logits, target, {"keys": ["part0"]})
    assert torch.equal(loss, trainer.loss(logits, target, annotated))
