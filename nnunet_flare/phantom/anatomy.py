"""The 13 organs as shapes, and the HU of every tissue in every contrast phase.

Coordinates are those of :mod:`nnunet_flare.phantom.shapes`, the origin in the middle of the trunk. Small organs are
stylised: at their true size a network of a few minutes never finds them on a 5 to 8 mm grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nnunet_flare.organs import FLARE22, FLARE23
from nnunet_flare.phantom.domains import Patient
from nnunet_flare.phantom.shapes import Ellipsoid, JoinedShapes, Shape, Tube

LABEL_IDS: Mapping[str, int] = {organ.name: organ.id for organ in FLARE22}
LESION_ID = next(organ.id for organ in FLARE23 if organ.name == "lesion")

ORGANS: Mapping[str, Shape] = {
    "liver": JoinedShapes(
        [
            Ellipsoid((52, 2, -66), (74, 76, 62)),
            Ellipsoid((64, -42, -6), (38, 36, 72), tilt_deg=-10),
            Ellipsoid((0, 6, -88), (56, 52, 34)),
        ]
    ),
    "stomach": Tube(
        [(80, 8, 52), (56, -12, 60), (26, -40, 56), (0, -52, 32), (-4, -50, 6), (4, -42, -18)],
        [29, 34, 29, 24, 21, 14],
    ),
    "spleen": Ellipsoid((46, 32, 94), (50, 46, 29), tilt_deg=12, turn_deg=18),
    "right_kidney": Ellipsoid((-36, 36, -62), (53, 29, 28), tilt_deg=-12),
    "left_kidney": Ellipsoid((-20, 38, 64), (53, 29, 28), tilt_deg=12),
    "duodenum": Tube(
        [(4, -40, -28), (-4, -20, -46), (-30, -8, -50), (-54, -6, -38), (-58, -6, -8), (-46, -8, 22)],
        [14, 14, 14, 14, 14, 13],
    ),
    "pancreas": Tube(
        [(-30, -14, -24), (-12, -20, -18), (2, -24, 2), (12, -12, 28), (26, 6, 58)],
        [16, 16, 12, 12, 11],
    ),
    "gallbladder": Ellipsoid((-6, -48, -56), (28, 21, 17), tilt_deg=-25, turn_deg=-20),
    "inferior_vena_cava": Tube(
        [(140, -4, -20), (100, -2, -24), (60, 10, -26), (0, 16, -24), (-60, 16, -20), (-140, 20, -20)],
        [12, 12, 12, 12, 11, 11],
    ),
    "esophagus": Tube([(140, 2, 2), (112, 0, 4), (92, -4, 14), (78, -6, 34)], [11, 11, 11, 11]),
    "aorta": Tube([(140, 26, 14), (90, 22, 10), (30, 18, 6), (-40, 18, 4), (-140, 22, 6)], [12, 12, 12, 11, 10]),
    "right_adrenal_gland": JoinedShapes(
        [Tube([(44, 20, -36), (22, 32, -46)], [8, 8]), Tube([(44, 20, -36), (20, 32, -28)], [8, 8])]
    ),
    "left_adrenal_gland": JoinedShapes(
        [Tube([(56, 16, 38), (34, 28, 50)], [8, 8]), Tube([(56, 16, 38), (32, 30, 32)], [8, 8])]
    ),
}
"""The mean patient, in painting order: later organs take the voxels where shapes overlap."""

THORACIC = frozenset({"esophagus", "aorta", "inferior_vena_cava"})
"""Organs that pass the diaphragm; all others stay below it."""

SINUS: Mapping[str, Shape] = {
    "right_kidney": Ellipsoid((-36, 30, -43), (17, 9, 13), tilt_deg=-12),
    "left_kidney": Ellipsoid((-20, 32, 45), (17, 9, 13), tilt_deg=12),
}
"""Fat of the renal hilum; it moves with its kidney and is not part of the label."""

PHASE_HU: Mapping[str, Mapping[str, float]] = {
    "portal": {
        "liver": 108, "right_kidney": 185, "left_kidney": 185, "spleen": 122, "pancreas": 98, "aorta": 160,
        "inferior_vena_cava": 150, "right_adrenal_gland": 82, "left_adrenal_gland": 82, "gallbladder": 8,
        "esophagus": 62, "stomach": 78, "duodenum": 70, "muscle": 62, "hepatic vessels": 150,
        "medulla": 180, "bowel": 70,
    },
    "arterial": {
        "liver": 70, "right_kidney": 205, "left_kidney": 205, "spleen": 135, "pancreas": 112, "aorta": 320,
        "inferior_vena_cava": 90, "right_adrenal_gland": 92, "left_adrenal_gland": 92, "gallbladder": 8,
        "esophagus": 60, "stomach": 86, "duodenum": 78, "muscle": 58, "hepatic vessels": 80,
        "medulla": 95, "bowel": 76,
    },
    "late": {
        "liver": 92, "right_kidney": 165, "left_kidney": 165, "spleen": 100, "pancreas": 78, "aorta": 112,
        "inferior_vena_cava": 112, "right_adrenal_gland": 62, "left_adrenal_gland": 62, "gallbladder": 10,
        "esophagus": 58, "stomach": 68, "duodenum": 64, "muscle": 60, "hepatic vessels": 108,
        "medulla": 190, "bowel": 64,
    },
    "native": {
        "liver": 58, "right_kidney": 32, "left_kidney": 32, "spleen": 47, "pancreas": 40, "aorta": 42,
        "inferior_vena_cava": 40, "right_adrenal_gland": 22, "left_adrenal_gland": 22, "gallbladder": 8,
        "esophagus": 38, "stomach": 40, "duodenum": 38, "muscle": 52, "hepatic vessels": 40,
        "medulla": 32, "bowel": 36,
    },
    "t1": {
        "liver": 140, "right_kidney": 84, "left_kidney": 84, "spleen": 58, "pancreas": 168, "aorta": 16,
        "inferior_vena_cava": 22, "right_adrenal_gland": 92, "left_adrenal_gland": 92, "gallbladder": 4,
        "esophagus": 66, "stomach": 72, "duodenum": 70, "muscle": 54, "hepatic vessels": 40,
        "medulla": 44, "bowel": 62,
    },
    "fdg": {
        "liver": 125, "right_kidney": 165, "left_kidney": 165, "spleen": 110, "pancreas": 94, "aorta": 104,
        "inferior_vena_cava": 102, "right_adrenal_gland": 98, "left_adrenal_gland": 98, "gallbladder": 24,
        "esophagus": 92, "stomach": 100, "duodenum": 96, "muscle": 56, "hepatic vessels": 106,
        "medulla": 205, "bowel": 88,
    },
}  # fmt: skip
"""Typical HU per contrast phase: portal venous (70 s), late arterial (35 s), late (180 s), without contrast.

``t1`` and ``fdg`` are painted like phases too: levels that the curves of
:mod:`~nnunet_flare.phantom.modalities` take to the signal of a T1-weighted MR and of an FDG PET."""

HEPATIC_VESSELS: Shape = JoinedShapes(
    [
        Tube([(84, 4, -30), (66, -4, -60), (46, 8, -96)], [5, 4, 2.5]),
        Tube([(84, 0, -26), (80, -28, -34), (60, -52, -50)], [5, 4, 2.5]),
        Tube([(22, -8, -30), (34, -6, -52), (36, 6, -88)], [6, 5, 3]),
        Tube([(34, -6, -52), (52, -40, -20)], [5, 3]),
    ]
)
"""Hepatic and portal veins; drawn inside the liver only and part of its label."""


@dataclass(frozen=True)
class LesionSite:
    """Where in an organ of the mean patient lesions start, how large they are, and their share of all lesions."""

    share: float
    region: Ellipsoid
    radius_mm: tuple[float, float]


LESION_SITES: Mapping[str, LesionSite] = {
    "liver": LesionSite(0.55, Ellipsoid((50, 2, -66), (52, 54, 44)), (7, 18)),
    "right_kidney": LesionSite(0.125, Ellipsoid((-36, 40, -66), (36, 18, 16)), (7, 13)),
    "left_kidney": LesionSite(0.125, Ellipsoid((-20, 42, 68), (36, 18, 16)), (7, 13)),
    "pancreas": LesionSite(0.1, Ellipsoid((-4, -19, -4), (8, 4, 24)), (6, 10)),
    "spleen": LesionSite(0.1, Ellipsoid((46, 32, 92), (34, 28, 14)), (6, 11)),
}
"""Organs that get lesions."""

LESION_CONTRAST_HU = (-75.0, -35.0)
"""Darker than their organ, as most metastases and all cysts are."""


@dataclass(frozen=True)
class Lesion:
    """A round lesion of ``organ``, drawn inside it only, ``contrast_hu`` off the organ's HU."""

    organ: str
    shape: Ellipsoid
    contrast_hu: float


def organ_shapes(patient: Patient) -> dict[str, Shape]:
    """The organs of ``patient`` by name in painting order; without the gallbladder where it is missing."""
    return {
        name: shape.varied(patient.offset_mm[name], patient.radius[name])
        for name, shape in ORGANS.items()
        if name != "gallbladder" or patient.gallbladder
    }


def draw_lesions(rng: np.random.Generator, patient: Patient) -> list[Lesion]:
    """The lesions of ``patient``, most of them in the liver."""
    lesions = []
    for _ in range(patient.lesions):
        organ = str(rng.choice(list(LESION_SITES), p=[site.share for site in LESION_SITES.values()]))
        site = LESION_SITES[organ]
        direction = rng.normal(size=3)
        direction *= rng.random() / np.linalg.norm(direction)
        z, y, x = np.asarray(site.region.centre) + patient.offset_mm[organ] + direction * site.region.radii
        radii = rng.uniform(*site.radius_mm) * np.exp(rng.normal(0, 0.12, 3))
        shape = Ellipsoid((z, y, x), (radii[0], radii[1], radii[2]))
        lesions.append(Lesion(organ, shape, float(rng.uniform(*LESION_CONTRAST_HU))))
    return lesions
