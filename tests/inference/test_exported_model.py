"""``flare-export``: one folder that predicts what the trained model predicts, without PyTorch and nnU-Net."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans

from nnunet_flare.cli import export, predict
from nnunet_flare.errors import InputError
from nnunet_flare.images import read_labels, write_volume
from nnunet_flare.inference import export_model, exported, runtimes
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.settings import PredictionSettings

openvino = pytest.importorskip("openvino")

EXACT = ("--precision", "fp32")


def run(command, *words: object) -> int:
    return command.main([str(word) for word in words])


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Trained models and their exports, made once."""
    folder = tmp_path_factory.mktemp("exported")
    models.write_kinds(folder)
    models.write_cascade(folder / "of_regions", labels=models.REGIONS, transpose=(2, 0, 1), spacing=(2.0, 4.0, 2.0))
    models.write_model(folder / "as_it_is", plan=models.plans(resampling="no_resampling_hack"))
    old = models.plans()
    old["foreground_intensity_properties_by_modality"] = old.pop("foreground_intensity_properties_per_channel")
    models.write_model(folder / "of_old_plans", plan=old)
    write_volume(folder / "images" / "a_0000.nii.gz", scans.blobs((20, 50, 60), pad=2))
    (folder / "clean.yaml").write_text("steps:\n  - operation: keep_largest\n    organs: [liver]\n")
    return folder


@pytest.fixture(scope="module")
def whole(room) -> Path:
    """Two folds in single precision, as nobody else changes it."""
    assert run(export, "-m", room / "T__nnUNetPlans__3d_fullres", "-o", room / "whole", *EXACT) == 0
    return room / "whole"


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def labels(room: Path, out: Path, model: Path, *words: object) -> np.ndarray:
    assert run(predict, "-i", room / "images", "-o", out, "-m", model, *words) == 0
    return read_labels(out / "a.nii.gz").array


ROI = ("--roi", "3d_lowres", "--roi_rule", "union", "--roi_margin", 6)

CASCADE = f"cascade/nnUNetTrainer__nnUNetPlans__{models.CASCADE}"

SAME = {
    "one fold": ("T__nnUNetPlans__3d_fullres", ("-f", 1)),
    "several folds": ("T__nnUNetPlans__3d_fullres", ()),
    "mirroring": ("T__nnUNetPlans__3d_fullres", ("-f", 0, "--tta", "mirror")),
    "crop-rotate and small steps": ("T__nnUNetPlans__3d_fullres", ("-f", 0, "--tta", "crop-rotate", "-step_size", 0.5)),
    "coarse to fine": ("T__nnUNetPlans__3d_fullres", ("-f", 0, *ROI)),
    "post-processing": ("T__nnUNetPlans__3d_fullres", ("-f", 0, "--postprocess", "CLEAN")),
    "regions": ("regions", ()),
    "two dimensions": ("flat", ()),
    "turned axes and masked values": ("turned", ()),
    "no resampling": ("as_it_is", ()),
    "plans of the first nnU-Net 2": ("of_old_plans", ()),
    "a cascade of regions with turned axes": (CASCADE.replace("cascade/", "of_regions/", 1), ()),
    "a cascade behind a coarse model": (CASCADE, ("-f", 1, *ROI, "--tta", "mirror", "--postprocess", "CLEAN")),
}


@pytest.mark.parametrize("what", SAME)
def test_an_exported_model_predicts_what_the_trained_one_predicts_with_pytorch(room, tmp_path, what):
    """What is said at export is what prediction does, where nothing else is said."""
    model, words = SAME[what]
    words = tuple(room / "clean.yaml" if word == "CLEAN" else word for word in words)
    assert run(export, "-m", room / model, "-o", tmp_path / "out", *EXACT, *words) == 0
    expected = labels(room, tmp_path / "torch", room / model, *words, *EXACT, "--backend", "torch")
    found = labels(room, tmp_path / "ours", tmp_path / "out")
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() < 1e-4


def test_the_defaults_of_the_export_can_be_switched_off(room, tmp_path):
    words = ("-f", 0, "--tta", "mirror", *ROI, "--postprocess", room / "clean.yaml", "-step_size", 0.5)
    fine = room / "T__nnUNetPlans__3d_fullres"
    assert run(export, "-m", fine, "-o", tmp_path / "out", *EXACT, *words) == 0
    off = ("--roi", "none", "--postprocess", "none", "--tta", "none", "-step_size", 0.9)
    plain = labels(room, tmp_path / "plain", fine, "-f", 0, *EXACT, "--backend", "torch")
    assert (labels(room, tmp_path / "off", tmp_path / "out", *off) != plain).mean() < 1e-4
    assert (labels(room, tmp_path / "on", tmp_path / "out") != plain).mean() > 1e-3


@pytest.mark.parametrize("model", ["T__nnUNetPlans__3d_fullres", CASCADE], ids=["at the top", "a cascade in folders"])
def test_a_packed_exported_model_opens_too(room, tmp_path, capsys, model):
    """Its coarse model and its first stage, which lie in it in the same form, are not taken for further ones."""
    above = "models/mine/" if model == CASCADE else ""
    assert run(export, "-m", room / model, "-o", tmp_path / "out", *EXACT, "-f", 0, *ROI) == 0
    pack(tmp_path / "out", tmp_path / "model.zip", above)
    expected = labels(room, tmp_path / "a", tmp_path / "out")
    np.testing.assert_array_equal(labels(room, tmp_path / "b", tmp_path / "model.zip"), expected)
    words = ("-i", room / "images", "-o", tmp_path / "c", "-m", tmp_path / "model.zip")
    assert run(predict, *words, "-c", "3d_fullres") == 2
    assert "holds an exported model; leave out -c" in capsys.readouterr().err


def pack(folder: Path, path: Path, *above: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in (file for file in sorted(folder.rglob("*")) if file.is_file()):
            for prefix in above:
                archive.write(file, prefix + file.relative_to(folder).as_posix())


def test_a_zip_file_of_two_exported_models_is_refused(room, whole, tmp_path, capsys):
    pack(whole, tmp_path / "two.zip", "one/", "two/")
    assert run(predict, "-i", room / "images", "-o", tmp_path / "out", "-m", tmp_path / "two.zip") == 2
    assert "holds 2 exported models, one, two; expected one" in capsys.readouterr().err


def test_a_zip_file_of_an_exported_and_a_trained_model_is_refused(room, whole, tmp_path, capsys):
    pack(whole, tmp_path / "both.zip", "light/")
    with zipfile.ZipFile(tmp_path / "both.zip", "a") as archive:
        for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
            archive.write(room / "regions" / name, f"T__P__3d_fullres/{name}")
    assert run(predict, "-i", room / "images", "-o", tmp_path / "out", "-m", tmp_path / "both.zip") == 2
    assert "holds an exported model (light) and a trained one (T__P__3d_fullres)" in capsys.readouterr().err


def test_a_zip_file_that_was_renamed_opens_as_before(room, whole, tmp_path):
    pack(whole, tmp_path / "model.zip", "")
    expected = labels(room, tmp_path / "a", tmp_path / "model.zip")
    (tmp_path / "model.zip").rename(tmp_path / "renamed.zip")
    np.testing.assert_array_equal(labels(room, tmp_path / "b", tmp_path / "renamed.zip"), expected)


def test_what_an_exported_model_cannot_hold_is_one_line(room, tmp_path, capsys):
    alone = shutil.copytree(room / CASCADE, tmp_path / Path(CASCADE).name)
    plan = json.loads((room / CASCADE / "plans.json").read_text())
    plan["configurations"][models.CASCADE]["resampling_fn_seg"] = "resample_torch_fornnunet"
    mine = shutil.copytree(room / "cascade", tmp_path / "mine") / Path(CASCADE).name
    (mine / "plans.json").write_text(json.dumps(plan))
    (tmp_path / "model.zip").write_bytes(b"PK")
    for model, expected in (
        (alone, "needs the first, nnUNetTrainer__nnUNetPlans__3d_lowres, next to it"),
        (mine, "needs the resampling resample_torch_fornnunet of label maps"),
        (tmp_path / "model.zip", "is a file; expected a trained model's folder"),
    ):
        assert run(export, "-m", model, "-o", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("error") == 1
        assert not (tmp_path / "out").exists()


def test_half_weights_are_half_as_large_and_change_hardly_a_voxel(room, whole, tmp_path, caplog):
    fine = room / "T__nnUNetPlans__3d_fullres"
    assert run(export, "-m", fine, "-o", tmp_path / "half") == 0
    sizes = [(folder / "fold_0" / "network.bin").stat().st_size for folder in (tmp_path / "half", whole)]
    assert 0.45 < sizes[0] / sizes[1] < 0.6
    single = labels(room, tmp_path / "a", whole)
    assert (labels(room, tmp_path / "b", tmp_path / "half", *EXACT) != single).mean() < 0.01
    assert "weights were stored in half precision" in caplog.text


def test_the_python_interface_opens_it_too(room, whole):
    from nnunet_flare.inference.predictor import FlarePredictor

    predictor = FlarePredictor.from_model_folder(whole)
    trained = FlarePredictor.from_model_folder(room / "T__nnUNetPlans__3d_fullres", precision="fp32", backend="torch")
    image = room / "images" / "a_0000.nii.gz"
    assert (predictor.predict(image) != trained.predict(image)).mean() < 1e-4


# ------------------------------------------------------------------ without PyTorch

ABSENT = ("torch", "nnunetv2", "batchgenerators", "batchgeneratorsv2", "acvl_utils", "dynamic_network_architectures")

BLOCKED = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Blocked())
from nnunet_flare.cli import predict
code = predict.main(sys.argv[1:])
loaded = {{*{ABSENT!r}, "SimpleITK", "openvino.tools.ovc"}} & set(sys.modules)
assert not loaded, loaded
sys.exit(code)
"""


def subprocess_of(words: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_prediction_imports_neither_pytorch_nor_nnunet_nor_what_converts_networks(room, tmp_path):
    words = (*ROI, "--postprocess", room / "clean.yaml", "--tta", "mirror", "-f", 0)
    fine = room / "T__nnUNetPlans__3d_fullres"
    assert run(export, "-m", fine, "-o", tmp_path / "out", *EXACT, *words) == 0
    expected = labels(room, tmp_path / "here", tmp_path / "out")
    done = subprocess_of(
        [sys.executable, "-c", BLOCKED, "-i", room / "images", "-o", tmp_path / "there", "-m", tmp_path / "out"]
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(read_labels(tmp_path / "there" / "a.nii.gz").array, expected)


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Path:
    """A folder of packages like this environment's, in which those that need PyTorch are not installed."""
    site = tmp_path_factory.mktemp("light")
    for package in Path(np.__file__).parents[1].iterdir():
        name = package.name.lower()
        if not name.startswith((*ABSENT, "nnunet", "__pycache__", "_nnunet")) and package.suffix != ".pth":
            (site / package.name).symlink_to(package)
    package = Path(predict.__file__).parents[1]
    if not (site / "nnunet_flare").exists():
        (site / "nnunet_flare").symlink_to(package)
    return site


LIGHT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import importlib.util
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("nnunetv2") is None
from nnunet_flare.cli import predict
sys.exit(predict.main(sys.argv[1:]))
"""


def test_an_environment_without_them_is_enough(room, whole, light, tmp_path):
    python = [sys.executable, "-I", "-S", "-c", LIGHT, light, "-i", room / "images", "-o", tmp_path / "out", "-m"]
    done = subprocess_of([*python, whole])
    assert done.returncode == 0, done.stderr
    expected = labels(room, tmp_path / "here", whole)
    np.testing.assert_array_equal(read_labels(tmp_path / "out" / "a.nii.gz").array, expected)
    trained = subprocess_of([*python, room / "regions"])
    assert trained.returncode == 2
    assert "needs PyTorch and nnU-Net, which are not installed here" in trained.stderr
    assert len(trained.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------ bad input


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file, and its checksum with it, as somebody else's program might."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    if path.name != exported.CHECKSUMS:
        (path.parent / exported.CHECKSUMS).unlink()
        exported.write_checksums(path.parent)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a network cut off": (lambda f: os.truncate(f / "fold_1" / "network.bin", 100), "fold_1/network.bin was changed"),
    "a network changed": (
        lambda f: (f / "fold_0" / "network.xml").write_text("<net/>"),
        "fold_0/network.xml was changed",
    ),
    "a network not copied": (lambda f: (f / "fold_0" / "network.bin").unlink(), "fold_0/network.bin: No such file"),
    "half copied": (lambda f: shutil.rmtree(f / "fold_1"), "fold_1/network.bin: No such file or directory and 1 more"),
    "no checksums": (lambda f: (f / "checksums.json").unlink(), "checksums.json: no such file"),
    "checksums cut off": (lambda f: os.truncate(f / "checksums.json", 30), "checksums.json: not readable as JSON"),
    "no checksum of a network": (
        lambda f: edit(f / "checksums.json", lambda d: d.pop("fold_0/network.bin")),
        "fold_0/network.bin is not in checksums.json",
    ),
    "a checksum outside": (
        lambda f: edit(f / "checksums.json", lambda d: d.update({"../../etc/passwd": "0"})),
        "which is outside",
    ),
    "no plans": (lambda f: (f / "plans.json").unlink(), "plans.json: no such file"),
    "another spacing": (
        lambda f: (f / "plans.json").write_text((f / "plans.json").read_text().replace("4.0", "4.5", 1)),
        "plans.json was changed",
    ),
    "no manifest": (lambda f: (f / "exported.json").unlink(), "that flare-export wrote, but no exported.json; copy"),
    "no data set": (lambda f: (f / "dataset.json").unlink(), "dataset.json: no such file"),
    "empty manifest": (lambda f: (f / "exported.json").write_text(""), "exported.json: not readable as JSON"),
    "another program's": (
        lambda f: edit(f / "exported.json", lambda d: d.update(kind="something")),
        "kind: found 'something', expected 'exported model of nnunet-flare'",
    ),
    "newer": (lambda f: edit(f / "exported.json", lambda d: d.update(format=99)), "by a newer nnunet-flare (format 99"),
    "a fold that is a path": (
        lambda f: edit(f / "exported.json", lambda d: d["networks"][0].update(fold="../x")),
        "networks[0].fold: found '../x'",
    ),
    "no networks": (lambda f: edit(f / "exported.json", lambda d: d.update(networks=[])), "has no networks"),
    "a strange step size": (lambda f: edit(f / "exported.json", lambda d: d.update(step_size=7)), "step size 7"),
    "plans of another preprocessor": (
        lambda f: edit(
            f / "plans.json",
            lambda d: d["configurations"]["3d_fullres"].update(preprocessor_name="Mine"),
        ),
        "needs the preprocessor Mine",
    ),
    "plans without a patch": (
        lambda f: edit(f / "plans.json", lambda d: d["configurations"]["3d_fullres"].pop("patch_size")),
        "configurations.3d_fullres.patch_size: is missing",
    ),
    "networks of another size": (
        lambda f: edit(f / "plans.json", lambda d: d["configurations"]["3d_fullres"].update(patch_size=[8, 16, 16])),
        "takes windows of",
    ),
    "fewer labels than scores": (
        lambda f: edit(f / "dataset.json", lambda d: d["labels"].pop("spleen")),
        "gives 4 scores",
    ),
    "no network inside": (
        lambda f: ((f / "fold_0" / "network.xml").write_text("<net/>"), edit(f / "exported.json", lambda d: d)),
        "cannot be run by the OpenVINO that is installed here",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_or_foreign_folder_is_refused_in_one_line(room, copy, tmp_path, capsys, what):
    damage, says = BAD[what]
    damage(copy)
    assert run(predict, "-i", room / "images", "-o", tmp_path / "out", "-m", copy) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("flare-predict: error: ") and says in line and str(copy) in line, line
    assert not list(tmp_path.glob("out/*.nii.gz"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-f", "0"], "which always uses all its folds; -f, -chk"),
        (["-chk", "checkpoint_best.pth"], "which always uses all its folds; -f, -chk"),
        (["--trust-checkpoint"], "--trust-checkpoint are for a trained model's folder"),
        (["--backend", "torch"], "leave out --backend torch"),
        (["-device", "cuda"], "leave out -device cuda"),
        (["--roi", "3d_lowres"], "is not a trained model's folder"),
    ],
)
def test_options_of_trained_models_are_refused(room, whole, tmp_path, capsys, words, says):
    assert run(predict, "-i", room / "images", "-o", tmp_path / "out", "-m", whole, *words) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_missing_folder_is_named(room, tmp_path, capsys):
    assert run(predict, "-i", room / "images", "-o", tmp_path / "out", "-m", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_cpu_without_the_models_precision_falls_back_and_says_so(room, tmp_path, monkeypatch, caplog):
    assert run(export, "-m", room / "regions", "-o", tmp_path / "out", "--precision", "bf16") == 0
    for module in (exported, runtimes):
        monkeypatch.setattr(module, "cpu_flags", lambda: frozenset({"avx2"}))
    segmenter = Segmenter.from_model_folder(tmp_path / "out", PredictionSettings())
    assert segmenter._networks.precision == "fp32"
    assert "was exported for bf16, which this CPU lacks; fp32 is used" in caplog.text
    caplog.clear()
    for module in (exported, runtimes):
        monkeypatch.setattr(module, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert Segmenter.from_model_folder(tmp_path / "out", PredictionSettings())._networks.precision == "bf16"
    assert not caplog.text


def test_an_openvino_that_is_missing_or_too_old_is_said(room, whole, tmp_path, monkeypatch, capsys):
    words = ("-i", room / "images", "-o", tmp_path / "out", "-m", whole)
    monkeypatch.setattr(openvino, "__version__", "2023.3.0-1-abc")
    assert run(predict, *words) == 2
    assert "OpenVINO 2023.3 is too old, expected 2024.4 or newer" in capsys.readouterr().err
    monkeypatch.undo()
    with monkeypatch.context() as patched:
        other = types.ModuleType("openvino")  # before 2023, or a folder of that name
        other.__spec__ = ModuleSpec("openvino", None)
        patched.setitem(sys.modules, "openvino", other)
        assert run(predict, *words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "is too old, or something else of that name: pip install -U openvino" in line
    find = runtimes.importlib.util.find_spec
    monkeypatch.setattr(
        runtimes.importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else find(name, *more)
    )
    assert run(predict, *words) == 2
    assert "pip install 'nnunet-flare[openvino]'" in capsys.readouterr().err


# ------------------------------------------------------------------ what cannot be exported


def test_nothing_is_written_onto_what_is_there(room, whole, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, says in (("full", "is not empty"), ("file", "is not replaced")):
        assert run(export, "-m", room / "regions", "-o", tmp_path / out) == 2
        assert says in capsys.readouterr().err
    assert run(export, "-m", whole, "-o", tmp_path / "again") == 2
    assert "is already an exported model" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} - {"flare-cache"} == {"file", "full"}


def test_of_two_exports_into_one_folder_the_first_stays_and_the_second_says_so(room, tmp_path, monkeypatch, capsys):
    def another_is_faster(folder: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "exported.json").write_text("of the other")

    monkeypatch.setattr(export_model, "write_checksums", another_is_faster)
    assert run(export, "-m", room / "regions", "-o", tmp_path / "out", *EXACT) == 2
    assert "another command wrote it in the meantime" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "exported.json").read_text() == "of the other"


def test_models_that_need_other_packages_are_refused(room, tmp_path, capsys):
    plan = models.plans(resampling="resample_torch_fornnunet")
    models.write_model(tmp_path / "model", plan=plan)
    assert run(export, "-m", tmp_path / "model", "-o", tmp_path / "out") == 2
    assert "needs the resampling resample_torch_fornnunet of images" in capsys.readouterr().err
    assert run(export, "-m", room / "regions", "-o", tmp_path / "out", "--license", tmp_path / "none") == 2
    assert run(export, "-m", room / "regions", "-o", tmp_path / "out", "--roi_margin", 3) == 2
    assert not (tmp_path / "out").exists()


def test_a_network_that_computes_something_else_after_conversion_is_not_written(room, tmp_path, monkeypatch, capsys):
    from nnunet_flare.inference import export_model

    call = export_model.OpenVinoRuntime.__call__
    monkeypatch.setattr(export_model.OpenVinoRuntime, "__call__", lambda self, window: call(self, window)[::-1].copy())
    assert run(export, "-m", room / "regions", "-o", tmp_path / "out") == 2
    assert "computes different scores than PyTorch" in capsys.readouterr().err
    assert not {path.name for path in tmp_path.iterdir()} - {"flare-cache"}


def test_the_folder_says_what_it_is(room, tmp_path):
    (tmp_path / "terms").write_text("Ask Anna.")
    words = ("-o", tmp_path / "out", "--license", tmp_path / "terms")
    assert run(export, "-m", room / "regions", *words) == 0
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Ask Anna."
    assert "flare-predict -i SCANS -o OUT -m THIS_FOLDER" in (tmp_path / "out" / "README.md").read_text()
    manifest = json.loads((tmp_path / "out" / "exported.json").read_text())
    assert {"openvino", "torch", "nnunetv2"} <= set(manifest["made_with"])
    assert str(room) not in (tmp_path / "out" / "exported.json").read_text()


def test_onnx_is_written_beside_and_computes_what_pytorch_computes(room, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: export)")
    pytest.importorskip("onnx", reason="onnx is not installed (extra: export)")
    from nnunet_flare.inference.members import Member
    from nnunet_flare.inference.model import open_model

    assert run(export, "-m", room / "regions", "-o", tmp_path / "out", "--format", "onnx") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "fold_0" / "network.onnx"))
    window = np.random.default_rng(5).normal(size=(1, 1, 8, 32, 32)).astype(np.float32)
    network = open_model(Member(room / "regions", 0)).network()
    import torch

    with torch.inference_mode():
        expected = network(torch.from_numpy(window)).numpy()
    np.testing.assert_allclose(session.run(None, {"window": window})[0], expected, atol=1e-3)


def test_onnx_that_is_not_installed_is_said(room, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(export, "-m", room / "regions", "-o", tmp_path / "out", "--format", "onnx") == 2
    assert "--format onnx needs onnx: pip install 'nnunet-flare[export]'" in capsys.readouterr().err


def test_a_damaged_coarse_model_is_noticed(room, tmp_path):
    fine = room / "T__nnUNetPlans__3d_fullres"
    assert run(export, "-m", fine, "-f", 0, "-o", tmp_path / "out", *ROI) == 0
    os.truncate(tmp_path / "out" / "coarse" / "fold_0" / "network.bin", 10)
    with pytest.raises(InputError, match=r"coarse/fold_0/network.bin was changed"):
        exported.Exported.read(tmp_path / "out").check()


# ------------------------------------------------------------------ cascades


@pytest.fixture(scope="module")
def cascade(room) -> Path:
    """Both stages in one folder."""
    assert run(export, "-m", room / CASCADE, "-f", 0, "-o", room / "cascade_whole", *EXACT) == 0
    return room / "cascade_whole"


def test_an_exported_cascade_in_an_environment_without_pytorch(room, cascade, light, tmp_path):
    python = [sys.executable, "-I", "-S", "-c", LIGHT, light, "-i", room / "images", "-o", tmp_path / "out", "-m"]
    done = subprocess_of([*python, cascade])
    assert done.returncode == 0, done.stderr
    found = read_labels(tmp_path / "out" / "a.nii.gz").array
    expected = labels(room, tmp_path / "torch", room / CASCADE, "-f", 0, *EXACT, "--backend", "torch")
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() < 1e-4


def test_another_first_stage_may_be_given(room, cascade, tmp_path):
    """At export and at prediction; a trained one too, where PyTorch is there."""
    other = models.write_cascade(tmp_path / "other", spacing=(5.0, 2.0, 2.0))
    first = other.with_name(other.name.replace(models.CASCADE, "3d_lowres"))
    words = ("-f", 0, "--prev_stage", first)
    expected = labels(room, tmp_path / "a", room / CASCADE, *words, *EXACT, "--backend", "torch")
    assert (labels(room, tmp_path / "b", cascade) != expected).mean() > 1e-3
    assert run(export, "-m", room / CASCADE, "-o", tmp_path / "with", *EXACT, *words) == 0
    assert (labels(room, tmp_path / "c", tmp_path / "with") != expected).mean() < 1e-4
    for given in (first, tmp_path / "with" / "first_stage"):
        found = labels(room, tmp_path / f"of {given.name}", cascade, *EXACT, "--prev_stage", given)
        assert (found != expected).mean() < 1e-4


LACKING: dict[str, tuple[Callable[[Path], object], str]] = {
    "no first stage": (lambda f: shutil.rmtree(f / "first_stage"), "the exported model is damaged (first_stage/"),
    "no first stage, and checksums that do not know it": (
        lambda f: (shutil.rmtree(f / "first_stage"), edit(f / "exported.json", lambda d: d)),
        "holds the second stage of a cascade, but not the first (first_stage/exported.json)",
    ),
    "a network of the first stage cut off": (
        lambda f: os.truncate(f / "first_stage" / "fold_1" / "network.bin", 10),
        "first_stage/fold_1/network.bin was changed",
    ),
    "a network of the second stage not copied": (
        lambda f: (f / "fold_0" / "network.bin").unlink(),
        "fold_0/network.bin: No such file or directory",
    ),
    "a second stage that is the first too": (
        lambda f: (
            shutil.rmtree(f / "first_stage"),
            shutil.copytree(f, f.parent / "again"),
            shutil.move(f.parent / "again", f / "first_stage"),
            edit(f / "first_stage" / "exported.json", lambda d: d),
            edit(f / "exported.json", lambda d: d),
        ),
        "first_stage: is the second stage of a cascade, which sees the labels of the first one too",
    ),
    "a first stage of other labels": (
        lambda f: (
            edit(f / "first_stage" / "dataset.json", lambda d: d["labels"].update(spleen=7)),
            edit(f / "exported.json", lambda d: d),
        ),
        "their labels differ",
    ),
}


@pytest.mark.parametrize("what", LACKING)
def test_a_cascade_with_a_damaged_or_missing_stage_is_refused_in_one_line(room, cascade, tmp_path, capsys, what):
    damage, says = LACKING[what]
    copy = Path(shutil.copytree(cascade, tmp_path / "copy"))
    damage(copy)
    assert run(predict, "-i", room / "images", "-o", tmp_path / "out", "-m", copy) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("flare-predict: error: ") and says in line and str(copy) in line, line
    assert not list(tmp_path.glob("out/*.nii.gz"))


def test_a_cascade_says_what_it_is_to_older_versions_and_to_readers(cascade, whole):
    """Others keep the form that older versions read."""
    forms = [json.loads((folder / "exported.json").read_text())["format"] for folder in (cascade, whole)]
    assert forms == [2, 1]
    assert "second stage of a cascade; `first_stage/` is the first" in (cascade / "README.md").read_text()


def test_an_exported_second_stage_is_not_taken_for_a_whole_model(room, cascade, whole, tmp_path, capsys):
    from nnunet_flare.inference.predictor import FlarePredictor

    with pytest.raises(InputError, match="second stage of a cascade"):
        FlarePredictor.from_model_folder(cascade)
    words = ("-i", room / "images", "-o", tmp_path / "out", "-m")
    for model, *option in ((whole, "--roi", cascade), (whole, "--prev_stage", cascade)):
        assert run(predict, *words, model, *option) == 2
        assert "second stage of a cascade" in capsys.readouterr().err.strip().splitlines()[-1]
