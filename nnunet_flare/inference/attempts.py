"""Where a prediction is computed and how, and what is tried when that fails: too little GPU memory, or an overflow.

Half precision holds numbers up to 65504. What is larger becomes infinite, then *not a number* in the next
normalisation, and the label map is silently empty or wrong: such scores are noticed and computed in single precision.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nnunet_flare.errors import CaseError
from nnunet_flare.inference.arrays import HOST, Array
from nnunet_flare.inference.devices import CPU, Device
from nnunet_flare.inference.memory import free_gpu_memory, gpu_figures, is_out_of_memory
from nnunet_flare.inference.places import place_of
from nnunet_flare.inference.windows import Consume, Forward

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class NotFiniteError(ArithmeticError):
    """A network's scores hold infinite values or NaN."""


@dataclass(frozen=True)
class Way:
    """How a prediction is computed: the networks' device and precision, and where sums and preprocessed scan lie."""

    device: Device
    precision: str
    sums: Device
    volume: Device = CPU


def attempt(case: str, way: Way, work: Callable[[Way], Result]) -> Result:
    """What ``work`` makes, tried in one way after the other, which is said. It must start anew every time.

    Out of GPU memory: with sums and scan on the CPU, then with everything there. Scores that are not finite: in single
    precision.

    Raises:
        CaseError: when the scores are not finite in single precision either.
        torch.OutOfMemoryError: when nothing is left to move to the CPU.
    """
    while True:
        following: Way | None
        try:
            return work(way)
        except RuntimeError as error:
            following = _with_less_on_gpu(way)
            if not is_out_of_memory(error) or following is None:
                raise
            what = "with the sums on the CPU" if following.device == way.device else "on the CPU, which takes longer"
            log.warning("%s: out of GPU memory; predicted again %s%s", case, what, gpu_figures(way.device))
        except NotFiniteError:
            if way.precision == "fp32":
                raise CaseError(
                    case,
                    "the network's scores are infinite or not a number even in fp32: its weights are damaged, "
                    "or the scan's values are far from those it was trained on",
                ) from None
            following = replace(way, precision="fp32")
            log.warning("%s: scores overflow in %s; predicted again in fp32", case, way.precision)
        if way.device.type == "cuda" or way.sums.type == "cuda":
            free_gpu_memory()
        way = following


def _with_less_on_gpu(way: Way) -> Way | None:
    if way.sums.type != "cpu" or way.volume.type != "cpu":
        return replace(way, sums=CPU, volume=CPU)
    return None if way.device.type == "cpu" else replace(way, device=CPU)


class Watch:
    """Notices scores that are not finite: at once on a CPU, on a GPU before a slab's scores are handed on.

    A GPU is not waited for at every window; sums over the scores are added up there and looked at once per slab.
    """

    def __init__(self) -> None:
        self._sum: Any = None

    def watched(self, forward: Forward) -> Forward:
        """``forward``, its scores watched."""

        def watching(window: Array) -> Array:
            scores = forward(window)
            total = place_of(scores).total(scores)
            self._sum = total if self._sum is None else self._sum + total
            if place_of(scores) is HOST:
                self.check()
            return scores

        return watching

    def before(self, consume: Consume) -> Consume:
        """``consume``, called when all scores so far were finite."""

        def checked(*block: Any) -> None:
            self.check()
            consume(*block)

        return checked

    def check(self) -> None:
        """Raise when a score was not finite.

        Raises:
            NotFiniteError: then.
        """
        if self._sum is not None and not math.isfinite(self._sum):
            raise NotFiniteError("scores are infinite or not a number")
