"""``flare-pseudolabel clean`` gives back the disk of old rounds and leaves everything that is still needed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from fake_tasks import finish, make_run, run_of

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.clean import cleanable, rounds_over
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.tasks import graph

KILO = 4096


@pytest.fixture
def run(tmp_path):
    """A finished run of two rounds with small files in every place that a real one has."""
    run = make_run(tmp_path, rounds="2")
    finish(run, *graph(run))
    image = write(run.unlabelled_data / "c.b2nd")
    for number in range(3):
        for fold in ("0", "1") if number < 2 else ("all",):
            for name in ("final", "best"):
                write(run.round(number).model / f"fold_{fold}" / f"checkpoint_{name}.pth", 4)
            write(run.round(number).model / f"fold_{fold}" / "progress.png")
    for number in range(2):
        write(run.paths.members(number, "c"), 2)
        write(run.paths.training_label(number, "c"))
        write(run.paths.label(number, "c", ".nii.gz"))
        write(run.paths.case(number, "c"))
        run.round(number + 1).data.mkdir(parents=True, exist_ok=True)
        os.link(image, run.round(number + 1).data / "c.b2nd")
        os.link(run.paths.training_label(number, "c"), run.round(number + 1).data / "c_seg.b2nd")
    write(run.base_data / "a.b2nd")
    return run


def write(path: Path, blocks: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(blocks * KILO))
    return path


def files(run) -> set[str]:
    base = run.root.parent
    return {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file() and "site" not in path.parts}


def test_old_rounds_go_and_the_final_model_ledger_and_labels_stay(run, capsys):
    before = files(run)
    assert main(["clean", "-o", str(run.root), "--yes"]) == 0
    gone = before - files(run)
    assert {Path(name).name for name in gone} == {
        "checkpoint_final.pth", "checkpoint_best.pth", "c.b2nd", "c_seg.b2nd",
    }  # fmt: skip
    assert len([name for name in gone if name.endswith(".pth")]) == 8
    assert not any("fold_all" in name or name.endswith(".nii.gz") for name in gone)
    assert run.round(2).data.is_dir() and not run.round(1).data.exists(), "the final training's data stays"
    assert (run.base_data / "a.b2nd").is_file() and (run.unlabelled_data / "c.b2nd").is_file()
    assert "MB removed" in capsys.readouterr().out
    assert cleanable(run) == []


def test_the_size_is_what_the_disk_gets_back(run):
    items = {item.what: item.size_bytes for item in cleanable(run)}
    assert items["round 0: checkpoints"] == 4 * 4 * KILO
    assert items["round 1: training data"] == KILO, "its image is a link to a file that stays"
    assert items["round 0: label arrays"] == items["round 1: label arrays"] == 2 * KILO, "the members' maps"
    before = disk(run)
    assert main(["clean", "-o", str(run.root), "--yes"]) == 0
    assert before - disk(run) == sum(items.values())


def disk(run) -> int:
    seen = {
        (s.st_dev, s.st_ino): s.st_blocks * 512 for p in run.root.parent.rglob("*") if (s := p.lstat()) and p.is_file()
    }
    return sum(seen.values())


@pytest.mark.parametrize(("answer", "is_removed"), [("y\n", True), ("n\n", False), ("", False)])
def test_it_asks_first(run, monkeypatch, capsys, answer, is_removed):
    before = files(run)
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert main(["clean", "-o", str(run.root)]) == 0
    assert (files(run) != before) == is_removed
    assert "MB  in all" in capsys.readouterr().out


def test_a_round_that_something_still_needs_stays(run):
    assert rounds_over(run) == [0, 1]
    run.paths.done("train-r2-fall").unlink()
    assert rounds_over(run) == [0]
    run.paths.done("train-r1-f1").unlink()
    assert rounds_over(run) == []
    assert cleanable(run) == []


def test_the_last_round_of_a_loop_stays_until_the_union_is_trained(tmp_path):
    run = run_of(tmp_path, load_recipe("partial"))
    finish(run, *graph(run))
    assert rounds_over(run) == [0, 1, 2, 3]
    run.paths.done("train-r4-fall").unlink()
    assert rounds_over(run) == [0, 2]


def test_models_that_the_run_was_started_from_are_never_touched(run, tmp_path):
    given = tmp_path / "given"
    checkpoint = write(given / "fold_0" / "checkpoint_final.pth")
    manifest = run.paths.manifest
    manifest.write_text(manifest.read_text().replace('"init_model": null', f'"init_model": "{given}"'))
    assert main(["clean", "-o", str(run.root), "--yes"]) == 0
    assert checkpoint.is_file() and not run.round(1).data.exists()


def test_nothing_is_removed_while_a_driver_works(run, capsys):
    before = files(run)
    with LockFile(run.paths.driver_lock, "test"):
        assert main(["clean", "-o", str(run.root), "--yes"]) == 1
    assert files(run) == before
    assert "in use by process" in capsys.readouterr().err
