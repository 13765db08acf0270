"""The planners write the papers' plans, cap them on small data, and need nothing of this package afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_flare import plugin
from nnunet_flare.errors import InputError
from nnunet_flare.planners import flare
from nnunet_flare.planners.expected import expected_configuration
from nnunet_flare.planners.flare import plan_dataset

FLARE_CT = {"shape": (100, 512, 512), "spacing": (2.5, 0.8, 0.8)}
SMALL_CT = {"shape": (20, 60, 50), "spacing": (4.0, 1.2, 1.2)}
NAME = "Dataset022_Abdomen"

MakeDataset = Callable[..., Path]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeDataset:
    """Makes a raw data set whose fingerprint is written by hand: planning reads nothing else of the images."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))

    def make(*, shape: tuple[int, ...], spacing: tuple[float, ...], cases: int = 5) -> Path:
        raw, preprocessed = tmp_path / "raw" / NAME, tmp_path / "preprocessed" / NAME
        (raw / "imagesTr").mkdir(parents=True)
        (raw / "labelsTr").mkdir()
        preprocessed.mkdir()
        image = sitk.GetImageFromArray(np.zeros((2, 2, 2), np.int16))
        for case in range(cases):
            sitk.WriteImage(image, str(raw / "imagesTr" / f"case_{case}_0000.nii.gz"))
            sitk.WriteImage(image, str(raw / "labelsTr" / f"case_{case}.nii.gz"))
        document = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, **{f"organ{k}": k for k in range(1, 14)}},
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(document))
        intensity = {"max": 3000.0, "mean": 80.0, "median": 85.0, "min": -1000.0}
        fingerprint = {
            "spacings": [list(spacing)] * cases,
            "shapes_after_crop": [list(shape)] * cases,
            "foreground_intensity_properties_per_channel": {
                "0": {**intensity, "percentile_00_5": -970.0, "percentile_99_5": 280.0, "std": 140.0}
            },
            "median_relative_size_after_cropping": 1.0,
        }
        (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        return raw

    return make


def parameters_of(configuration: dict[str, Any], classes: int = 14) -> int:
    architecture = configuration["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        classes,
        allow_init=False,
        deep_supervision=False,
    )
    return sum(p.numel() for p in network.parameters())


PAPERS = {
    "nnUNetPlannerFlare": {
        "plans": "nnUNetPlansFlare",
        "spacing": [4.0, 1.2, 1.2],
        "patch": [40, 224, 192],
        "features": [32, 64, 128, 256, 320, 320],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
        "kernels": [[1, 3, 3]] + [[3, 3, 3]] * 5,
        "convs": ("n_conv_per_stage", [2] * 6, [2] * 5),
    },
    "nnUNetPlannerFlareBig": {
        "plans": "nnUNetPlansFlareBig",
        "spacing": [2.5, 0.8, 0.8],
        "patch": [48, 224, 224],
        "features": [32, 64, 128, 256, 512, 512],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
        "kernels": [[1, 3, 3]] + [[3, 3, 3]] * 5,
        "convs": ("n_conv_per_stage", [3] * 6, [3] * 5),
    },
    "nnUNetPlannerFlareSmall": {
        "plans": "nnUNetPlansFlareSmall",
        "spacing": [4.0, 1.2, 1.2],
        "patch": [32, 128, 192],
        "features": [16, 32, 64, 128, 256],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        "kernels": [[1, 3, 3]] + [[3, 3, 3]] * 4,
        "convs": ("n_conv_per_stage", [2] * 5, [2] * 4),
    },
    "nnUNetPlannerFlareNoisyStudent": {
        "plans": "nnUNetPlansFlareNoisyStudent",
        "spacing": [3.0, 1.0, 1.0],
        "patch": [32, 224, 224],
        "features": [32, 64, 128, 256, 320, 320],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
        "kernels": [[1, 3, 3]] + [[3, 3, 3]] * 5,
        "convs": ("n_blocks_per_stage", [1, 2, 3, 4, 4, 4], [1] * 5),
    },
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_planner_writes_its_papers_plan_on_flare_data(dataset: MakeDataset, name: str) -> None:
    paper = PAPERS[name]
    dataset(**FLARE_CT)
    plans, identifier = plan_experiment_dataset(22, getattr(flare, name))
    assert identifier == paper["plans"]
    assert sorted(plans["configurations"]) == ["2d", "3d_fullres"], "no low resolution"
    configuration = plans["configurations"]["3d_fullres"]
    arch = configuration["architecture"]["arch_kwargs"]
    assert configuration["spacing"] == paper["spacing"]
    assert configuration["patch_size"] == paper["patch"]
    assert configuration["batch_size"] == 2
    assert configuration["batch_dice"] is True, "stock would have planned a low resolution for this data"
    assert configuration["data_identifier"] == f"{identifier}_3d_fullres"
    assert arch["features_per_stage"] == paper["features"]
    assert arch["strides"] == paper["strides"]
    assert arch["kernel_sizes"] == paper["kernels"]
    encoder, encoder_numbers, decoder_numbers = paper["convs"]
    assert arch[encoder] == encoder_numbers
    assert arch["n_conv_per_stage_decoder"] == decoder_numbers
    assert plans["transpose_forward"] == [0, 1, 2]
    assert configuration["preprocessor_name"] == "DefaultPreprocessor"
    assert {configuration[key] for key in configuration if key.startswith("resampling_fn") and "kwargs" not in key} == {
        "resample_data_or_seg_to_shape"
    }


@pytest.mark.parametrize("name", PAPERS)
def test_the_network_is_known_before_the_data_are_planned(dataset: MakeDataset, name: str) -> None:
    dataset(**FLARE_CT)
    expected = expected_configuration(getattr(flare, name), "3d_fullres", {})
    plans, _ = plan_experiment_dataset(22, getattr(flare, name))
    planned = plans["configurations"]["3d_fullres"]
    assert expected is not None
    assert {key: expected[key] for key in ("patch_size", "batch_size")} == {
        key: [int(edge) for edge in planned[key]] if key == "patch_size" else planned[key]
        for key in ("patch_size", "batch_size")
    }
    for key in ("network_class_name", "arch_kwargs"):
        assert json.loads(json.dumps(expected["architecture"][key])) == json.loads(
            json.dumps(planned["architecture"][key])
        )


def test_the_noisy_student_has_about_the_papers_63_million_parameters(dataset: MakeDataset) -> None:
    dataset(**FLARE_CT)
    plans, _ = plan_experiment_dataset(22, flare.nnUNetPlannerFlareNoisyStudent)
    assert parameters_of(plans["configurations"]["3d_fullres"]) == pytest.approx(63.07e6, rel=0.15)


def test_small_data_gets_a_small_patch(dataset: MakeDataset) -> None:
    dataset(**SMALL_CT)
    for planner in (flare.nnUNetPlannerFlare, flare.nnUNetPlannerFlareSmall):
        plans, _ = plan_experiment_dataset(22, planner)
        configuration = plans["configurations"]["3d_fullres"]
        strides = np.prod(configuration["architecture"]["arch_kwargs"]["strides"], axis=0)
        assert configuration["patch_size"] == [20, 64, 56], "the median 20 x 60 x 50, rounded up to what 4, 8, 8 divide"
        assert strides.tolist() == [4, 8, 8]
        assert configuration["batch_dice"] is False


def test_the_tiny_planner_keeps_the_datas_spacing_and_at_most_16_features(dataset: MakeDataset) -> None:
    dataset(shape=(48, 96, 96), spacing=(5.0, 3.0, 3.0))
    plans, identifier = plan_experiment_dataset(22, flare.nnUNetPlannerFlareTiny)
    configuration = plans["configurations"]["3d_fullres"]
    assert identifier == "nnUNetPlansFlareTiny"
    assert configuration["spacing"] == [5.0, 3.0, 3.0]
    assert configuration["patch_size"] == [32, 64, 64]
    for each in plans["configurations"].values():
        features = each["architecture"]["arch_kwargs"]["features_per_stage"]
        assert features[0] == 4
        assert max(features) == 16


def test_planning_works_without_augmentation_workers(dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's planner stops at nnUNet_n_proc_DA=0, which is a common setting for training on a CPU."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    dataset(**SMALL_CT)
    plan_experiment_dataset(22, flare.nnUNetPlannerFlareTiny)


def test_a_given_spacing_and_plans_name_win(dataset: MakeDataset) -> None:
    dataset(**FLARE_CT)
    plans, identifier = plan_experiment_dataset(
        22, flare.nnUNetPlannerFlareTiny, overwrite_target_spacing=(6, 2, 2), overwrite_plans_name="mine"
    )
    assert identifier == "mine"
    assert plans["configurations"]["3d_fullres"]["spacing"] == [6.0, 2.0, 2.0]


def test_plan_dataset_writes_the_overridden_plan(dataset: MakeDataset) -> None:
    raw = dataset(shape=(32, 48, 64), spacing=(8.5, 5.0, 5.2))
    plans, identifier = plan_dataset(
        22, flare.nnUNetPlannerFlareTiny, patch_size=(32, 48, 64), base_features=8, stages=4, convs_per_stage=1
    )
    written = json.loads(Path(str(nnUNet_preprocessed), raw.name, f"{identifier}.json").read_text())
    assert written == json.loads(json.dumps(plans))
    assert written["configurations"]["3d_fullres"]["patch_size"] == [32, 48, 64]
    assert written["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][-1] == 64
    with pytest.raises(InputError, match=r"3d_lowres.*it plans 2d, 3d_fullres"):
        plan_dataset(22, flare.nnUNetPlannerFlareTiny, configuration="3d_lowres")


def test_the_case_table_is_carried_to_the_preprocessed_folder(dataset: MakeDataset) -> None:
    raw = dataset(**SMALL_CT)
    table = {"version": 1, "cases": {"case_0": {"role": "pseudo"}}}
    (raw / "flare_cases.json").write_text(json.dumps(table))
    plan_experiment_dataset(22, flare.nnUNetPlannerFlareTiny)
    copy = Path(str(nnUNet_preprocessed), raw.name, "flare_cases.json")
    assert json.loads(copy.read_text()) == table
    copy.write_text(json.dumps({"version": 1, "cases": {}}))
    with pytest.raises(InputError, match="differ"):
        plan_experiment_dataset(22, flare.nnUNetPlannerFlareTiny)


WITHOUT_US = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnunet_flare":
            raise ModuleNotFoundError("blocked: " + name)

for module in [name for name in sys.modules if name.split(".")[0] == "nnunet_flare"]:
    del sys.modules[module]
sys.meta_path.insert(0, Blocker())

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

plans = PlansManager(sys.argv[1])
configuration = plans.get_configuration("3d_fullres")
network = nnUNetTrainer.build_network_architecture(plans, configuration, 1, 14, True)
configuration.preprocessor_class
configuration.resampling_fn_data, configuration.resampling_fn_seg, configuration.resampling_fn_probabilities
plans.image_reader_writer_class
print(type(network).__name__)
"""


def test_written_plans_open_where_this_package_is_not_installed(dataset: MakeDataset, tmp_path: Path) -> None:
    raw = dataset(**FLARE_CT)
    _, identifier = plan_experiment_dataset(22, flare.nnUNetPlannerFlareNoisyStudent)
    plans_file = Path(str(nnUNet_preprocessed), raw.name, f"{identifier}.json")
    assert "nnunet_flare" not in plans_file.read_text()
    script = tmp_path / "without_us.py"
    script.write_text(WITHOUT_US)
    result = subprocess.run(
        [sys.executable, str(script), str(plans_file)],
        env={**os.environ, "NNUNET_FLARE_PLUGIN": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-1] == "ResidualEncoderUNet"


@pytest.mark.parametrize("name", [*PAPERS, "nnUNetPlannerFlareTiny"])
@pytest.mark.parametrize("pixel", [1.0, 0.3])
def test_pictures_are_planned_as_stock_plans_them(dataset: MakeDataset, name: str, pixel: float) -> None:
    """No volume is made of them, although their readers say that one plane lies 999 pixels from the next."""
    dataset(shape=(1, 256, 192), spacing=(999 * pixel, pixel, pixel))
    expected, _ = plan_experiment_dataset(22)
    plans, _ = plan_experiment_dataset(22, plugin.resolve(name))
    assert list(plans["configurations"]) == list(expected["configurations"]) == ["2d"]
    found, stock = plans["configurations"]["2d"], expected["configurations"]["2d"]
    for key in ("spacing", "median_image_size_in_voxels"):
        assert list(found[key]) == list(stock[key])
    if name in ("nnUNetPlannerFlare", "nnUNetPlannerFlareBig"):  # of two convolutions, or three
        features = [each["architecture"]["arch_kwargs"]["features_per_stage"] for each in (found, stock)]
        assert features[0] == features[1]
    assert PlansManager(plans).get_configuration("2d").patch_size is not None


@pytest.mark.parametrize("name", ["nnUNetPlannerFlareCoarse", "nnUNetPlannerFlareFine"])
def test_pictures_are_refused_by_the_planners_of_whole_volumes(dataset: MakeDataset, name: str) -> None:
    dataset(shape=(1, 256, 192), spacing=(999.0, 1.0, 1.0))
    with pytest.raises(InputError, match=f"{name}: Dataset022_Abdomen has pictures of one plane"):
        plan_experiment_dataset(22, plugin.resolve(name))
