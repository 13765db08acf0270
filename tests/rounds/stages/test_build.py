"""A round's data: ignored organs, and labels that are not the ones that were judged."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from changed_runs import changed, labelled_cases, set_agreement
from fake_run import fake_run

from nnunet_flare.errors import TaskError
from nnunet_flare.files import read_json
from nnunet_flare.images import read_labels
from nnunet_flare.rounds.export import export_dataset
from nnunet_flare.rounds.run.dataset import organ_ids
from nnunet_flare.rounds.run.ledger import read_decisions, read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages import build
from nnunet_flare.rounds.stages.arrays import read_array, write_array
from nnunet_flare.rounds.stages.build import build_round
from nnunet_flare.rounds.stages.label_maps import ignore_label
from nnunet_flare.rounds.stages.select import select_round


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def test_uncertain_organs_become_ignore_in_the_rounds_data_and_nowhere_else(run):
    case, other, poor = labelled_cases(run)[:3]
    set_agreement(run, case, liver=0.3, spleen=0.5)
    set_agreement(run, other)
    set_agreement(run, poor, **dict.fromkeys(list(organ_ids(run))[:10], 0.1))
    organwise = changed(run, fusion={"uncertain_organs": "ignore"}, selection={"threshold": 0.9})
    select_round(organwise, organwise.round(0))
    decided = {entry.case: entry for entry in read_decisions(run.paths, 0)}
    assert decided[case].decision == "taken" and set(decided[case].ignored) == {"liver", "spleen"}
    assert decided[other].decision == "taken" and decided[other].ignored == {}
    assert decided[poor].decision == "refused" and "3 of 13 organs certain" in decided[poor].reason
    build_round(organwise, organwise.round(1))
    organs, ignored = organ_ids(run), ignore_label(run)
    assert ignored == 14
    label = read_array(run.round(1).data / f"{case}_seg.b2nd")[0]
    fused = read_array(run.paths.training_label(0, case))[0]
    members = read_array(run.paths.members(0, case))
    union = np.isin(fused, [organs["liver"], organs["spleen"]])
    union |= np.isin(members, [organs["liver"], organs["spleen"]]).any(axis=0)
    np.testing.assert_array_equal(label == ignored, union)
    np.testing.assert_array_equal(label[~union], fused[~union])
    shares = {entry.case: entry for entry in read_ledger(run.paths)}[case].ignored
    assert shares["liver"] == pytest.approx(
        (np.isin(fused, [organs["liver"]]) | (members == organs["liver"]).any(axis=0)).mean()
    )
    assert "ignore" not in read_json(run.raw / "dataset.json")["labels"]
    configuration = read_json(run.plans_file)["configurations"][run.round(1).configuration]
    assert configuration["flare"]["ignore_label"] == 14


def test_the_table_of_a_round_says_what_became_of_a_case_that_its_build_refused(run, monkeypatch):
    """The plans of the final model could not preprocess it."""
    case, *others = [entry.case for entry in read_decisions(run.paths, 0) if entry.decision == "taken"]
    built = build.Built(1, 1, 0, {}, ignored={}, failed={case: "it is too thin"})
    monkeypatch.setattr(build, "build_training", lambda *_: built)
    build_round(run, run.round(1))
    with open(run.paths.selection(0), newline="", encoding="utf-8") as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    assert {name for name, row in rows.items() if row["taken"] == "1"} == set(others)
    assert rows[case]["reason"].startswith("it is too thin; ")
    said = {entry.case: (entry.decision, entry.reason) for entry in read_ledger(run.paths) if entry.round == 0}
    assert said[case] == ("failed", rows[case]["reason"]) and said.keys() == rows.keys()


def test_training_with_ignored_voxels_runs_and_its_export_declares_them(run):
    from nnunetv2.run.run_training import get_trainer_from_args

    for case in labelled_cases(run):
        set_agreement(run, case, liver=0.3)
    organwise = changed(run, fusion={"uncertain_organs": "ignore"})
    organwise = changed(organwise, selection={"threshold": 0.9})
    select_round(organwise, organwise.round(0))
    build_round(organwise, organwise.round(1))
    configuration = run.round(1).configuration
    trainer = get_trainer_from_args("22", configuration, "all", run.recipe.trainer, run.settings.plans_name,
                                    device=torch.device("cpu"))  # fmt: skip
    trainer.initialize()
    batches, _ = trainer.get_dataloaders()
    seen = set()
    for _ in range(12):
        batch = next(batches)
        seen |= set(torch.unique(batch["target"][0]).tolist())
        assert np.isfinite(trainer.train_step(batch)["loss"])
    assert 14 in seen
    target = export_dataset(organwise, 1, 501)
    document = read_json(target / "dataset.json")
    assert document["labels"]["ignore"] == 14
    exported = read_labels(target / "labelsTr" / f"{labelled_cases(run)[0]}.nii.gz").array
    assert (exported == 14).any() and not (exported == 1).any()


def test_a_label_that_changed_after_it_was_judged_is_never_trained_on(run):
    taken = next(e.case for e in read_ledger(run.paths) if e.decision == "taken")
    path = run.paths.training_label(0, taken)
    label = read_array(path)
    path.unlink()
    write_array(path, np.where(label == 1, 2, label).astype(np.int16), [16, 32, 32])
    with pytest.raises(TaskError, match=taken):
        build_round(run, run.round(1))
    assert not run.paths.case(0, taken).is_file() and not run.paths.done("label-r0-p0").is_file()


def test_a_labelled_case_that_was_added_after_the_start_is_named(tmp_path):
    run = fake_run(tmp_path, cases=["scan"], rounds=1, pictured=0)
    (run.raw / "labelsTr").mkdir()
    for case in ("first", "late"):
        (run.raw / "labelsTr" / f"{case}.nii.gz").write_bytes(b"")
    with pytest.raises(TaskError, match=r"1 labelled case\(s\) are not preprocessed \(late\).*move them out"):
        build_round(run, run.round(1))


def test_a_truncated_label_array_is_found_and_made_anew(run):
    taken = next(e.case for e in read_ledger(run.paths) if e.decision == "taken")
    path = run.paths.training_label(0, taken)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TaskError, match="label them again"):
        build_round(run, run.round(1))
    assert not run.paths.case(0, taken).is_file()
