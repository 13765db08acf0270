"""The networks of an ensemble, built where they fit and in the precision that is asked for, once for all threads."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from nnunet_flare.errors import InputError
from nnunet_flare.inference.attempts import Way, attempt
from nnunet_flare.inference.augment import flipped, flips_of
from nnunet_flare.inference.devices import CPU, Device, named, open_device
from nnunet_flare.inference.memory import FLOAT_BYTES, free_gpu_memory, gpu_figures, is_out_of_memory, keep_to
from nnunet_flare.inference.opened import Execution, Opened, Runtime
from nnunet_flare.inference.places import place_at
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.runtimes import choose_backend, choose_precision
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.windows import Forward

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Networks:
    """One network per member, test-time augmentation included."""

    def __init__(
        self,
        models: Sequence[Opened],
        settings: PredictionSettings,
        profile: Profile,
        *,
        patch: Sequence[int],
        two_d: bool,
    ) -> None:
        """Nothing is built yet; device, precision and backend are chosen.

        Raises:
            InputError: for a device, precision or backend that does not exist here or do not go together.
        """
        self._models, self._settings, self._profile = models, settings, profile
        self._patch, self._two_d = patch, two_d
        self.device = open_device(settings.device)
        self.precision = choose_precision(settings.precision, self.device)
        self._built: dict[tuple[str, str], list[Forward]] = {}
        self._runtimes: dict[tuple[str, str], list[Runtime]] = {}
        self._cold: list[Runtime] = []
        self._lock = threading.Lock()
        self._built_in: int | None = None
        self._said = False
        choose_backend(settings.backend, self.device)  # refused now and not at the first scan
        if settings.gpu_memory_gb is not None and self.device.type != "cuda":
            raise InputError(f"--gpu_memory needs -device cuda; -device {settings.device} is {self.device} here")

    def load(self) -> None:
        """Build the networks now; on the CPU from now on where the GPU has no room for them, which is said."""
        try:
            self.forwards(self.device, self.precision)
            return
        except RuntimeError as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
        log.warning("the GPU has no room for the network; the CPU predicts%s", gpu_figures(self.device))
        free_gpu_memory()
        self.precision = _on(CPU, self.precision)
        self.device = CPU
        self.forwards(self.device, self.precision)

    def warm_up(self, window: Sequence[int]) -> None:
        """Run each network that was built since the last call on an empty window (z, y, x), on a GPU.

        CUDA loads its kernels, and cuDNN chooses its algorithms, while the first scan is still being read.
        """
        cold, self._cold = self._cold, []
        if self.device.type != "cuda":
            return
        with self._profile.stage("warm-up"):
            try:
                for forward, model in zip(cold, self._models, strict=False):
                    empty = place_at(self.device).zeros((1, model.network_channels, *window))
                    self._profile.settle(forward(empty))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                free_gpu_memory()  # a scan that is being prepared may hold it; predicting will find a way

    def attempt(self, case: str, sums: Device, volume: Device, work: Callable[[list[Forward], Way], Result]) -> Result:
        """What ``work`` makes of the networks and the way of computing, in the first way that succeeds.

        ``sums`` and ``volume`` say where sums and preprocessed scan shall lie at first.

        Raises:
            CaseError: as :func:`nnunet_flare.inference.attempts.attempt`.
        """
        self._say_what_was_chosen()
        return attempt(
            case,
            Way(self.device, self.precision, sums, volume),
            lambda way: work(self.forwards(way.device, _on(way.device, way.precision)), way),
        )

    def forwards(self, device: Device, precision: str) -> list[Forward]:
        """The networks on a device in a precision; built once, by whichever thread comes first.

        Raises:
            InputError: in a process that was forked from the one that built them.
        """
        if self._built_in not in (None, os.getpid()):
            raise InputError(
                f"the networks were built in process {self._built_in}, of which this one is a fork: threads do not "
                "survive a fork, so it would wait for ever. Open the model in each process, and start processes with "
                "multiprocessing's 'spawn'"
            )
        with self._lock:
            self._built_in = os.getpid()
            known = self._built.get((str(device), precision))
            if known is not None:
                return known
            axes = [model.mirroring_axes for model in self._models]
            if not self._built and self._settings.tta == "mirror" and not any(axes):
                log.warning("the model was trained without mirroring; --tta mirror has no effect")
            if device.type == "cuda" and self._settings.gpu_memory_gb is not None:
                keep_to(device, self._settings.gpu_memory_gb)
            with self._profile.stage("model"):
                plain = [self._runtime(model, device, precision) for model in self._models]
                made = [
                    flipped(forward, flips_of(self._settings.tta, its, two_d=self._two_d))
                    for forward, its in zip(plain, axes, strict=True)
                ]
            self._runtimes[str(device), precision] = plain
            self._cold = plain
            self._built[str(device), precision] = made
            return made

    def window_bytes(self, scores: int, *, apart: bool) -> int | None:
        """Bytes that windows take on the CPU beyond what the process holds; None, which is said, where unknown.

        Args:
            scores: bytes of one network's scores of a window in single precision.
            apart: whether the members' scores are kept apart.
        """
        self.forwards(CPU, self.precision)
        runtimes = self._runtimes[str(CPU), self.precision]
        shapes = [(1, model.network_channels, *self._patch) for model in self._models]
        try:
            found = [runtime.window_bytes(shape) for runtime, shape in zip(runtimes, shapes, strict=True)]
        except RuntimeError as error:
            log.warning("%s: %s; --max_memory counts scores alone for its windows", self._models[0], error)
            return None
        flips = [flips_of(self._settings.tta, model.mirroring_axes, two_d=self._two_d) for model in self._models]
        is_flipped, folds = max(map(len, flips)) > 1, len(runtimes)
        copies = (3 if is_flipped else 0) + (0 if folds == 1 else 2 * folds if apart else 2)
        turned = FLOAT_BYTES * math.prod(shapes[0]) if is_flipped else 0
        return sum(one.kept for one in found) + max(one.passing for one in found) + turned + copies * scores

    def release(self) -> None:
        """Give back what the networks' windows took on the CPU, until the next one; they stay ready."""
        from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

        with self._lock:
            for runtime in (one for some in self._runtimes.values() for one in some):
                if isinstance(runtime, OpenVinoRuntime):
                    runtime.release()

    def _say_what_was_chosen(self) -> None:
        """Once, before the first scan, where the choice was ours."""
        if self._said or "auto" not in (self._settings.device, self._settings.precision):
            return
        self._said = True
        backend = choose_backend(self._settings.backend, self.device)
        log.info("device %s, precision %s, backend %s", named(self.device), self.precision, backend)

    def _runtime(self, model: Opened, device: Device, precision: str) -> Runtime:
        how = Execution(
            backend=choose_backend(self._settings.backend, device),
            fall_back=self._settings.backend == "auto",
            device=device,
            precision=precision,
            patch=self._patch,
            two_d=self._two_d,
        )
        return model.runtime(how)


def _on(device: Device, precision: str) -> str:
    """The precision after a fall from the GPU to the CPU, which has no fp16."""
    return choose_precision("auto", device) if device.type == "cpu" and precision == "fp16" else precision
