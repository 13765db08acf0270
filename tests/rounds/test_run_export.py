"""What leaves a run: a dataset, the final model, the ledger."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from in_process import do_all, phantom, started

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json
from nnunet_flare.rounds import export
from nnunet_flare.rounds.export import export_dataset
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.share import export_stock_model


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def test_a_round_is_exported_as_a_dataset_that_stock_nnunet_accepts(run):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    target = export_dataset(run, 1, 77)
    verify_dataset_integrity(str(target), 1)
    assert target.name == "Dataset077_FLAREPhantom_tiny_r1"
    document = read_json(target / "dataset.json")
    assert document["numTraining"] == 7 and document["labels"] == read_json(run.raw / "dataset.json")["labels"]
    roles = {case: entry["role"] for case, entry in read_json(target / "flare_cases.json")["cases"].items()}
    assert sorted(roles.values()) == ["labelled"] * 4 + ["pseudo"] * 3
    with pytest.raises(InputError, match="exists already"):
        export_dataset(run, 1, 77)
    with pytest.raises(InputError, match="expected 1 to 1"):
        export_dataset(run, 5, 78)


def test_a_dataset_without_some_of_its_scans_is_not_exported(tmp_path, monkeypatch, capsys):
    """The folder of unlabelled scans was tidied up after the run."""
    folders = phantom(tmp_path, monkeypatch, labelled=1, unlabelled=2, test=0)
    settings = {"members.count": "1", "selection.rule": "all", "selection.keep_odd": "true"}
    run = started(tmp_path, folders, "demo", settings)
    do_all(run, monkeypatch, until=lambda name: name == "build-r1")
    scan = min((tmp_path / "unlabelled").iterdir())
    scan.unlink()
    assert main(["export", "-o", str(run.root), "--dataset", "77"]) == 2
    assert f"1 file(s) are missing: {scan}" in capsys.readouterr().err
    assert not list(folders["nnUNet_raw"].glob("Dataset077*"))


def test_two_exports_of_one_dataset_at_once_leave_one_whole_dataset(run, monkeypatch):
    """One that starts while another one is linking its files must not take them from it."""
    write, others = export.write_label_map, []

    def another_one_meanwhile(*words):
        monkeypatch.setattr(export, "write_label_map", write)
        others.append(export_dataset(run, 1, 77))
        write(*words)

    monkeypatch.setattr(export, "write_label_map", another_one_meanwhile)
    with pytest.raises(InputError, match="another command wrote it in the meantime"):
        export_dataset(run, 1, 77)
    (target,) = others
    document = read_json(target / "dataset.json")
    for folder in ("imagesTr", "labelsTr"):
        assert len(list((target / folder).iterdir())) == document["numTraining"] == 7
    assert not list(target.parent.glob(".tmp-*"))


def test_the_final_model_is_exported_for_machines_without_this_package(run, tmp_path):
    folder = export_stock_model(run, tmp_path / "model")
    code = (
        "import sys, torch\n"
        "sys.modules['nnunet_flare'] = None\n"
        "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor\n"
        "p = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False)\n"
        f"p.initialize_from_trained_model_folder({str(folder)!r}, ('all',))\n"
        "print('stock trainer', p.trainer_name)\n"
    )
    environment = {**os.environ, "NNUNET_FLARE_PLUGIN": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "stock trainer nnUNetTrainer" in done.stdout, done.stderr
    assert "flare" not in read_json(folder / "plans.json")["configurations"][run.round(1).configuration]


def test_the_ledger_is_exported_as_csv(run, tmp_path, capsys):
    assert main(["export", "-o", str(run.root), "--ledger", str(tmp_path / "ledger.csv")]) == 0
    lines = (tmp_path / "ledger.csv").read_text().splitlines()
    assert len(lines) == 1 + 7 and lines[0].startswith("round,case,role,decision,reason") and "liver" in lines[0]


def test_export_without_a_target_says_what_to_give(run, capsys):
    assert main(["export", "-o", str(run.root)]) == 2
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.parametrize("refused", ["ledger", "dataset", "stock_model", "zip"])
def test_of_several_targets_none_is_written_where_one_is_refused(run, tmp_path, refused):
    """Each that is right alone is right beside another one, but not beside one that is refused."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    good = {"ledger": tmp_path / "l.csv", "dataset": 77, "stock_model": tmp_path / "model", "zip": tmp_path / "m.zip"}
    bad = {"ledger": next((run.root / "tasks").iterdir()), "dataset": 22, "stock_model": taken, "zip": taken / "m.txt"}
    words = {**good, refused: bad[refused]}
    before = sorted(tmp_path.iterdir()), sorted(run.raw.parent.iterdir())
    assert (
        main(["export", "-o", str(run.root), *(word for name, to in words.items() for word in (f"--{name}", str(to)))])
        == 2
    )
    assert (sorted(tmp_path.iterdir()), sorted(run.raw.parent.iterdir())) == before
