"""PyTorch's networks as OpenVINO's.

A network is converted from the PyTorch module in memory; the converted one is kept in the cache, so that conversion
(some seconds) is paid once per checkpoint: the key holds a digest of the weights themselves. A network whose code is
the user's own, or whose trainer builds it, is converted every time, since nothing tells when that code changes. The
window size is fixed, which is what sliding windows have.
"""

from __future__ import annotations

import errno
import logging
import math
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnunet_flare.digests import digest_of
from nnunet_flare.inference.cache import NETWORKS, cache_folder, cached, key_of, made_by
from nnunet_flare.inference.exported import NETWORK
from nnunet_flare.inference.openvino_runtime import silent_openvino

if TYPE_CHECKING:
    from nnunet_flare.inference.model import Model

log = logging.getLogger(__name__)

FORMAT = 6
"""Counts up when the conversion changes."""

ANY_SIZE = "dynamic_network_architectures.architectures."
"""Networks of this package hold no operation that depends on the window's size."""

_CONVERTING = threading.Lock()
"""The converter, and what quietens it, change settings of the whole process: one thread converts at a time."""


def openvino_network(model: Model, network: nn.Module, *, patch: Sequence[int], two_d: bool) -> Path | Any:
    """A model's network as OpenVINO's, for windows of a size (z, y, x): its file in the cache, else the network itself.

    Raises:
        RuntimeError: when the network has an operation that OpenVINO does not convert.
    """
    shape = window_shape(model, patch, two_d=two_d)
    made: list[Any] = []

    def make(folder: Path) -> None:
        made.append(convert(model, network, shape))
        save(made[0], folder / NETWORK, half=False)

    entry = cached(cache_folder(NETWORKS), _key(model, shape), make) if model.is_of_packages else None
    if entry is not None:
        return entry / NETWORK
    return made[0] if made else convert(model, network, shape)


def save(converted: Any, path: Path, *, half: bool) -> None:
    """Write a converted network, its weights in half precision or as they are.

    Raises:
        OSError: when it cannot be written whole; OpenVINO does not say why.
    """
    try:
        silent_openvino().save_model(converted, str(path), compress_to_fp16=half)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            errno.EIO, f"OpenVINO cannot write the network, perhaps the disk is full ({reason})", str(path)
        ) from error


def window_shape(model: Model, patch: Sequence[int], *, two_d: bool) -> list[int]:
    """Shape of a window as the network takes it: (1, C, z, y, x), or (1, C, y, x)."""
    return [1, model.network_channels, *(patch[1:] if two_d else patch)]


def _key(model: Model, shape: Sequence[int]) -> str:
    architecture = model.configuration_manager.configuration["architecture"]
    return key_of(FORMAT, *made_by(), list(shape), architecture, _layout(model), _digest(model))


def _layout(model: Model) -> list[Any]:
    """Name, shape and type of every weight: what :func:`_digest` does not say."""
    return [[name, list(value.shape), str(value.dtype)] for name, value in model.weights.items()]


def _digest(model: Model) -> str:
    """The digest of all weights, as they lie in memory; the file's other half, the optimiser's state, is not read."""
    values = [value.detach().cpu().contiguous().reshape(-1) for value in model.weights.values()]
    return digest_of(value.view(torch.uint8).numpy() for value in values)


def convert(model: Model, network: nn.Module, shape: Sequence[int]) -> Any:
    """The converted network for windows of ``shape``, traced on a smaller one where that gives the same.

    Raises:
        RuntimeError: when the network has an operation that OpenVINO does not convert.
    """
    often = (
        "once per checkpoint" if model.is_of_packages else "every time, as its code may change; flare-export keeps it"
    )
    log.info("converting the network for OpenVINO (%s)", often)
    with _CONVERTING:
        level = logging.root.level
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the tracer's remarks about shapes
                example = torch.zeros(_trace_shape(model, shape))
                converted = silent_openvino().convert_model(_traced(network, example), example_input=example)
        except Exception as error:  # what the tracer and the converter raise has nothing in common
            raise RuntimeError(_reason(error)) from error
        finally:
            logging.root.setLevel(level)  # the converter quietens the whole process
    converted.reshape(list(shape))
    return converted


def _traced(network: nn.Module, example: torch.Tensor) -> Any:
    """A network without gradients as TorchScript.

    OpenVINO, given the network, has the tracer make each of its modules a script of its own, and compare itself with
    another run, which only warns. Both together take several times as long as this, which gives the same operations.
    """
    return torch.jit.trace(lambda window: network(window), example, strict=False, check_trace=False)


def _reason(error: BaseException) -> str:
    """The last line of what came first: the tracer wraps the network's own error in general advice."""
    while error.__context__ is not None:
        error = error.__context__
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _trace_shape(model: Model, shape: Sequence[int]) -> list[int]:
    """A small window for tracing: nnU-Net's own architectures compute the same at every size that strides divide.

    Two voxels remain per axis at the deepest stage, since instance normalisation refuses a single one.
    """
    architecture = model.configuration_manager.configuration["architecture"]
    strides = architecture["arch_kwargs"].get("strides")
    if strides is None or not architecture["network_class_name"].startswith(ANY_SIZE):
        return list(shape)
    steps = [math.prod(stage[axis] for stage in strides) for axis in range(len(shape) - 2)]
    return [*shape[:2], *(min(size, 2 * step) for size, step in zip(shape[2:], steps, strict=True))]
