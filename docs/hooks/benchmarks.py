"""MkDocs hook: ``benchmarks.md`` is made of the JSON that the scripts in ``benchmarks/`` wrote, figure by figure."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
INTRODUCTION = """# Benchmarks

Every table below is made from the file that its script wrote (`benchmarks/results/*.json`). No figure is copied by
hand. Both sides of a comparison ran on the same machine, shared with other work. Single repeats are in the files.
Memory is that of the whole process tree unless a table says otherwise. To run a script again, use the command shown. It
needs the development environment that `make test` makes, and uses a phantom if a real scan is missing.

↓: less is better. ↑: more is better. No arrow: neither. *Ours / reference* is our time or memory as a share of the
other side's: 2 % is fifty times less.
"""
SETTING = ("command", "hardware", "environment", "machine", "cores", "cpu", "python", "versions", "bf16", "threads")
REPEATS = ("turns", "runs")
WRAPPERS = ("results", "rows")
"""Keys that hold figures and say nothing about them."""
UNSHOWN = ("met", "target")
"""What a script checks for us: whether a goal was reached."""
WORDS = {
    "seconds": "time (s)",
    "ratio": "ours / reference",
    "ratio to stock": "share of stock's",
    "wall": "wall time",
    "cpu": "processor time",
    "peak": "peak memory",
    "difference": "largest difference",
    "same": "same windows on both sides, no mirroring",
    "defaults": "default settings of both sides",
    "first run, converts": "first run of ours, which converts the network",
}
LESS = ("s", "h", "mb", "gb", "hu", "mm", "seconds", "hours", "ratio", "difference")
MORE = ("dice", "dsc", "nsd", "spearman", "auc", "voxels")
"""First or last words of keys whose figures are better when they are smaller, or larger."""
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
    gpu = f", {flat['gpu']}" if flat.get("gpu") else ""
    lines.append(f"Machine: {machine}, {flat.get('cores')} cores{features}{gpu}. Versions: {listed}.\n")
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
    parts = {key: part for key, part in value.items() if key not in (*SETTING, *REPEATS) and not _is_unshown(key)}
    plain = {key: part for key, part in parts.items() if _is_plain(part) and part not in _names(value)}
    rows = [(key, part) for key, part in parts.items() if isinstance(part, Mapping) and _is_flat(part)]
    if plain:
        yield (
            f"{caption}: ".lstrip(": ")
            + "; ".join(f"{_label(key)}: {_shown(part, key)}" for key, part in plain.items())
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
    every = dict.fromkeys(key for _, record in rows for key in record)
    columns = [key for key in every if key not in REPEATS and not _is_unshown(key)]
    named = any(name for name, _ in rows)
    head = ([""] if named else []) + [_label(column) for column in columns]
    lines = [f"**{caption}**\n"] if caption else []
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, record in rows:
        cells = [_shown(record[column], column, name) if column in record else "" for column in columns]
        lines.append(f"| {' | '.join(([_label(name)] if named else []) + cells)} |")
    return "\n".join(lines) + "\n"


def _is_unshown(key: str) -> bool:
    return key.partition("_")[0] in UNSHOWN


def _label(key: str) -> str:
    """``wall_s`` as ``wall time (s) ↓``."""
    first, underscore, last = key.rpartition("_")
    unit = f" ({UNITS[last]})" if underscore and last in UNITS else ""
    text = (first if unit else key).replace("_", " ").replace("|", "/")
    return WORDS.get(text, text) + unit + _arrow(key)


def _arrow(key: str) -> str:
    words = key.replace(",", " ").replace("_", " ").split()
    if not words or ("voxels" in words and "equal" not in words):
        return ""
    ends = {words[0], words[-1]}
    return " ↓" if ends & set(LESS) and "scans" not in words else " ↑" if ends & set(MORE) else ""


def _shown(value: Any, *keys: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and any("ratio" in key.replace("_", " ").split() for key in keys):
        return f"{100 * value:.3g} %"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "–" if value is None else str(value).replace("|", "/")
