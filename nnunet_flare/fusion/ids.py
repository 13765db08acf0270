"""Label ids of other data sets and tools, mapped to ours by data files (``id_maps/*.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.documents import load_yaml, parse_yaml
from nnunet_flare.errors import InputError

KEYS = {"name", "ids", "others"}


@dataclass(frozen=True)
class IdMap:
    """Foreign id to ours (0: background). ``refuses_others``: ids that are not listed are an error, not background."""

    name: str
    ids: Mapping[int, int]
    refuses_others: bool

    @property
    def knows(self) -> frozenset[int]:
        """Our ids that such a label map can hold."""
        return frozenset(self.ids.values()) - {0}

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """The label map (Z, Y, X) in our ids, uint8.

        Raises:
            ValueError: for an id that is not listed, where the map refuses others.
        """
        table = np.zeros(max(int(labels.max(initial=0)), *self.ids) + 1, dtype=np.uint8)
        for foreign, own in self.ids.items():
            table[foreign] = own
        if self.refuses_others:
            unknown = sorted(set(np.flatnonzero(np.bincount(labels.ravel())).tolist()) - set(self.ids) - {0})
            if unknown:
                raise ValueError(f"holds the ids {unknown}, which id map {self.name} does not list")
        mapped: np.ndarray = table[labels]
        return mapped


def shipped_id_maps() -> list[str]:
    """Names of the id maps in the package."""
    folder = resources.files("nnunet_flare.fusion").joinpath("id_maps")
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_id_map(name_or_path: str) -> IdMap:
    """A shipped id map by name, or the user's own ``.yaml`` file: ``name``, ``ids``, ``others: refuse|background``.

    Raises:
        InputError: for an unknown name or a wrong file, with what was found and what is expected.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"id map {path}: no such file")
        document = load_yaml(path, f"id map {path}")
    elif name_or_path in shipped_id_maps():
        file = resources.files("nnunet_flare.fusion") / "id_maps" / f"{name_or_path}.yaml"
        document = parse_yaml(file.read_text(encoding="utf-8"), f"id map {name_or_path}")
    else:
        raise InputError(f"no id map '{name_or_path}'; there are {', '.join(shipped_id_maps())}, or give a YAML file")
    return _parse(document, f"id map {name_or_path}")


def _parse(document: Any, where: str) -> IdMap:
    if not isinstance(document, dict) or set(document) != KEYS:
        found = sorted(map(str, document)) if isinstance(document, dict) else type(document).__name__
        raise InputError(f"{where}: found {found}, expected the keys {', '.join(sorted(KEYS))}")
    ids = document["ids"]
    if not isinstance(ids, dict) or not ids:
        raise InputError(f"{where}: ids: expected foreign id: our id, found {ids!r:.80}")
    for foreign, own in ids.items():
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (foreign, own))
        if not whole or foreign < 1 or not 0 <= own <= 255:
            raise InputError(f"{where}: ids: found {foreign!r}: {own!r}, expected an id above 0 and one from 0 to 255")
    if document["others"] not in ("refuse", "background"):
        raise InputError(f"{where}: others: found {document['others']!r}, expected refuse or background")
    return IdMap(str(document["name"]), ids, document["others"] == "refuse")
