"""The label sets of the FLARE challenges: one table for names, NSD tolerances and smallest plausible volumes.

Tolerances are those of the official FLARE22, FLARE23 and FLARE24 evaluation scripts; FLARE25 and FLARE26 kept FLARE24's
rules. ``min_volume_mm3`` is the smallest volume that the Radboud system measured on the FLARE22 training set (its
post-processing removes an organ below half of it).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Organ:
    """One label: ``id`` in the label map, dataset.json ``name``, official CSV ``short`` name and its constants."""

    id: int
    name: str
    short: str
    nsd_tolerance_mm: float
    min_volume_mm3: float | None
    sole: bool = False
    """No map has anything else: the official script scores a prediction with any higher value 0."""


FLARE22: tuple[Organ, ...] = (
    Organ(1, "liver", "Liver", 5, 1037420.7),
    Organ(2, "right_kidney", "RK", 3, 107952.7),
    Organ(3, "spleen", "Spleen", 3, 51560.1),
    Organ(4, "pancreas", "Pancreas", 5, 41522.0),
    Organ(5, "aorta", "Aorta", 2, 40533.6),
    Organ(6, "inferior_vena_cava", "IVC", 2, 41437.5),
    Organ(7, "right_adrenal_gland", "RAG", 2, 1385.6),
    Organ(8, "left_adrenal_gland", "LAG", 2, 2445.2),
    Organ(9, "gallbladder", "Gallbladder", 2, 4276.8),
    Organ(10, "esophagus", "Esophagus", 3, 6978.7),
    Organ(11, "stomach", "Stomach", 5, 140339.3),
    Organ(12, "duodenum", "Duodenum", 7, 43615.0),
    Organ(13, "left_kidney", "LK", 3, 102572.2),
)

FLARE23: tuple[Organ, ...] = (*FLARE22, Organ(14, "lesion", "Lesion", 2, None))

LESION: tuple[Organ, ...] = (Organ(1, "lesion", "Lesion", 2, None, sole=True),)
"""Task 1 of FLARE24 to FLARE26, pan-cancer: every lesion is the one class."""

LATER_YEARS = ("flare24", "flare25", "flare26")

LABEL_SETS: MappingProxyType[str, tuple[Organ, ...]] = MappingProxyType(
    {
        "flare22": FLARE22,
        "flare23": FLARE23,
        **{f"{year}-lesion": LESION for year in LATER_YEARS},
        **{f"{year}-organs": FLARE22 for year in LATER_YEARS},
    }
)
"""``-lesion`` is task 1, ``-organs`` are tasks 2 and 3, which are scored as FLARE22."""


def dataset_labels(organs: tuple[Organ, ...]) -> dict[str, int]:
    """The ``labels`` entry of a dataset.json for this label set, background first."""
    return {"background": 0, **{organ.name: organ.id for organ in organs}}


SYNONYMS: dict[str, str] = {
    **{organ.short.lower(): organ.name for organ in FLARE23},
    "oesophagus": "esophagus",
    "gall_bladder": "gallbladder",
    "postcava": "inferior_vena_cava",
    "tumor": "lesion",
    "tumour": "lesion",
}
"""Other spellings of the FLARE organs, as data sets and the official tables use them."""


def canonical(name: str) -> str:
    """A FLARE organ's name, of any spelling of case, hyphens and blanks, or a synonym; others in small letters."""
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())
    return SYNONYMS.get(plain, plain)
