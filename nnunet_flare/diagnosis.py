"""Is everything in place: packages, plugin, hardware, nnU-Net's folders and rounds; what ``flare-doctor`` prints.

Every check returns findings and raises nothing, so that one broken part does not hide the others. Only ``cli`` imports
this module.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import nnunet_flare
from nnunet_flare import plugin
from nnunet_flare.documents import load_json
from nnunet_flare.errors import InputError

DISTRIBUTION = "nnunet-flare"
EXTRAS = ("openvino", "dicom")
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
START_UP_FILE = "nnunet_flare_plugin.pth"
FALLBACK_VARIABLE = "nnUNet_extTrainer"

LOW_DISK_GB = 20
"""A FLARE data set's preprocessed scans need more."""

LOW_SHARED_MEMORY_GB = 1
"""Docker gives 0.06 GB unless told otherwise; nnU-Net's training workers hand batches over through it."""

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. A ``note`` is good to know, a ``problem`` stops some command from working."""

    level: Level
    text: str


def check_packages() -> list[Finding]:
    """Installed versions against what this package requires, its optional extras included."""
    from packaging.requirements import Requirement

    findings = [Finding("ok", f"Python {platform.python_version()} ({sys.executable})")]
    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return [*findings, Finding("problem", f"{DISTRIBUTION} is only on the path, not installed: pip install it")]
    findings.append(Finding("ok", f"{DISTRIBUTION} {nnunet_flare.__version__} ({Path(nnunet_flare.__file__).parent})"))
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found is None:
            findings.append(Finding("problem", f"{requirement.name} is missing: pip install '{wanted}'"))
        elif not requirement.specifier.contains(found, prereleases=True):
            findings.append(Finding("problem", f"{requirement.name} {found} is installed: pip install '{wanted}'"))
        elif requirement.name in ("nnunetv2", "torch"):
            findings.append(Finding("ok", f"{requirement.name} {found}"))
    for extra in EXTRAS:
        given = [r for r in requirements if r.marker is not None and r.marker.evaluate({"extra": extra})]
        names = [r.name for r in given if r.marker is not None and not r.marker.evaluate({"extra": ""})]
        if not names:
            continue
        missing = [name for name in names if _version(name) is None]
        if missing:
            text = f"optional: {', '.join(missing)} not installed: pip install '{DISTRIBUTION}[{extra}]'"
        else:
            text = "optional: " + ", ".join(f"{name} {_version(name)}" for name in names)
        findings.append(Finding("note" if missing else "ok", text))
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_plugin() -> list[Finding]:
    """Whether stock nnU-Net's commands find our trainers and planners, and if not, why and what to do."""
    findings = list(_stock_commands())
    reason = _why_inactive()
    if reason is None:
        names = ", ".join([*plugin.TRAINERS, *plugin.PLANNERS])
        return [Finding("ok", f"the plugin is active: stock nnU-Net finds {names}"), *findings]
    extension = Path(nnunet_flare.__file__).parent / "ext"
    if str(extension) in os.environ.get(FALLBACK_VARIABLE, "").split(os.pathsep):
        level: Level = "note"
        remedy = f"{FALLBACK_VARIABLE} is set, so trainers are found anyway"
    else:
        level = "problem"
        remedy = f"trainers are found with: export {FALLBACK_VARIABLE}={extension}"
    planners = (
        'planners are found with: python -c "import nnunet_flare.plugin as p; p.install(); from '
        "nnunetv2.experiment_planning."
        'plan_and_preprocess_entrypoints import plan_and_preprocess_entry as plan; plan()" -d 22 -pl nnUNetPlannerFlare'
    )
    return [
        Finding(level, f"the plugin is not active: {reason}"),
        Finding("note", remedy),
        Finding("note", planners),
        *findings,
    ]


def _why_inactive() -> str | None:
    if plugin.is_installed():
        try:
            lookup = getattr(importlib.import_module(plugin.TARGET), plugin.FUNCTION, None)
        except Exception as error:  # a broken nnU-Net must not stop the diagnosis
            return f"nnU-Net cannot be imported ({type(error).__name__}: {error})"
        return None if hasattr(lookup, plugin.MARK) else f"this nnU-Net has no {plugin.TARGET}.{plugin.FUNCTION}"
    if not plugin.is_enabled():
        return f"{plugin.SWITCH}={os.environ[plugin.SWITCH]} turns it off; unset {plugin.SWITCH}"
    if sys.flags.no_site:
        return "this Python runs without start-up files (python -S)"
    folders = [Path(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())]
    if any((folder / START_UP_FILE).is_file() for folder in folders):
        return f"{START_UP_FILE} exists but did not run; Python says why on stderr when it starts"
    home = Path(nnunet_flare.__file__).parents[1]
    if home not in folders:
        return f"{home} is not a site folder of this Python (pip install --target, or a source folder on PYTHONPATH)"
    return f"{home} holds no {START_UP_FILE}; install {DISTRIBUTION} again"


def _stock_commands() -> Iterator[Finding]:
    """The plugin works in its own environment only, so the commands on PATH must be those of this environment."""
    scripts = Path(sysconfig.get_path("scripts"))
    found = shutil.which("nnUNetv2_train")
    if found is None:
        yield Finding("note", f"nnUNetv2_train is not on PATH; its folder is {scripts}")
    elif Path(found).parent != scripts and Path(found).resolve().parent != scripts.resolve():
        yield Finding("problem", f"{found} belongs to another environment, not to this one ({scripts}); fix PATH")


def check_hardware() -> list[Finding]:
    """GPU, CPU, threads and shared memory, and what ``precision auto`` and ``backend auto`` make of them."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    from nnunet_flare.inference.runtimes import choose_backend, choose_precision

    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        findings.append(Finding("ok", f"GPU {index}: {device.name}, {device.total_memory / 1e9:.1f} GB"))
    if not findings:
        findings.append(Finding("note", _why_no_gpu()))
    cpu = torch.device("cpu")
    auto = f"precision auto is {choose_precision('auto', cpu)}, backend auto is {choose_backend('auto', cpu)}"
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings.append(Finding("ok", f"CPU: {available} cores, {torch.get_num_threads()} torch threads; {auto}"))
    return [*findings, *_torchvision(), *_shared_memory()]


def _why_no_gpu() -> str:
    import torch

    if Path("/proc/driver/nvidia").is_dir() and torch.version.cuda is None:
        return "no GPU: there is a driver, but this torch is built for CPUs; install a CUDA build"
    return "no GPU that torch can use; give the commands -device cpu"


def _torchvision() -> Iterator[Finding]:
    """Stock's search for a trainer imports all of its own on the way, some of which need a torchvision that fits."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever a binary that does not fit raises
        versions = f"torchvision {_version('torchvision')} does not fit torch {_version('torch')} ({error})"
        yield Finding(
            "note",
            f"{versions}: nnUNetv2_train does not find variants of stock trainers; it finds those of this package",
        )


def _shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total / 1e9
    if total < LOW_SHARED_MEMORY_GB:
        yield Finding(
            "note",
            f"{folder} has {total:.2f} GB: training workers may die; use docker run --ipc=host or "
            "--shm-size=8g (flare-predict needs none)",
        )


def check_folders() -> list[Finding]:
    """nnU-Net's three environment variables, their folders and the free disk."""
    findings = []
    for variable in FOLDERS:
        value = os.environ.get(variable)
        if not value:
            findings.append(Finding("problem", f"{variable} is not set: export {variable}=FOLDER"))
        elif not Path(value).is_dir():
            findings.append(Finding("problem", f"{variable}={value}: no such folder: mkdir -p {value}"))
        else:
            findings.append(_folder(variable, Path(value)))
    return findings


def _folder(variable: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    told = f"{variable}={folder}, {free:.0f} GB free"
    if not os.access(folder, os.W_OK | os.X_OK):
        if variable == "nnUNet_raw":
            return Finding(
                "note", f"{told}, not writable; the list of unlabelled scans goes to nnUNet_preprocessed instead"
            )
        return Finding("problem", f"{told}, not writable; make it writable or choose another folder")
    if free < LOW_DISK_GB and variable != "nnUNet_raw":
        return Finding("note", f"{told}: not much for preprocessed scans and checkpoints")
    return Finding("ok", told)


def check_rounds(preprocessed: Path) -> list[Finding]:
    """Rounds of a dataset whose training data holds ignored voxels, which only our trainers leave out."""
    from nnunet_flare.trainers.settings import KEY

    findings = []
    for plans in sorted(preprocessed.glob("*.json")):
        try:
            configurations = load_json(plans, {"configurations": {str: dict}})["configurations"]
            ignoring = {
                name: value[KEY]["ignore_label"]
                for name, value in configurations.items()
                if value.get(KEY, {}).get("ignore_label") is not None
            }
        except (InputError, TypeError, AttributeError):
            continue  # not a plans file
        for name, label in ignoring.items():
            marked = f"{plans.name}: configuration {name} marks uncertain voxels with {label}"
            remedy = "train it with -tr nnUNetTrainerFlareST, or export the round with flare-pseudolabel export"
            findings.append(Finding("note", f"{marked}, and a stock trainer takes that for an organ: {remedy}"))
    return findings
