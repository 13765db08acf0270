"""MkDocs hook: ``benchmarks.md`` is made of the JSON that the scripts in ``benchmarks/`` wrote, figure by figure."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
INTRODUCTION = """# Benchmarks

Every table below is drawn from the file that its script wrote (`benchmarks/results/*.json`), so no figure is copied by
hand. Both sides of a comparison ran on one machine, shared with other work; raw repeats are in the files. Memory is
that of the whole process tree where nothing else is said. Run a script again with the command shown: it needs the
development environment that `make test` makes, and takes a phantom where a real scan is missing.
"""
SETTING = ("command", "hardware", "environment", "machine", "cores", "cpu", "python", "versions", "bf16", "threads")
REPEATS = ("turns", "runs")
WRAPPERS = ("results", "rows")
"""Keys that hold figures and say nothing about them."""
UNITS = {"s": "s", "mb": "MB", "gb": "GB", "hu": "HU", "mm": "mm", "mm3": "mm³", "h": "h"}


def on_files(files: Any, config: Any) -> Any:
    """Add the page to MkDocs' files."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "benchmarks.md", content=benchmarks_page()))
    return files


def benchmarks_page(folder: Path = FOLDER) -> str:
    """Markdown with a section per result file: what was measured, on what, by which command, and the figures."""
    parts = [INTRODUCTION]
    for path in sorted((folder / "results").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"## {path.stem.replace('_', ' ').capitalize()}\n\n{_purpose(folder / f'{path.stem}.py')}\n")
        parts += [_setting(document), *_figures(document, "")]
    return "\n".join(parts)


def _purpose(script: Path) -> str:
    """The first paragraph of a script's docstring."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ")


def _setting(document: Mapping[str, Any]) -> str:
    """Command, hardware and versions of a result file, whichever way it nests them."""
    flat = dict(document)
    for key in ("environment", "hardware"):
        flat.update(flat.pop(key, {}))
    machine = flat.get("machine") or flat.get("cpu")
    lines = [f"`{flat['command']}`\n" if flat.get("command") else ""]
    features = f" ({', '.join(flat['bf16'])})" if flat.get("bf16") else ""
    versions = dict(flat.get("versions", {}))
    versions = {"Python": flat.get("python") or versions.pop("python", None), **versions}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines.append(f"{machine}, {flat.get('cores')} cores{features}; {listed}.\n")
    return "\n".join(lines)


def _figures(value: Mapping[str, Any] | Sequence[Any], caption: str) -> Iterator[str]:
    """Tables of everything in a part of a document that is neither setting nor raw repeat."""
    if not isinstance(value, Mapping):
        records = [record for record in value if isinstance(record, Mapping)]
        if records and all(_is_flat(record) for record in records):
            yield _table(caption, [("", record) for record in records])
            return
        for record in records:
            yield from _figures(record, ", ".join([caption, *_names(record)]).strip(", "))
        return
    parts = {key: part for key, part in value.items() if key not in (*SETTING, *REPEATS)}
    plain = {key: part for key, part in parts.items() if _is_plain(part) and part not in _names(value)}
    rows = [(key, part) for key, part in parts.items() if isinstance(part, Mapping) and _is_flat(part)]
    if plain:
        yield (
            f"{caption}: ".lstrip(": ")
            + "; ".join(f"{_label(key)} {_shown(part)}" for key, part in plain.items())
            + ".\n"
        )
    if rows:
        yield _table(caption, rows)
    for key, part in parts.items():
        if not _is_plain(part) and (key, part) not in rows:
            yield from _figures(part, ", ".join(filter(None, (caption, "" if key in WRAPPERS else _label(key)))))


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Mapping) and not (
        isinstance(value, list) and any(isinstance(v, Mapping) for v in value)
    )


def _is_flat(record: Mapping[str, Any]) -> bool:
    """Whether a record is one row of a table: no record in it but raw repeats."""
    return all(_is_plain(part) for key, part in record.items() if key not in REPEATS)


def _names(record: Mapping[str, Any]) -> list[str]:
    """The words that say what a record of a list is about."""
    return [part for part in record.values() if isinstance(part, str)]


def _table(caption: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    columns = list(dict.fromkeys(key for _, record in rows for key in record if key not in REPEATS))
    named = any(name for name, _ in rows)
    head = ([""] if named else []) + [_label(column) for column in columns]
    lines = [f"**{caption}**\n"] if caption else []
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, record in rows:
        cells = [_shown(record[column]) if column in record else "" for column in columns]
        lines.append(f"| {' | '.join(([_label(name)] if named else []) + cells)} |")
    return "\n".join(lines) + "\n"


def _label(key: str) -> str:
    """``wall_s`` as ``wall (s)``."""
    first, underscore, last = key.rpartition("_")
    text = f"{first} ({UNITS[last]})" if underscore and last in UNITS else key
    return text.replace("_", " ").replace("|", "/")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "–" if value is None else str(value).replace("|", "/")
