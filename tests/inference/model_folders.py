"""Model folders as a stock trainer leaves them, without training: plans, dataset.json and saved checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

ORGANS = {"background": 0, "liver": 1, "kidney": 2, "spleen": 3}
CASCADE = "3d_cascade_fullres"
REGIONS = {"background": 0, "organ": [1, 2], "lesion": 2}


def plans(
    *,
    spacing: tuple[float, ...] = (4.0, 2.0, 2.0),
    patch: tuple[int, ...] = (8, 32, 32),
    transpose: tuple[int, int, int] = (0, 1, 2),
    reader: str = "SimpleITKIO",
    normalisation: str = "CTNormalization",
    masked: bool = False,
    features: tuple[int, ...] = (4, 8),
    force_separate_z: bool | None = None,
    resampling: str = "resample_data_or_seg_to_shape",
    channels: int = 1,
) -> dict[str, Any]:
    """Plans of a two-stage U-Net, in the form that nnU-Net's planner writes."""
    dim = len(patch)
    stock = resampling == "resample_data_or_seg_to_shape"

    def arguments(is_seg: bool, order: int) -> dict[str, Any]:
        basis: dict[str, Any] = {"is_seg": is_seg, "force_separate_z": force_separate_z}
        if resampling == "no_resampling_hack":
            return {}
        return {**basis, "order": order, "order_z": 0} if stock else basis

    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": len(features),
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim for _ in features],
            "strides": [[1] * dim, *([1, 2, 2][-dim:] for _ in features[1:])],
            "n_conv_per_stage": [1] * len(features),
            "n_conv_per_stage_decoder": [1] * (len(features) - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    backward = [int(i) for i in np.argsort(transpose)]
    intensities = {
        "mean": 80.0, "std": 140.0, "percentile_00_5": -950.0, "percentile_99_5": 300.0,
        "min": -1024.0, "max": 3000.0, "median": 90.0,
    }  # fmt: skip
    return {
        "dataset_name": "Dataset999_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": [64] * 3,
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": backward,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): intensities for c in range(channels)},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch),
                "median_image_size_in_voxels": [64.0] * dim,
                "spacing": list(spacing),
                "normalization_schemes": [normalisation] * channels,
                "use_mask_for_norm": [masked] * channels,
                "resampling_fn_data": resampling,
                "resampling_fn_data_kwargs": arguments(False, 3),
                "resampling_fn_seg": resampling,
                "resampling_fn_seg_kwargs": arguments(True, 1),
                "resampling_fn_probabilities": resampling,
                "resampling_fn_probabilities_kwargs": arguments(False, 1),
                "batch_dice": True,
                "architecture": architecture,
            }
        },
    }


def dataset_json(*, labels: dict[str, Any] | None = None, channels: int = 1) -> dict[str, Any]:
    """dataset.json; region-based where a label is a list."""
    labels = labels or ORGANS
    document = {
        "channel_names": {str(c): "CT" for c in range(channels)},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    if any(isinstance(value, list) for value in labels.values()):
        document["regions_class_order"] = [1, 2]
    return document


def heads(document: dict[str, Any]) -> int:
    """Output channels of the network for these labels."""
    count = len(document["labels"])
    return count - 1 if "regions_class_order" in document else count


def network(
    plan: dict[str, Any], document: dict[str, Any], seed: int, configuration: str = "3d_fullres"
) -> torch.nn.Module:
    """A network with weights drawn from a seed, its last layer strengthened so that labels vary in space."""
    settings = plan["configurations"]["3d_fullres"]["architecture"]
    seen = len(document["labels"]) - 1 if configuration == CASCADE else 0
    torch.manual_seed(seed)
    net = get_network_from_plans(
        settings["network_class_name"], settings["arch_kwargs"], settings["_kw_requires_import"],
        len(document["channel_names"]) + seen, heads(document), allow_init=True, deep_supervision=True,
    )  # fmt: skip
    with torch.no_grad():
        for layer in net.decoder.seg_layers:
            layer.weight *= 8
    return net


def checkpoint(
    plan: dict[str, Any],
    document: dict[str, Any],
    *,
    fold: int | str,
    seed: int,
    trainer: str = "nnUNetTrainer",
    configuration: str = "3d_fullres",
) -> dict[str, Any]:
    """What stock's ``save_checkpoint`` writes, NumPy scalars in the log included."""
    net = network(plan, document, seed, configuration)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.99)
    return {
        "network_weights": net.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.5), 0.4]]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1,
        "init_args": {
            "plans": plan, "configuration": configuration, "fold": fold, "dataset_json": document,
            "device": torch.device("cpu"),
        },
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": (0, 1, 2)[: len(plan["configurations"]["3d_fullres"]["patch_size"])],
    }  # fmt: skip


def write_model(
    folder: Path,
    *,
    folds: tuple[int | str, ...] = (0,),
    plan: dict[str, Any] | None = None,
    labels: dict[str, Any] | None = None,
    channels: int = 1,
    trainer: str = "nnUNetTrainer",
    seed: int = 0,
    configuration: str = "3d_fullres",
) -> Path:
    """A trained model's folder; fold ``k`` gets the weights of ``seed + k``."""
    plan = plan or plans(channels=channels)
    document = dataset_json(labels=labels, channels=channels)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plan))
    (folder / "dataset.json").write_text(json.dumps(document))
    for number, fold in enumerate(folds):
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(
            checkpoint(plan, document, fold=fold, seed=seed + number, trainer=trainer, configuration=configuration),
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder


def write_cascade(
    parent: Path, *, labels: dict[str, Any] | None = None, trainer: str = "nnUNetTrainer", **options: Any
) -> Path:
    """Both stages of a cascade side by side, as trained with the same plans; returns the second one's folder."""
    plan = plans(**options)
    stages = plan["configurations"]
    fine = stages["3d_fullres"]
    coarse = [1.6 * mm for mm in fine["spacing"]]
    stages["3d_lowres"] = {**fine, "spacing": coarse, "next_stage": CASCADE, "data_identifier": "nnUNetPlans_3d_lowres"}
    stages[CASCADE] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    for seed, stage in enumerate(("3d_lowres", CASCADE)):
        folder = parent / f"{trainer}__nnUNetPlans__{stage}"
        write_model(folder, plan=plan, labels=labels, configuration=stage, seed=seed, folds=(0, 1), trainer=trainer)
    return folder


def write_kinds(folder: Path) -> None:
    """A model of each kind: folds with a coarse model beside them, regions, a cascade, two dimensions, turned axes."""
    write_model(folder / "T__nnUNetPlans__3d_fullres", folds=(0, 1), plan=plans(features=(4, 8)))
    write_model(folder / "T__nnUNetPlans__3d_lowres", plan=plans(spacing=(8.0, 4.0, 4.0)), seed=3)
    write_model(folder / "regions", labels=REGIONS)
    write_cascade(folder / "cascade")
    write_model(folder / "flat", plan=plans(patch=(32, 32), spacing=(2.0, 2.0)))
    turned = plans(transpose=(2, 0, 1), normalisation="ZScoreNormalization", masked=True)
    write_model(folder / "turned", plan=turned)
