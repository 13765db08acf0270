"""How to predict, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_flare.errors import InputError
from nnunet_flare.inference.choices import TTA, WINDOWS

DEFAULT_STEP_SIZE = 0.9


@dataclass(frozen=True)
class PredictionSettings:
    """How to predict; the words are those of ``flare-predict``.

    ``step_size`` is a share of the patch, ``gaussian`` weighs a window's centre more than its rim, limits are in GB.
    With ``from_cache`` a trained model whose networks were converted before is opened without PyTorch and nnU-Net.
    """

    step_size: float = DEFAULT_STEP_SIZE
    tta: str = "none"
    device: str = "cpu"  # or auto: CUDA where torch finds it
    precision: str = "auto"
    trust_checkpoint: bool = False
    gaussian: bool = True
    backend: str = "auto"
    windows: str = "all"
    max_memory_gb: float | None = None
    gpu_memory_gb: float | None = None
    from_cache: bool = False

    def __post_init__(self) -> None:
        for name, limit in (("max_memory", self.max_memory_gb), ("gpu_memory", self.gpu_memory_gb)):
            if limit is not None and not limit > 0:
                raise InputError(f"--{name} {limit}: expected a number of gigabytes above 0")
        if self.gpu_memory_gb is not None and not self.device.startswith(("cuda", "auto")):
            raise InputError(f"--gpu_memory needs -device cuda, not {self.device}")
        if not 0 < self.step_size <= 1:
            raise InputError(f"step size {self.step_size}: expected a number above 0 and at most 1")
        if self.tta not in TTA:
            raise InputError(f"test-time augmentation {self.tta!r}: expected one of {', '.join(TTA)}")
        if self.windows not in WINDOWS:
            raise InputError(f"windows {self.windows!r}: expected one of {', '.join(WINDOWS)}")
