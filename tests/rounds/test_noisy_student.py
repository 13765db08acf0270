"""The recipe noisy_student: one model labels every case, nothing is judged, a student learns from all."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.organs import FLARE22, dataset_labels
from nnunet_flare.phantom import write_phantom
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run, load_run
from nnunet_flare.rounds.run.settings import RunSettings
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, write_list
from nnunet_flare.rounds.stages.select import select_round
from nnunet_flare.rounds.status import status

ORGANS = [organ.name for organ in FLARE22]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Round 0 labelled three cases with one model; one more could not be read."""
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    recipe = load_recipe("noisy_student")
    made = Run(
        tmp_path / "run",
        RunSettings("noisy-student", "Dataset022_X", "plans", "un", recipe.model_dump(mode="json"), folders, "cpu", 1),
        recipe,
    )
    write_json(
        made.raw / "dataset.json",
        {"labels": dataset_labels(FLARE22), "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"},
    )
    cases = ["one", "two", "odd", "broken"]
    write_list(made.paths.unlabelled, [UnlabelledCase(case, "un", (f"{case}.nii.gz",), 1) for case in cases])
    for case in cases[:-1]:
        document = {
            "agreement": dict.fromkeys(ORGANS),
            "volume_mm3": dict.fromkeys(ORGANS, 1000.0),
            "members": 1,
            "label_sha256": "0" * 64,
            "odd": ["spacing"] if case == "odd" else [],
        }
        write_json(made.paths.case(0, case), document)
    write_json(made.paths.case(0, "broken"), {"failed": "truncated"})
    return made


def test_the_papers_numbers() -> None:
    recipe = load_recipe("noisy_student")
    assert recipe.planner == "nnUNetPlannerFlareNoisyStudent"
    assert (recipe.rounds, recipe.selection.rule) == (1, "all")
    assert (recipe.predict.step_size, recipe.predict.tta) == (0.5, "mirror")
    settings = recipe.settings(1, run="x")
    assert (settings.num_epochs, settings.iterations_per_epoch, settings.optimizer) == (1000, 250, "SGD")
    assert (settings.augmentation.labelled, settings.augmentation.pseudo) == ("stock", "strong")


def test_a_single_member_trains_on_all_cases_and_several_on_folds() -> None:
    recipe = load_recipe("noisy_student", {"rounds": "3"})
    assert [recipe.member_folds(number) for number in range(4)] == [["all"]] * 4
    assert [recipe.member_checkpoints(number) for number in range(4)] == [["checkpoint_final.pth"]] * 4
    assert load_recipe("noisy_student", {"members.count": "2"}).member_folds(0) == ["0", "1"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("selection.rule", "mean-organ"),
        ("selection.per_organ", "{liver: 0.9}"),
        ("fusion.uncertain_organs", "ignore"),
        ("stop.patience", "1"),
    ],
)
def test_what_needs_agreement_is_refused_for_a_single_member(key: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"{key}: found .*members.count=1 there is no agreement"):
        load_recipe("noisy_student", {key: value})
    load_recipe("noisy_student", {key: value, "members.count": "2"})


def test_all_labelled_cases_are_taken_without_a_word_about_agreement(run: Run, caplog) -> None:
    with caplog.at_level(logging.INFO):
        result = select_round(run, run.round(0))
    assert result == {"taken": 2, "refused": 0, "odd": 1, "failed": 1, "mean_agreement": None}
    assert "agreement of" not in caplog.text
    assert "2 taken, 1 odd, 1 failed, no agreement" in caplog.text
    entries = {entry.case: entry for entry in read_decisions(run.paths, 0)}
    assert entries["one"].decision == "taken"
    assert (entries["one"].mean_organ, entries["one"].min_organ, entries["one"].agreement) == (None, None, {})
    with open(run.paths.scores(0), newline="") as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    assert rows["one"]["liver"] == rows["one"]["mean_organ"] == "" and rows["one"]["members"] == "1"


def test_status_shows_no_agreement_where_there_is_none(run: Run) -> None:
    select_round(run, run.round(0))
    text = status(run)
    assert "mean agreement" not in text
    assert "nan" not in text.lower()
    assert [name for name in graph(run) if name.startswith("train")] == ["train-r0-fall", "train-r1-fall"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipe_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_phantom(tmp_path, labelled=2, unlabelled=3, test=1, size=(20, 32, 32), seed=3)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("NNUNET_FLARE_THREADS", "1")
    changes = [
        "plan.spacing_mm=[8.5, 5.0, 5.2]",
        "plan.patch_size=[16, 32, 32]",
        "plan.base_features=4",
        "plan.stages=3",
        "plan.dropout=0.2",
        "training.num_epochs=1",
        "training.iterations_per_epoch=2",
        "training.final_validation=false",
        "predict.precision=fp32",
    ]
    command = ["run", "-d", "22", "-u", str(tmp_path / "unlabelled"), "--recipe", "noisy_student", "-device", "cpu"]
    assert main([*command, "--set", *changes]) == 0
    run = load_run(tmp_path / "nnUNet_results" / "Dataset022_FLAREPhantom" / "flare_noisy-student")
    assert len([entry for entry in read_decisions(run.paths, 0) if entry.decision == "taken"]) == 3
    table = read_json(run.preprocessed / f"flare_cases.{run.round(1).configuration}.json")["cases"]
    assert sorted(entry["role"] for entry in table.values()) == ["labelled"] * 2 + ["pseudo"] * 3
    final = run.round(1).model
    assert (final / "fold_all" / "checkpoint_final.pth").is_file()
    arch = read_json(final / "plans.json")["configurations"]["3d_fullres"]["architecture"]
    assert arch["network_class_name"].endswith("ResidualEncoderUNet")
    assert arch["arch_kwargs"]["dropout_op_kwargs"]["p"] == 0.2
    assert main([*command, "--set", *changes]) == 0, "the same command again has nothing to do"
