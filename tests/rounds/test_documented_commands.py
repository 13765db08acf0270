"""The commands of the tutorial and the how-tos, run as they stand on the tiny run in place of the demo's."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALLER = {"phantom": ["--size", "20", "32", "32", "--labelled", "2", "--unlabelled", "1", "--test", "1"]}
"""Added to what takes minutes as shown."""


def blocks(page: str) -> list[str]:
    """The code blocks of a page that are marked as ``sh``: what a reader types, in order."""
    return re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def type_line(line: str) -> None:
    """Run one line as a shell would: variables, our commands in this process, the rest in a real shell."""
    line = os.path.expandvars(line.replace("flare_demo", "flare_tiny").replace("_demo_r1", "_tiny_r1"))
    words = shlex.split(line, comments=True)
    assignments = words[1:] if words[0] == "export" else words
    if all(re.match(r"\w+=", word) for word in assignments):
        os.environ.update(word.split("=", 1) for word in assignments)
        return
    if not words[0].startswith("flare-"):
        subprocess.run(line, shell=True, check=True)
        return
    program, *words = words
    if words[0] == "run" and "--dry_run" not in words:
        words.insert(1, "--dry_run")  # the loop itself is run by the fixture
    words += SMALLER.get(words[0], [])
    main = importlib.import_module(f"nnunet_flare.cli.{program.removeprefix('flare-')}").main
    assert main(words) == 0, line


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
        type_line(line)
    assert (desk / "data" / "nnUNet_raw" / "Dataset022_FLAREPhantom" / "dataset.json").is_file()
    take_tiny_run(desk, tiny_loop)
    for line in "".join(others).splitlines():
        type_line(line)
    assert (desk / os.environ["RUN"] / "report" / "index.html").is_file()
    for name in ("ledger.csv", "scores.csv"):
        assert len((desk / name).read_text().splitlines()) > 2


@pytest.mark.parametrize(
    "page", ["recipes-uncertainty", "recipes-demo", "howto-resume", "howto-review", "howto-cpu", "howto-labels"]
)
def test_the_commands_of_a_page_work(desk, tiny_loop, monkeypatch, page):
    take_tiny_run(desk, tiny_loop)
    for name in tiny_loop.environment:
        monkeypatch.setenv(name, str(desk / "data" / name))
    monkeypatch.setenv("RUN", str(desk / "data" / tiny_loop.run_dir.relative_to(tiny_loop.folder)))
    lines = "".join(blocks(f"{page}.md")).splitlines()
    assert lines
    for line in lines:
        type_line(line)
