"""A tiny preprocessed data set, written directly: no fingerprint, no planning, no preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_flare.planners.layers import STOCK_LAYERS
from nnunet_flare.planners.topology import override_configuration, topology

NAME = "Dataset022_Tiny"
PLANS = "nnUNetPlansFlareTiny"
PATCH = (8, 16, 16)
SHAPE = (10, 20, 20)
INTENSITIES = {"mean": 80.0, "std": 140.0, "percentile_00_5": -970.0, "percentile_99_5": 280.0}
LABELS = {"background": 0, "liver": 1, "spleen": 2}


def configuration(patch: Sequence[int] = PATCH, batch_size: int = 2) -> dict[str, Any]:
    """A base configuration of three stages of 4 to 8 features."""
    found = topology((2.0, 1.0, 1.0), patch)
    arch = {
        "n_stages": found.stages,
        "features_per_stage": [4] * found.stages,
        "kernel_sizes": [list(k) for k in found.kernel_sizes],
        "strides": [list(s) for s in found.strides],
        "n_conv_per_stage": [1] * found.stages,
        "n_conv_per_stage_decoder": [1] * (found.stages - 1),
        **STOCK_LAYERS,
    }
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    made = {
        "data_identifier": f"{PLANS}_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [float(edge) for edge in SHAPE],
        "spacing": [2.0, 1.0, 1.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{part}": "resample_data_or_seg_to_shape" for part in ("data", "seg", "probabilities")},
        **{f"resampling_fn_{part}_kwargs": resampling for part in ("data", "seg", "probabilities")},
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arch,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return override_configuration(made, stages=3, base_features=4, max_features=8)


def write_case(folder: Path, case: str, *, seed: int, seg: np.ndarray | None = None) -> None:
    """A noisy image with two boxes of organ as nnU-Net's preprocessing would leave it."""
    stream = np.random.default_rng(seed)
    data = stream.normal(0, 0.5, (1, *SHAPE)).astype(np.float32)
    if seg is None:
        seg = np.zeros((1, *SHAPE), np.int8)
        seg[0, 2:7, 3:11, 3:11] = 1
        seg[0, 3:8, 11:17, 9:17] = 2
    data += seg
    locations = {label: np.argwhere(seg == label)[:200] for label in (1, 2)}
    nnUNetDatasetBlosc2.save_case(
        data,
        seg.astype(np.int8),
        {"class_locations": locations, "spacing": [2.0, 1.0, 1.0]},
        str(folder / case),
        chunks=(1, *SHAPE),
        blocks=(1, *SHAPE),
    )


class TinyDataset:
    """The preprocessed folder of a data set, and trainers on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "preprocessed" / NAME
        self.raw = root / "raw" / NAME
        self.data = self.folder / f"{PLANS}_3d_fullres"
        self.data.mkdir(parents=True)
        self.raw.mkdir(parents=True)
        self.plans: dict[str, Any] = {
            "dataset_name": NAME,
            "plans_name": PLANS,
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {"3d_fullres": configuration()},
            "experiment_planner_used": "nnUNetPlannerFlareTiny",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
        }
        self.dataset_json: dict[str, Any] = {
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": 6,
            "file_ending": ".nii.gz",
        }
        (self.folder / "dataset_fingerprint.json").write_text("{}")
        self.save()

    def save(self) -> None:
        (self.folder / f"{PLANS}.json").write_text(json.dumps(self.plans))
        (self.folder / "dataset.json").write_text(json.dumps(self.dataset_json))

    def add(self, *cases: str, **keywords: Any) -> None:
        for case in cases:
            write_case(self.data, case, seed=sum(map(ord, case)), **keywords)

    def table(self, roles: Mapping[str, Any], *, name: str = "flare_cases.json", raw: bool = False) -> None:
        """Write a case table; a role is a word or a whole entry."""
        entries = {case: {"role": role} if isinstance(role, str) else role for case, role in roles.items()}
        folder = self.raw if raw else self.folder
        (folder / name).write_text(json.dumps({"version": 1, "cases": entries}))

    def splits(self, *folds: tuple[Sequence[str], Sequence[str]]) -> None:
        document = [{"train": list(train), "val": list(val)} for train, val in folds]
        (self.folder / "splits_final.json").write_text(json.dumps(document))

    def trainer(
        self,
        *,
        fold: int | str = "all",
        name: str = "nnUNetTrainerFlareST",
        configuration: str = "3d_fullres",
        continued: bool = False,
        results: str = "results",
        **settings: Any,
    ) -> Any:
        """A trainer as ``nnUNetv2_train`` makes it, with these settings under "flare" in its configuration."""
        (self.root / results).mkdir(exist_ok=True)
        self.environment.setenv("nnUNet_results", str(self.root / results))
        if settings:
            self.plans["configurations"][configuration]["flare"] = settings
        self.save()
        return get_trainer_from_args(NAME, configuration, fold, name, PLANS, continued, torch.device("cpu"))

    environment: pytest.MonkeyPatch
