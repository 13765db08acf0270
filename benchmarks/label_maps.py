"""Label maps of full clinical size for the benchmarks of post-processing and of the measures.

The anatomy is a real one (shared data: torso at 3 mm, a published model's labels) stretched to 512 x 512 x 160 voxels,
with an oesophagus drawn in, which those labels lack; where the shared data are missing, a phantom.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from shown_command import shown_command

from nnunet_flare.images import read_labels
from nnunet_flare.images.orientation import turn_between
from nnunet_flare.phantom import make_phantom

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (160, 512, 512)
SPACING_MM = (2.5, 0.8, 0.8)
OESOPHAGUS = 10
STRAY_BLOBS = 40


def anatomy() -> tuple[np.ndarray, str]:
    """A label map (160, 512, 512) of 13 organs, each in one piece, and where it comes from."""
    path = Path(os.environ.get("FLARE_SHARED_DATA", ROOT.parent / "shared" / "data")) / "ts_torso3mm_flare13.nii.gz"
    if path.is_file():
        volume = read_labels(path)
        labels, source = turn_between(volume.direction).apply(volume.array), path.name
    else:
        labels, source = make_phantom(0, domain="wide", size=(64, 128, 128))[1], "phantom"
    stretched = labels[np.ix_(*(np.arange(n) * size // n for n, size in zip(SHAPE, labels.shape, strict=True)))]
    stretched = np.ascontiguousarray(stretched)
    if not (stretched == OESOPHAGUS).any():
        tube = stretched[SHAPE[0] // 2 :, 290:312, 246:268]
        tube[tube == 0] = OESOPHAGUS
    return _largest_pieces(stretched), source


def _largest_pieces(labels: np.ndarray) -> np.ndarray:
    pieces = cc3d.connected_components(labels)
    counts = np.bincount(pieces.ravel())
    owner = np.zeros(counts.size, dtype=np.uint8)
    owner[pieces] = labels
    kept = [max(np.flatnonzero(owner == organ), key=lambda piece: counts[piece]) for organ in np.unique(owner) if organ]
    return np.where(np.isin(pieces, kept), labels, 0).astype(np.uint8)


def as_predicted(labels: np.ndarray) -> np.ndarray:
    """The same anatomy with borders that wave by a few voxels, as a prediction's do."""
    z, y, x = (np.arange(size) for size in labels.shape)
    dy = np.rint(2 * np.sin(x / 23)).astype(int)
    dx = np.rint(2 * np.sin(y / 19)).astype(int)
    dz = np.rint(1.2 * np.sin(x / 31)).astype(int)
    rows = np.clip(y[:, None] + dy[None, :], 0, labels.shape[1] - 1)
    columns = np.clip(x[None, :] + dx[:, None], 0, labels.shape[2] - 1)
    return np.stack([labels[np.clip(place + dz, 0, labels.shape[0] - 1)[None, :], rows, columns] for place in z])


def with_strays(labels: np.ndarray, seed: int) -> np.ndarray:
    """The map with small blobs of random organs anywhere in the volume."""
    rng = np.random.default_rng(seed)
    labels = labels.copy()
    for _ in range(STRAY_BLOBS):
        corner = [int(rng.integers(0, size - 4)) for size in labels.shape]
        size = rng.integers(1, 5, 3)
        labels[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = rng.integers(1, 14)
    return labels


def environment(*packages: str) -> dict[str, Any]:
    """What the figures depend on: machine, versions, command."""
    return {
        "command": shown_command(),
        "python": platform.python_version(),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in packages},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
