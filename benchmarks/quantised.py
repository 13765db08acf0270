"""An exported network in int8, by NNCF's post-training quantisation, for ``real_network.py --int8``."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.images import Volume
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.exported import NETWORK, Exported, write_checksums
from nnunet_flare.inference.openvino_conversion import save
from nnunet_flare.inference.openvino_runtime import REPORTING, shared_core, silent_openvino
from nnunet_flare.inference.settings import DEFAULT_STEP_SIZE, PredictionSettings
from nnunet_flare.inference.windows import padding, window_starts

INSTALL = "pip install 'nncf>=3.4'"

CONVOLUTIONS = ("Convolution", "GroupConvolution")

PER_SCAN = 2
"""Windows of each scan that calibrate; each costs some seconds."""


def require_nncf() -> None:
    """Import NNCF so that it does not report its use, or stop with one line where it is not installed."""
    silent_openvino()
    sys.modules[REPORTING] = None  # type: ignore[assignment]  # not importable: NNCF then does without
    try:
        import nncf  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"--int8 needs NNCF, which is not installed here ({error}): {INSTALL}") from error


def calibration_windows(model: Path, scans: Sequence[Volume]) -> list[np.ndarray]:
    """Windows (1, 1, z, y, x) of every scan as the network gets them, spread over it."""
    segmenter = Segmenter.from_model_folder(model, PredictionSettings(precision="fp32"))
    return [window for scan in scans for window in _windows(segmenter, scan)]


def _windows(segmenter: Segmenter, scan: Volume) -> Iterator[np.ndarray]:
    data = segmenter.prepare([scan]).prepared.data
    data = np.pad(data, [(0, 0), *padding(data.shape[1:], segmenter.patch)])
    rows = window_starts(data.shape[1:], segmenter.patch, DEFAULT_STEP_SIZE)
    starts = [(z, y, x) for z in rows[0] for y in rows[1] for x in rows[2]]
    for chosen in sorted({round(at) for at in np.linspace(0, len(starts) - 1, PER_SCAN + 2)[1:-1]}):
        box = tuple(slice(low, low + edge) for low, edge in zip(starts[chosen], segmenter.patch, strict=True))
        yield np.ascontiguousarray(data[(slice(None), *box)], np.float32)[None]


def quantised(model: Path, folder: Path, windows: Sequence[np.ndarray], *, only_pointwise: bool) -> Path:
    """The same exported model, its weights and activations in int8; the last layer and the normalisations are not.

    Weights are symmetric per channel, activations asymmetric per tensor where they have both signs (the preset
    ``mixed``); biases are corrected. With ``only_pointwise`` convolutions of larger kernels than 1 x 1 x 1 stay.
    """
    import nncf

    shutil.copytree(model, folder)
    for network in Exported.read(folder).models():
        exact = shared_core().read_model(str(model / network.network.parent.name / NETWORK))
        layers = [op for op in exact.get_ordered_ops() if op.get_type_name() in CONVOLUTIONS]
        kept = [op for op in layers if op is layers[-1] or (only_pointwise and _looks_around(op))]
        reduced = nncf.quantize(
            exact,
            nncf.Dataset(list(windows)),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(windows),
            ignored_scope=nncf.IgnoredScope(names=[op.get_friendly_name() for op in kept]),
        )
        save(reduced, network.network, half=False)
    (folder / "checksums.json").unlink()
    write_checksums(folder)
    return folder


def _looks_around(convolution: Any) -> bool:
    """Whether a convolution's kernel is larger than one voxel."""
    return math.prod(convolution.input_value(1).get_shape()[-3:]) > 1
