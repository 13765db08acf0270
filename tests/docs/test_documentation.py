"""The pages: they build without a warning, and no command in them has an option that does not exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nnunet_flare.cli.parser import HyphenParser

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def shown_commands(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks that start with one of our commands; usage lines with [...] left out."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if re.match(r"flare-\w+ ", line) and not re.search(r"\[-|\.\.\.", line):
                yield line


class Parsed(Exception):
    """The command's words were understood."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_shown_command_is_understood(page, monkeypatch):
    understand = HyphenParser.parse_known_args

    def parse(self, args=None, namespace=None):
        found = understand(self, args, namespace)
        if not self.prog.startswith("flare-pseudolabel "):  # a subcommand's own parser is asked on the way
            assert not found[1], f"unknown: {found[1]}"
            raise Parsed
        return found

    monkeypatch.setattr(HyphenParser, "parse_known_args", parse)
    for line in shown_commands(page):
        program, *words = shlex.split(line, comments=True)
        main = importlib.import_module(f"nnunet_flare.cli.{program.removeprefix('flare-')}").main
        try:
            main(words)
        except Parsed:
            continue
        except SystemExit as error:
            pytest.fail(f"{page.name}: {line}\nis refused with exit code {error.code}")
        pytest.fail(f"{page.name}: {line}\nwas not parsed")


def test_the_pages_are_found_and_show_commands():
    assert sum(len(list(shown_commands(page))) for page in PAGES) > 20


TABLE = re.compile(r"^\|.*\|\n\|[-|: ]+\|\n(?:\|.*\|\n)*", re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_whole_and_say_nothing_twice(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8") + "\n", flags=re.M | re.S)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    found = [match.group().splitlines() for match in TABLE.finditer(text)]
    assert rows == [row for table in found for row in table], "a row outside of a table"
    for head, _, *body in found:
        cells = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in (head, *body)]
        assert len(set(cells)) == 1, f"another number of columns: {head}"
        assert len(set(body)) == len(body), f"a row twice: {head}"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed (pip install nnunet-flare[docs])")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    commands = (tmp_path / "site" / "commands" / "index.html").read_text(encoding="utf-8")
    for name in ("flare-pseudolabel report", "flare-predict", "flare-evaluate efficiency", "flare-postprocess learn"):
        assert name in commands
    assert "--decisions" in commands and "--step_size" in commands
    figures = (tmp_path / "site" / "benchmarks" / "index.html").read_text(encoding="utf-8")
    assert "deepmind (s)" in figures and "<table>" in figures
    modules = (tmp_path / "site" / "modules-inference" / "index.html").read_text(encoding="utf-8")
    assert "FlarePredictor" in modules and "from_model_folder" in modules
    pages = list((tmp_path / "site").rglob("*.html"))
    outside = {
        link
        for page in pages
        for link in re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8")
        )
    }
    assert outside == set()


def test_the_site_can_be_written_as_plain_files_for_another_builder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "docs" / "hooks" / "write.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "mkdocs.yml").read_text(encoding="utf-8"))
    assert "hooks" not in config
    listed = set(re.findall(r"[\w-]+\.md", json.dumps(config["nav"])))
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "docs").glob("*.md")}
    assert listed == set(pages), "every page is in the menu"
    assert {"commands.md", "benchmarks.md", "modules-inference.md", "recipes-uncertainty.md"} <= listed
    for name, text in pages.items():
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", text, flags=re.S)):
            assert (tmp_path / "docs" / link).is_file(), f"{name}: {link}"
        assert not re.search(r"^(!!!|\?\?\?|=== )", text, re.M), f"{name}: not plain Markdown"


def test_contributors_are_told_targets_that_exist():
    told = set(re.findall(r"^make ([a-z-]+)", (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M))
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"test", "docs", "release-check"} <= told <= targets
