"""flare-postprocess as people call it: files, geometry, exit codes, refusals."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from nnunet_flare.cli.postprocess import main
from nnunet_flare.images import Volume, geometry_difference, read_labels, write_labels, write_volume
from nnunet_flare.postprocessing.pipeline import load_pipeline

GRID = {"spacing_mm": (2.5, 0.8, 0.7), "origin": (5.0, -3.0, 40.0), "direction": (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)}


def scan(stray=True):
    labels = np.zeros((10, 12, 14), dtype=np.uint8)
    labels[2:8, 2:8, 2:8] = 1
    labels[9, 11, 13] = 1 if stray else 0
    return Volume(labels, **GRID)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        write_labels(tmp_path / "in" / f"{name}.nii.gz", scan(stray=name == "a").array, scan())
    return tmp_path


def call(folder, *words):
    return main([word.format(d=folder) for word in words])


def test_label_maps_are_cleaned_with_their_geometry_kept(folder, capsys):
    assert call(folder, "-i", "{d}/in", "-o", "{d}/out", "--pipeline", "largest", "-np", "1") == 0
    found = read_labels(folder / "out/a.nii.gz")
    assert geometry_difference(found, scan()) is None and found.array.dtype == np.uint8
    np.testing.assert_array_equal(found.array, scan(stray=False).array)
    printed = capsys.readouterr().out
    assert "a: 0.00 mL erased" in printed and "2 cases" in printed and "1 of them changed" in printed


def test_two_workers_do_the_same(folder):
    assert call(folder, "-i", "{d}/in", "-o", "{d}/one", "--pipeline", "largest", "-np", "1") == 0
    assert call(folder, "-i", "{d}/in", "-o", "{d}/two", "--pipeline", "largest", "-np", "2") == 0
    for name in ("a", "b"):
        ours, theirs = (read_labels(folder / run / f"{name}.nii.gz").array for run in ("one", "two"))
        np.testing.assert_array_equal(ours, theirs)


def test_a_single_file_is_a_folder_of_one(folder):
    assert call(folder, "-i", "{d}/in/a.nii.gz", "-o", "{d}/out", "--pipeline", "largest") == 0
    assert [path.name for path in (folder / "out").iterdir()] == ["a.nii.gz"]


def test_the_image_gives_back_a_lost_header(folder):
    bare = Volume(scan().array, (1.0, 1.0, 1.0))
    write_labels(folder / "bare/a.nii.gz", bare.array, bare)
    write_volume(folder / "images/a_0000.nii.gz", scan().with_array(scan().array.astype(np.int16) * 100))
    words = ["-i", "{d}/bare", "-o", "{d}/out", "--pipeline", "largest", "--image", "{d}/images"]
    assert call(folder, *words) == 0
    assert geometry_difference(read_labels(folder / "out/a.nii.gz"), scan()) is None


def test_an_image_that_is_missing_or_of_another_shape_sets_the_case_aside(folder, capsys):
    write_volume(folder / "images/a_0000.nii.gz", Volume(np.zeros((3, 4, 5), np.int16), (1.0, 1.0, 1.0)))
    words = ["-i", "{d}/in", "-o", "{d}/out", "--pipeline", "largest", "--image", "{d}/images", "-np", "1"]
    assert call(folder, *words) == 1
    error = capsys.readouterr().err
    assert "(3, 4, 5)" in error and "no image b_0000.nii.gz" in error


def test_bad_cases_are_named_with_the_place_and_the_others_are_written(folder, capsys):
    labels = scan().array.copy()
    labels[0, 0, 0] = 14
    write_labels(folder / "in/lesion.nii.gz", labels, scan())
    (folder / "in/broken.nii.gz").write_bytes(b"")
    assert call(folder, "-i", "{d}/in", "-o", "{d}/out", "-np", "1") == 1
    error = capsys.readouterr().err
    assert "lesion" in error and "[14]" in error and "broken.nii.gz" in error
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_lesions_pass_with_their_label_set(folder):
    labels = scan().array.copy()
    labels[4, 4, 4] = 14
    write_labels(folder / "in/a.nii.gz", labels, scan())
    assert (
        call(folder, "-i", "{d}/in", "-o", "{d}/out", "--pipeline", "largest", "--labels", "flare23", "-np", "1") == 0
    )
    assert (read_labels(folder / "out/a.nii.gz").array == 14).sum() == 1


def test_a_label_map_without_spacing_is_refused_with_its_file(folder, capsys):
    path = folder / "in/a.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:92] = bytes(12)  # pixdim[1..3] of the NIfTI header
    path.write_bytes(gzip.compress(content))
    assert call(folder, "-i", "{d}/in", "-o", "{d}/out", "-np", "1") == 1
    assert "a.nii.gz: spacing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["-i", "{d}/none", "-o", "{d}/out"], "no such file or folder"),
        (["-i", "{d}/in", "-o", "{d}/in"], "choose another"),
        (["-i", "{d}/in", "-o", "{d}/out", "--pipeline", "flare99"], "flare99"),
        (["-i", "{d}/in", "-o", "{d}/out", "--labels", "flare99"], "flare99"),
        (["-i", "{d}/in", "-o", "{d}/out", "--image", "{d}/none"], "--image"),
        (["learn", "-i", "{d}/none", "-o", "{d}/p.yaml"], "no such"),
        (["tune", "-i", "{d}/in", "-ref", "{d}/none", "-o", "{d}/p.yaml"], "no such folder"),
        (["tune", "-i", "{d}/in", "-ref", "{d}/in", "-o", "{d}/p.yaml", "--volumes", "largest"], "learn"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(folder, capsys, words, complaint):
    assert call(folder, *words) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (folder / "p.yaml").exists() and not (folder / "out").exists()


def test_a_wrong_pipeline_file_is_refused_with_the_place_before_anything_is_written(folder, capsys):
    (folder / "p.yaml").write_text("steps: [{operation: keep_largest, organs: [livr]}]")
    assert call(folder, "-i", "{d}/in", "-o", "{d}/out", "--pipeline", "{d}/p.yaml") == 2
    assert "steps.0.organs" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_learn_then_apply(folder, capsys):
    assert call(folder, "learn", "-i", "{d}/in", "-o", "{d}/p.yaml", "--base", "largest", "-np", "1") == 0
    assert "liver" in capsys.readouterr().out
    tiny = scan().with_array(np.zeros_like(scan().array))
    tiny.array[2:4, 2:4, 2:4] = 1
    write_labels(folder / "new/a.nii.gz", tiny.array, tiny)
    assert call(folder, "-i", "{d}/new", "-o", "{d}/out", "--pipeline", "{d}/p.yaml") == 0
    assert not read_labels(folder / "out/a.nii.gz").array.any()  # far below half of any liver seen


def test_tune_then_apply(folder, capsys):
    for name in ("a", "b"):
        write_labels(folder / "ref" / f"{name}.nii.gz", scan(stray=False).array, scan())
    assert call(folder, "tune", "-i", "{d}/in", "-ref", "{d}/ref", "-o", "{d}/p.yaml", "-np", "1") == 0
    assert "kept" in capsys.readouterr().out
    assert call(folder, "-i", "{d}/in", "-o", "{d}/out", "--pipeline", "{d}/p.yaml", "-np", "1") == 0
    np.testing.assert_array_equal(read_labels(folder / "out/a.nii.gz").array, scan(stray=False).array)


@pytest.mark.parametrize("labels", [{"spleen": 1, "liver": 2}, {"organs": [1, 2], "liver": 2}])
def test_what_was_learned_of_a_dataset_applies_to_its_labels_also_without_naming_it_again(tmp_path, capsys, labels):
    """FLARE22's numbers of the same organs are others."""
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **labels}}))
    maps = np.zeros((10, 12, 14), dtype=np.uint8)
    maps[2:8, 2:4, 2:4], maps[2:8, 5:11, 5:13] = 1, 2
    write_labels(tmp_path / "in/a.nii.gz", maps, Volume(maps, (2.5, 0.8, 0.7)))
    base = f"labels: {tmp_path}/dataset.json\nsteps: [{{operation: fill_holes}}]"
    (tmp_path / "base.yaml").write_text(base)
    tune = ["tune", "-i", "{d}/in", "-ref", "{d}/in", "-o", "{d}/t.yaml", "--labels", "{d}/dataset.json", "-np", "1"]
    assert call(tmp_path, "learn", "-i", "{d}/in", "-o", "{d}/l.yaml", "--base", "{d}/base.yaml", "-np", "1") == 0
    assert call(tmp_path, *tune) == 0
    (tmp_path / "dataset.json").rename(tmp_path / "moved.json")
    for pipeline in ("l", "t"):
        words = ["-i", "{d}/in", "-o", f"{{d}}/{pipeline}", "--pipeline", f"{{d}}/{pipeline}.yaml", "-np", "1"]
        assert call(tmp_path, *words) == 0
        np.testing.assert_array_equal(read_labels(tmp_path / pipeline / "a.nii.gz").array, maps)
        assert load_pipeline(tmp_path / f"{pipeline}.yaml").labels.structures.keys() == labels.keys()
    assert "0 of them changed" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from nnunet_flare.cli.postprocess import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'torch', 'scipy', 'pydantic') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "--pipeline" in done.stdout
