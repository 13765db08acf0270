"""What a prediction will need, estimated before it starts, and where its sums go.

The sums over windows cover one patch depth (``windows.slide``): the volume is done in blocks along the first axis that
overlap by a patch, so that a block's result is the whole volume's. ``skip-empty`` needs the sums of the whole volume,
and gives way to all windows where a limit asks for it. On a GPU the sums lie there when they leave room for the
network, else on the CPU; a limit that cannot be kept is said before the work and not by the kernel's killer.

A limit of GPU memory is one of the card, as challenges measure it: what PyTorch's allocator may take is the limit less
what the CUDA context and its kernels take beside it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.inference.arrays import Array, to_host
from nnunet_flare.inference.devices import CPU, Device, gpu_number
from nnunet_flare.inference.slabs import WEIGHED_SLICES
from nnunet_flare.inference.spare import give_up_all
from nnunet_flare.inference.windows import goes_by_rows

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FLOAT_BYTES = 4

WINDOW_COPIES = 4
"""Scores of one window alive at once: the network's output, its float copy, their sum over folds and flips.

This tells what windows take beside a network on a GPU. On the CPU intermediate results are most of it, which each
network's runtime counts (:meth:`nnunet_flare.inference.networks.Networks.window_bytes`)."""

GPU_SHARE = 0.5
"""Share of the GPU's memory that sums may take; the network's activations need the rest."""

GIGABYTE = 2**30

CHUNK_BYTES = 2**26
"""What is worked on at a time on a GPU where a whole scan need not be there in single precision."""

SHORT_OF_MEMORY = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "unable to find an engine to execute")
"""What CUDA and its libraries say; the last is cuDNN's, when no algorithm gets the memory that it wants."""

CONTEXT = (GIGABYTE // 2, GIGABYTE)
"""Least and most that a CUDA context with its kernels is taken to hold on the card."""


@dataclass(frozen=True)
class Need:
    """Bytes of one prediction beyond what the process holds already.

    Not counted: the next scan, of a size that is not known, which is prepared meanwhile, and the network in single
    precision, with which a scan is repeated where its scores overflow.
    """

    sums: int
    window: int
    labels: int
    kept: int = 0
    """Scores that are kept whole beside the sums."""

    @property
    def scores(self) -> int:
        """Sums and kept scores, which lie in one place."""
        return self.sums + self.kept

    @property
    def total(self) -> int:
        """All together."""
        return self.scores + self.window + self.labels


def need(
    grid: Sequence[int],
    image: Sequence[int],
    patch: Sequence[int],
    *,
    heads: int,
    maps: int,
    whole_volume: bool,
    by_rows: bool = False,
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
        by_rows: whether rows of windows are handed on where one slab covers the scan, see :func:`windows.slide`.
        kept: shape on the network's grid of scores that are kept for later.
    """
    if whole_volume:  # with their total weights, and with what a small scan is padded with
        sums = (heads + 1) * math.prod(max(n, p) for n, p in zip(grid, patch, strict=True))
    else:
        depth = min(grid[0], patch[0])
        rows = patch[1] + 1 if by_rows and goes_by_rows(grid, patch) else grid[1]
        sums = (heads * depth + min(depth, WEIGHED_SLICES)) * rows * grid[2]
    window = WINDOW_COPIES * heads * math.prod(patch) * FLOAT_BYTES
    kept_bytes = 0 if kept is None else heads * math.prod(kept) * FLOAT_BYTES
    return Need(sums * FLOAT_BYTES, window, 2 * maps * math.prod(image), kept_bytes)


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
                    "%s: --windows %s would need more than %.3g GB; all windows are predicted instead",
                    case,
                    policies[0],
                    limit_gb,
                )
            return policy
    least = held + wanted(policies[-1]).total
    raise CaseError(
        case,
        f"needs about {least / GIGABYTE:.2f} GB, --max_memory allows {limit_gb:g} GB; {held / GIGABYTE:.2f} GB of it "
        "for the program and the model",
    )


def process_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def volume_device(device: Device, gpu_memory_gb: float | None, volume: int, beside: int = 0) -> Device:
    """Where an array of so many bytes lies: on the GPU when it leaves room there, else on the CPU.

    ``beside``: bytes that will be needed there as well.
    """
    if device.type != "cuda":
        return CPU
    try:
        room = gpu_room(device, gpu_memory_gb)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return CPU  # no room even for a context
    return device if sums_fit_on_gpu(volume + beside, room) else CPU


def gpu_room(device: Device, gpu_memory_gb: float | None) -> int:
    """Bytes of a GPU that may still be taken: what is free, and what PyTorch's allocator keeps without using it."""
    import torch

    at = gpu_number(device)
    held = torch.cuda.memory_allocated(at)
    free = torch.cuda.mem_get_info(at)[0] + torch.cuda.memory_reserved(at) - held
    return free if gpu_memory_gb is None else max(0, min(free, keep_to(device, gpu_memory_gb) - held))


def sums_fit_on_gpu(sums: int, budget: int) -> bool:
    """Whether the sums leave the network its share of a GPU's memory budget."""
    return sums <= GPU_SHARE * budget


def sums_device(device: Device, gpu_memory_gb: float | None, sums: int) -> Device:
    """Where the sums lie: on the GPU when they leave room for the network there, else on the CPU."""
    if device.type != "cuda":
        return device
    if sums_fit_on_gpu(sums, gpu_room(device, gpu_memory_gb)):
        return device
    log.info("the sums of scores (%.2f GB) are kept on the CPU", sums / GIGABYTE)
    return CPU


def keep_to(device: Device, gpu_memory_gb: float) -> int:
    """Limit PyTorch's allocator so that the process keeps to a limit of the card; returns the bytes it may take.

    Raises:
        InputError: for a limit that the CUDA context alone takes.
    """
    import torch

    at, limit = gpu_number(device), int(gpu_memory_gb * GIGABYTE)
    _, total = torch.cuda.mem_get_info(at)
    allowed = limit - beside_allocator(device)
    if limit <= CONTEXT[0]:
        raise InputError(
            f"--gpu_memory {gpu_memory_gb:g}: the CUDA context alone needs about {CONTEXT[0] / GIGABYTE:g} GB of the "
            "card; give more, or use -device cpu"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, allowed) / total), at)
    return max(0, allowed)


def beside_allocator(device: Device) -> int:
    """Bytes that this process holds on the card beside PyTorch's allocator: context, kernels, libraries.

    The card tells what all programs hold together, so that it is what the allocator does not explain, within
    :data:`CONTEXT`.
    """
    import torch

    at = gpu_number(device)
    free, total = torch.cuda.mem_get_info(at)
    return min(max(total - free - torch.cuda.memory_reserved(at), CONTEXT[0]), CONTEXT[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory did not suffice: to PyTorch, to CUDA's context or to its libraries."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    is_torchs = type(error).__name__ == "OutOfMemoryError"  # by name, since PyTorch need not be there
    return is_torchs or any(part in text for part in SHORT_OF_MEMORY)


def unless_memory_is_short(device: Device, work: Callable[[], Result]) -> Result | None:
    """What ``work`` makes on a GPU, or None, which is said, where its memory does not suffice; the CPU then does it."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    log.warning("out of GPU memory; the CPU prepares the scan%s", gpu_figures(device))
    free_gpu_memory()
    return None


def there_or_on_cpu(array: Array, work: Callable[[Array], Result]) -> Result:
    """What ``work`` makes of an array; where a GPU's memory does not suffice, which is said, of a copy on the CPU."""
    try:
        return work(array)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    log.warning("out of GPU memory; the CPU goes on%s", gpu_figures(array.device))
    free_gpu_memory()
    return work(to_host(array))


def free_gpu_memory() -> None:
    """Give up what only saves copies, and give back what PyTorch's allocator keeps for later."""
    import torch

    give_up_all()
    torch.cuda.empty_cache()


def gpu_figures(device: Device) -> str:
    """What a GPU holds, as the end of a message; nothing where it cannot be asked."""
    if device.type != "cuda":
        return ""
    import torch

    try:
        at = gpu_number(device)
        free, total = torch.cuda.mem_get_info(at)
    except RuntimeError:  # no room even for a context
        return ""
    held = torch.cuda.memory_allocated(at)
    return (
        f" (the GPU has {total / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB of it free; the network and its windows "
        f"held {held / GIGABYTE:.1f} GB)"
    )
