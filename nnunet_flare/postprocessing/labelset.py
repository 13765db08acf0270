"""Names and ids of the labels that a pipeline is written for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_flare.documents import load_json
from nnunet_flare.errors import InputError
from nnunet_flare.labels import IGNORE, Group
from nnunet_flare.organs import LABEL_SETS, canonical, dataset_labels


@dataclass(frozen=True)
class LabelSet:
    """What a label map may hold.

    Attributes:
        source: a label set's name, or the file.
        organs: ids of the organs of a single label by name.
        allowed: every id.
        regions: label ids of the regions by name; operations that only erase take them as they take organs.
        ignored: the id of voxels that nobody annotated, which count nowhere.
        entry: dataset.json's ``labels``, of which it was made.
    """

    source: str
    organs: Mapping[str, int]
    allowed: frozenset[int]
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: int | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """Label ids of every organ and region by name: what is measured and scored."""
        return {**{name: (label,) for name, label in self.organs.items()}, **self.regions}

    @property
    def in_file(self) -> str | dict[str, Any]:
        """What a pipeline file says of this set: its name, or the labels of a dataset.json, which may move."""
        return self.source if self.source in LABEL_SETS else dict(self.entry)

    def find(self, name: str | int) -> Group:
        """The id of an organ, or the ids of a region, given by name (as it is in the set, else any spelling of case,
        hyphens and blanks, or a synonym) or by id.

        Raises:
            ValueError: with the names that there are, or that the name may mean.
        """
        if isinstance(name, int):
            if name in self.organs.values():
                return name
            raise ValueError(f"label id {name} is not in {self.source}, which has {sorted(self.organs.values())}")
        everything: dict[str, Group] = {**self.organs, **self.regions}
        if name in everything:
            return everything[name]
        wanted = canonical(name)
        alike = [known for known in everything if canonical(known) == wanted]
        if len(alike) > 1:
            raise ValueError(f"organ '{name}' may be {' or '.join(alike)} of {self.source}; give the exact name")
        if alike:
            return everything[alike[0]]
        close = difflib.get_close_matches(wanted, map(canonical, everything), 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"organ '{name}' is not in {self.source} ({', '.join(everything)}){hint}")


def label_set(labels: str | Mapping[str, Any]) -> LabelSet:
    """The label set of a name (``flare22``, ``flare23``), a dataset.json's path, or its ``labels`` entry.

    Raises:
        InputError: for an unknown name, an unreadable file or unusable labels.
    """
    if isinstance(labels, str):
        if labels in LABEL_SETS:
            return _of_entry(labels, dataset_labels(LABEL_SETS[labels]))
        return _of_entry(labels, _read_entry(Path(labels)))
    return _of_entry("dataset.json", labels)


def _read_entry(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"labels {path}: not a label set ({', '.join(LABEL_SETS)}) and not an existing dataset.json")
    document = load_json(path)
    try:
        return document["labels"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: no usable 'labels' ({error}); expected nnU-Net's dataset.json") from error


def _of_entry(source: str, entry: Any) -> LabelSet:
    organs: dict[str, int] = {}
    regions: dict[str, tuple[int, ...]] = {}
    allowed, ignored = {0}, None
    for name, value in entry.items() if isinstance(entry, Mapping) else ():
        ids = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 256 for i in ids):
            raise InputError(f"{source}: label '{name}' is {value!r}; expected ids from 0 to 255")
        allowed.update(ids)
        if name == IGNORE:
            ignored = ids[0]
        elif len(ids) == 1 and ids[0] > 0:
            organs[name] = ids[0]
        elif len(ids) > 1:
            regions[name] = tuple(dict.fromkeys(ids))
    if not organs and not regions:
        raise InputError(f"{source}: names no organ; expected nnU-Net's 'labels'")
    return LabelSet(source, organs, frozenset(allowed), regions, ignored, entry)
