"""Seconds of one training iteration, measured on random input: what ``--dry-run`` multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nnunet_flare.labels import label_ids
from nnunet_flare.rounds.run.configurations import check_names
from nnunet_flare.rounds.run.dataset import read_dataset
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.trainers.settings import AdversarialSettings, StreamSettings, stream_key


def iteration_seconds(run: Run, base: Base) -> float | None:
    """Seconds of one training iteration of the planned network on random input; None before planning."""
    if not base.plans_file.is_file():
        return None
    import torch

    from nnunet_flare.networks.planned import planned_network

    configuration = check_names(run, base)
    dataset = read_dataset(run.preprocessed / "dataset.json")
    device = torch.device(run.settings.device)
    network = planned_network(configuration, dataset, allow_init=True).to(device)
    shape = (configuration["batch_size"], len(dataset["channel_names"]), *configuration["patch_size"])
    image = torch.randn(shape, device=device)
    seconds = _timed(lambda: _supervised_step(network, image))
    if not run.recipe.is_online or base != run.base:
        return seconds
    stream = run.recipe.settings(0, run=None)
    organs = len(label_ids(dataset["labels"]))
    if stream_key(run.recipe.trainer) == "mean_teacher":
        return _timed(lambda: _mean_teacher_step(network, image, _few(stream.mean_teacher, shape[0])))
    return _adversarial_seconds(network, image, organs, stream.adversarial or AdversarialSettings(), seconds)


def _few(settings: StreamSettings | None, batch_size: int) -> int:
    """Samples of a batch of unlabelled scans."""
    return (settings and settings.unlabelled_batch_size) or max(1, batch_size // 2)


def _adversarial_seconds(
    network: Any, image: Any, organs: int, settings: AdversarialSettings, supervised: float
) -> float:
    """Seconds of a mean iteration, of which some, at start and end, are supervised alone."""
    from nnunet_flare.networks.discriminator import Discriminator

    channels, *size = image.shape[1:]
    judge = Discriminator(channels, organs, size, features=settings.discriminator_features).to(image.device)
    share = 1 - settings.warmup - settings.finish
    few = _few(settings, len(image))
    return share * _timed(lambda: _three_steps(network, judge, image, few)) + (1 - share) * supervised


def _timed(step: Callable[[], None]) -> float:
    """Seconds of a step on its device, the better of two: the first pays for set-up."""
    import torch

    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _supervised_step(network: Any, image: Any) -> None:
    import torch

    with torch.autocast(image.device.type, enabled=image.device.type == "cuda"):
        loss = sum(output.float().square().mean() for output in network(image))
    loss.backward()


def _mean_teacher_step(network: Any, image: Any, few: int) -> None:
    """An iteration with an average that teaches: its forward pass, and a step on both batches together."""
    import torch

    some = image[:1].expand(few, *image.shape[1:])
    with torch.no_grad(), torch.autocast(image.device.type, enabled=image.device.type == "cuda"):
        network(some)
    _supervised_step(network, torch.cat([image, some]))


def _three_steps(network: Any, judge: Any, image: Any, few: int) -> None:
    """An iteration of adversarial training with any labels: what it computes, without its optimizers."""
    import torch

    from nnunet_flare.trainers import adversarial_steps as steps
    from nnunet_flare.trainers.resolutions import highest

    some = image[:1].expand(few, *image.shape[1:])
    with torch.autocast(image.device.type, enabled=image.device.type == "cuda"):
        with torch.no_grad():
            mask = torch.softmax(highest(network(image)), dim=1)
        organs = steps.shown_masks(mask, poison=False)
        loss = steps.discriminator_loss(judge, image, organs, organs, truth_first=True)
    loss.backward()
    _supervised_step(network, image)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=image.device.type == "cuda"):
        first, second = (torch.softmax(highest(network(some)), dim=1) for _ in range(2))
        choice = steps.choose(judge, some, some, first[:, 1:], second[:, 1:])
        learnt, _ = steps.lesson(choice, some, some, first, second)
    _supervised_step(network, learnt)
