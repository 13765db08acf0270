"""Trainer classes named ``<trainer>_<N>epochs``, made when they are first asked for and kept.

A trainer's module calls :func:`class_with_length` in its ``__getattr__``. The class becomes an attribute of that
module, so that every import gives the same object and spawned workers can unpickle it.
"""

from __future__ import annotations

import re
from typing import Any

PATTERN = re.compile(r"(?P<base>\w+)_(?P<epochs>[1-9]\d{0,5})epochs")


def class_with_length(name: str, namespace: dict[str, Any]) -> type:
    """The class ``name`` of a trainer's module, whose globals are ``namespace``.

    Raises:
        AttributeError: when the name is not that of a trainer of the module with a length.
    """
    match = PATTERN.fullmatch(name)
    base = None if match is None else namespace.get(match["base"])
    if match is None or not isinstance(base, type) or getattr(base, "epochs_by_name", 0) is not None:
        raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
    epochs = int(match["epochs"])
    made = type(
        name,
        (base,),
        {
            "__module__": namespace["__name__"],
            "__doc__": f"{base.__name__} for {epochs} epochs.",
            "epochs_by_name": epochs,
        },
    )
    kept: type = namespace.setdefault(name, made)
    return kept
