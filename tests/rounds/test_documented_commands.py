"""The commands of the tutorial and the how-tos, run as they stand on the tiny run in place of the demo's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typed_pages import blocks, type_line

SMALLER = {"phantom": ["--size", "20", "32", "32", "--labelled", "2", "--unlabelled", "1", "--test", "1"]}
"""Added to what takes minutes as shown."""


def type_here(line: str) -> None:
    """Type a line for the tiny run, which has another name than the demo's."""
    type_line(line.replace("flare_demo", "flare_tiny").replace("_demo_r", "_tiny_r"), smaller)


def smaller(words: list[str]) -> list[str]:
    if words[0] == "run" and not {"--dry-run", "--dry_run"} & set(words):
        words = [words[0], "--dry-run", *words[1:]]  # the loop itself is run by the fixture
    if words[0] == "run":  # which split its four labelled cases into two folds
        words = [*words, *([] if "--set" in words else ["--set"]), "members.count=2"]
    return words + SMALLER.get(words[0], [])


@pytest.fixture
def desk(tiny_loop, tmp_path, monkeypatch) -> Path:
    """An empty folder, the variables as after the tutorial's first block, and the tiny run as ``data``."""
    monkeypatch.chdir(tmp_path)
    for name, value in {**tiny_loop.environment, "RUN": str(tiny_loop.run_dir)}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def take_tiny_run(desk: Path, tiny_loop) -> None:
    """Put a copy of the finished tiny run where the tutorial has its data."""
    shutil.rmtree(desk / "data", ignore_errors=True)
    shutil.copytree(tiny_loop.folder, desk / "data", symlinks=True)
    for path in (desk / "data").rglob("*.json"):
        if str(tiny_loop.folder) in (text := path.read_text()):
            path.write_text(text.replace(str(tiny_loop.folder), str(desk / "data")))
    (desk / "data" / "unlabelled" / "truncated_0000.nii.gz").unlink()


def test_the_tutorial_works_from_the_first_line_to_the_last(desk, tiny_loop):
    first, *others = blocks("tutorial.md")
    for line in first.splitlines():
        type_here(line)
    assert (desk / "data" / "nnUNet_raw" / "Dataset022_FLAREPhantom" / "dataset.json").is_file()
    take_tiny_run(desk, tiny_loop)
    for line in "".join(others).splitlines():
        type_here(line)
    assert (desk / os.environ["RUN"] / "report" / "index.html").is_file()
    for name in ("ledger.csv", "scores.csv"):
        assert len((desk / name).read_text().splitlines()) > 2


@pytest.mark.parametrize(
    "page",
    [
        "recipes-uncertainty",
        "recipes-demo",
        "howto-resume",
        "howto-review",
        "howto-select",
        "howto-cpu",
        "howto-labels",
        "howto-share",
    ],
)
def test_the_commands_of_a_page_work(desk, tiny_loop, monkeypatch, page):
    take_tiny_run(desk, tiny_loop)
    for name in tiny_loop.environment:
        monkeypatch.setenv(name, str(desk / "data" / name))
    monkeypatch.setenv("RUN", str(desk / "data" / tiny_loop.run_dir.relative_to(tiny_loop.folder)))
    lines = "".join(blocks(f"{page}.md")).splitlines()
    assert lines
    for line in lines:
        type_here(line)
