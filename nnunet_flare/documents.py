"""JSON, YAML and CSV: read, or refused with an error that names the file.

Such a file may hold anything: other encodings, nesting without end, numbers of a thousand digits, YAML's dates that do
not exist. No YAML tag makes an object of more than plain data (``safe_load``).

A spreadsheet takes a cell that starts with ``=`` for a formula and runs it. Names of files and organs come from
anywhere, so every table of ours is made by :func:`csv_text`, which puts ``'`` before such a text, and read by
:func:`load_rows`, which takes it away again.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.shapes import mismatch

_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""The starts of a cell that spreadsheets take for a formula, the wide forms of Chinese and Japanese input included."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")


def load_json(path: Path, shape: Any = object) -> Any:
    """The value of a JSON file that has a shape (see :mod:`nnunet_flare.shapes`).

    Raises:
        InputError: when it cannot be read, is no JSON, or has another shape.
    """
    value = _parse(lambda: json.loads(path.read_text(encoding="utf-8")), str(path), "not readable as JSON")
    problem = mismatch(value, shape)
    if problem is not None:
        raise InputError(f"{path}: {problem}")
    return value


def load_yaml(path: Path, where: str | None = None, *, plain_text: bool = False) -> Any:
    """The value of a YAML file; ``where`` is what an error calls it, by default its path. See :func:`parse_yaml`.

    Raises:
        InputError: when it cannot be read or is no YAML.
    """
    where = where or str(path)
    text = _parse(lambda: path.read_text(encoding="utf-8"), where, "not text in UTF-8")
    return parse_yaml(text, where, plain_text=plain_text)


def parse_yaml(text: str, where: str, *, plain_text: bool = False) -> Any:
    """The value of a YAML text; ``plain_text`` leaves every scalar the text that it is.

    Raises:
        InputError: when it is no YAML.
    """
    import yaml

    loader = yaml.BaseLoader if plain_text else yaml.SafeLoader
    return _parse(lambda: yaml.load(text, Loader=loader), where, "not valid YAML", yaml.YAMLError)


def load_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file that are not empty, each with the number of its last line; a byte order mark is left out.

    Cells that :func:`csv_text` guarded are given back as they were.

    Raises:
        InputError: when it cannot be read or is no CSV.
    """

    def read() -> list[tuple[int, list[str]]]:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            return [(reader.line_num, [_plain(cell) for cell in row]) for row in reader if row]

    return _parse(read, str(path), "not CSV in UTF-8", csv.Error)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """CSV of some rows, in which no text starts as a formula; numbers stay numbers, None is an empty cell."""
    lines = []
    for row in rows:
        stream = io.StringIO(newline="")
        csv.writer(stream, lineterminator="\r\n").writerow([_guarded(cell) for cell in row])  # quotes either character
        lines.append(stream.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def _guarded(cell: Any) -> Any:
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _parse(read: Callable[[], Any], where: str, what: str, *errors: type[Exception]) -> Any:
    refused: tuple[type[Exception], ...] = (OSError, ValueError, OverflowError, *errors)  # ValueError: encodings, dates
    try:
        return read()
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file") from error
    except RecursionError as error:
        raise InputError(f"{where}: {what} (nested too deeply)") from error
    except refused as error:
        raise InputError(f"{where}: {what} ({' '.join(str(error).split())})") from error


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in settings as ``outer.inner``, as ``--set`` names them; tuples as lists."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
