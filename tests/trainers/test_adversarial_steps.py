"""The arithmetic of adversarial training: masks, the discriminator's question, who wins, what the loser learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nnunet_flare.trainers import adversarial_steps as steps
from nnunet_flare.trainers.heads import Heads

SHAPE = (4, 6, 5)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Likes(nn.Module):
    """A discriminator whose opinion is written into the first voxel of the image."""

    def forward(self, image: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        opinion = image[:, 0, 0, 0, 0]
        return torch.stack([opinion, torch.zeros_like(opinion)], dim=1)


class PrefersLarger(nn.Module):
    """Logits that grow with a mask's voxels."""

    def forward(self, image: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.stack([first.sum((1, 2, 3, 4)), second.sum((1, 2, 3, 4))], dim=1)


def images(*opinions: float) -> torch.Tensor:
    made = torch.randn(len(opinions), 1, *SHAPE)
    made[:, 0, 0, 0, 0] = torch.tensor(opinions)
    return made


def outputs(batch: int = 2, classes: int = 4) -> torch.Tensor:
    return torch.softmax(torch.randn(batch, classes, *SHAPE), 1)


def test_the_three_steps_run_between_warm_up_and_finish() -> None:
    def adversarial(epochs: int, warmup: float = 0.1, finish: float = 0.1) -> list[int]:
        return [e for e in range(epochs) if steps.is_adversarial(e, epochs, warmup=warmup, finish=finish)]

    assert adversarial(500) == list(range(50, 450))
    assert adversarial(10) == list(range(1, 9))
    assert adversarial(30, 0.1, 0.7) == list(range(3, 9)), "30 x 0.3 is 8.999... in floating point"
    assert adversarial(4, 0, 0) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["truth", "prediction"])
def test_poisoned_masks_are_probabilities_over_the_classes(kind: str) -> None:
    truth = Heads().certain(torch.randint(0, 4, (2, 1, *SHAPE)), 4).float()
    poisoned = steps.poisoned(truth if kind == "truth" else outputs())
    assert torch.allclose(poisoned.sum(1), torch.ones(2, *SHAPE))
    assert ((poisoned > 0) & (poisoned < 1)).all()
    if kind == "truth":
        assert torch.equal(poisoned.argmax(1), truth.argmax(1))
        # (e + r1) r2 of the class itself, r1 r2 of the three others, both factors in [0.5, 1)
        lowest, highest = (math.e + 0.5) * 0.5, math.e + 1
        own = poisoned.amax(1)
        assert own.min() > math.exp(lowest) / (math.exp(lowest) + 3 * math.exp(1))
        assert own.max() < math.exp(highest) / (math.exp(highest) + 3 * math.exp(0.25))
    assert not torch.equal(poisoned, steps.poisoned(truth)), "drawn anew every time"


def test_the_discriminator_sees_the_organs_only() -> None:
    probabilities = outputs()
    assert torch.equal(steps.shown_masks(probabilities, heads=Heads(), poison=False), probabilities[:, 1:])
    shown = steps.shown_masks(probabilities, heads=Heads(), poison=True)
    assert shown.shape == (2, 3, *SHAPE)
    assert not torch.allclose(shown, probabilities[:, 1:])


@pytest.mark.parametrize("truth_first", [True, False])
def test_the_discriminator_is_asked_which_mask_is_the_truth(truth_first: bool) -> None:
    truth, prediction = torch.ones(2, 1, 2, 2, 2), torch.full((2, 1, 2, 2, 2), 0.5)
    loss = steps.discriminator_loss(PrefersLarger(), images(0, 0), truth, prediction, truth_first=truth_first)
    # Eight voxels against four, and the larger one is the truth: -log of sigmoid(4), whatever the order.
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-5)
    fooled = steps.discriminator_loss(PrefersLarger(), images(0, 0), prediction, truth, truth_first=truth_first)
    assert fooled.item() == pytest.approx(math.log(1 + math.exp(4)), rel=1e-5)


def test_the_choice_is_the_mean_of_two_opinions_of_each_image() -> None:
    noised, clean = images(2.0, -3.0, 1.0), images(-1.0, 1.0, -1.0)
    choice = steps.choose(Likes(), noised, clean, outputs(3), outputs(3))

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    first = [(sigmoid(2) + sigmoid(-1)) / 2, (sigmoid(-3) + sigmoid(1)) / 2, 0.5]
    assert choice.second_wins.tolist() == [False, True, False], "the first one wins a draw"
    assert choice.score.tolist() == pytest.approx([max(p, 1 - p) for p in first])
    assert not choice.score.requires_grad


def test_the_losers_image_learns_the_winners_mask() -> None:
    noised, clean, first, second = images(0, 0), images(0, 0), outputs(), outputs()
    choice = steps.Choice(second_wins=torch.tensor([False, True]), score=torch.tensor([0.7, 0.8]))
    image, labels = steps.lesson(choice, noised, clean, first, second, heads=Heads())
    assert torch.equal(image[0], clean[0]) and torch.equal(labels[0, 0], first[0].argmax(0))
    assert torch.equal(image[1], noised[1]) and torch.equal(labels[1, 0], second[1].argmax(0))


def test_each_image_has_noise_of_its_own_strength() -> None:
    clean = torch.randn(40, 1, 16, 16, 16)
    spread = (steps.with_noise(clean, 0.1) - clean).flatten(1).std(1)
    assert 0 < spread.min() < 0.02 and 0.08 < spread.max() < 0.105
    assert torch.equal(steps.with_noise(clean, 0.0), clean)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_every_image_has_its_own_loss_and_weight(deep_supervision: bool) -> None:
    output, target = torch.randn(3, 2), torch.randn(3, 2)
    weights = torch.tensor([0.5, 0.75, 1.0])
    expected = (weights * (output - target).square().sum(1)).mean()
    if deep_supervision:
        loss = steps.weighted_loss(
            lambda o, t: (o[0] - t[0]).square().sum() + (o[1] - t[1]).square().sum(),
            [output] * 2,
            [target] * 2,
            weights,
        )
        expected = 2 * expected
    else:
        loss = steps.weighted_loss(lambda o, t: (o - t).square().sum(), output, target, weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
