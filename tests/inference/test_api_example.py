"""What the page on Python shows of prediction runs as it stands there; the rest of it is in tests/rounds."""

from __future__ import annotations

import re
from pathlib import Path

import model_folders as models
import numpy as np
import small_scans as scans

from nnunet_flare.images import write_volume

PAGE = Path(__file__).parents[2] / "docs" / "python-api.md"


def test_documented_example(tmp_path, monkeypatch):
    volume = scans.blobs((10, 40, 44))
    models.write_model(tmp_path / "model", folds=(0, 1))
    models.write_model(tmp_path / "coarse_model", plan=models.plans(spacing=(8.0, 4.0, 4.0)))
    write_volume(tmp_path / "scan_0000.nii.gz", volume)
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    (part,) = re.findall(r"^## Predict\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert isinstance(names["labels"], np.ndarray)
    assert names["labels"].shape == volume.array.shape
    assert names["labels"].dtype == np.uint8
    assert len(names["members"].labels) == 2
    assert names["members"].mean_softmax.shape[0] == len(models.ORGANS)
