"""What every command line has: help for each option, a version, "did you mean", completion, and two spellings."""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from nnunet_flare import __version__
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.errors import InputError
from nnunet_flare.recipes.load import load_recipe

PROGRAMS = {
    "pseudolabel": ((),),
    "predict": ((),),
    "export": ((),),
    "postprocess": ((), ("learn",), ("tune",)),
    "evaluate": ((), ("efficiency",)),
    "doctor": ((),),
}


def parsers(monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.ArgumentParser]:
    """Every parser of every command."""
    found: list[argparse.ArgumentParser] = []

    def grab(self, args=None, namespace=None):
        found.append(self)
        raise SystemExit

    monkeypatch.setattr(HyphenParser, "parse_known_args", grab)
    for module, calls in PROGRAMS.items():
        for words in calls:
            with pytest.raises(SystemExit):
                importlib.import_module(f"nnunet_flare.cli.{module}").main(list(words))
    while found:
        parser = found.pop(0)
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()


def refusal(capsys: pytest.CaptureFixture[str], module: str, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"nnunet_flare.cli.{module}").main(list(words))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_every_option_is_described_and_no_help_has_markup(monkeypatch):
    seen = 0
    for parser in parsers(monkeypatch):
        bare = [
            a.option_strings or a.dest
            for a in parser._actions
            if not a.help and not isinstance(a, argparse._SubParsersAction)
        ]
        assert bare == [], parser.prog
        assert "`" not in parser.format_help(), parser.prog
        seen += 1
    assert seen > 20


def test_help_fits_a_terminal_of_80_columns_and_breaks_no_name(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for parser in parsers(monkeypatch):
        lines = parser.format_help().splitlines()
        assert [line for line in lines if line.endswith("-")] == [], parser.prog
        assert [line for line in lines if len(line) > 80] == [], parser.prog


def test_no_option_is_shown_in_two_spellings_but_nnunets_own(monkeypatch):
    for parser in parsers(monkeypatch):
        for action in parser._actions:
            if "--trust_checkpoint" not in action.option_strings:
                names = [name.lstrip("-").replace("_", "-") for name in action.option_strings if name[:2] == "--"]
                assert len(set(names)) == len(names), f"{parser.prog} {action.option_strings}"


@pytest.mark.parametrize("module", PROGRAMS)
def test_every_command_says_its_version(module, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"nnunet_flare.cli.{module}").main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"nnunet-flare {__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("stat",), "did you mean status?"),
        (("run", "--recipies", "demo"), "unknown option --recipies; did you mean --recipe?"),
        (("run", "-d", "1", "-u", "x", "-devise", "cpu"), "unknown option -devise; did you mean -device?"),
        (("run", "-d", "1", "-u", "x", "-device", "gpu"), "expected cuda, cpu or mps; did you mean cpu?"),
        (("run", "--zzzzzz"), "unknown option --zzzzzz\n"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(capsys, words, expected):
    assert expected in refusal(capsys, "pseudolabel", *words)


def test_a_mistyped_recipe_or_key_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean uncertainty"):
        load_recipe("uncertanty")
    with pytest.raises(InputError, match=r"selection.treshold: unknown key; did you mean selection.threshold\?"):
        load_recipe("demo", {"selection.treshold": "0.5"})
    with pytest.raises(InputError, match=r"training.num_epoch: unknown key; did you mean training.num_epochs\?"):
        load_recipe("demo", {"training.num_epoch": "5"})


def parser_of_two() -> HyphenParser:
    parser = HyphenParser(prog="flare-x")
    parser.add_argument("--dry-run", action="store_true", help="x")
    parser.add_argument("--save_members", help="x")
    return parser


@pytest.mark.parametrize("dry", ["--dry-run", "--dry_run", "--dry"])
@pytest.mark.parametrize("save", ["--save_members=a", "--save-members=a"])
def test_hyphens_and_underscores_mean_the_same(dry, save):
    found = parser_of_two().parse_args([dry, save])
    assert found.dry_run and found.save_members == "a"


@pytest.mark.parametrize("value", ["a/--b", "-1", "--no such option"])
def test_values_are_no_options(value):
    parser = parser_of_two()
    parser.add_argument("-d", help="x")
    parser.add_argument("--number", type=int, help="x")
    if value == "-1":
        assert parser.parse_args(["--number", value]).number == -1
    else:
        assert parser.parse_args([f"--save_members={value}", "-dtask"]).save_members == value


def test_completion_is_a_script_that_bash_takes(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        importlib.import_module("nnunet_flare.cli.pseudolabel").main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert end.value.code == 0 and "--dry-run" in script
    if shutil.which("bash"):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_without_the_extra_completion_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'nnunet-flare[completion]'" in refusal(capsys, "predict", "--print-completion", "bash")


def test_help_imports_nothing_heavy():
    code = """
import sys
from nnunet_flare.cli.pseudolabel import main
try:
    main(["run", "--help"])
except SystemExit:
    pass
heavy = {"torch", "nnunetv2", "numpy", "rich", "shtab", "difflib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
