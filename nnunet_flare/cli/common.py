"""What the commands share: exit codes, one-line errors, logging to the terminal and nnU-Net's folders."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nnunet_flare.errors import FlareError, InputError


def setup_logging(verbose: bool = False) -> None:
    """Write our own log records to stderr, bare; those of other packages stay as they are."""
    logger = logging.getLogger("nnunet_flare")
    for handler in [h for h in logger.handlers if isinstance(h, _Terminal)]:
        logger.removeHandler(handler)
    terminal = _Terminal(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(terminal)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


class _Terminal(logging.StreamHandler):
    """The one handler of our commands, known again when a command runs twice in one process."""


def run_command(program: str, function: Callable[[], int]) -> int:
    """Run a command's body: our errors and the system's become one line and an exit code, Ctrl-C becomes 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be text that the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return function()
    except FlareError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:
        logging.getLogger(__name__).debug("where it happened", exc_info=True)
        sys.stderr.write(f"{program}: error: {_in_words(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return 130


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Inside, the garbage collector runs seldom, and when the program ends it no longer looks at what lives then.

    Importing torch makes very many objects that live to the end. Looking through them again and again while they are
    made, and once more at the end, costs 0.3 s.
    """
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _in_words(error: OSError | MemoryError) -> str:
    """A full disk, a missing permission or too little memory, with the file that it concerns."""
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({error})' if str(error) else ''}; use fewer processes, or a machine with more"
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names.

    Raises:
        InputError: when it is not set or not a folder.
    """
    value = os.environ.get(variable)
    if not value:
        raise InputError(f"the environment variable {variable} is not set; export {variable}=FOLDER as for nnU-Net")
    return Path(value)


class HyphenParser(argparse.ArgumentParser):
    """An argument parser that takes ``--save-members`` for ``--save_members``, as people type both."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        args = list(sys.argv[1:] if args is None else args)
        known = {option for action in self._actions for option in action.option_strings}
        for index, word in enumerate(args):
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in known and name.replace("-", "_")[2:] != name[2:]:
                candidate = "--" + name[2:].replace("-", "_")
                if candidate in known:
                    args[index] = candidate + equals + value
        return super().parse_known_args(args, namespace)


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """``["a.b=1", ...]`` as a dict; values stay text.

    Raises:
        InputError: for a word without ``=`` or a key given twice.
    """
    settings: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(f"--set {word}: expected key=value, for example selection.threshold=0.85")
        if key in settings:
            raise InputError(f"--set {key}: given twice ({settings[key]} and {value})")
        settings[key] = value
    return settings
