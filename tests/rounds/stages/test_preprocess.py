"""Scans that cannot be used are set aside one by one, and tried again after they were mended."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_flare.images import Volume, read_volume, to_sitk, write_volume
from nnunet_flare.rounds.retry import forget_failures
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, read_list, write_list
from nnunet_flare.rounds.stages.preprocess import failure, odd, preprocess_unlabelled, state_file


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def test_bad_and_odd_scans_are_set_aside_or_flagged_one_by_one(run, monkeypatch):
    monkeypatch.setattr("nnunet_flare.inference.preprocessing.MAX_NETWORK_VOXELS", 10**6)
    good = read_volume(Path(read_list(run.paths.unlabelled)[0].images[0]))
    folder = run.raw / "imagesUn"
    hu = good.array.astype(np.float32)
    makers = {
        "nan": lambda p: write_volume(p, good.with_array(np.where(hu > 0, np.nan, hu).astype(np.float32))),
        "infinite": lambda p: write_volume(p, good.with_array(np.where(hu > 200, np.inf, hu).astype(np.float32))),
        "constant": lambda p: write_volume(p, good.with_array(np.zeros_like(good.array))),
        "one_slice": lambda p: write_volume(p, Volume(good.array[:1], good.spacing_mm)),
        "empty_file": lambda p: p.write_bytes(b""),
        "missing": lambda p: None,
        "flat": lambda p: sitk.WriteImage(sitk.GetImageFromArray(good.array[0]), str(p)),
        "series": lambda p: sitk.WriteImage(sitk.JoinSeries([to_sitk(good), to_sitk(good)]), str(p)),
        "picture": lambda p: write_volume(p, good.with_array(np.clip(good.array, 0, 255).astype(np.uint8))),
        "coarse": lambda p: write_volume(p, Volume(good.array, (40.0, 5.0, 5.0))),
        "shifted": lambda p: write_volume(p, good.with_array((good.array + 1024).astype(np.int16))),
        "scores": lambda p: write_volume(p, good.with_array((hu - hu.mean()) / hu.std())),
        "unit": lambda p: write_volume(p, good.with_array(hu / 2000)),
        "far_too_long": lambda p: write_volume(p, Volume(good.array, (900.0, 5.0, 5.0))),
        "huge": lambda p: write_volume(p, Volume(good.array, (77.0, 52.0, 39.0))),
    }
    cases = []
    for name, make in makers.items():
        path = folder / f"{name}_0000.nii.gz"
        make(path)
        cases.append(UnlabelledCase(name, str(path), (str(path),), 1))
    write_list(run.paths.unlabelled, cases)
    assert preprocess_unlabelled(run) == {"ready": 5, "failed": 10}
    reasons = {name: failure(run.unlabelled_data, name) for name in makers}
    said = {"nan": "NaN", "infinite": "infinite", "constant": "empty", "one_slice": "fewer than 2 voxels"}
    said |= {"empty_file": "0 bytes", "missing": "no such file", "flat": "dimensions", "series": "4"}
    said |= {"far_too_long": "the spacing is wrong", "huge": "too large to predict; check the spacing"}
    for name, word in said.items():
        assert word in reasons[name] and f"{name}_0000.nii.gz" in reasons[name], (name, reasons[name])
    assert reasons["picture"] is None and "8-bit picture" in odd(run.unlabelled_data, "picture")[0]
    for name, word in (("shifted", "rescale intercept"), ("scores", "a few units"), ("unit", "a few units")):
        assert reasons[name] is None and word in odd(run.unlabelled_data, name)[0], name
    assert reasons["coarse"] is None and "spacing" in odd(run.unlabelled_data, "coarse")[0]


def test_a_scan_that_was_mended_takes_part_after_retry(run, capsys):
    assert "damaged" in failure(run.unlabelled_data, "truncated")
    good = read_list(run.paths.unlabelled)[0]
    target = run.raw / "imagesUn" / "truncated_0000.nii.gz"
    target.unlink()
    shutil.copyfile(good.images[0], target)
    forget_failures(run)
    assert not state_file(run.unlabelled_data, "truncated").is_file()
    assert preprocess_unlabelled(run) == {"ready": 7, "failed": 0}
