"""The example runs from its first line to its last, and its notebook is the same."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
from in_process import do_all, nnunet_folders
from tiny_loop import TINY

from nnunet_flare.images import read_labels, read_volume
from nnunet_flare.rounds.executors import local

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
SCRIPT = FOLDER / "predict_and_compare.py"
SMALLER = {
    "size=(48, 96, 96)": "size=(20, 32, 32)",
    '{"members.count": "2"}': "dict(word.split('=') for word in " + repr(TINY) + ")",
}


def test_the_example_predicts_measures_and_compares(tmp_path, monkeypatch, capsys):
    """Its run is a tiny one, and in this process."""
    nnunet_folders(tmp_path, monkeypatch)  # the script sets others; this puts them back
    monkeypatch.setattr(local, "run_local", lambda run: do_all(run, monkeypatch))
    monkeypatch.chdir(tmp_path)
    text = SCRIPT.read_text(encoding="utf-8")
    for shown, small in SMALLER.items():
        assert text.count(shown) == 1, shown
        text = text.replace(shown, small)
    (tmp_path / "example.py").write_text(text)
    found = runpy.run_path(str(tmp_path / "example.py"))
    scan = read_volume(next((tmp_path / "example" / "test" / "images").iterdir()))
    written = read_labels(tmp_path / "prediction.nii.gz")
    np.testing.assert_array_equal(written.array, found["labels"])
    assert written.array.shape == scan.array.shape and (tmp_path / "prediction.png").stat().st_size > 1000
    assert len(found["rows"]) == 2 and len(found["scores"]) == 13
    said = capsys.readouterr().out
    assert "liver" in said and " ml" in said and "mean " in said


def test_the_notebook_is_made_of_the_script():
    make = runpy.run_path(str(FOLDER / "make_notebook.py"))
    document = json.loads((FOLDER / "predict_and_compare.ipynb").read_text(encoding="utf-8"))
    assert document == make["notebook"](SCRIPT.read_text(encoding="utf-8")), "python docs/examples/make_notebook.py"
    assert [cell["cell_type"] for cell in document["cells"]].count("code") == 7
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), "cell", "exec")
