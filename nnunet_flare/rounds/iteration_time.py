"""What one training iteration costs, measured on random input: what ``--dry-run`` multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from nnunet_flare.rounds.run.configurations import check_names
from nnunet_flare.rounds.run.dataset import read_dataset
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.trainers.settings import AdversarialSettings, StreamSettings, stream_key

if TYPE_CHECKING:
    from nnunet_flare.trainers.heads import Heads

VALIDATION_COST = 1 / 3
"""A validation iteration is a forward pass alone, about a third of a training iteration."""

Measure = Callable[[Callable[[], None]], float]
"""What a step costs: its seconds, or its floating point operations."""


def iteration_seconds(run: Run, base: Base) -> float | None:
    """Seconds of one training iteration of the planned network on random input.

    None before planning, and on a machine that has not the run's device.
    """
    if not base.plans_file.is_file() or not has_device(run.settings.device):
        return None
    dataset = read_dataset(run.preprocessed / "dataset.json")
    return iteration_cost(run, base, check_names(run, base), dataset, run.settings.device, _timed)


def has_device(device: str) -> bool:
    """Whether PyTorch finds a device of this kind here."""
    import torch

    if device == "cuda":
        return torch.cuda.is_available()
    return device != "mps" or torch.backends.mps.is_available()


def iteration_cost(
    run: Run | None,
    base: Base | None,
    configuration: Mapping[str, Any],
    dataset: Mapping[str, Any],
    device_name: str,
    measure: Measure,
) -> float:
    """What one training iteration costs, in the unit of ``measure``.

    Args:
        run: whose recipe says whether unlabelled scans are learnt from online; None: from labels alone.
        base: what the training builds on; None: labels alone.
        configuration: of plans.json: its network, patch and batch.
        dataset: dataset.json: its channels and labels.
        device_name: where the step is computed; on ``meta`` nothing is.
        measure: takes the step as a function.
    """
    import torch

    from nnunet_flare.networks.planned import planned_network
    from nnunet_flare.trainers.halves import halve_convolutions

    device = torch.device(device_name)
    with device:
        network = planned_network(configuration, dataset, allow_init=device.type != "meta").to(device)
    halve_convolutions(network, device)  # as our trainers
    shape = (configuration["batch_size"], len(dataset["channel_names"]), *configuration["patch_size"])
    image = torch.randn(shape, device=device)
    cost = measure(lambda: _supervised_step(network, image))
    if run is None or not run.recipe.is_online or base != run.base:
        return cost
    stream = run.recipe.settings(0, run=None)
    if stream_key(run.recipe.trainer) == "mean_teacher":
        return measure(lambda: _mean_teacher_step(network, image, _few(stream.mean_teacher, shape[0])))
    return _adversarial_cost(network, image, dataset, stream.adversarial or AdversarialSettings(), cost, measure)


def _few(settings: StreamSettings | None, batch_size: int) -> int:
    """Samples of a batch of unlabelled scans."""
    return (settings and settings.unlabelled_batch_size) or max(1, batch_size // 2)


def _adversarial_cost(
    network: Any,
    image: Any,
    dataset: Mapping[str, Any],
    settings: AdversarialSettings,
    supervised: float,
    measure: Measure,
) -> float:
    """Cost of a mean iteration; some iterations, at start and end, are supervised alone."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from nnunet_flare.networks.discriminator import Discriminator
    from nnunet_flare.trainers.halves import halve_convolutions
    from nnunet_flare.trainers.heads import Heads

    manager = LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    heads = Heads.of(manager)
    organs = manager.num_segmentation_heads - heads.first_organ
    channels, *size = image.shape[1:]
    judge = Discriminator(channels, organs, size, features=settings.discriminator_features).to(image.device)
    halve_convolutions(judge, image.device)
    share = 1 - settings.warmup - settings.finish
    few = _few(settings, len(image))
    return share * measure(lambda: _three_steps(network, judge, image, few, heads)) + (1 - share) * supervised


def _timed(step: Callable[[], None]) -> float:
    """Seconds of a step on its device, the better of two: the first pays for set-up."""
    import torch

    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        step()
        if torch.cuda.is_initialized():  # a step on the CPU is no reason to open the GPU
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _autocast(image: Any) -> AbstractContextManager[Any]:
    """Mixed precision, on CUDA alone."""
    import torch

    return torch.autocast("cuda") if image.device.type == "cuda" else nullcontext()


def _supervised_step(network: Any, image: Any) -> None:
    with _autocast(image):
        loss = sum(output.float().square().mean() for output in network(image))
    loss.backward()


def _mean_teacher_step(network: Any, image: Any, few: int) -> None:
    """An iteration with an average that teaches: its forward pass, and a step on both batches together."""
    import torch

    some = image[:1].expand(few, *image.shape[1:])
    with torch.no_grad(), _autocast(image):
        network(some)
    _supervised_step(network, torch.cat([image, some]))


def _three_steps(network: Any, judge: Any, image: Any, few: int, heads: Heads) -> None:
    """An iteration of adversarial training with any labels: what it computes, without its optimizers."""
    import torch

    from nnunet_flare.trainers import adversarial_steps as steps
    from nnunet_flare.trainers.resolutions import highest

    some = image[:1].expand(few, *image.shape[1:])
    with _autocast(image):
        with torch.no_grad():
            mask = heads.probabilities(highest(network(image)))
        organs = steps.shown_masks(mask, heads=heads, poison=False)
        loss = steps.discriminator_loss(judge, image, organs, organs, truth_first=True)
    loss.backward()
    _supervised_step(network, image)
    with torch.no_grad(), _autocast(image):
        first, second = (heads.probabilities(highest(network(some))) for _ in range(2))
        shown = [steps.shown_masks(each, heads=heads, poison=False) for each in (first, second)]
        choice = steps.choose(judge, some, some, *shown)
        learnt, _ = steps.lesson(choice, some, some, first, second, heads=heads)
    _supervised_step(network, learnt)
