"""The final model as a file to pass on: stock nnU-Net installs it and predicts with it; its card says what it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import stock_prediction
import torch
from typed_pages import blocks, type_line

from nnunet_flare.checkpoints import load_checkpoint
from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import read_labels, read_volume
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.recipes.parts import Roi
from nnunet_flare.rounds.model_card import model_card
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.share import export_stock_model, export_zip, stock_model
from nnunet_flare.rounds.stages.arrays import read_array


def stock_command(name: str, *words: str, results: Path) -> None:
    """Run a command of stock nnU-Net that knows nothing of this package."""
    code = (
        "import sys; sys.modules['nnunet_flare'] = None; from importlib.metadata import entry_points as e;"
        "(c,) = e(group='console_scripts', name=sys.argv.pop(1)); c.load()()"
    )
    folders = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed"), str(results.parent))
    variables = {**os.environ, **folders, "nnUNet_results": str(results), "NNUNET_FLARE_PLUGIN": "0"}
    done = subprocess.run([sys.executable, "-c", code, name, *words], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {Path(name).name: archive.read(name) for name in archive.namelist()}


def test_stock_nnunet_installs_the_file_and_predicts_with_it(copied_run: Run, tmp_path: Path, capsys) -> None:
    run, file = copied_run, tmp_path / "model.zip"
    licence = tmp_path / "LICENCE"
    licence.write_text("CC BY 4.0, as the data")
    assert main(["export", "-o", str(run.root), "--zip", str(file), "--license", str(licence)]) == 0
    assert "nnUNetv2_install_pretrained_model_from_zip" in capsys.readouterr().out
    results = tmp_path / "elsewhere" / "results"
    results.mkdir(parents=True)
    stock_command("nnUNetv2_install_pretrained_model_from_zip", str(file), results=results)
    final = run.rounds[-1]
    installed = results / run.settings.dataset / f"nnUNetTrainer__{final.base.plans_name}__{final.configuration}"
    assert (installed / "LICENSE.txt").read_text() == "CC BY 4.0, as the data"
    card = (installed / "README.md").read_text()
    (command,) = (line for line in card.splitlines() if line.startswith("nnUNetv2_predict"))
    images, out = Path(str(run.settings.eval_images)), tmp_path / "out"
    words = command.replace("SCANS", str(images)).replace("OUT", str(out)).split()[1:]
    stock_command("nnUNetv2_predict", *words, "-device", "cpu", "-npp", "1", "-nps", "1", results=results)
    for scan in images.glob("*_0000.nii.gz"):
        found = read_labels(out / scan.name.replace("_0000.nii.gz", ".nii.gz")).array
        assert found.shape == read_volume(scan).array.shape
    mine = load_checkpoint(final.model / "fold_all" / "checkpoint_final.pth")["network_weights"]
    theirs = load_checkpoint(installed / "fold_all" / "checkpoint_final.pth")
    assert mine.keys() == theirs["network_weights"].keys() and "optimizer_state" not in theirs
    assert all(torch.equal(mine[name], theirs["network_weights"][name]) for name in mine)


def test_the_card_says_data_recipe_decisions_scores_and_licence_and_names_no_patient(copied_run, tmp_path) -> None:
    run = copied_run
    document = read_json(run.raw / "dataset.json")
    write_json(run.raw / "dataset.json", {**document, "description": "synthetic abdomens", "licence": "CC0"})
    card = members(export_zip(run, tmp_path / "model.zip"))["README.md"].decode()
    for part in ("- description: synthetic abdomens", "- licence: CC0", "- 4 labelled cases, 7 unlabelled scans",
                 "`demo`", "- `members.count`: 2 (shipped: 3)", "Not given when this file was made"):  # fmt: skip
        assert part in card, part
    rows = run.cases()
    counts = [sum(row["decision"] == decision for row in rows) for decision in ("taken", "refused", "odd", "failed")]
    assert f"| r0 | {' | '.join(map(str, counts))} | " in card
    dice = read_json(run.paths.evaluation(run.rounds[-1].number) / "dice.json")
    assert f"Dice on 2 held-out cases: mean {dice['mean']:.3f}." in card
    assert f"| liver | {dice['organs']['liver']:.3f} |" in card
    cases = [case.case for case in read_list(run.paths.unlabelled)]
    assert not [word for word in (*cases, str(run.root), str(run.raw), *dice["cases"]) if word in card]


def test_the_card_names_no_folder_of_the_machine_and_says_that_a_coarse_model_is_missing(copied_run, tmp_path) -> None:
    recipe, shipped = copied_run.recipe, load_recipe("demo")
    card = model_card(copied_run, trainer="nnUNetTrainer", licence="CC0")
    assert "coarse model" not in card
    fusion = recipe.fusion.model_copy(update={"teachers": ("/home/ann/teacher",), "id_maps": ("/home/ann/ids.json",)})
    roi = Roi(model="/home/ann/coarse")
    run = replace(copied_run, recipe=recipe.model_copy(update={"fusion": fusion, "roi": roi}))
    card = model_card(run, trainer="nnUNetTrainer", licence="CC0")
    assert shipped.roi is None and "/home/ann" not in card
    for key in ("fusion.teachers", "fusion.id_maps", "roi.model"):
        assert f"- `{key}`: given (shipped: " in card
    assert "the command predicts whole scans" in card


def test_a_final_training_that_is_to_be_done_again_is_not_passed_on(copied_run, tmp_path, capsys) -> None:
    final = copied_run.rounds[-1]
    copied_run.paths.done(f"train-{final.configuration.rpartition('_')[2]}-fall").unlink()
    for option, name in (("--zip", "model.zip"), ("--stock_model", "model")):
        assert main(["export", "-o", str(copied_run.root), option, str(tmp_path / name)]) == 2
        assert f"the final training, train-r{final.number}-fall, is not done" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    words = ["--ledger", str(tmp_path / "l.csv"), "--stock_model", str(tmp_path / "model")]
    assert main(["export", "-o", str(copied_run.root), *words]) == 2 and not (tmp_path / "l.csv").exists()


def test_an_export_that_was_cut_short_leaves_no_half_model(copied_run, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_stock_model(copied_run, tmp_path / "model")
    assert not list(tmp_path.glob("model*"))
    assert (export_stock_model(copied_run, tmp_path / "model") / "fold_all" / "checkpoint_final.pth").is_file()


def test_the_page_on_viewers_makes_the_folder_that_slicers_extension_takes(copied_run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUN", str(copied_run.root))
    for line in "".join(blocks("howto-viewers.md")).splitlines():
        type_line(line, lambda words: words)
    (folder,) = tmp_path.glob("slicer/Dataset022_FLAREPhantom/*__*__*")
    assert (folder / "dataset.json").is_file() and len(folder.name.split("__")) == 3
    assert stock_prediction.predictor(folder, [0]).trainer_name == "nnUNetTrainer"


def test_files_of_training_cases_stay_behind(copied_run: Run) -> None:
    path = copied_run.rounds[-1].model / "dataset.json"
    document = read_json(path)
    write_json(path, {**document, "dataset": {"Doe_John": {"images": ["/x/Doe_John_0000.nii.gz"], "label": "/x/l"}}})
    model = stock_model(copied_run)
    assert "Doe" not in json.dumps(model.dataset) and model.dataset["labels"] == document["labels"]
    assert "dataset" not in model.checkpoint["init_args"]["dataset_json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--zip", "model.tar"], "expected a name that ends with .zip"),
        (["--zip", "m.zip", "--license", "none.txt"], "none.txt: no such file"),
        (["--ledger", "l.csv", "--license", "none.txt"], "needs --zip"),
        (["--ledger", "l.csv", "--zip", "model.tar"], "expected a name that ends with .zip"),
        (["--ledger", "l.csv", "--round", "1"], "--round 1: needs --dataset ID"),
    ],
)
def test_a_wrong_wish_is_refused_before_anything_is_written(tiny_loop, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "-o", str(tiny_loop.run_dir), *words]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", [export_zip, export_stock_model])
@pytest.mark.parametrize("name", ["model.zip", "model.zip/plans.json"])
def test_a_model_that_was_exported_before_is_not_replaced(tmp_path: Path, export, name) -> None:
    earlier = tmp_path / name
    earlier.parent.mkdir(exist_ok=True)
    earlier.write_text("of another run")
    with pytest.raises(InputError, match=f"{tmp_path / 'model.zip'}: already exists"):
        export(cast(Run, None), tmp_path / "model.zip")  # refused before the run is looked at
    assert earlier.read_text() == "of another run" and [p for p in tmp_path.rglob("*") if p.is_file()] == [earlier]


def test_what_the_page_on_python_shows_of_runs_works(copied_run: Run, tmp_path: Path, monkeypatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "python-api.md").read_text(encoding="utf-8")
    after = page[page.index("## Train a recipe") :]
    train, read, export = re.findall(r"```python\n(.*?)```", after, re.DOTALL)
    monkeypatch.chdir(copied_run.raw.parents[1])
    names: dict[str, Any] = {}
    exec(train.replace("run_local(run)", "# the example does it", 1), names)  # tests/docs/test_examples.py
    assert names["run"].paths.manifest.is_file() and names["run"].recipe.members.count == 2
    exec(read.replace("RUN_DIR", str(copied_run.root)), names)
    assert len(names["rows"]) == 7 and 0 < len(names["taken"]) < 7
    exec(export, names)
    for name in ("ledger.csv", "stock_model/plans.json", "model.zip"):
        assert Path(name).is_file(), name
    assert list(copied_run.raw.parent.glob("Dataset077_*"))


def test_a_run_is_read_as_rows_of_plain_values(tiny_loop) -> None:
    run = Run.open(str(tiny_loop.run_dir))
    rows = run.cases()
    assert len(rows) == 7 and {frozenset(row) for row in rows} == {frozenset(rows[0])}
    assert all(isinstance(value, (int, float, str, type(None))) for row in rows for value in row.values())
    row = next(row for row in rows if row["decision"] == "taken")
    assert row["members"] == 2 and 0 <= row["agreement_liver"] <= 1
    label = np.asarray(read_array(run.paths.training_label(0, row["case"])))
    found = (label == 1).sum() * np.prod([8.5, 5.0, 5.2]) / 1000  # the demo's spacing
    assert row["volume_ml_liver"] == pytest.approx(found)
