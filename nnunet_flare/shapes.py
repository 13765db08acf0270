"""What a JSON document must look like, and what is wrong with one that does not.

A shape is a type (``str``, ``int``, ``float``: any finite number, ``bool``, ``dict``, ``list``, ``object``: anything),
None, ``[shape]`` for a list, ``{str: shape}`` for an object of any keys, ``{"key": shape, "other?": shape}`` for one
that has at least ``key``, a set for one of some values, or a tuple of shapes for one of several.
"""

from __future__ import annotations

import math
from typing import Any

SPLITS = [{"train": [str], "val": [str]}]
"""Of nnU-Net's ``splits_final.json``."""

WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


def mismatch(value: Any, shape: Any, where: str = "") -> str | None:
    """The first place where a value has another shape, in words; None where it fits.

    Args:
        value: of a JSON document.
        shape: see the module.
        where: the place of the value in its document.
    """
    if isinstance(shape, tuple):
        problems = [mismatch(value, one, where) for one in shape]
        return None if None in problems else problems[-1]
    if isinstance(shape, (set, frozenset)):
        fits = any(type(value) is type(one) and value == one for one in shape)
        return None if fits else _told(value, where, " or ".join(sorted(map(repr, shape))))
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _told(value, where, WORDS[list])
        entries = (mismatch(entry, shape[0], f"{where}[{number}]") for number, entry in enumerate(value))
        return next((problem for problem in entries if problem), None)
    if isinstance(shape, dict):
        return _of_object(value, shape, where)
    return None if _is_of(value, shape) else _told(value, where, WORDS[shape if shape is not None else type(None)])


def _of_object(value: Any, shape: dict[Any, Any], where: str) -> str | None:
    if not isinstance(value, dict):
        return _told(value, where, WORDS[dict])
    for key, part in shape.items():
        if key is str:
            entries = [(name, entry) for name, entry in value.items() if name not in shape]
        elif key.removesuffix("?") in value:
            entries = [(key.removesuffix("?"), value[key.removesuffix("?")])]
        elif key.endswith("?"):
            continue
        else:
            return f"{where}.{key}: is missing" if where else f"'{key}' is missing"
        for name, entry in entries:
            problem = mismatch(entry, part, f"{where}.{name}" if where else str(name))
            if problem:
                return problem
    return None


def _is_of(value: Any, kind: Any) -> bool:
    if kind is object:
        return True
    if kind is None:
        return value is None
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is kind


def _told(value: Any, where: str, expected: str) -> str:
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    found = f"{value!r:.60}" if plain else WORDS.get(type(value), type(value).__name__)
    return f"{where + ': ' if where else ''}found {found}, expected {expected}"
