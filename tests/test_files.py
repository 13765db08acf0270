"""Files are whole or absent: written beside their place, then renamed; links are never written through."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from nnunet_flare.files import LOOP_FILES, link_or_copy, name_problem, read_json, replacing, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_new_file_appears_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "scan.nii.gz") as temporary:
        assert temporary.parent == tmp_path, "a rename is atomic only within a file system"
        assert temporary.name.endswith("scan.nii.gz"), "writers look at the suffix"
        assert temporary.name.startswith("."), "nobody takes it for a result"
        temporary.write_bytes(b"whole")
        assert not (tmp_path / "scan.nii.gz").exists()
    assert names(tmp_path) == ["scan.nii.gz"]
    assert (tmp_path / "scan.nii.gz").read_bytes() == b"whole"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_after_a_failure_the_old_file_stands_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_failing_before_anything_was_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), replacing(tmp_path / "a.txt"):
        raise ValueError("early")
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert names(tmp_path) == ["a"]


def test_text_and_json_come_back(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "a.txt", "Größe\n")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "Größe\n".encode()
    document = {"b": [1, 2.5, None, "ü"], "a": {"x": True}}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json") == document
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"], "the order is kept"


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_what_is_no_json_is_refused_and_the_old_file_stands(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", {"new": value})
    assert names(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_text(tmp_path / "a", "text")
    assert order == ["fsync", "rename"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.b2nd"
    path.write_bytes(b"voxels")
    return path


def refuse(*args: object) -> None:
    raise OSError(errno.EXDEV, "not on this file system")


def test_a_hard_link_costs_no_disk(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.b2nd"
    assert link_or_copy(source, target) == "hard link"
    assert target.samefile(source)
    assert not target.is_symlink()
    source.unlink()
    assert target.read_bytes() == b"voxels"


def test_a_symbolic_link_where_hard_ones_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "round"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert link_or_copy(Path("source.b2nd"), folder / "target.b2nd") == "symbolic link"
    assert (folder / "target.b2nd").is_symlink()
    monkeypatch.chdir("/")
    assert (folder / "target.b2nd").read_bytes() == b"voxels", "a relative source must not dangle"


def test_a_copy_where_no_links_exist(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    target = tmp_path / "target.b2nd"
    assert link_or_copy(source, target) == "copy"
    assert target.read_bytes() == b"voxels"
    assert not target.samefile(source)
    assert names(tmp_path) == ["source.b2nd", "target.b2nd"]


@pytest.mark.parametrize("ways", [(), ("link",), ("link", "symlink")])
def test_an_old_target_is_replaced_and_never_written_through(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...]
) -> None:
    """A round's file may be a link to the base data, which must not change with it."""
    base = tmp_path / "base.b2nd"
    base.write_bytes(b"base")
    target = tmp_path / "target.b2nd"
    os.link(base, target)
    for way in ways:
        monkeypatch.setattr(os, way, refuse)
    link_or_copy(source, target)
    assert target.read_bytes() == b"voxels"
    assert base.read_bytes() == b"base"


def test_a_dangling_link_is_replaced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.b2nd"
    target.symlink_to(tmp_path / "gone")
    assert link_or_copy(source, target) == "hard link"
    assert target.read_bytes() == b"voxels"


# ------------------------------------------------------------------ long names


@pytest.mark.parametrize("letter", ["a", "ä", "肝"])
def test_a_name_fits_exactly_when_every_file_of_it_can_be_written(tmp_path: Path, letter: str) -> None:
    for length in range(60, 240):
        case = letter * length
        fits = True
        for pattern in LOOP_FILES:
            try:
                write_text(tmp_path / pattern.replace("{}", case), "")
            except OSError as error:
                assert error.errno == errno.ENAMETOOLONG
                fits = False
        assert (name_problem(case, tmp_path) is None) == fits, length
    problem = name_problem(letter * 240, tmp_path / "not" / "made" / "yet")
    assert problem is not None and f"has {240 * len(letter.encode())} bytes, at most 224 are possible" in problem


def test_names_are_measured_by_what_is_written_from_them(tmp_path: Path) -> None:
    assert name_problem("a" * 248, tmp_path, ["{}.nii.gz"], renamed=False) is None
    assert name_problem("a" * 249, tmp_path, ["{}.nii.gz"], renamed=False) is not None
