"""No command writes an output onto what it reads: refused before anything is written, the input's bytes unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.cli import evaluate, postprocess, pseudolabel
from nnunet_flare.errors import InputError
from nnunet_flare.files import remove_leftovers, replacing, temporary_prefix
from nnunet_flare.images import Volume, write_labels
from nnunet_flare.outputs import check_document, check_new, check_outputs, put_new


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    array = np.zeros((4, 8, 8), np.uint8)
    array[1:3, 2:6, 2:6] = 1
    for folder in ("one", "two"):
        write_labels(tmp_path / folder / "a.nii.gz", array, Volume(array, (2.0, 1.0, 1.0)))
    return tmp_path


def link(kind: str, source: Path, target: Path) -> Path:
    """Another way to name a file."""
    if kind == "dots":
        return source.parent / ".." / source.parent.name / source.name
    if kind == "hard link":
        os.link(source, target)
    elif kind == "symbolic link":
        target.symlink_to(source)
    elif kind == "folder":
        (target.parent / "linked").symlink_to(source.parent)
        return target.parent / "linked" / source.name
    return source if kind == "itself" else target


@pytest.mark.parametrize("kind", ["itself", "dots", "hard link", "symbolic link", "folder"])
def test_an_input_is_known_under_any_name(maps: Path, kind: str) -> None:
    source = maps / "one" / "a.nii.gz"
    output = link(kind, source, maps / "b.nii.gz")
    with pytest.raises(InputError, match="would be overwritten"):
        check_outputs([maps / "free.nii.gz", output], [source])
    check_outputs([maps / "free.nii.gz"], [source])


def test_an_earlier_table_may_be_replaced_and_other_files_may_not(maps: Path) -> None:
    (maps / "scores.csv").write_text("case\n")
    check_document(maps / "scores.csv", (".csv",), [maps / "one" / "a.nii.gz"])
    with pytest.raises(InputError, match=r"is not a \.csv file"):
        check_document(maps / "two" / "a.nii.gz", (".csv",), [])


COMMANDS = {
    "score onto a map": (pseudolabel, "score -i {d}/one {d}/two -o {d}/one/a.nii.gz"),
    "score onto another file": (pseudolabel, "score -i {d}/one {d}/two -o {d}/three/a.nii.gz"),
    "select": (pseudolabel, "select -i {d}/s.csv -o {d}/one/../s.csv"),
    "merge": (pseudolabel, "merge -o {d}/hard --base {d}/one --teacher {d}/two -np 1"),
    "postprocess": (postprocess, "-i {d}/one -o {d}/hard --pipeline largest -np 1"),
    "postprocess onto images": (postprocess, "-i {d}/one -o {d}/two --image {d}/two --pipeline largest -np 1"),
    "learn": (postprocess, "learn -i {d}/one -o {d}/one/a.nii.gz -np 1"),
    "tune": (postprocess, "tune -i {d}/one -ref {d}/two -o {d}/two/a.nii.gz -np 1"),
    "evaluate's json": (evaluate, "-ref {d}/one -pred {d}/two -o {d}/dataset.csv --labels {d}/dataset.json -np 1"),
    "compare": (evaluate, "--compare {d}/s.csv {d}/t.csv -o {d}/s.csv"),
    "efficiency": (evaluate, "efficiency -o {d}/s.csv -- cat {d}/s.csv"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_and_changes_no_byte(maps: Path, name: str, capsys) -> None:
    (maps / "s.csv").write_text("case,liver\na,0.5\n")
    (maps / "t.csv").write_text("case,liver\na,0.6\n")
    (maps / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1}}')
    for folder in ("hard", "three"):
        (maps / folder).mkdir()
        os.link(maps / "one" / "a.nii.gz", maps / folder / "a.nii.gz")
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in maps.rglob("*") if path.is_file()}
    program, words = COMMANDS[name]
    assert program.main([word.format(d=maps) for word in words.split()]) == 2
    after = {path: (path.read_bytes(), path.stat().st_ino) for path in maps.rglob("*") if path.is_file()}
    assert after == before and "Traceback" not in capsys.readouterr().err


def test_what_a_killed_command_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from nnunet_flare.files import temporary_prefix\n"
        "name = temporary_prefix(); folder = pathlib.Path(sys.argv[1])\n"
        "(folder / (name + 'half.nii.gz')).touch(); (folder / (name + 'x')).mkdir(); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        child.kill()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_elsewhere_go_when_they_are_old_and_foreign_files_never(tmp_path: Path) -> None:
    other = tmp_path / f".tmp-p0000{temporary_prefix()[10:]}a.nii.gz"
    for path in (other, tmp_path / ".tmp-notes", tmp_path / ".tmp-0123-half.nii.gz"):
        path.touch()
    with replacing(tmp_path / "mine") as mine:
        mine.touch()
        remove_leftovers(tmp_path)
        assert mine.exists() and other.exists() and not (tmp_path / ".tmp-0123-half.nii.gz").exists()
    os.utime(other, (time.time() - 4000, time.time() - 4000))
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-notes", "mine"]


def test_what_is_there_is_not_new_and_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "sub").mkdir(parents=True)
    (tmp_path / "file").touch()
    for link, target in (("to_empty", "empty"), ("to_nothing", "nothing")):
        (tmp_path / link).symlink_to(tmp_path / target)
    for name in ("empty", "new"):
        check_new(tmp_path / name)
    for name, said in (
        ("full", "is not empty"),
        ("file", "is not replaced"),
        ("to_empty", "is not replaced"),
        ("to_nothing", "is not replaced"),
    ):
        with pytest.raises(InputError, match=said):
            check_new(tmp_path / name)


def test_a_finished_folder_takes_a_free_name_and_no_other(tmp_path: Path) -> None:
    def made() -> Path:
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / "mine").touch()
        return tmp_path / "made"

    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        put_new(made(), tmp_path / name)
        assert (tmp_path / name / "mine").is_file()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(InputError, match="another command wrote it in the meantime"):
            put_new(made(), tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["theirs"] and (tmp_path / "file").is_file()
    with pytest.raises(FileNotFoundError):
        put_new(made(), tmp_path / "missing" / "new")
