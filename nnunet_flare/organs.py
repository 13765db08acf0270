"""The label sets of the FLARE challenges: one table for names, NSD tolerances and smallest plausible volumes.

Tolerances are those of the official FLARE22/23 evaluation scripts. ``min_volume_mm3`` is the smallest volume that the
Radboud system measured on the FLARE22 training set (its post-processing removes an organ below half of it).
"""

from __future__ import annotations

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

LABEL_SETS: MappingProxyType[str, tuple[Organ, ...]] = MappingProxyType({"flare22": FLARE22, "flare23": FLARE23})


def dataset_labels(organs: tuple[Organ, ...]) -> dict[str, int]:
    """The ``labels`` entry of a dataset.json for this label set, background first."""
    return {"background": 0, **{organ.name: organ.id for organ in organs}}
