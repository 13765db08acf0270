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
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from nnunet_flare.children import safe_children
from nnunet_flare.errors import FlareError, InputError

GOES_ON = "finished work is kept; the same command goes on from there"
STARTS_ANEW = "the same command starts again"
"""What is said after Ctrl-C."""

CUT_SHORT = 141
"""Exit code of a program that the signal SIGPIPE ends, as shells give it."""


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


def open_streams() -> None:
    """Give a process that was started with closed standard streams (``2>&-``) the null device in their place.

    Otherwise the next file that it opens gets their number, and what is printed goes into that file. To be called
    before anything is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def run_command(program: str, function: Callable[[], int], *, interrupted: str = STARTS_ANEW) -> int:
    """Run a command's body: our errors and the system's become one line and an exit code, Ctrl-C becomes 130.

    ``interrupted`` says after Ctrl-C what is there and how to go on.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be text that the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with safe_children():
            code = function()
    except FlareError as error:
        _say(f"{program}: error: {error}")
        code = error.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has gone, and what was to follow was not done
        code = CUT_SHORT
    except (OSError, MemoryError) as error:
        logging.getLogger(__name__).debug("where it happened", exc_info=True)
        _say(f"{program}: error: {_in_words(error)}")
        code = 1
    except KeyboardInterrupt:
        _say(f"{program}: interrupted; {interrupted}")
        code = 130
    try:
        sys.stdout.flush()  # here, where it can still be said that the output is on a full disk
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        _say(f"{program}: error: the output cannot be written: {_in_words(error)}")
        code = code or 1
    return code


def _say(line: str) -> None:
    with suppress(OSError):  # whoever read our errors has gone
        sys.stderr.write(line + "\n")


def _discard_output() -> None:
    """What is left in the buffer of stdout goes nowhere, so that the interpreter does not fail with it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with suppress(OSError):
        sys.stdout.flush()


class _ToLog(io.TextIOBase):
    """A stream that keeps what is printed for those who ask for more (``-v``)."""

    def write(self, text: str) -> int:
        if text.strip():
            logging.getLogger(__name__).debug("%s", text.rstrip())
        return len(text)


@contextmanager
def quiet_stock() -> Iterator[None]:
    """Inside, what stock nnU-Net prints (plans, page by page) goes to the log of ``-v`` and not to the terminal."""
    with redirect_stdout(_ToLog()):
        yield


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


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float, unit: str = "", *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that takes a number from ``low`` (or only ``above`` it) to ``high``, never NaN."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (above and value == low):
            words = (
                f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g} {unit}".rstrip()
            )
            raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected {words}")
        return value

    return parse


PROCESSES = whole(1, 4096)
SEED = whole(0, 2**32 - 1)


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """``["a.b=1", ...]`` as a dict; values stay text.

    Raises:
        InputError: for a word without ``=`` or a key given twice.
    """
    settings: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(f"--set {word}: expected KEY=VALUE, for example selection.threshold=0.85")
        if key in settings:
            raise InputError(f"--set {key}: given twice ({settings[key]} and {value})")
        settings[key] = value
    return settings
