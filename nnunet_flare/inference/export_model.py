"""Writing an exported model: networks converted and compared with PyTorch's, documents, a README, checksums."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_flare.errors import InputError
from nnunet_flare.files import temporary_prefix, write_json, write_text
from nnunet_flare.inference.arrays import to_host
from nnunet_flare.inference.cascade import CascadeSegmenter
from nnunet_flare.inference.coarse_to_fine import RoiSegmenter
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.exported import (
    COARSE,
    FIRST_STAGE,
    FORMAT,
    FORMAT_ALONE,
    KIND,
    MANIFEST,
    NETWORK,
    write_checksums,
)
from nnunet_flare.inference.model import Model
from nnunet_flare.inference.opened import is_second_stage
from nnunet_flare.inference.openvino_conversion import convert, save, window_shape
from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime, silent_openvino
from nnunet_flare.inference.plain_plans import check_plain, plain_plans
from nnunet_flare.outputs import put_new

log = logging.getLogger(__name__)

MADE_WITH = ("nnunet-flare", "nnunetv2", "torch", "openvino", "onnx", "onnxruntime", "numpy")

ONNX = "network.onnx"

LARGEST_DIFFERENCE = {"half": 0.05, "single": 0.005}
"""Mean difference from PyTorch's scores of a window of noise, as a share of their standard deviation, by weights."""

OF_DATASET = ("channel_names", "labels", "regions_class_order", "file_ending")


@dataclass(frozen=True)
class Export:
    """What is written: defaults of prediction, the post-processing's document, a licence, and whether ONNX too."""

    step_size: float
    tta: str
    precision: str
    postprocess: dict[str, Any] | None = None
    licence: Path | None = None
    onnx: bool = False

    @property
    def weights(self) -> str:
        """``single`` where single precision was asked for, else ``half``."""
        return "single" if self.precision == "fp32" else "half"


def check_exportable(segmenter: Segmenter | CascadeSegmenter, export: Export) -> None:
    """Refuse before anything is converted what an exported model cannot hold.

    Raises:
        InputError: naming it.
    """
    for stage in _stages(segmenter):
        for model in _trained(stage):
            check_plain(model.plans_manager.plans, model.configuration_manager, str(model.folder))
    try:
        silent_openvino()
    except (ImportError, RuntimeError) as error:
        raise InputError(f"OpenVINO is needed: {error}; pip install 'nnunet-flare[openvino]'") from error
    if export.onnx:
        _onnx_packages()
    if export.licence is not None and not export.licence.is_file():
        raise InputError(f"--license {export.licence}: no such file")


def export_model(segmenter: Segmenter | CascadeSegmenter | RoiSegmenter, out: Path, export: Export) -> None:
    """Write a model, with its coarse one and its first stage where it has one, into a folder not there yet, by rename.

    Raises:
        InputError: when a network cannot be converted, or the converted one does not compute what PyTorch's does; or
            when the folder was filled meanwhile.
        OSError: when it cannot be written.
    """
    fine, roi = (segmenter.fine, segmenter) if isinstance(segmenter, RoiSegmenter) else (segmenter, None)
    *before, last = _stages(fine)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f"{temporary_prefix()}{out.name}")
    scratch.mkdir()
    try:
        if roi is not None:
            coarse = Export(roi.coarse.settings.step_size, "none", export.precision, onnx=export.onnx)
            _write(roi.coarse, scratch / COARSE, coarse)
        for first in before:
            _write(first, scratch / FIRST_STAGE, replace(export, postprocess=None))
        box = None if roi is None else {"rule": roi.rule, "margin_mm": float(roi.margin_mm)}
        _write(last, scratch, export, box)
        put_new(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write(segmenter: Segmenter, folder: Path, export: Export, roi: dict[str, Any] | None = None) -> None:
    """One model, its checksums last: those of what lies in the folder already are among them."""
    models = _trained(segmenter)
    first = models[0]
    folder.mkdir(exist_ok=True)
    for model in models:
        log.info("%s: exporting", model)
        _write_network(model, folder / f"fold_{model.member.fold}", segmenter, export)
    plans = plain_plans(first.plans_manager, first.configuration_manager.configuration, first.configuration_name)
    write_json(folder / "plans.json", plans)
    dataset = {key: first.dataset_json[key] for key in OF_DATASET if key in first.dataset_json}
    dataset.setdefault("channel_names", first.dataset_json.get("modality"))  # its name in older data sets
    write_json(folder / "dataset.json", dataset)
    manifest = {
        "kind": KIND,
        "format": FORMAT if is_second_stage(first) else FORMAT_ALONE,
        "made_with": {"python": platform.python_version(), **_versions()},
        "model": f"{first.plans_manager.plans.get('dataset_name', '')}/{first.folder.resolve().name}",
        "configuration": first.configuration_name,
        "networks": [
            {
                "fold": model.member.fold,
                "mirroring_axes": None if model.mirroring_axes is None else list(model.mirroring_axes),
            }
            for model in models
        ],
        "weights": export.weights,
        "step_size": export.step_size,
        "tta": export.tta,
        "precision": export.precision,
        "roi": roi,
        "postprocess": export.postprocess,
    }
    write_json(folder / MANIFEST, manifest)
    write_text(folder / "README.md", _readme(manifest, cascade=is_second_stage(first)))
    write_text(folder / "LICENSE.txt", _licence(export.licence, first.folder))
    write_checksums(folder)


def _write_network(model: Model, folder: Path, segmenter: Segmenter, export: Export) -> None:
    """One fold's network, compared with PyTorch's on a window of noise."""
    folder.mkdir()
    two_d = len(model.configuration_manager.patch_size) == 2
    network = model.network().float()
    shape = window_shape(model, segmenter.patch, two_d=two_d)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(noise))[0].numpy()
    try:
        converted = convert(model, network, shape)
    except RuntimeError as error:
        raise InputError(f"{model}: OpenVINO cannot convert this network ({error})") from error
    save(converted, folder / NETWORK, half=export.weights == "half")
    runtime = OpenVinoRuntime(folder / NETWORK, precision="fp32", two_d=False)
    _compare(to_host(runtime(noise)), expected, f"{model}: OpenVINO", LARGEST_DIFFERENCE[export.weights])
    if export.onnx:
        _write_onnx(network, noise, expected, folder / ONNX, str(model))


def _write_onnx(network: torch.nn.Module, noise: np.ndarray, expected: np.ndarray, path: Path, model: str) -> None:
    """The network as ONNX, its weights in single precision, compared with PyTorch's by onnxruntime."""
    import warnings

    onnx, onnxruntime = _onnx_packages()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks about shapes
            torch.onnx.export(
                network, (torch.from_numpy(noise),), str(path), input_names=["window"], output_names=["scores"],
                opset_version=17, dynamo=False,
            )  # fmt: skip
        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        scores = session.run(None, {"window": noise})[0][0]
    except Exception as error:  # what the exporter, the checker and the runtime raise has nothing in common
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InputError(f"{model}: cannot be written as ONNX ({lines[0]})") from error
    _compare(scores, expected, f"{model}: onnxruntime", LARGEST_DIFFERENCE["single"])


def _compare(found: np.ndarray, expected: np.ndarray, what: str, limit: float) -> None:
    difference = float(np.abs(found - expected).mean() / max(float(expected.std()), 1e-8))
    log.info("%s differs from PyTorch by %.2g of the scores' deviation on a window of noise", what, difference)
    if not difference <= limit:
        raise InputError(
            f"{what} computes different scores than PyTorch: they differ by {difference:.3g} of their deviation, "
            f"expected at most {limit:g}; the network cannot be exported"
        )


def _stages(segmenter: Segmenter | CascadeSegmenter) -> list[Segmenter]:
    """A cascade's stages in their order, or the model alone."""
    return [segmenter.first, segmenter.second] if isinstance(segmenter, CascadeSegmenter) else [segmenter]


def _trained(segmenter: Segmenter) -> Sequence[Model]:
    models = [model for model in segmenter.models if isinstance(model, Model)]
    if len(models) != len(segmenter.models):
        raise InputError(
            f"{segmenter.models[0].folder}: is already an exported model; expected a trained model's folder"
        )
    return models


def _onnx_packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(f"--format onnx needs {error.name}: pip install 'nnunet-flare[export]'") from error
    return onnx, onnxruntime


def _versions() -> dict[str, str]:
    found = {}
    for name in MADE_WITH:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _licence(given: Path | None, folder: Path) -> str:
    """The licence's text: of the file that was given, or that lies beside the model."""
    beside = sorted(path for path in folder.iterdir() if path.is_file() and path.name.upper().startswith("LICEN"))
    for path in [given] if given is not None else beside[:1]:
        return path.read_text(encoding="utf-8", errors="replace")
    return (
        "The licence of these weights was not given when they were exported (flare-export --license FILE).\n"
        "Ask who trained the model before you pass it on.\n"
    )


def _readme(manifest: dict[str, Any], *, cascade: bool) -> str:
    """What the folder is and how it is used."""
    made = ", ".join(f"{name} {number}" for name, number in manifest["made_with"].items())
    roi, cleaning = manifest["roi"], manifest["postprocess"]
    lines = [
        "# A segmentation model, exported for prediction on CPUs",
        "",
        f"Model `{manifest['model']}`, configuration `{manifest['configuration']}`, "
        f"{len(manifest['networks'])} fold(s), weights in {manifest['weights']} precision."
        + (f" It is the second stage of a cascade; `{FIRST_STAGE}/` is the first." if cascade else ""),
        "",
        "    flare-predict -i SCANS -o OUT -m THIS_FOLDER",
        "",
        "This needs nnunet-flare, OpenVINO and NumPy, but neither PyTorch nor nnU-Net. Defaults: windows "
        f"{manifest['step_size']:g} of a patch apart, test-time augmentation {manifest['tta']}, precision "
        f"{manifest['precision']}, coarse model {'none' if roi is None else 'with rule ' + roi['rule']}, "
        f"post-processing {'none' if cleaning is None else cleaning['name']}.",
        "",
        "`fold_*/network.xml` is an OpenVINO network for one window (1, channels, z, y, x) of preprocessed values; "
        "`plans.json` and `dataset.json` say how a scan is preprocessed and what the scores stand for. "
        "`checksums.json` has the digest of every file, `LICENSE.txt` the licence of the weights.",
        "",
        f"Made with {made}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
