"""Damaged JSON of a run: every command says which file and what to do, or goes on; never a traceback, never belief."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_run import fake_run
from fake_tasks import finish, make_run, notes

from nnunet_flare.cases import Case, table_name, write_table
from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.executors.local import run_local
from nnunet_flare.rounds.executors.slurm import state_file as slurm_file
from nnunet_flare.rounds.run.decisions import load_reviews
from nnunet_flare.rounds.run.ledger import read_decisions, read_ledger
from nnunet_flare.rounds.run.manifest import Run, load_run
from nnunet_flare.rounds.run.tasks import graph, is_done
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.arrays import is_cut
from nnunet_flare.rounds.stages.mending import forget_damaged, load_mended
from nnunet_flare.rounds.stages.preprocess import state_file


def inside_out(value: Any) -> Any:
    """The same document with every value of another type."""
    if isinstance(value, dict):
        return {key: inside_out(entry) for key, entry in value.items()} if value else []
    if isinstance(value, list):
        return [inside_out(entry) for entry in value] if value else {}
    return 7 if isinstance(value, str) or value is None else "text"


KINDS: dict[str, Callable[[Any], bytes]] = {
    "empty": lambda document: b"",
    "half": lambda document: json.dumps(document).encode()[: len(json.dumps(document)) // 2],
    "zeros": lambda document: bytes(len(json.dumps(document))),
    "not text": lambda document: b"\xff\xfe\x00{",
    "a list": lambda document: b"[]",
    "null": lambda document: b"null",
    "a number": lambda document: b"12",
    "no keys": lambda document: b"{}",
    "other types": lambda document: json.dumps(inside_out(document)).encode(),
    "keys only": lambda document: json.dumps(dict.fromkeys(document)).encode(),
}

DOCUMENTS: dict[str, Callable[[Run], Path]] = {
    "run.json": lambda run: run.paths.manifest,
    "unlabelled.json": lambda run: run.paths.unlabelled,
    "reviews.json": lambda run: run.paths.reviews,
    "early_stop.json": lambda run: run.paths.stop,
    "decisions.json": lambda run: run.paths.decisions(0),
    "a case": lambda run: run.paths.case(0, "a"),
    "dice.json": lambda run: run.paths.evaluation(0) / "dice.json",
    "done marker": lambda run: run.paths.done("select-r0"),
    "failed marker": lambda run: run.paths.failed("train-r1-fall"),
    "plans": lambda run: run.plans_file,
    "dataset.json": lambda run: run.raw / "dataset.json",
    "summary.json": lambda run: run.round(0).model / "fold_0" / "validation" / "summary.json",
    "flare_cases.json": lambda run: run.preprocessed / "flare_cases.json",
    "state": lambda run: state_file(run.unlabelled_data, "a"),
}

COMMANDS: dict[str, list[str]] = {
    "status": ["status"],
    "report": ["report", "--pictures", "0"],
    "export": ["export", "--ledger", "LEDGER"],
    "dataset": ["export", "--dataset", "77"],
    "clean": ["clean", "--yes"],
    "cancel": ["cancel"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A judged run with one file of every kind; tests copy nothing, they put back what they damaged."""
    run = fake_run(tmp_path_factory.mktemp("damaged"), cases=["a", "b"], pictured=2)
    write_json(run.paths.reviews, {"version": 1, "cases": [
        {"case": "a", "decision": "accept", "organs": [], "comment": ""}
    ]})  # fmt: skip
    write_json(run.paths.failed("train-r1-fall"), {"task": "train-r1-fall", "exit_code": 1, "last_lines": "fire"})
    write_json(run.paths.stop, {"last_labelled_round": 1, "mean_agreement": [0.5, 0.5]})
    write_table(run.preprocessed / "flare_cases.json", {"first": Case()})
    for case in ("a", "b"):
        write_json(state_file(run.unlabelled_data, case), {"source": case, "odd": []})
    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_names_the_damaged_file_and_a_remedy_or_does_without_it(
    whole, capsys, tmp_path, document, command
):
    path = DOCUMENTS[document](whole)
    good = path.read_bytes()
    first, *options = [word.replace("LEDGER", str(tmp_path / "ledger.csv")) for word in COMMANDS[command]]
    codes = {}
    try:
        for kind, damaged in KINDS.items():
            path.write_bytes(damaged(json.loads(good)))
            codes[kind] = main([first, "-o", str(whole.root), *options])
            printed = capsys.readouterr()
            assert codes[kind] in (0, 1, 2)
            shutil.rmtree(whole.raw.parent / "Dataset077_Boxes_look_r2", ignore_errors=True)
            if codes[kind]:
                (line,) = [line for line in printed.err.splitlines() if "error: " in line]
                assert path.name in line, line
                assert "Traceback" not in printed.err
    finally:
        path.write_bytes(good)
    if document == "run.json":
        assert set(codes.values()) == {2}


def test_the_whole_run_is_looked_at_without_an_error(whole, capsys, tmp_path):
    assert main(["status", "-o", str(whole.root)]) == 0 and main(["report", "-o", str(whole.root)]) == 0
    assert "the file is damaged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "read"),
    [
        ("unlabelled.json", lambda run: read_list(run.paths.unlabelled)),
        ("reviews.json", load_reviews),
        ("decisions.json", lambda run: read_decisions(run.paths, 0)),
        ("early_stop.json", lambda run: run.current()),
        ("run.json", lambda run: load_run(run.root)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_must_be_read_says_what_to_do(whole, document, read, kind):
    path = DOCUMENTS[document](whole)
    good = path.read_bytes()
    try:
        path.write_bytes(KINDS[kind](json.loads(good)))
        with pytest.raises(InputError, match=r"the file is damaged: .*(restore|remove|retry)") as caught:
            read(whole)
    finally:
        path.write_bytes(good)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    read(whole)


# ------------------------------------------------------------------ markers


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_marker_is_not_done_and_a_whole_one_is(tmp_path, kind):
    run = make_run(tmp_path, device="cpu", shards=1)
    task = graph(run)["plan"]
    finish(run, "plan")
    assert is_done(run, task)
    path = run.paths.done("plan")
    path.write_bytes(KINDS[kind](read_json(path)))
    assert not is_done(run, task)
    finish(run, "plan")
    assert is_done(run, task)


def test_retry_does_again_what_an_empty_marker_stood_for(tmp_path, monkeypatch):
    run = make_run(tmp_path, device="cpu", shards=1)
    write_json(run.paths.unlabelled, {"version": 1, "cases": []})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    tasks = graph(run)
    finish(run, *(name for name in tasks if not name.startswith("report-r1")))
    last = list(tasks)[-1]
    run.paths.done(last).parent.mkdir(exist_ok=True)
    run.paths.done(last).write_bytes(b"")
    run_local(run)
    assert [line["task"] for line in notes(run)] == [last]


# ------------------------------------------------------------------ the ledger


def rows(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        return int(connection.execute("SELECT count(*) FROM cases").fetchone()[0])


def without_rows(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM cases")


def one_row_lost(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM cases WHERE \"case\" = 'a' AND round = 1")


def another_decision(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE cases SET decision = 'taken', agreement = '{}'")


def other_columns(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cases (round INTEGER, 'case' TEXT)")
        connection.execute("INSERT INTO cases VALUES (0, 'a')")


def no_json_in_it(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE cases SET agreement = '{'")


SPOILT = [
    without_rows, one_row_lost, another_decision, other_columns, no_json_in_it, Path.unlink,
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:3000]),
    lambda path: path.write_bytes(bytes(8192)),
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_ledger_that_says_otherwise_than_the_decisions_is_rebuilt(tmp_path, spoil):
    run = fake_run(tmp_path, cases=["a", "b"], pictured=0)
    entries = read_ledger(run.paths)
    assert [(e.round, e.case) for e in entries] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    spoil(run.paths.ledger)
    assert read_ledger(run.paths) == entries
    assert rows(run.paths.ledger) == 4, "the file itself is mended too"


def test_a_ledger_that_another_program_uses_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_flare.rounds.run.ledger.BUSY_SECONDS", 0.1)
    run = fake_run(tmp_path, cases=["a"], pictured=0)
    entries = read_ledger(run.paths)
    inode = run.paths.ledger.stat().st_ino
    other = sqlite3.connect(run.paths.ledger)
    other.execute("BEGIN EXCLUSIVE")
    assert read_ledger(run.paths) == entries and run.paths.ledger.stat().st_ino == inode
    other.close()


# ------------------------------------------------------------------ made anew


@pytest.fixture
def building(tmp_path):
    """A run before its final training: round 0 is judged, the final model's data and configuration are built."""
    run = fake_run(tmp_path, cases=["a", "b"], rounds=1, pictured=2)
    for case in ("a", "b"):
        write_json(state_file(run.unlabelled_data, case), {"source": case, "odd": []})
        shutil.copy(run.paths.training_label(0, case), run.unlabelled_data / f"{case}_seg.b2nd")
    for stem in ("first",):
        shutil.copy(run.unlabelled_data / "a.b2nd", run.base_data / f"{stem}.b2nd")
        shutil.copy(run.unlabelled_data / "a.pkl", run.base_data / f"{stem}.pkl")
    labels = run.raw / "labelsTr"
    labels.mkdir(parents=True)
    (labels / "first.nii.gz").write_bytes(b"")
    plans = read_json(run.plans_file)
    for number in (0, 1):
        plans["configurations"][run.round(number).configuration] = {"inherits_from": "3d_fullres"}
        write_table(run.preprocessed / table_name(run.round(number).configuration), {"first": Case()})
    write_json(run.plans_file, plans)
    shutil.copytree(run.base_data, run.round(1).data)
    finish(run, *(name for name, task in graph(run).items() if task.stage not in ("train",) or task.round == 0))
    return run


def undone(run: Run) -> set[str]:
    return {name for name, task in graph(run).items() if not is_done(run, task)}


def test_a_whole_run_is_left_as_it_is(building):
    forget_damaged(building)
    assert undone(building) == {"train-r1-fall"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def lose_configuration(run: Run) -> None:
    plans = read_json(run.plans_file)
    del plans["configurations"][run.round(1).configuration]
    write_json(run.plans_file, plans)


@pytest.mark.parametrize(
    ("spoil", "again"),
    [
        (lambda run: cut(run.paths.training_label(0, "a")), {"label-r0-p0", "build-r1"}),
        (lambda run: cut(run.round(1).data / "first_seg.b2nd"), {"build-r1"}),
        (lambda run: shutil.rmtree(run.round(1).data), {"build-r1"}),
        (lambda run: cut(run.base_data / "first_seg.b2nd"), {"plan", "build-r1"}),
        (lambda run: (run.base_data / "first.b2nd").write_bytes(b""), {"plan", "build-r1"}),
        (lambda run: (run.base_data / "first.pkl").unlink(), {"plan", "build-r1"}),
        (lambda run: cut(run.unlabelled_data / "b.b2nd"), {"unlabelled", "build-r1"}),
        (lambda run: run.paths.case(0, "a").write_text("{}"), {"label-r0-p0"}),
        (lambda run: run.paths.decisions(0).write_text('{"cases": [{}]}'), {"select-r0"}),
        (lambda run: state_file(run.unlabelled_data, "a").write_bytes(b""), {"unlabelled"}),
        (lose_configuration, {"build-r1"}),
        (lambda run: (run.preprocessed / table_name(run.round(1).configuration)).write_text("{"), {"build-r1"}),
        (lambda run: (run.preprocessed / table_name(run.round(1).configuration)).unlink(), {"build-r1"}),
        (lambda run: run.plans_file.unlink(), {"plan", "build-r1"}),
    ],
)
def test_what_a_task_can_make_anew_is_made_anew(building, monkeypatch, spoil, again):
    if "label-r0-p0" in again:  # its checkpoint is there
        checkpoint = building.round(0).model / "fold_0" / "checkpoint_final.pth"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(b"")
    spoil(building)
    forget_damaged(building)
    assert undone(building) == again | {"train-r1-fall"}


def test_damaged_plans_are_refused_with_a_remedy(building):
    building.plans_file.write_text('{"configurations": ')
    with pytest.raises(InputError, match="restore it from a copy, or remove it and flare-pseudolabel retry plans"):
        forget_damaged(building)


def test_a_damaged_early_stop_is_decided_again(building):
    building.paths.stop.write_text("{}")
    load_mended(building.root)
    assert not building.paths.stop.exists() and undone(building) == {"select-r0", "train-r1-fall"}


def test_an_array_is_cut_as_soon_as_a_byte_is_missing(building):
    path = building.unlabelled_data / "a.b2nd"
    whole = path.read_bytes()
    assert not is_cut(path)
    for length in (0, 10, 23, 24, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert is_cut(path), length


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_note_of_slurm_jobs_says_what_to_do(whole, capsys, kind):
    write_json(slurm_file(whole), {"options": {}, "submissions": [{"token": "x", "tasks": ["plan"], "job": "1"}]})
    try:
        slurm_file(whole).write_bytes(KINDS[kind](read_json(slurm_file(whole))))
        assert main(["cancel", "-o", str(whole.root)]) == 2 or kind == "other types"
        assert "slurm.json" in capsys.readouterr().err
    finally:
        slurm_file(whole).unlink()
