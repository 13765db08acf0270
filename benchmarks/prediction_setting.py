"""Models and scans of the prediction benchmarks.

Untrained models are enough for time and memory: a six-stage U-Net as in *brananas* ("big") and the FLARE22 winner's
student ("small"). The scan is a real CT (shared data, CHAOS 3) resampled to the size asked for, or a phantom where it
is missing.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "inference"))

import model_folders  # noqa: E402

from nnunet_flare.images import Volume, read_labels, read_volume, write_volume  # noqa: E402

LABELS = {"background": 0, **{f"organ{i}": i for i in range(1, 14)}}

EXTENT_MM = {160: 400.0, 400: 400.0, 1000: 1000.0}
"""Length of the scan along z for each number of slices: the first two have the same windows."""

IN_PLANE_MM = 0.8

SHARED = Path(os.environ.get("FLARE_SHARED_DATA", ROOT.parent / "shared" / "data"))

REAL_SCAN = SHARED / "chaos3_ct.nii.gz"

SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"spacing": (4.0, 1.5, 1.5), "patch": (32, 128, 192), "features": (16, 32, 64, 128, 256, 256)},
    "big": {"spacing": (4.0, 1.2, 1.2), "patch": (40, 224, 192), "features": (32, 64, 128, 256, 320, 320)},
}


def plans(name: str) -> dict[str, Any]:
    """Plans of a benchmark model: anisotropic first stage, two convolutions a stage, as nnU-Net plans them."""
    setting = SETTINGS[name]
    plan = model_folders.plans(**setting)
    kwargs = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    stages = len(setting["features"])
    kwargs["strides"] = [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * (stages - 3), [1, 2, 2]]
    kwargs["kernel_sizes"] = [[1, 3, 3], *[[3, 3, 3]] * (stages - 1)]
    kwargs["n_conv_per_stage"] = [2] * stages
    kwargs["n_conv_per_stage_decoder"] = [2] * (stages - 1)
    return plan


def write_model(folder: Path, name: str, folds: tuple[int, ...] = (0,)) -> Path:
    """The trained-model folder of an untrained benchmark model."""
    return model_folders.write_model(folder, plan=plans(name), labels=LABELS, folds=folds)


def source_name() -> str:
    """Where :func:`scan` takes its voxels from."""
    return "CHAOS 3" if REAL_SCAN.is_file() else "phantom"


def scan(slices: int, size: int = 512) -> Volume:
    """A CT of ``slices`` x ``size`` x ``size`` voxels, int16 HU."""
    if REAL_SCAN.is_file():
        source = read_volume(REAL_SCAN)
    else:
        from nnunet_flare.phantom import make_phantom

        source = make_phantom(0, domain="wide", size=(80, 256, 256), spacing_mm=(5.0, 1.6, 1.6))[0]
    from scipy.ndimage import zoom

    factors = [slices / source.array.shape[0], size / source.array.shape[1], size / source.array.shape[2]]
    array = zoom(source.array, factors, order=1, grid_mode=True, mode="nearest").astype(np.int16)
    noise = np.random.default_rng(0).integers(-12, 13, array.shape, np.int16)
    spacing = (EXTENT_MM.get(slices, 2.5 * slices) / slices, IN_PLANE_MM, IN_PLANE_MM)
    return Volume(np.clip(array + noise, -1024, 3071).astype(np.int16), spacing)


def organ_labels(shape: tuple[int, ...]) -> np.ndarray:
    """A label map of the 13 organs, stretched to ``shape``: a real one, or a phantom's where it is missing."""
    from scipy.ndimage import zoom

    path = SHARED / "ts_torso3mm_flare13.nii.gz"
    if path.is_file():
        labels = read_labels(path).array
    else:
        from nnunet_flare.phantom import make_phantom

        labels = make_phantom(0, domain="wide", size=(80, 256, 256), spacing_mm=(5.0, 1.6, 1.6))[1]
    factors = [new / old for new, old in zip(shape, labels.shape, strict=True)]
    return zoom(labels, factors, order=0, grid_mode=True, mode="nearest")


def write_scan(path: Path, slices: int) -> None:
    """Write :func:`scan`."""
    write_volume(path, scan(slices))


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a figure belongs to; with a GPU also its name and driver."""
    model = platform.processor()
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    packages = ("torch", "nnunetv2", "openvino", "numpy", "SimpleITK")
    card = {"gpu": _gpu()} if device == "cuda" else {}
    return {
        **card,
        "cpu": model,
        "cores": os.cpu_count(),
        "bf16": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _gpu() -> str:
    """Name, memory and driver of the first GPU, and the CUDA that PyTorch was built with."""
    import torch

    query = ["nvidia-smi", "--id=0", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = torch.cuda.get_device_name(0)
    return f"{found}, CUDA {torch.version.cuda}"


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # not installed
        return "-"
