"""What is published beside figures says how they were made, and nothing of the machine's folders."""

from __future__ import annotations

import re

import pytest
from shown_command import ROOT, shown_command

OF_A_MACHINE = re.compile(r"(?<![\w.~/])/(?:home|Users|root|work|tmp|var/tmp|mnt|scratch)/|\b[A-Z]:\\\\?Users\\")

READ_BY_PEOPLE = sorted(
    path
    for folder in (ROOT / "docs", ROOT / "benchmarks" / "results")
    for path in folder.rglob("*")
    if path.suffix in {".md", ".json", ".svg", ".csv", ".yml", ".yaml", ".html"}
)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["benchmarks/recipes.py", "--seeds", "1", "2"], "python benchmarks/recipes.py --seeds 1 2"),
        (["recipes.py", "-o", "/home/someone/evidence"], "python benchmarks/recipes.py -o evidence"),
        (["/home/someone/flare/benchmarks/predict.py", "--folder=/tmp/a/b"], "python benchmarks/predict.py --folder=b"),
        (["scale.py", str(ROOT / "benchmarks" / "results")], "python benchmarks/scale.py benchmarks/results"),
        (["export.py", "-m", "/data/my model/"], "python benchmarks/export.py -m 'my model'"),
        (["export.py", "--scale=1/2", "a/b"], "python benchmarks/export.py --scale=1/2 a/b"),
    ],
)
def test_a_command_is_shown_as_it_was_typed_without_the_folders_of_the_machine(typed, shown):
    assert shown_command(typed) == shown


def test_no_page_and_no_result_names_a_folder_of_a_machine():
    assert len(READ_BY_PEOPLE) > 100
    named = [path.name for path in READ_BY_PEOPLE if OF_A_MACHINE.search(path.read_text(encoding="utf-8"))]
    assert not named


def test_a_folder_of_a_machine_is_found_where_one_stands():
    texts = ["-o /home/me/evidence", '"/home/me/x"', "--folder=/tmp/lead/pred", r"C:\\Users\\me"]
    assert all(OF_A_MACHINE.search(text) for text in texts)
