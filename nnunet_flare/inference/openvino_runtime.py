"""The network executed by OpenVINO on a CPU: about twice as fast as PyTorch in the same precision.

The network is converted from the PyTorch module in memory; the converted one is kept in the cache, so that conversion
(some seconds) is paid once per checkpoint: the key holds a digest of the weights themselves. Its window size is fixed,
which is what sliding windows have.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnunet_flare.digests import digest_of
from nnunet_flare.inference.cache import cache_folder, cached, key_of
from nnunet_flare.inference.openvino_norms import average_in_blocks

if TYPE_CHECKING:
    from nnunet_flare.inference.model import Model

log = logging.getLogger(__name__)

CONVERTED = "network.xml"

REPORTING = "openvino_telemetry"
"""The package through which OpenVINO reports."""

FORMAT = 4
"""Counts up when the conversion changes."""

ANY_SIZE = "dynamic_network_architectures.architectures."
"""Networks of this package hold no operation that depends on the window's size."""

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoRuntime:
    """A network compiled for windows of one size: a window (1, C, z, y, x) to scores (K, z, y, x).

    The result's memory is used again by the same thread's next call; every thread has its own.
    """

    def __init__(
        self,
        model: Model,
        network: nn.Module,
        *,
        patch: Sequence[int],
        precision: str,
        two_d: bool,
    ) -> None:
        """Convert or take from the cache, and compile; in single precision it normalises as exactly as PyTorch.

        Raises:
            RuntimeError: when the network has an operation that OpenVINO does not convert.
        """
        openvino = silent_openvino()
        self._two_d = two_d
        shape = [1, model.network_channels, *(patch[1:] if two_d else patch)]
        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        example = _trace_shape(model, shape)

        exact = precision == "fp32"  # in bfloat16 the difference is not felt

        def make(folder: Path) -> None:
            converted = _convert(network, shape, example, exact=exact)
            openvino.save_model(converted, str(folder / CONVERTED), compress_to_fp16=False)

        entry = cached(cache_folder("openvino"), _key(model, shape, exact=exact), make)
        source: Any = str(entry / CONVERTED) if entry is not None else _convert(network, shape, example, exact=exact)
        self._compiled = core.compile_model(source, "CPU", options)
        self._own = threading.local()

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        array = (window[:, :, 0] if self._two_d else window).float().contiguous().numpy()
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        result = self._own.request.infer({0: array}, share_inputs=True, share_outputs=True)[0]
        scores = torch.from_numpy(result)[0]
        return scores[:, None] if self._two_d else scores


_IMPORTING = threading.Lock()


def silent_openvino() -> Any:
    """The package ``openvino``, imported so that it does not report its use.

    Its import and every conversion tell its makers, by default, from processes that it forks. A prediction contacts
    nobody, and a process that is forked while another thread multiplies matrices may stop both for ever.
    """
    with _IMPORTING:
        if "openvino" not in sys.modules:
            sys.modules[REPORTING] = None  # type: ignore[assignment]  # not importable: openvino then does without
        try:
            import openvino
        finally:
            if sys.modules.get(REPORTING, ...) is None:
                del sys.modules[REPORTING]
    return openvino


def _key(model: Model, shape: Sequence[int], *, exact: bool) -> str:
    from importlib.metadata import version

    architecture = model.configuration_manager.configuration["architecture"]
    versions = version("openvino"), version("torch")
    return key_of(FORMAT, *versions, list(shape), exact, architecture, _layout(model), _digest(model))


def _layout(model: Model) -> list[Any]:
    """Name, shape and type of every weight: what :func:`_digest` does not say."""
    return [[name, list(value.shape), str(value.dtype)] for name, value in model.weights.items()]


def _digest(model: Model) -> str:
    """The digest of all weights, as they lie in memory; the file's other half, the optimiser's state, is not read."""
    values = [value.detach().cpu().contiguous().reshape(-1) for value in model.weights.values()]
    return digest_of(value.view(torch.uint8).numpy() for value in values)


def _convert(network: nn.Module, shape: Sequence[int], example: Sequence[int], *, exact: bool) -> Any:
    """The converted network for windows of ``shape``, traced on one of shape ``example``.

    Raises:
        RuntimeError: when the network has an operation that OpenVINO does not convert.
    """
    log.info("converting the network for OpenVINO (once per checkpoint)")
    level = logging.root.level
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks about shapes
            converted = silent_openvino().convert_model(network, example_input=torch.zeros(list(example)))
    except Exception as error:  # what the tracer and the converter raise has nothing in common
        raise RuntimeError(_reason(error)) from error
    finally:
        logging.root.setLevel(level)  # the converter quietens the whole process
    converted.reshape(list(shape))
    if exact:
        average_in_blocks(converted)
    return converted


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
