"""A network executed by OpenVINO on a CPU: about twice as fast as PyTorch in the same precision. Needs no PyTorch."""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.inference.arrays import BFloat16
from nnunet_flare.inference.cpus import thread_count
from nnunet_flare.inference.devices import say_no_bf16
from nnunet_flare.inference.opened import WindowBytes
from nnunet_flare.inference.openvino_memory import bytes_of_window
from nnunet_flare.inference.openvino_norms import average_in_blocks
from nnunet_flare.inference.openvino_slabs import join_in_slabs

OLDEST = (2024, 4)
"""Year and release of the oldest OpenVINO that networks are run with."""

REPORTING = "openvino_telemetry"
"""The package through which OpenVINO reports."""

CONVERTER = "openvino.tools.ovc"
"""Its part that converts networks of PyTorch."""

MOVES = frozenset({"Output", "Result", "Reorder"})
"""Kinds of steps of a compiled network that change the order of values in memory at most, or their type."""

CONVERTS = frozenset({"Convert", "Subgraph"})
"""Kinds of steps that may take single precision to bfloat16."""

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoRuntime:
    """A network compiled for windows of one size: a window (1, C, z, y, x) to scores (K, z, y, x).

    The result's memory is used again by the same thread's next call; every thread has its own. ``window`` and
    ``scores`` are the shapes of what goes in and comes out. Scores that are computed in bfloat16 come as that
    (:class:`BFloat16`): in single precision the same values take twice the memory.
    """

    def __init__(self, source: Path | Any, *, precision: str, two_d: bool) -> None:
        """Compile; in single precision it normalises as exactly as PyTorch.

        Args:
            source: a stored network (``.xml``), or a converted one, which is changed.
            precision: ``fp32`` or ``bf16``.
            two_d: whether the network takes single slices.

        Raises:
            RuntimeError: when OpenVINO cannot read or compile it.
        """
        core = shared_core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            say_no_bf16("OpenVINO", "cpu")
            precision = "fp32"
        network = core.read_model(str(source)) if isinstance(source, Path) else source
        if precision == "fp32":  # in bfloat16 the difference is not felt
            average_in_blocks(network)
        else:  # in single precision the exact normalisation holds as much
            join_in_slabs(network)
        options = {
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": thread_count(),
        }
        self._two_d = two_d
        self._is_bf16 = False
        if precision == "bf16":
            self._compiled = core.compile_model(_with_bf16_scores(network.clone()), "CPU", options)
            self._is_bf16 = _computes_bf16(self._compiled)
        if not self._is_bf16:  # where scores are computed in single precision, they stay so
            self._compiled = core.compile_model(network, "CPU", options)
        ports = self._compiled.input(0), self._compiled.output(0)
        self.window, self.scores = (tuple(int(n) for n in port.shape) for port in ports)
        self._own = threading.local()

    def __call__(self, window: np.ndarray) -> np.ndarray | BFloat16:
        array = np.ascontiguousarray(window[:, :, 0] if self._two_d else window, np.float32)
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        scores: np.ndarray = self._own.request.infer({0: array}, share_inputs=True, share_outputs=True)[0][0]
        scores = scores[:, None] if self._two_d else scores
        return BFloat16(scores.view(np.uint16)) if self._is_bf16 else scores

    def window_bytes(self, window: Sequence[int]) -> WindowBytes:
        """As :class:`nnunet_flare.inference.opened.Runtime`; ``window`` is copied once where it is a part of a scan."""
        kept = 0 if hasattr(self._own, "request") else bytes_of_window(self._compiled)
        return WindowBytes(kept=kept, passing=4 * math.prod(window))

    def release(self) -> None:
        """Give back the memory of windows and scores; the next call takes it again. No call may be under way."""
        self._own = threading.local()
        self._compiled.release_memory()


def _with_bf16_scores(network: Any) -> Any:
    """The network, changed to give its scores in bfloat16."""
    from openvino import Type
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(network)
    steps.output(0).tensor().set_element_type(Type.bf16)
    return steps.build()


def _computes_bf16(compiled: Any) -> bool:
    """Whether what computes a compiled network's scores gives bfloat16, and nothing converts them to it afterwards."""
    node = compiled.get_runtime_model().get_results()[0]
    while True:
        info = node.get_rt_info()
        if info["outputPrecisions"].astype(str) != "bf16":
            return False
        if info["layerType"].astype(str) not in MOVES:
            return str(info["layerType"].astype(str)) not in CONVERTS
        node = node.input_value(0).get_node()


_IMPORTING = threading.Lock()
_SHARING = threading.Lock()
_shared: list[Any] = []


def shared_core() -> Any:
    """The one ``openvino.Core`` of this process, which lives as long as it does.

    On some processors a core lays a stack of its own under the signal handlers of the thread that compiles, and lays
    the one before back when it goes. Of two cores the later one lays back what the first has freed: then Ctrl-C, or
    being asked to end, is a segmentation fault. Compiling a second network is faster too.

    Raises:
        RuntimeError: when OpenVINO is too old.
    """
    openvino = silent_openvino()
    with _SHARING:
        if not _shared:
            _shared.append(openvino.Core())
        return _shared[0]


def silent_openvino() -> Any:
    """The package ``openvino``, imported so that it does not report its use.

    Its import and every conversion tell its makers, by default, from processes that it forks. A prediction contacts
    nobody, and a process that is forked while another thread multiplies matrices may stop both for ever. Its converter,
    half of its import, comes with the first call of ``openvino.convert_model``.

    Raises:
        RuntimeError: when it is too old.
    """
    with _IMPORTING, nullcontext() if "openvino" in sys.modules else _without(REPORTING, CONVERTER):
        import openvino
    if not hasattr(openvino, "__version__") or not hasattr(openvino, "Core"):  # before 2023, or a folder of that name
        where = list(getattr(openvino, "__path__", ())) or [getattr(openvino, "__file__", None)]
        raise RuntimeError(
            f"the package openvino in {where[0]} is too old, or something else of that name: pip install -U openvino"
        )
    found = re.match(r"(\d+)\.(\d+)", str(openvino.__version__))
    if found is not None and (int(found[1]), int(found[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(f"OpenVINO {found[0]} is too old, expected {oldest} or newer: pip install -U openvino")
    if not hasattr(openvino, "convert_model"):
        openvino.convert_model = _convert_model
    return openvino


def _convert_model(*args: Any, **settings: Any) -> Any:
    """``openvino.convert_model``, imported when it is called."""
    with _IMPORTING, _without(REPORTING):
        from openvino.tools.ovc import convert_model
    return convert_model(*args, **settings)


@contextmanager
def _without(*modules: str) -> Iterator[None]:
    """Inside, modules that were not imported before cannot be, and whoever can do without them does."""
    missing = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in missing:
            if sys.modules.get(name, ...) is None:
                del sys.modules[name]
