"""A model's second prediction on a CPU: what was converted before is used, without PyTorch, and gives the same."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch

from nnunet_flare.cli import export, predict
from nnunet_flare.images import read_labels, read_volume, write_volume
from nnunet_flare.inference import model as trained_model
from nnunet_flare.inference import openvino_runtime
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.settings import PredictionSettings

pytest.importorskip("openvino")

EXACT = ("--precision", "fp32")


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Trained models and a scan, made once."""
    folder = tmp_path_factory.mktemp("remembered")
    models.write_kinds(folder)
    write_volume(folder / "images" / "a_0000.nii.gz", scans.blobs((20, 50, 60), pad=2))
    return folder


@pytest.fixture
def model(room, tmp_path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(room / "T__nnUNetPlans__3d_fullres", tmp_path / "model"))


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The checkpoints that were opened with PyTorch."""
    real, names = trained_model.open_model, []

    def recorded(member, **options):
        names.append(str(member))
        return real(member, **options)

    monkeypatch.setattr(trained_model, "open_model", recorded)
    return names


class Broken:
    """An OpenVINO that does not run what it converted."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("no such operation")


def labels(room: Path, out: Path, model: Path, *words: object) -> np.ndarray:
    arguments = ["-i", room / "images", "-o", out, "-m", model, *words]
    assert predict.main([str(word) for word in arguments]) == 0
    return read_labels(out / "a.nii.gz").array


MODELS = {
    "two folds": ("T__nnUNetPlans__3d_fullres", (), 2),
    "mirroring and small steps": ("T__nnUNetPlans__3d_fullres", ("-f", 0, "--tta", "mirror", "-step_size", 0.5), 1),
    "each member": ("T__nnUNetPlans__3d_fullres", ("--save_members",), 2),
    "half precision": ("T__nnUNetPlans__3d_fullres", ("--precision", "bf16"), 2),
    "a coarse model before": ("T__nnUNetPlans__3d_fullres", ("--roi", "3d_lowres", "--roi_rule", "union"), 3),
    "regions": ("regions", (), 1),
    "two dimensions": ("flat", (), 1),
    "turned axes and masked values": ("turned", (), 1),
    "a cascade": (f"cascade/nnUNetTrainer__nnUNetPlans__{models.CASCADE}", (), 4),
}


@pytest.mark.parametrize("what", MODELS)
def test_the_second_prediction_opens_no_checkpoint_and_gives_the_same(room, tmp_path, opened, what):
    name, words, count = MODELS[what]
    words = words if "--precision" in words else (*EXACT, *words)
    first = labels(room, tmp_path / "first", room / name, *words)
    assert len(opened) == count
    second = labels(room, tmp_path / "second", room / name, *words)
    assert len(opened) == count
    np.testing.assert_array_equal(second, first)
    assert len(np.unique(first)) > 1
    for path in (tmp_path / "first").rglob("*.nii.gz"):
        same = tmp_path / "second" / path.relative_to(tmp_path / "first")
        np.testing.assert_array_equal(read_labels(same).array, read_labels(path).array)


def test_plans_of_the_first_nnunet_2_predict_too(room, tmp_path, opened, model):
    """They call the intensities of the channels by another name."""
    plan = models.plans()
    plan["foreground_intensity_properties_by_modality"] = plan.pop("foreground_intensity_properties_per_channel")
    (model / "plans.json").write_text(json.dumps(plan))
    expected = labels(room, tmp_path / "torch", model, "-f", 0, *EXACT, "--backend", "torch")
    count = len(opened)
    for name in ("first", "second"):
        np.testing.assert_array_equal(labels(room, tmp_path / name, model, "-f", 0, *EXACT), expected)
    assert len(opened) == count + 1, "the second prediction opened the checkpoints again"


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_intensities_that_are_read_must_be_numbers(room, tmp_path, model, backend, capsys):
    """Every voxel would be no number, and the whole scan background."""
    plan = models.plans()
    plan["foreground_intensity_properties_per_channel"]["0"]["mean"] = float("nan")
    (model / "plans.json").write_text(json.dumps(plan))
    words = ("-i", str(room / "images"), "-o", str(tmp_path / "out"), "-m", str(model), "--backend", backend)
    assert predict.main([*words, *EXACT]) == 2
    said = capsys.readouterr().err
    assert "plans.json: mean of channel 0 are not finite, and CTNormalization needs them" in said
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("masked", [False, None])
@pytest.mark.parametrize("normalisation", ["ZScoreNormalization", "CTNormalization"])
def test_intensities_that_no_normalisation_reads_may_be_anything(room, tmp_path, model, normalisation, masked):
    """Stock's planner writes NaN and infinity where training scans have such voxels."""
    plan = models.plans(normalisation=normalisation)
    values = plan["foreground_intensity_properties_per_channel"]["0"]
    unread = values if normalisation == "ZScoreNormalization" else ("min", "max", "median")
    values |= dict.fromkeys(unread, float("nan"))
    plan["configurations"]["3d_fullres"]["use_mask_for_norm"] = [masked]
    (model / "plans.json").write_text(json.dumps(plan))
    expected = labels(room, tmp_path / "torch", model, "-f", 0, *EXACT, "--backend", "torch")
    for name in ("first", "second"):
        np.testing.assert_array_equal(labels(room, tmp_path / name, model, "-f", 0, *EXACT), expected)
    assert export.main(["-m", str(model), "-o", str(tmp_path / "exported"), "-f", "0", *EXACT]) == 0
    np.testing.assert_array_equal(labels(room, tmp_path / "third", tmp_path / "exported"), expected)


TORCH_FREE = """
import sys
from nnunet_flare.cli import predict
code = predict.main(sys.argv[1:])
print([name for name in ("torch", "nnunetv2", "SimpleITK", "openvino.tools.ovc") if name in sys.modules])
sys.exit(code)
"""


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_it_imports_neither_pytorch_nor_nnunet_nor_what_converts_networks(room, tmp_path, device):
    labels(room, tmp_path / "first", room / "regions")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    words = ["-i", room / "images", "-o", tmp_path / "second", "-m", room / "regions", "-device", device]
    command = [sys.executable, "-c", TORCH_FREE, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    there = Path("/dev/kfd").exists() or shutil.which("nvidia-smi")  # PyTorch is asked about a GPU that may be there
    expected = ["torch"] if there and device == "auto" else []
    assert done.stdout.splitlines()[-1] == str(expected)


def _other_weights(model: Path) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["network_weights"]["decoder.seg_layers.0.weight"] *= -1
    torch.save(checkpoint, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # what is open keeps the old file


def _other_intensities(model: Path) -> None:
    document = json.loads((model / "plans.json").read_text())
    document["foreground_intensity_properties_per_channel"]["0"]["mean"] += 300
    (model / "plans.json").write_text(json.dumps(document))


def _other_order(model: Path) -> None:
    document = json.loads((model / "dataset.json").read_text())
    document["regions_class_order"] = document["regions_class_order"][::-1]
    (model / "dataset.json").write_text(json.dumps(document))


CHANGES = {
    "weights": ("T__nnUNetPlans__3d_fullres", _other_weights),
    "plans": ("T__nnUNetPlans__3d_fullres", _other_intensities),
    "data set": ("regions", _other_order),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_was_changed_since_is_opened_anew(room, tmp_path, opened, what, monkeypatch):
    name, change = CHANGES[what]
    model = Path(shutil.copytree(room / name, tmp_path / "model"))
    before = labels(room, tmp_path / "before", model, "-f", 0, *EXACT)
    change(model)
    found = labels(room, tmp_path / "after", model, "-f", 0, *EXACT)
    assert len(opened) == 2
    monkeypatch.setenv("NNUNET_FLARE_CACHE", "")
    np.testing.assert_array_equal(found, labels(room, tmp_path / "expected", model, "-f", 0, *EXACT))
    assert (found != before).any()


def test_files_that_were_replaced_while_the_network_was_converted_are_not_taken_for_it(room, tmp_path, model, opened):
    """As by a training that goes on beside a prediction."""
    settings = PredictionSettings(precision="fp32")
    segmenter = Segmenter.from_model_folder(model, settings, folds=[0])
    _other_weights(model)
    segmenter.load()
    found = labels(room, tmp_path / "new", model, "-f", 0, *EXACT)
    assert len(opened) == 2
    old = segmenter.segment(segmenter.prepare([read_volume(room / "images" / "a_0000.nii.gz")]))[0]
    assert (found != old).any()
    np.testing.assert_array_equal(labels(room, tmp_path / "again", model, "-f", 0, *EXACT), found)
    assert len(opened) == 2


@pytest.mark.parametrize("package", ["nnunet-flare", "nnunetv2", "dynamic-network-architectures", "torch", "openvino"])
def test_another_version_of_what_makes_a_network_makes_it_anew(room, tmp_path, model, opened, monkeypatch, package):
    labels(room, tmp_path / "first", model, "-f", 0)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0" if name == package else real(name))
    labels(room, tmp_path / "second", model, "-f", 0)
    assert len(opened) == 2 and len(list((tmp_path / "flare-cache" / "openvino").glob("*/network.xml"))) == 2


def test_pytorch_is_used_where_it_is_asked_for(room, tmp_path, model, opened):
    labels(room, tmp_path / "first", model, "-f", 0)
    labels(room, tmp_path / "second", model, "-f", 0, "--backend", "torch")
    assert len(opened) == 2


def test_another_fold_is_opened(room, tmp_path, model, opened):
    labels(room, tmp_path / "first", model, "-f", 0)
    labels(room, tmp_path / "second", model, "-f", 0, 1)
    assert [Path(name).parent.name for name in opened] == ["fold_0", "fold_0", "fold_1"]


@pytest.mark.parametrize("name", ["network.bin", "network.xml", "model.json"])
def test_a_damaged_entry_is_said_and_made_again(room, tmp_path, model, opened, caplog, name):
    expected = labels(room, tmp_path / "first", model, "-f", 0, *EXACT)
    (entry,) = (tmp_path / "flare-cache").rglob(name)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    np.testing.assert_array_equal(labels(room, tmp_path / "second", model, "-f", 0, *EXACT), expected)
    assert caplog.text.count("is damaged") == 1 and len(opened) == 2
    labels(room, tmp_path / "third", model, "-f", 0, *EXACT)
    assert len(opened) == 2


def test_a_network_that_was_removed_is_converted_again(room, tmp_path, model, opened):
    labels(room, tmp_path / "first", model, "-f", 0)
    shutil.rmtree(tmp_path / "flare-cache" / "openvino")
    labels(room, tmp_path / "second", model, "-f", 0)
    labels(room, tmp_path / "third", model, "-f", 0)
    assert len(opened) == 2


def test_pytorch_takes_over_where_openvino_cannot_run_what_it_converted(room, tmp_path, model, opened, monkeypatch):
    expected = labels(room, tmp_path / "first", model, "-f", 0, *EXACT)
    monkeypatch.setattr(openvino_runtime, "OpenVinoRuntime", Broken)
    found = labels(room, tmp_path / "second", model, "-f", 0, *EXACT)
    assert len(opened) == 2 and (found != expected).mean() < 1e-4


def test_a_checkpoint_that_must_be_trusted_must_be_trusted_again(room, tmp_path, model, opened, capsys):
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    torch.save({**checkpoint, "more": PredictionSettings()}, path)
    labels(room, tmp_path / "first", model, "-f", 0, "--trust-checkpoint")
    assert predict.main([str(w) for w in ("-i", room / "images", "-o", tmp_path / "other", "-m", model, "-f", 0)]) == 2
    assert "--trust-checkpoint" in capsys.readouterr().err
    before = len(opened)
    labels(room, tmp_path / "second", model, "-f", 0, "--trust-checkpoint")
    assert len(opened) == before


NETWORK_OF_A_TEST = """
from dynamic_network_architectures.architectures.unet import PlainConvUNet
class Network(PlainConvUNet):
    def forward(self, window):
        return {factor} * super().forward(window)
"""

TRAINER_OF_A_TEST = """
import functools
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerOfATest(nnUNetTrainer):
    @staticmethod
    @functools.wraps(nnUNetTrainer.build_network_architecture)  # whose signature is looked at
    def build_network_architecture(*given, **more):
        network = nnUNetTrainer.build_network_architecture(*given, **more)
        network.register_forward_hook(lambda module, data, scores: {factor} * scores)
        return network
"""


def other_network(folder: Path) -> Path:
    plan = models.plans(features=(4, 8))
    model = models.write_model(folder, plan=plan)
    plan["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "code_of_a_test.Network"
    (model / "plans.json").write_text(json.dumps(plan))
    return model


def other_trainer(folder: Path) -> Path:
    return models.write_model(folder, plan=models.plans(features=(4, 8)), trainer="nnUNetTrainerOfATest")


@pytest.mark.parametrize(
    ("write", "code"), [(other_network, NETWORK_OF_A_TEST), (other_trainer, TRAINER_OF_A_TEST)], ids=["network", "own"]
)
def test_code_that_changed_between_two_predictions_predicts_as_it_is_now(
    room, tmp_path, opened, monkeypatch, write, code
):
    """With the same weights, which are all that the cache knows of such a network."""
    from nnunetv2.utilities import find_objects

    model = write(tmp_path / "model")
    monkeypatch.syspath_prepend(tmp_path)

    def predicted(factor: int, *words: object) -> np.ndarray:
        (tmp_path / "code_of_a_test.py").write_text(code.format(factor=factor))
        sys.modules.pop("code_of_a_test", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        own = importlib.import_module("code_of_a_test")
        if hasattr(own, "nnUNetTrainerOfATest"):
            monkeypatch.setattr(
                find_objects, "recursive_find_trainer_class_by_name", lambda name: own.nnUNetTrainerOfATest
            )
        return labels(room, tmp_path / f"out{len(opened)}", model, "--trust-checkpoint", *EXACT, *words)

    before, after = predicted(1), predicted(-1)
    assert len(opened) == 2 and (before != after).mean() > 0.5
    assert (after != predicted(-1, "--backend", "torch")).mean() < 1e-4
    monkeypatch.delitem(sys.modules, "code_of_a_test")


def test_another_network_of_a_trainer_with_the_same_weights_is_converted_anew(room, tmp_path, model, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities import find_objects

    class Turned(nnUNetTrainer):
        @staticmethod
        @functools.wraps(nnUNetTrainer.build_network_architecture)  # whose signature is looked at
        def build_network_architecture(*given: object, **more: object) -> torch.nn.Module:
            network = nnUNetTrainer.build_network_architecture(*given, **more)
            network.register_forward_hook(lambda module, data, scores: -scores)
            return network

    first = labels(room, tmp_path / "first", model, "-f", 0, *EXACT)
    monkeypatch.setattr(find_objects, "recursive_find_trainer_class_by_name", lambda name: Turned)
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    torch.save({**checkpoint, "trainer_name": "nnUNetTrainerOfATest"}, path)
    second = labels(room, tmp_path / "second", model, "-f", 0, *EXACT)
    assert (second != first).mean() > 0.5


ONE_CPU = """
import sys
from nnunet_flare.cli import predict
from nnunet_flare.inference import cpus, openvino_runtime

class Broken:
    def __init__(self, *given, **more):
        raise RuntimeError("no such operation")

cpus.usable_cpus = lambda: 1
openvino_runtime.OpenVinoRuntime = Broken
code = predict.main(sys.argv[1:])
print(sys.modules["torch"].get_num_threads())
sys.exit(code)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
@pytest.mark.parametrize("words", [["--backend", "torch"], []], ids=["torch", "openvino that breaks"])
def test_pytorch_keeps_to_the_cpus_of_the_container(room, tmp_path, words):
    labels(room, tmp_path / "first", room / "regions")
    command = ["-i", room / "images", "-o", tmp_path / "second", "-m", room / "regions", "-device", "cpu", *words]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_CPU, *map(str, command)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "1"


def test_a_cache_that_others_may_write_is_no_help_and_no_failure(room, tmp_path, model, opened, caplog):
    caplog.set_level(logging.INFO, "nnunet_flare")
    (tmp_path / "flare-cache").mkdir()
    (tmp_path / "flare-cache" / "models").mkdir(mode=0o777)
    (tmp_path / "flare-cache" / "models").chmod(0o777)
    for number in range(2):
        labels(room, tmp_path / str(number), model, "-f", 0)
    assert len(opened) == 2 and "other users may write" in caplog.text
