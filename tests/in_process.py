"""A whole run in this process: its tasks one after another, without an interpreter and its imports for each."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_flare.phantom import write_phantom
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds import do_task as work
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.start import plan_run, start_run

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
TINY_PLAN = {
    "planner": "nnUNetPlannerFlareTiny",
    "plan.spacing_mm": "[8.5, 5.0, 5.2]",
    "plan.patch_size": "[16, 32, 32]",
    "plan.base_features": "4",
    "plan.stages": "3",
}
TINY_TRAINING = {
    "training.num_epochs": "1",
    "training.iterations_per_epoch": "2",
    "training.validation_iterations": "1",
    "training.final_validation": "false",
    "predict.precision": "fp32",
    "predict.tta": "none",
    "predict.step_size": "1.0",
}

TINY_COARSE_TO_FINE = {
    **{f"{where}plan.{key}": value for where in ("", "roi.") for key, value in (
        ("patch_size", "[16, 32, 32]"), ("base_features", "4"), ("max_features", "8"), ("stages", "3"),
    )},
    "training.num_epochs": "3",
    "training.validation_iterations": "1",
    "training.final_validation": "false",
    "roi.training.num_epochs": "1",
    "roi.training.final_validation": "false",
    "predict.precision": "fp32",
    "seed": "1",
}  # fmt: skip
"""Of the recipes that find the organs with a coarse model first, whose planners make patches of a fixed size."""


def phantom(folder: Path, monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> dict[str, Path]:
    """A phantom dataset in ``folder`` with nnU-Net's variables set; its three folders."""
    write_phantom(folder, size=(20, 32, 32), seed=3, **sizes)
    return nnunet_folders(folder, monkeypatch)


def nnunet_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """nnU-Net's three folders in ``folder``, its variables set to them and to one process without workers.

    nnU-Net draws 100 million voxels for the intensities of a dataset, with replacement: here that takes longer
    than all trainings of a run. So does a process that it starts for a few small scans, and that imports nnU-Net first.
    A training's ``progress.png`` takes longer than its iterations; ``tests/trainers`` has it.
    """
    prepare = DatasetFingerprintExtractor.__init__

    def draw_less(self: DatasetFingerprintExtractor, *arguments: Any, **named: Any) -> None:
        prepare(self, *arguments, **named)
        self.num_foreground_voxels_for_intensitystats = 1e5

    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", draw_less)
    monkeypatch.setattr(get_context("spawn"), "Pool", ThreadPool, raising=False)
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)
    folders = {name: folder / name for name in FOLDERS}
    for name, path in folders.items():
        path.mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(path))
    variables = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "NNUNET_FLARE_THREADS": "1", work.TASK_VARIABLE: ""}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return folders


def started(folder: Path, folders: Mapping[str, Path], recipe: str, settings: Mapping[str, str], **more: Path) -> Run:
    """A run of a recipe with a tiny network."""
    loaded = load_recipe(recipe, {**TINY_PLAN, **TINY_TRAINING, **settings})
    request = Request(dataset="22", unlabelled=folder / "unlabelled", device="cpu", **more)
    return start_run(plan_run(request, loaded, folders))


def do_all(
    run: Run, monkeypatch: pytest.MonkeyPatch, *, until: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Do the tasks that are not done, up to the first that ``until`` names; returns what was done."""
    monkeypatch.setattr(work, "run_child", _in_this_process)
    done = []
    for name, task in graph(run).items():
        if until(name):
            break
        if not run.paths.done(name).is_file():
            work.do_task(run, task)
            done.append(name)
    return done


def _in_this_process(command: list[str], **_: object) -> int:
    if "nnunetv2.run.run_training" not in command:
        return 0  # the report
    parser = argparse.ArgumentParser()
    for name in ("dataset", "configuration", "fold"):
        parser.add_argument(name)
    for name in ("-tr", "-p", "-device"):
        parser.add_argument(name)
    parser.add_argument("--c", action="store_true")
    given = parser.parse_args(command[command.index("nnunetv2.run.run_training") + 1 :])
    os.environ["nnUNet_compile"] = "f"  # noqa: SIM112
    run_training(given.dataset, given.configuration, given.fold, given.tr, given.p, continue_training=given.c,
                 device=torch.device(given.device))  # fmt: skip
    return 0
