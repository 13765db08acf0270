"""What a prediction will need, estimated before it starts, and where its sums go.

The sums over windows cover one patch depth (``windows.slide``): the volume is done in blocks along the first axis that
overlap by a patch, so that a block's result is the whole volume's. ``skip-empty`` needs the sums of the whole volume,
and gives way to all windows where a limit asks for it. On a GPU the sums lie there when they leave room for the
network, else on the CPU; a limit that cannot be kept is said before the work and not by the kernel's killer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from nnunet_flare.errors import CaseError

log = logging.getLogger(__name__)

FLOAT_BYTES = 4

WINDOW_COPIES = 4
"""Scores of one window alive at once: the network's output, its float copy, their sum over folds and flips."""

GPU_SHARE = 0.5
"""Share of the GPU's memory that sums may take; the network's activations need the rest."""

GIGABYTE = 2**30

Result = TypeVar("Result")


@dataclass(frozen=True)
class Need:
    """Bytes of one prediction beyond what the process holds already."""

    sums: int
    window: int
    labels: int
    kept: int = 0
    """Scores that are kept whole beside the sums."""

    @property
    def total(self) -> int:
        """All together."""
        return self.sums + self.window + self.labels + self.kept


def need(
    grid: Sequence[int],
    image: Sequence[int],
    patch: Sequence[int],
    *,
    heads: int,
    maps: int,
    whole_volume: bool,
    kept: Sequence[int] | None = None,
) -> Need:
    """Estimate a prediction.

    Args:
        grid: shape on the network's grid.
        image: shape of the image.
        patch: window size.
        heads: score channels, of all members that are kept apart.
        maps: label maps that are made.
        whole_volume: whether sums cover the whole grid and not one patch depth.
        kept: shape on the network's grid of scores that are kept for later.
    """
    grid = [max(n, p) for n, p in zip(grid, patch, strict=True)]
    depth = grid[0] if whole_volume else patch[0]
    sums = (heads + 1) * depth * grid[1] * grid[2] * FLOAT_BYTES
    window = WINDOW_COPIES * heads * math.prod(patch) * FLOAT_BYTES
    kept_bytes = 0 if kept is None else heads * math.prod(kept) * FLOAT_BYTES
    return Need(sums, window, 2 * maps * math.prod(image), kept_bytes)


def affordable(case: str, limit_gb: float | None, policies: Sequence[str], wanted: Callable[[str], Need]) -> str:
    """The first of some window policies that keeps to a memory limit.

    Args:
        case: for messages.
        limit_gb: of the whole process; None for no limit.
        policies: in the order of preference.
        wanted: estimates a prediction with a policy.

    Raises:
        CaseError: when none of them does, with the figures.
    """
    if limit_gb is None:
        return policies[0]
    held, limit = process_bytes(), limit_gb * GIGABYTE
    for policy in policies:
        if held + wanted(policy).total <= limit:
            if policy != policies[0]:
                log.warning(
                    "%s: --windows %s would need more than %.3g GB; all windows are visited instead",
                    case,
                    policies[0],
                    limit_gb,
                )
            return policy
    least = held + wanted(policies[-1]).total
    raise CaseError(
        case,
        f"needs about {least / GIGABYTE:.2f} GB, --max_memory allows {limit_gb:g} GB; {held / GIGABYTE:.2f} GB of it "
        "are the program and the model",
    )


def process_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def sums_fit_on_gpu(sums: int, budget: int) -> bool:
    """Whether the sums leave the network its share of a GPU's memory budget."""
    return sums <= GPU_SHARE * budget


def sums_device(device: torch.device, gpu_memory_gb: float | None, sums: int) -> torch.device:
    """Where the sums lie: on the GPU when they leave room for the network there, else on the CPU."""
    if device.type != "cuda":
        return device
    free, total = torch.cuda.mem_get_info(device)
    budget = free if gpu_memory_gb is None else min(free, int(gpu_memory_gb * GIGABYTE))
    if gpu_memory_gb is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory_gb * GIGABYTE / total), device)
    if sums_fit_on_gpu(sums, budget):
        return device
    log.info("sums of %.2f GB go to the CPU", sums / GIGABYTE)
    return torch.device("cpu")


def else_on_cpu(case: str, device: torch.device, work: Callable[[torch.device], Result]) -> Result:
    """What ``work`` makes with the sums on a device; on the CPU where the GPU's memory does not suffice, which is said.

    ``work`` is called a second time then and must start anew.
    """
    try:
        return work(device)
    except torch.cuda.OutOfMemoryError:
        if device.type == "cpu":
            raise
    log.warning("%s: out of GPU memory; once more with the sums on the CPU", case)
    torch.cuda.empty_cache()
    return work(torch.device("cpu"))
