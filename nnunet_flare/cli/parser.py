"""The parser of every command: ``--version``, shell completion, "did you mean", and one name for two spellings."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

SHELLS = ("bash", "zsh", "tcsh")


class _WholeWords(argparse.HelpFormatter):
    """Breaks lines at spaces only, so that names such as ``flare-predict`` stay in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in self._split_lines(text, width - len(indent)))


class HyphenParser(argparse.ArgumentParser):
    """An argument parser that takes ``--save-members`` for ``--save_members`` and the reverse, as people type both.

    An option or a word that nobody knows is answered with the nearest one that is known.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _WholeWords, **kwargs})
        self.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
        if " " not in self.prog:
            text = "print a completion script for your shell and exit (extra: completion)"
            self.add_argument("--print-completion", action=_Completion, choices=SHELLS, help=text)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        args = list(sys.argv[1:] if args is None else args)
        known = {option for action in self._actions for option in action.option_strings}
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for index, word in enumerate(args):
            if word == "--" or (has_commands and not word.startswith("-")):
                break  # what follows belongs to a command
            name, equals, value = word.partition("=")
            if name in known:
                continue
            if not name.startswith("--"):
                self._refuse_near_miss(name, known)
                continue
            candidates = ("--" + name[2:].replace("-", "_"), "--" + name[2:].replace("_", "-"))
            found = next((candidate for candidate in candidates if candidate in known), None)
            if found is not None:
                args[index] = found + equals + value
            elif not any(option.startswith(candidates) for option in known) and " " not in name:
                self.error(f"unknown option {name}{self._hint(name, known)}")
        return super().parse_known_args(args, namespace)

    def _refuse_near_miss(self, word: str, known: Iterable[str]) -> None:
        """``-devise`` is no value of ``-d``, which argparse takes it for, where there is a ``-device``."""
        long = [option for option in known if len(option) > 3 and option[1] != "-"]
        if word[:1] == "-" and word[1:].isalpha() and not any(option.startswith(word) for option in long):
            hint = self._hint(word, long) if len(word) > 3 else ""
            if hint:
                self.error(f"unknown option {word}{hint}")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found, left = self.parse_known_args(args, namespace)
        if left:
            options = {option for action in self._actions for option in action.option_strings}
            hint = self._hint(left[0], options) if left[0].startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(left)}{hint}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            words = [str(choice) for choice in action.choices]
            name = "command" if isinstance(action, argparse._SubParsersAction) else None
            message = f"found {str(value)[:40]!r}, expected {_one_of(words)}{self._hint(str(value), words)}"
            if name:
                self.error(f"{name}: {message}")
            raise argparse.ArgumentError(action, message)

    @staticmethod
    def _hint(word: str, known: Iterable[str]) -> str:
        from nnunet_flare.wording import did_you_mean

        return did_you_mean(word, known)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, with where the help is, and end with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists its options\n")


def _one_of(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from nnunet_flare import __version__

        print(f"nnunet-flare {__version__}")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *_: Any) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab: pip install 'nnunet-flare[completion]'")
        complete_files(parser, shtab)
        print(shtab.complete(parser, values))
        parser.exit()


def complete_files(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Mark the options that take files or folders, for completion."""
    for action in parser._actions:
        if action.type is Path and not hasattr(action, "complete"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for sub in set(action.choices.values()):
                complete_files(sub, shtab)
