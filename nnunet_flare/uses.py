"""What this machine and environment are good for: a verdict per use, drawn from what the diagnosis found.

Every use is tried as far as that costs nothing: packages are imported, commands are looked up.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Mapping, Sequence

from nnunet_flare.diagnosis import Finding

SLURM = ("sbatch", "squeue", "scontrol", "scancel")
REPORT = ("jinja2", "PIL", "matplotlib")

Sections = Mapping[str, Sequence[Finding]]
"""Findings by the title of their section."""


def verdicts(sections: Sections) -> dict[str, Finding]:
    """Whether training, predicting, exporting, the report, Slurm and the GPU work here, and what is to know of each."""
    return {
        "train": _train(sections),
        "predict": _predict(),
        "export": _export(),
        "report": _report(),
        "Slurm": _slurm(),
        "GPU": _gpu(),
    }


def _train(sections: Sections) -> Finding:
    broken = broken_import("nnunetv2") or broken_import("torch")
    if broken:
        return Finding("problem", f"no: {broken}")
    wrong = [(title, f) for title in ("packages", "plugin", "folders") for f in sections.get(title, ())]
    problems = [title for title, finding in wrong if finding.level == "problem"]
    if problems:
        return Finding("problem", f"no: see the problems under {', '.join(dict.fromkeys(problems))}")
    limits = []
    if not _cuda():
        limits.append("only on the CPU (-device cpu), for the demo and small trials")
    if broken_import("torchvision"):
        limits.append(
            "variants of stock trainers are not found, because torchvision is broken; those of this package are"
        )
    return Finding("note", f"yes, but {'; '.join(limits)}") if limits else Finding("ok", "yes")


def _predict() -> Finding:
    openvino = importlib.util.find_spec("openvino") is not None
    torch = broken_import("torch") or broken_import("nnunetv2")
    if torch and not openvino:
        return Finding("problem", f"no: {torch}; for exported models alone: pip install 'nnunet-flare[openvino]'")
    if torch:
        return Finding("note", f"yes, but only models that flare-export wrote: {torch}")
    if not openvino and not _cuda():
        return Finding("note", "yes, but slower on the CPU than with OpenVINO: pip install 'nnunet-flare[openvino]'")
    return Finding("ok", "yes, with OpenVINO on the CPU" if openvino else "yes")


def _export() -> Finding:
    broken = broken_import("torch") or broken_import("nnunetv2")
    if broken:
        return Finding("problem", f"no: {broken}")
    if importlib.util.find_spec("openvino") is None:
        return Finding("note", "no: OpenVINO is not installed: pip install 'nnunet-flare[openvino]'")
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        return Finding("ok", "yes, for OpenVINO; --format onnx needs: pip install 'nnunet-flare[export]'")
    return Finding("ok", "yes, for OpenVINO and ONNX")


def _report() -> Finding:
    broken = [text for name in REPORT if (text := broken_import(name))]
    return Finding("problem", f"no: {'; '.join(broken)}") if broken else Finding("ok", "yes")


def _slurm() -> Finding:
    missing = [name for name in SLURM if shutil.which(name) is None]
    if not missing:
        return Finding("ok", "yes")
    return Finding("note", f"no: {', '.join(missing)} not on PATH; runs work on this machine (--executor local)")


def _gpu() -> Finding:
    broken = broken_import("torch")
    if broken:
        return Finding("note", f"no: {broken}")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(index) for index in range(count)))
        return Finding("ok", f"yes, {count}: {names}")
    if torch.backends.mps.is_available():
        return Finding("note", "only Apple's (-device mps)")
    return Finding("note", "no: see the notes under hardware")


def _cuda() -> bool:
    if broken_import("torch"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def broken_import(name: str) -> str | None:
    """Why a package cannot be imported, in a line; None where it can, and for an optional one that is not there."""
    if importlib.util.find_spec(name) is None:
        return None if name == "torchvision" else f"{name} is not installed"
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a binary that does not fit raises
        first = (str(error).splitlines() or [""])[0]
        return f"{name} cannot be imported ({type(error).__name__}: {first})"
    return None
