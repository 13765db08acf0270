"""JSON, YAML and CSV that people write or bring along: read, or refused with an error that names the file.

Such a file may hold anything: other encodings, nesting without end, numbers of a thousand digits, YAML's dates that do
not exist. No YAML tag makes an object of more than plain data (``safe_load``).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunet_flare.errors import InputError


def load_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: when it cannot be read or is no JSON.
    """
    return _parse(lambda: json.loads(path.read_text(encoding="utf-8")), str(path), "not readable as JSON")


def load_yaml(path: Path, where: str | None = None, *, plain_text: bool = False) -> Any:
    """The value of a YAML file; ``where`` is what an error calls it, by default its path. See :func:`parse_yaml`.

    Raises:
        InputError: when it cannot be read or is no YAML.
    """
    where = where or str(path)
    text = _parse(lambda: path.read_text(encoding="utf-8"), where, "no text in UTF-8")
    return parse_yaml(text, where, plain_text=plain_text)


def parse_yaml(text: str, where: str, *, plain_text: bool = False) -> Any:
    """The value of a YAML text; ``plain_text`` leaves every scalar the text that it is.

    Raises:
        InputError: when it is no YAML.
    """
    import yaml

    loader = yaml.BaseLoader if plain_text else yaml.SafeLoader
    return _parse(lambda: yaml.load(text, Loader=loader), where, "no valid YAML", yaml.YAMLError)


def load_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file that are not empty, each with the number of its last line; a byte order mark is left out.

    Raises:
        InputError: when it cannot be read or is no CSV.
    """

    def read() -> list[tuple[int, list[str]]]:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            return [(reader.line_num, row) for row in reader if row]

    return _parse(read, str(path), "no CSV in UTF-8", csv.Error)


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
