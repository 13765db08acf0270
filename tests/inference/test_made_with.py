"""``--continue_prediction`` keeps what the same command would write again, and nothing of another model or options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch

from nnunet_flare.cli import export, predict
from nnunet_flare.images import read_volume, write_labels, write_volume
from nnunet_flare.inference import folder


@pytest.fixture
def model(tmp_path) -> Path:
    """Two folds, and a coarse model beside them."""
    models.write_model(tmp_path / "m" / "T__P__3d_lowres", plan=models.plans(spacing=(8.0, 4.0, 4.0)), seed=3)
    return models.write_model(tmp_path / "m" / "T__P__3d_fullres", folds=(0, 1))


@pytest.fixture
def images(tmp_path) -> Path:
    for seed, name in enumerate("ab"):
        write_volume(tmp_path / "images" / f"{name}_0000.nii.gz", scans.blobs((10, 36, 40), seed=seed))
    return tmp_path / "images"


def run(images: Path, out: Path, model: Path, *words: object, backend: str = "torch") -> int:
    given = ("-i", images, "-o", out, "-m", model, *words, "--backend", backend)
    return predict.main([str(word) for word in given])


def in_place(out: Path) -> dict[str, np.ndarray]:
    return {path.name: read_volume(path).array for path in sorted(out.glob("*.nii.gz"))}


def other_weights(model: Path) -> None:
    path = model / "fold_1" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["network_weights"] = {key: -value for key, value in content["network_weights"].items()}
    torch.save(content, path)


def other_plans(model: Path) -> None:
    path = model / "plans.json"
    path.write_text(path.read_text().replace('"percentile_99_5": 300.0', '"percentile_99_5": 500.0'))


def coarse_trained_again(model: Path) -> None:
    models.write_model(model.with_name("T__P__3d_lowres"), plan=models.plans(spacing=(8.0, 4.0, 4.0)), seed=4)


FIRST = ("--roi", "3d_lowres", "-step_size", 0.9)
OTHERS = {
    "weights of a fold": (other_weights, FIRST),
    "plans": (other_plans, FIRST),
    "the coarse model": (coarse_trained_again, FIRST),
    "fewer folds": (None, (*FIRST, "-f", 1)),
    "step": (None, (*FIRST, "-step_size", 0.5)),
    "mirroring": (None, (*FIRST, "--tta", "mirror")),
    "windows": (None, (*FIRST, "--windows", "skip-empty")),
    "no region of interest": (None, ()),
    "its rule": (None, (*FIRST, "--roi_rule", "fosun")),
    "its margin": (None, (*FIRST, "--roi_margin", 5)),
    "post-processing": (None, (*FIRST, "--postprocess", "keep.yaml")),
}


@pytest.fixture
def mark(images, tmp_path, monkeypatch) -> Callable[..., str]:
    """The mark of what a command would write."""
    (tmp_path / "keep.yaml").write_text("steps: [{operation: keep_largest, organs: [liver]}]\n")
    monkeypatch.chdir(tmp_path)
    marks = []

    def only_open(*_: object, mark: Callable, open_segmenter: Callable, **__: object) -> folder.PredictionReport:
        marks.append(mark(open_segmenter()))
        return folder.PredictionReport()

    def found(model: Path, *words: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(folder, "predict_cases", only_open)
            assert run(images, tmp_path / "none", model, *words) == 0
        return marks.pop()

    return found


@pytest.mark.parametrize("what", OTHERS)
def test_another_model_or_other_options_have_another_mark(model, mark, what):
    change, words = OTHERS[what]
    before = mark(model, *FIRST)
    assert before == mark(model, *FIRST) and before.isascii() and len(before) < 80
    if change is not None:
        change(model)
    assert mark(model, *words) != before


def test_weights_that_were_saved_without_checksums_are_told_apart(model, mark):
    """PyTorch then writes zeros where the directory of the file has checksums."""
    torch.serialization.set_crc32_options(False)
    try:
        marks = []
        for _ in "ab":
            other_weights(model)
            marks.append(mark(model))
    finally:
        torch.serialization.set_crc32_options(True)
    assert marks[0] != marks[1]


def test_label_maps_by_another_model_are_made_again(model, images, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    assert run(images / "a_0000.nii.gz", out, model) == 0
    before = (out / "a.nii.gz").stat().st_mtime_ns
    other_weights(model)
    assert run(images / "b_0000.nii.gz", out, model) == 0
    caplog.clear()
    assert run(images, out, model, "--continue_prediction") == 0
    assert "a: its label map was made with another model or other options; it is predicted again" in caplog.text
    assert "b: " not in caplog.text
    assert "1 written, 1 already there" in capsys.readouterr().out
    assert (out / "a.nii.gz").stat().st_mtime_ns != before
    assert run(images, tmp_path / "anew", model) == 0
    for name, labels in in_place(tmp_path / "anew").items():
        np.testing.assert_array_equal(in_place(out)[name], labels)


def test_what_changes_no_label_map_and_what_has_no_mark_is_kept(model, images, tmp_path, capsys):
    """The model may be copied, computed otherwise or need less memory; other programs' label maps name no model."""
    out = tmp_path / "out"
    assert run(images / "a_0000.nii.gz", out, model) == 0
    scan = read_volume(images / "b_0000.nii.gz")
    write_labels(out / "b.nii.gz", np.zeros(scan.array.shape, np.uint8), scan)
    times = [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    copy = tmp_path / "copy"
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        target = copy / file.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    more = ("--precision", "bf16", "-device", "cpu", "--max_memory", 4, "-f", 0, 1)
    assert run(images, out, copy, *more, "--continue_prediction") == 0
    assert "0 written, 2 already there" in capsys.readouterr().out
    assert times == [path.stat().st_mtime_ns for path in sorted(out.iterdir())]


def test_further_outputs_of_another_model_are_made_again(model, images, tmp_path, caplog, capsys):
    """They look whole, and their label maps were made again without them."""
    further = ("--preview", "--save_probabilities", "--save_members", "--uncertainty")
    out, anew = tmp_path / "out", tmp_path / "anew"
    assert run(images, out, model, *further) == 0
    other_weights(model)
    assert run(images / "a_0000.nii.gz", out, model, "--continue_prediction") == 0
    caplog.clear()
    assert run(images / "a_0000.nii.gz", out, model, "--continue_prediction", *further) == 0
    assert "a: what lies beside its label map is of another prediction; it is predicted again" in caplog.text
    assert run(images / "a_0000.nii.gz", anew, model, *further) == 0
    for name in ("a.npz", "a.png"):
        assert (out / name).read_bytes() == (anew / name).read_bytes()
    for name in ("a.nii.gz", "uncertainty/a.nii.gz", "members/0/a.nii.gz", "members/1/a.nii.gz"):
        np.testing.assert_array_equal(read_volume(out / name).array, read_volume(anew / name).array)
    capsys.readouterr()
    for some in (further, further[1:3], ()):
        assert run(images / "a_0000.nii.gz", out, model, "--continue_prediction", *some) == 0
        assert "0 written, 1 already there" in capsys.readouterr().out


def test_first_stages_of_cascades_count(images, tmp_path, capsys):
    model = models.write_cascade(tmp_path / "models")
    first = model.with_name(model.name.replace(models.CASCADE, "3d_lowres"))
    for said in ("2 written, 0 already there", "0 written, 2 already there"):
        assert run(images, tmp_path / "out", model, "--continue_prediction") == 0
        assert said in capsys.readouterr().out
    other_weights(first)
    assert run(images, tmp_path / "out", model, "--continue_prediction") == 0
    assert "2 written, 0 already there" in capsys.readouterr().out


def test_exported_models_and_converted_networks_know_their_label_maps(model, images, tmp_path, capsys, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setenv("NNUNET_FLARE_CACHE", str(tmp_path / "cache"))
    for said in ("2 written, 0 already there", "0 written, 2 already there"):  # the second opens it from the cache
        assert run(images, tmp_path / "out", model, "-f", 0, "--continue_prediction", backend="auto") == 0
        assert said in capsys.readouterr().out
    for step in ("0.9", "0.5"):
        words = ["-m", str(model), "-o", str(tmp_path / step), "-step_size", step, "-f", "0"]
        assert export.main(words) == 0
        for said in ("2 written, 0 already there", "0 written, 2 already there"):
            assert run(images, tmp_path / "exported", tmp_path / step, "--continue_prediction", backend="auto") == 0
            assert said in capsys.readouterr().out
