"""Reading stock trainer checkpoints as data, never as code.

A PyTorch checkpoint is a pickle, and unpickling can run anything. ``weights_only`` admits tensors and plain
containers; what stock nnU-Net adds on top are NumPy scalars (the logged Dice values), so those and their dtypes are
allowed too, and nothing else. ``trust=True`` lifts the limit for files whose origin is known.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_flare.errors import InputError

REQUIRED = ("network_weights", "init_args", "trainer_name")
"""What every checkpoint of a stock trainer holds."""


def load_checkpoint(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """The checkpoint's content on the CPU; its tensors are mapped from the file, not read.

    Raises:
        InputError: when it is missing, truncated, not of an nnU-Net trainer, or holds more than data.
    """
    content = read_weights(path, trust=trust)
    missing = [key for key in REQUIRED if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{path}: is not a checkpoint of an nnU-Net trainer; it lacks {', '.join(missing)}")
    return content


def read_weights(path: Path, *, trust: bool = False) -> Any:
    """What a file of weights holds, of whatever program; stock nnU-Net may unpickle a file that was read here.

    Raises:
        InputError: when it is missing, truncated, or holds more than data.
    """
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such checkpoint; {path.parent} holds {there or 'none'} (choose with -chk)")
    try:
        return _load(path, trust=trust)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than weights and numbers ({_reason(error)}); opening such a file can run any "
            "program. If you trust its source, use --trust-checkpoint"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: cannot be read as a checkpoint ({_reason(error)}); its {path.stat().st_size} bytes look "
            "truncated or damaged; copy it again"
        ) from error


def weights_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The network's state, the prefixes of wrapped networks removed."""
    weights = {}
    for key, value in checkpoint["network_weights"].items():
        for prefix in ("module.", "_orig_mod."):
            key = key.removeprefix(prefix)
        weights[key] = value
    return weights


def _load(path: Path, *, trust: bool) -> Any:
    mapped = _is_zip(path)  # the older format cannot be mapped
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
    with torch.serialization.safe_globals(_allowed()):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _allowed() -> list[Any]:
    """NumPy's scalar constructor, under its old and its new name, and its dtypes."""
    core = np._core if hasattr(np, "_core") else np.core
    scalar = core.multiarray.scalar
    dtypes = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *sorted(dtypes, key=lambda dtype: dtype.__name__),
    ]


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _reason(error: Exception) -> str:
    """The telling line of torch's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")
    return telling[:200] or type(error).__name__
