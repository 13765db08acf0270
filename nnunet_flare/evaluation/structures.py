"""What is scored: a label, or a region made of several labels, with its tolerance and its rule for slices.

The official tables cover the FLARE label sets; any nnU-Net ``dataset.json`` serves as well, region-based ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.documents import load_json
from nnunet_flare.errors import InputError
from nnunet_flare.labels import BACKGROUND, IGNORE
from nnunet_flare.organs import FLARE22, FLARE23, LABEL_SETS, Organ, canonical

LABELLED_SLICES_ONLY: frozenset[str] = frozenset({"aorta", "inferior_vena_cava", "esophagus"})
"""Tubes that leave the field of view: the official script scores them on the reference's labelled slices only."""

NOT_AN_ORGAN: frozenset[str] = frozenset({"lesion", "tumor", "tumour"})
"""Structures that the official organ mean leaves out, and that count as false positives on a healthy scan."""

DEFAULT_TOLERANCE_MM = 2.0
"""NSD tolerance of structures outside the FLARE table: the challenge's own value for lesions and small organs."""


@dataclass(frozen=True)
class Structure:
    """One scored thing: ``id`` in tables, dataset.json ``name``, CSV ``short`` name, its label ids and constants."""

    id: int
    name: str
    short: str
    labels: tuple[int, ...]
    nsd_tolerance_mm: float
    labelled_slices_only: bool = False
    sole: bool = False
    """The only class: see :class:`nnunet_flare.organs.Organ`."""

    @property
    def is_lesion(self) -> bool:
        """A finding that a healthy body does not have."""
        return self.name.lower() in NOT_AN_ORGAN


def structures_of(organs: Sequence[Organ | Structure]) -> tuple[Structure, ...]:
    """The structures of a FLARE label set; structures are passed through."""
    return tuple(organ if isinstance(organ, Structure) else _of_organ(organ) for organ in organs)


def _of_organ(organ: Organ) -> Structure:
    return Structure(
        organ.id,
        organ.name,
        organ.short,
        (organ.id,),
        organ.nsd_tolerance_mm,
        organ.name in LABELLED_SLICES_ONLY,
        organ.sole,
    )


def read_structures(name_or_path: str, *, tolerance_mm: float = DEFAULT_TOLERANCE_MM) -> tuple[Structure, ...]:
    """Structures by the name of a label set (``flare22``, ``flare24-lesion``) or from a ``dataset.json``.

    A region of dataset.json (a list of ids) is scored as the union of its labels. Organs of the FLARE table keep the
    official tolerances and rules, however they are spelled; others get ``tolerance_mm``.

    Raises:
        InputError: for a name that is neither, a file without usable labels, or one with a label or a name twice.
    """
    if name_or_path in LABEL_SETS:
        return structures_of(LABEL_SETS[name_or_path])
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(
            f"--labels {name_or_path}: not a label set ({', '.join(LABEL_SETS)}) and not an existing dataset.json"
        )
    document = load_json(path)
    try:
        labels = document["labels"]
        entries = [(name, value) for name, value in labels.items() if name not in (BACKGROUND, IGNORE)]
        parsed = [(name, _label_ids(value)) for name, value in entries]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: no usable 'labels' ({error}); expected a label id, or a list of ids, for each name"
        ) from error
    if not parsed:
        raise InputError(f"{path}: 'labels' names no foreground label")
    structures = tuple(_of_entry(place, name, ids, tolerance_mm) for place, (name, ids) in enumerate(parsed, 1))
    _check_differ(structures, path)
    return structures


def _check_differ(structures: Sequence[Structure], path: Path) -> None:
    """A table has one column, and one score, for each."""
    for number, one in enumerate(structures):
        for other in structures[:number]:
            if one.id == other.id or one.short == other.short:
                what = f"the label {one.id}" if one.id == other.id else f"the column {one.short}"
                raise InputError(f"{path}: '{other.name}' and '{one.name}' both have {what}; leave one of them out")


def read_ignored(name_or_path: str) -> int | None:
    """The *ignore* label of a dataset.json; None where it has none, and for a FLARE label set.

    Raises:
        InputError: where it is no id from 1 to 255.
    """
    if name_or_path in LABEL_SETS:
        return None
    try:
        labels = load_json(Path(name_or_path))["labels"]
        return None if IGNORE not in labels else _label_ids(labels[IGNORE])[0]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name_or_path}: no usable 'ignore' label ({error}); expected one id") from error


def _label_ids(value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and 0 < i < 256 for i in ids):
        raise ValueError(f"label {value!r}: expected ids from 1 to 255")
    return tuple(dict.fromkeys(ids))


def _of_entry(place: int, name: str, ids: tuple[int, ...], tolerance_mm: float) -> Structure:
    exact = {organ.name: organ for organ in FLARE23}.get(name)
    known = exact or {organ.name: organ for organ in FLARE22}.get(canonical(name))
    identifier = ids[0] if len(ids) == 1 else 1000 + place
    if known is None:
        return Structure(identifier, name, name, ids, tolerance_mm)
    short = name if exact is None else known.short  # which two spellings in one file do not share
    return Structure(identifier, name, short, ids, known.nsd_tolerance_mm, known.name in LABELLED_SLICES_ONLY)


def label_ids(structures: Sequence[Structure]) -> tuple[int, ...]:
    """Every label id that some structure uses, sorted."""
    return tuple(sorted({label for structure in structures for label in structure.labels}))
