"""Files that SimpleITK and nibabel read differently are predicted as stock predicts them with the model's reader."""

from __future__ import annotations

import gzip
import struct
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import model_folders as models
import nibabel
import numpy as np
import pytest
import small_scans as scans
import stock_prediction as stock

from nnunet_flare.cli import predict
from nnunet_flare.images import Volume
from nnunet_flare.images.readers import READERS

AFFINE = np.array([[1.7, 0, 0, -30], [0, 2.3, 0, 12], [0, 0, 4.0, -7], [0, 0, 0, 1]])
MIRROR_X = np.diag([-1.0, 1, 1, 1])


def write(path: Path, sform: np.ndarray, qform: np.ndarray | None = None, scale: tuple[float, float] | None = None):
    volume: Volume = scans.blobs((10, 36, 40))
    image = nibabel.Nifti1Image(volume.array.transpose(2, 1, 0), sform)
    image.header.set_sform(sform, 2)
    image.header.set_qform(sform if qform is None else qform, 1)
    nibabel.save(image, path)
    if scale is not None:
        data = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<2f", data, 112, *scale)
        path.write_bytes(gzip.compress(bytes(data)))


def sheared(path: Path) -> None:
    affine = AFFINE.copy()
    affine[1, 2] = 0.7
    write(path, affine, AFFINE)
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<h", data, 252, 0)  # no qform
    path.write_bytes(gzip.compress(bytes(data)))


FILES = {
    "mirrored": lambda path: write(path, MIRROR_X @ AFFINE, AFFINE),
    "slope 0": lambda path: write(path, AFFINE, scale=(0.0, -1024.0)),
    "sheared": sheared,
    "LAS": lambda path: write(path, MIRROR_X @ AFFINE),
}


def run(model: Path, *words: object) -> int:
    return predict.main([str(w) for w in (*words, "-m", model, "--backend", "torch", "--precision", "fp32")])


def stock_label_map(model: Path, path: Path, target: Path) -> nibabel.Nifti1Image:
    """What stock nnU-Net writes for a scan."""
    predictor = stock.predictor(model, [0])
    reader = predictor.plans_manager.image_reader_writer_class()
    labels = stock.labels(predictor, [path])
    with redirect_stdout(StringIO()):
        reader.write_seg(labels, str(target), reader.read_images([str(path)])[1])
    return nibabel.load(target)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reader", READERS)
def test_the_label_map_is_the_one_that_stock_writes(tmp_path: Path, capsys, reader: str, name: str) -> None:
    model = models.write_model(tmp_path / "model", plan=models.plans(reader=reader))
    path = tmp_path / "a_0000.nii.gz"
    FILES[name](path)
    code = run(model, "-i", path, "-o", tmp_path / "out")
    said = capsys.readouterr().err
    if name == "sheared" and reader.startswith("SimpleITK"):
        assert code == 1 and f"cannot be read by SimpleITK, as {reader} reads it" in said
        return
    assert code == 0
    assert run(model, "-i", path, "-o", tmp_path / "out", "--continue_prediction") == 0
    assert "0 written, 1 already there" in capsys.readouterr().out
    ours, theirs = nibabel.load(tmp_path / "out/a.nii.gz"), stock_label_map(model, path, tmp_path / "stock.nii.gz")
    expected = np.asarray(theirs.dataobj)
    assert len(np.unique(expected)) > 2, "the reference proves nothing"
    assert (np.asarray(ours.dataobj) != expected).mean() < 2e-5
    assert (expected[::-1] != expected).mean() > 0.05, "mirrored it would be the same"
    assert ours.affine == pytest.approx(theirs.affine, abs=1e-4)
    assert (f"read as the model's {reader} reads it" in said) == (name != "LAS")


def test_the_readers_of_a_mirrored_file_give_different_maps(tmp_path: Path) -> None:
    """Else the test above could not tell them apart."""
    path = tmp_path / "a_0000.nii.gz"
    FILES["mirrored"](path)
    maps = []
    for reader in ("SimpleITKIOWithReorient", "NibabelIOWithReorient"):
        model = models.write_model(tmp_path / reader, plan=models.plans(reader=reader))
        assert run(model, "-i", path, "-o", tmp_path / reader / "out") == 0
        maps.append(np.asarray(nibabel.load(tmp_path / reader / "out/a.nii.gz").dataobj))
    assert (maps[0] != maps[1]).mean() > 0.01


def test_a_scan_of_one_slice_with_a_2d_model(tmp_path: Path) -> None:
    model = models.write_model(tmp_path / "model", plan=models.plans(patch=(32, 32), spacing=(2.0, 2.0)))
    path = tmp_path / "a_0000.nii.gz"
    array = scans.blobs((10, 36, 40)).array[:1].transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)
    assert run(model, "-i", path, "-o", tmp_path / "out") == 0
    expected = np.asarray(stock_label_map(model, path, tmp_path / "stock.nii.gz").dataobj)
    assert len(np.unique(expected)) > 2
    assert (np.asarray(nibabel.load(tmp_path / "out/a.nii.gz").dataobj) != expected).mean() < 2e-5
