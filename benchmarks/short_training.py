"""Models that learn the 13 organs in some minutes on two CPU cores, for benchmarks that need trained ones.

    python benchmarks/short_training.py -o models

Phantoms of two fields of view (the nominal one, and one that also shows chest, legs and air, as clinical scans do) and
a real torso CT (shared data) are the training cases. A coarse model (8.5 x 5 x 5.2 mm) sees a whole scan as one patch,
a fine one (4 x 2.5 x 2.5 mm) a whole phantom of the nominal field of view. Small networks learn that fast only with
whole volumes, weighted cross-entropy, AdamW with a high rate, and single samples. So trained, the fine one calls far
too much an organ; some more epochs without weights, on patches from anywhere, end that. A third model goes on from it
with patches of half the edges.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prediction_setting import SHARED

from nnunet_flare.cases import FILE_NAME, Case, write_table
from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, read_labels, read_volume, write_labels, write_volume
from nnunet_flare.images.orientation import turn_between, turn_volume
from nnunet_flare.organs import FLARE22, dataset_labels
from nnunet_flare.phantom import make_phantom

DATASET = "Dataset022_ShortTraining"
DATASET_ID = 22
PLANS = "nnUNetPlansFlareSmall"
TRAINER = "nnUNetTrainerFlareST"
COARSE, ROUGH, FINE, HALVED = "3d_coarse", "3d_rough", "3d_fullres", "3d_halved"

NOMINAL: tuple[tuple[int, int, int], tuple[float, float, float]] = ((68, 80, 100), (4.0, 3.0, 3.33))
LARGE: tuple[tuple[int, int, int], tuple[float, float, float]] = ((80, 112, 112), (5.0, 3.2, 4.0))
"""Size (z, y, x) and spacing in mm of the phantoms: the abdomen alone; chest, legs and air with it."""

NARROW_CASES, WIDE_CASES, UNSEEN_CASES = 4, 16, 20
"""Training phantoms, and those to compare on, of the domains ``between`` and ``wide`` in turn."""

UNSEEN_SEED = 10_000

TORSO_WEIGHT = 5.0
"""The only real scan is drawn as often as five phantoms."""

_FINE_PLAN: dict[str, Any] = {
    "spacing_mm": (4.0, 2.5, 2.5), "patch_size": (64, 96, 128), "stages": 5, "max_features": 128
}  # fmt: skip
PLANNED: dict[str, dict[str, Any]] = {
    ROUGH: _FINE_PLAN,
    FINE: _FINE_PLAN,
    HALVED: _FINE_PLAN,
    COARSE: {"spacing_mm": (8.5, 5.0, 5.2), "patch_size": (48, 80, 88), "stages": 4, "max_features": 64},
}

SETTINGS: dict[str, Any] = {
    "validation_iterations": 1,
    "optimizer": "AdamW",
    "initial_lr": 1e-2,
    "warmup_iterations": 20,
    "class_weights": "inverse-sqrt-frequency",
    "mirroring": False,
    "final_validation": False,
    "cpu_precision": "bf16",
    "oversample_foreground": 1.0,
    "seed": 0,
    "save_every": 1,
}
OF_ONE: dict[str, dict[str, Any]] = {
    COARSE: {"num_epochs": 50, "iterations_per_epoch": 40},
    ROUGH: {"num_epochs": 48, "iterations_per_epoch": 35},
    FINE: {
        "num_epochs": 14,
        "iterations_per_epoch": 35,
        "initial_lr": 3e-3,
        "class_weights": None,
        "oversample_foreground": 0.33,
    },
    HALVED: {
        "num_epochs": 24,
        "iterations_per_epoch": 50,
        "initial_lr": 3e-3,
        "class_weights": None,
        "oversample_foreground": 0.33,
    },
}
"""Settings of each training beside the common ones."""
GOES_ON_FROM = {FINE: ROUGH, HALVED: FINE}


@dataclass(frozen=True)
class Scan:
    """An image, the label map it is compared with, and the labels that map is annotated for."""

    image: Path
    reference: Path
    annotated: tuple[int, ...]
    unseen: bool


def write_data(folder: Path) -> dict[str, Scan]:
    """Training data below ``folder/nnUNet_raw``; returns the scans to compare on, by case name."""
    raw = folder / "nnUNet_raw" / DATASET
    if not (raw / "dataset.json").is_file():
        _write_training_cases(raw)
    everything = tuple(organ.id for organ in FLARE22)
    scans = {}
    for index in range(UNSEEN_CASES):
        case = f"phantom_{index:02d}"
        image, labels = folder / "unseen" / f"{case}_0000.nii.gz", folder / "unseen" / f"{case}.nii.gz"
        if not labels.is_file():
            domain = ("between", "wide")[index % 2]
            _write_phantom(image, labels, seed=UNSEEN_SEED + index, domain=domain, grid=LARGE)
        scans[case] = Scan(image, labels, everything, unseen=True)
    for case, reference in (
        ("ts_torso3mm", "ts_torso3mm_flare13"),
        ("ts_slab512", "ts_slab512_flare13"),
        ("chaos3", "chaos3_liver_gt"),
    ):
        if not (SHARED / f"{case}_ct.nii.gz").is_file():
            continue
        image, labels = folder / "unseen" / f"{case}_0000.nii.gz", folder / "unseen" / f"{case}.nii.gz"
        if not labels.is_file():
            _write_real(image, labels, case, reference)
        annotated = tuple(int(label) for label in np.unique(read_labels(labels).array) if label)
        scans[case] = Scan(image, labels, annotated, unseen=case != "ts_torso3mm")
    return scans


def _write_training_cases(raw: Path) -> None:
    weights: dict[str, float] = {}
    for index in range(NARROW_CASES + WIDE_CASES):
        case = f"phantom_{index:02d}"
        image, labels = raw / "imagesTr" / f"{case}_0000.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"
        domain = "narrow" if index < NARROW_CASES else "wide"
        _write_phantom(image, labels, seed=index, domain=domain, grid=(NOMINAL, LARGE)[index % 2])
        weights[case] = 1.0
    if (SHARED / "ts_torso3mm_ct.nii.gz").is_file():
        _write_real(
            raw / "imagesTr" / "torso_0000.nii.gz",
            raw / "labelsTr" / "torso.nii.gz",
            "ts_torso3mm",
            "ts_torso3mm_flare13",
        )
        weights["torso"] = TORSO_WEIGHT
    write_table(raw / FILE_NAME, {case: Case(weight=weight) for case, weight in weights.items()})
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {"0": "CT"},
            "labels": dataset_labels(FLARE22),
            "numTraining": len(weights),
            "file_ending": ".nii.gz",
        },
    )


def _write_phantom(
    image: Path,
    labels: Path,
    *,
    seed: int,
    domain: str,
    grid: tuple[tuple[int, int, int], tuple[float, float, float]],
) -> None:
    scan, organs = make_phantom(seed, domain=domain, size=grid[0], spacing_mm=grid[1])
    write_volume(image, scan)
    write_labels(labels, organs, scan)


def _write_real(image: Path, labels: Path, case: str, reference: str) -> None:
    """A scan of the shared data, turned as the phantoms lie."""
    scan = read_volume(SHARED / f"{case}_ct.nii.gz")
    turn = turn_between(scan.direction)
    scan = turn_volume(scan, turn)
    write_volume(image, scan)
    write_labels(labels, turn_volume(read_labels(SHARED / f"{reference}.nii.gz"), turn).array, scan)


def torso() -> Volume | None:
    """The real torso CT as the phantoms lie, or None where the shared data are missing."""
    path = SHARED / "ts_torso3mm_ct.nii.gz"
    if not path.is_file():
        return None
    image = read_volume(path)
    return turn_volume(image, turn_between(image.direction))


def plan(folder: Path) -> None:
    """Plans with a fine and a coarse configuration, and the preprocessed data."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess_dataset

    from nnunet_flare.planners.flare import nnUNetPlannerFlareSmall, plan_dataset

    extract_fingerprints([DATASET_ID], num_processes=1, check_dataset_integrity=False)
    common: dict[str, Any] = {"base_features": 8, "convs_per_stage": 1, "batch_size": 1}
    planned = {
        name: plan_dataset(DATASET_ID, nnUNetPlannerFlareSmall, **common, **of)[0] for name, of in PLANNED.items()
    }
    plans = planned[FINE]
    plans["configurations"] = {name: planned[name]["configurations"]["3d_fullres"] for name in PLANNED}
    for name, configuration in plans["configurations"].items():
        configuration["data_identifier"] = f"{PLANS}_{COARSE if name == COARSE else FINE}"
        configuration["flare"] = {**SETTINGS, **OF_ONE[name]}
    for name, before in GOES_ON_FROM.items():
        start = model_folder(folder, before) / "fold_all" / "checkpoint_final.pth"
        plans["configurations"][name]["flare"]["init_from"] = str(start)
    halved = plans["configurations"][HALVED]
    halved["patch_size"] = [edge // 2 for edge in halved["patch_size"]]
    preprocessed = folder / "nnUNet_preprocessed" / DATASET
    write_json(preprocessed / f"{PLANS}.json", plans)
    preprocess_dataset(DATASET_ID, PLANS, (FINE, COARSE), (1, 1))
    (preprocessed / "complete").touch()


def train(folder: Path) -> dict[str, Path]:
    """The folders of the models; trained where not there yet, an interrupted training goes on."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / name)
    os.environ.update(nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1", nnUNet_compile="f")
    if not (folder / "nnUNet_preprocessed" / DATASET / "complete").is_file():
        plan(folder)
    script = Path(sys.executable).with_name("nnUNetv2_train")
    models = {}
    for name in (COARSE, ROUGH, FINE, HALVED):
        models[name] = model_folder(folder, name)
        if (models[name] / "fold_all" / "checkpoint_final.pth").is_file():
            continue
        start = time.perf_counter()
        words = [str(script), str(DATASET_ID), name, "all", "-tr", TRAINER, "-p", PLANS, "-device", "cpu"]
        if (models[name] / "fold_all" / "checkpoint_latest.pth").is_file():
            words.append("--c")
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        print(f"{name} trained in {time.perf_counter() - start:.0f} s", flush=True)
    del models[ROUGH]
    return models


def model_folder(folder: Path, name: str) -> Path:
    """Where nnU-Net keeps a model."""
    return folder / "nnUNet_results" / DATASET / f"{TRAINER}__{PLANS}__{name}"


def training_of(model: Path) -> dict[str, Any]:
    """How a model was trained, from its plans: iterations, patch, features."""
    name = model.name.rpartition("__")[2]
    configuration = json.loads((model / "plans.json").read_text())["configurations"][name]
    settings = configuration["flare"]
    before = GOES_ON_FROM.get(name)
    after = {} if before is None else {"after": training_of(model.with_name(model.name.replace(name, before)))}
    return {
        **after,
        "iterations": settings["num_epochs"] * settings["iterations_per_epoch"],
        "optimizer": settings["optimizer"],
        "initial_lr": settings["initial_lr"],
        "class_weights": settings["class_weights"],
        "patch": configuration["patch_size"],
        "spacing_mm": configuration["spacing"],
        "features": configuration["architecture"]["arch_kwargs"]["features_per_stage"],
        "cases": f"{NARROW_CASES} narrow and {WIDE_CASES} wide phantoms, one real torso",
    }


def main() -> None:
    """Write the data and train the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--models", type=Path, required=True, help="data sets and models are kept here")
    folder = parser.parse_args().models.resolve()
    write_data(folder)
    for model in train(folder).values():
        print(model)


if __name__ == "__main__":
    main()
