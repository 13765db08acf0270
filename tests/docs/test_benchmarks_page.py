"""The page of benchmarks: every figure of every result file, with its command and machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))

specification = importlib.util.spec_from_file_location(
    "benchmarks_hook", REPOSITORY / "docs" / "hooks" / "benchmarks.py"
)
hook = importlib.util.module_from_spec(specification)
specification.loader.exec_module(hook)


def page_of(folder: Path, document: dict) -> str:
    (folder / "results").mkdir()
    (folder / "results" / "speed.json").write_text(json.dumps(document))
    (folder / "speed.py").write_text('"""How fast\nit is.\n\nMore.\n"""\n')
    return hook.benchmarks_page(folder)


SETTING = {
    "command": "python benchmarks/speed.py",
    "hardware": {"cpu": "A chip", "cores": 2, "versions": {"numpy": "2.4"}},
}


def test_a_result_is_shown_with_purpose_command_machine_and_figures(tmp_path):
    rows = {"stock": {"wall_s": 84.2164766, "runs": [{"wall_s": 1}]}, "ours": {"wall_s": 8.0974, "peak_mb": 870.4}}
    page = page_of(tmp_path, {**SETTING, "ratio": 0.0961, "met": True, "results": rows})
    for line in (
        "## Speed",
        "How fast it is.",
        "`python benchmarks/speed.py`",
        "Machine: A chip, 2 cores. Versions: numpy 2.4.",
        "|  | wall time (s) ↓ | peak memory (MB) ↓ |",
        "| stock | 84.22 |  |",
        "| ours | 8.097 | 870.4 |",
        "ours / reference ↓: 9.61 %.",
    ):
        assert line in page.splitlines(), line
    assert "runs" not in page.partition("## Speed")[2]


def test_records_of_a_list_are_told_apart_by_their_words(tmp_path):
    records = [{"model": "small", "slices": 160, "rows": {"stock": {"wall_s": 2.0}}}]
    page = page_of(tmp_path, {**SETTING, "results": records})
    assert "**small**" in page and "small: slices: 160." in page and "| stock | 2 |" in page


def test_a_list_of_plain_records_is_one_table(tmp_path):
    page = page_of(tmp_path, {**SETTING, "rows": [{"maps": "clean", "ratio": 0.5}, {"maps": "a|b", "ratio": None}]})
    assert "| maps | ours / reference ↓ |" in page and "| clean | 50 % |" in page and "| a/b | – |" in page


def test_units_and_what_is_better_stand_at_every_figure(tmp_path):
    rows = {"ours": {"peak_mb": 12345.6, "foreground_dice": 0.91, "slices": 160}}
    page = page_of(tmp_path, {**SETTING, "target_ratio": 0.5, "met": False, "results": rows})
    assert "|  | peak memory (MB) ↓ | foreground dice ↑ | slices |" in page and "| ours | 12346 | 0.91 | 160 |" in page
    assert "target" not in page and "met" not in page.partition("## Speed")[2]


def numbers_of(value, *keys: str) -> list[str]:
    """Every figure of a document as the page writes it, but those that say whether a goal was reached."""
    key = keys[-1] if keys else ""
    if key in (*hook.SETTING, *hook.REPEATS) or hook._is_unshown(key):
        return []
    if isinstance(value, dict):
        return [number for name, part in value.items() for number in numbers_of(part, *keys, name)]
    if isinstance(value, list):
        return [number for part in value for number in numbers_of(part, *keys)]
    return [hook._shown(value, *keys)] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_no_figure_of_a_result_file_is_missing(path):
    section = (
        hook.benchmarks_page().partition(f"## {path.stem.replace('_', ' ').capitalize()}\n")[2].partition("\n## ")[0]
    )
    document = json.loads(path.read_text())
    missing = {number for number in numbers_of(document) if number not in section}
    assert section and missing == set()
    command = document.get("command") or document["environment"]["command"]
    assert command in section and "cores" in section
