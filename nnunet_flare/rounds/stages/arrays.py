"""Preprocessed cases as nnU-Net stores them: ``<case>.b2nd``, ``<case>_seg.b2nd`` and ``<case>.pkl``.

Written under temporary names and renamed, the pickle last, so that its presence says that the case is whole.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.files import replacing

ENDINGS = (".b2nd", "_seg.b2nd", ".pkl")
FRAME_HEAD = 24
"""Bytes at the start of a blosc2 frame; the last eight say how long it is."""


def write_array(path: Path, array: np.ndarray, patch_size: Sequence[int]) -> None:
    """Write one blosc2 array (C, Z, Y, X) with nnU-Net's chunks, blocks and compression, by rename.

    Labels are stored without the byte shuffle, which only helps resampled intensities.
    """
    import blosc2
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

    blocks, chunks = comp_blosc2_params(array.shape, tuple(patch_size), array.itemsize)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=tuple(chunks),
        blocks=tuple(blocks),
        contiguous=True,
        cparams={
            "codec": blosc2.Codec.ZSTD,
            "clevel": 8,
            "filters": [blosc2.Filter.SHUFFLE if array.dtype.kind == "f" else blosc2.Filter.NOFILTER],
        },
    )
    with replacing(path) as temporary:  # not through a memory map: on a full disk that ends the process (SIGBUS)
        temporary.write_bytes(stored.to_cframe())


def read_array(path: Path) -> np.ndarray:
    """Read a whole blosc2 array.

    Raises:
        OSError: when it is missing or damaged; the message names the file.
    """
    import blosc2

    try:
        return np.asarray(blosc2.open(urlpath=str(path), mode="r")[:])
    except Exception as error:  # blosc2 raises RuntimeError, ValueError or FileNotFoundError
        raise OSError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def write_properties(path: Path, properties: dict[str, Any]) -> None:
    """Write a case's pickle as nnU-Net does, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        pickle.dump(properties, stream)


def read_properties(path: Path) -> dict[str, Any]:
    """Read a case's pickle from our own preprocessed folders.

    Raises:
        OSError: when it is missing or damaged.
    """
    try:
        with open(path, "rb") as stream:
            properties = pickle.load(stream)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(properties, dict):
        raise OSError(f"{path}: holds {type(properties).__name__}, expected the properties of a case")
    return properties


def is_cut(path: Path) -> bool:
    """Whether a blosc2 array is shorter than its head says, or has no head; other files: whether they are empty.

    Reads 24 bytes, so that thousands of files may be asked.
    """
    with open(path, "rb") as stream:
        head = stream.read(FRAME_HEAD)
    size = path.stat().st_size
    if path.suffix != ".b2nd":
        return size == 0
    return len(head) < FRAME_HEAD or b"b2frame" not in head or size < int.from_bytes(head[16:], "big")


def damage(folder: Path, case: str) -> str | None:
    """What is wrong with a preprocessed case, in words, or None; its three files are read whole.

    A crash or a full disk can leave files of the right names that hold only a part.
    """
    try:
        image = read_array(folder / f"{case}.b2nd")
        labels = read_array(folder / f"{case}_seg.b2nd")
        read_properties(folder / f"{case}.pkl")
    except OSError as error:
        return str(error)
    if image.shape[1:] != labels.shape[1:]:
        return f"{folder / case}: image of shape {image.shape}, labels of {labels.shape}"
    return None


def label_hash(label: np.ndarray) -> str:
    """SHA-256 of a label map's shape and uint8 voxels."""
    digest = hashlib.sha256(repr(label.shape).encode())
    digest.update(np.ascontiguousarray(label, dtype=np.uint8).tobytes())
    return digest.hexdigest()


def network_spacing_mm(
    properties: dict[str, Any], transpose_forward: Sequence[int], shape: Sequence[int]
) -> tuple[float, ...]:
    """Spacing (z, y, x) of a case's array on the network's grid, which plans of a fixed size do not say."""
    stored = [float(properties["spacing"][axis]) for axis in transpose_forward]
    before = properties["shape_after_cropping_and_before_resampling"]
    return tuple(step * int(n) / new for step, n, new in zip(stored, before, shape, strict=True))
