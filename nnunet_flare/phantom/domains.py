"""How much scans vary: the domains of the phantom, and what is drawn from them for one patient and one scanner.

The labelled set comes from a ``narrow`` domain (one site, portal phase, healthy), the unlabelled and test scans from a
``wide`` one, so that self-training has something to gain; ``between`` is a milder version of the latter. The ranges
are those with which a gain of self-training was measured on a 32 x 48 x 64 grid. ``mr`` and ``pet`` are the patients of
``wide`` in another scanner (:mod:`~nnunet_flare.phantom.modalities`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from nnunet_flare.errors import InputError
from nnunet_flare.organs import FLARE22

LESION_PROBABILITY_LABELLED = 0.75
"""With lesions as a label of their own (FLARE23) every domain needs examples of them."""

POSITION_UNIT_MM = 100.0
"""Standard deviations of organ positions are given in units of about half a trunk's width."""


@dataclass(frozen=True)
class Domain:
    """Ranges from which patients and scans are drawn; pairs are uniform ranges, ``_sd`` standard deviations.

    ``fat_mm`` is the subcutaneous fat; ``scanners`` how many of :data:`SCANNERS` the scans come from. ``modality`` is
    ``ct``, or another one, of which HU, noise and blur of a CT say nothing.
    """

    phases: Mapping[str, float]
    size_scale: tuple[float, float]
    aspect_sd: float
    max_rotation_deg: float
    noise_sd_hu: tuple[float, float]
    blur_voxels: tuple[float, float]
    deformation_mm: float
    organ_position_sd: float
    organ_log_radius_sd: float
    lesion_probability: float
    organ_hu_sd: float
    max_z_shift_mm: float
    no_gallbladder_probability: float
    ascites_probability: float
    fat_mm: tuple[float, float]
    scanners: int
    modality: str = "ct"


CT_DOMAINS: Mapping[str, Domain] = MappingProxyType(
    {
        "narrow": Domain(
            phases={"portal": 1.0},
            size_scale=(0.97, 1.03),
            aspect_sd=0.02,
            max_rotation_deg=3,
            noise_sd_hu=(8, 14),
            blur_voxels=(0.3, 0.5),
            deformation_mm=5,
            organ_position_sd=0.025,
            organ_log_radius_sd=0.06,
            lesion_probability=0,
            organ_hu_sd=6,
            max_z_shift_mm=5,
            no_gallbladder_probability=0,
            ascites_probability=0,
            fat_mm=(11, 15),
            scanners=1,
        ),
        "between": Domain(
            phases={"portal": 0.45, "arterial": 0.3, "late": 0.25},
            size_scale=(0.88, 1.12),
            aspect_sd=0.06,
            max_rotation_deg=9,
            noise_sd_hu=(8, 28),
            blur_voxels=(0.3, 0.8),
            deformation_mm=8,
            organ_position_sd=0.04,
            organ_log_radius_sd=0.11,
            lesion_probability=0.4,
            organ_hu_sd=10,
            max_z_shift_mm=14,
            no_gallbladder_probability=0.08,
            ascites_probability=0.1,
            fat_mm=(8, 18),
            scanners=3,
        ),
        "wide": Domain(
            phases={"portal": 0.4, "arterial": 0.25, "late": 0.2, "native": 0.15},
            size_scale=(0.85, 1.15),
            aspect_sd=0.08,
            max_rotation_deg=12,
            noise_sd_hu=(8, 35),
            blur_voxels=(0.3, 0.9),
            deformation_mm=9,
            organ_position_sd=0.05,
            organ_log_radius_sd=0.14,
            lesion_probability=0.5,
            organ_hu_sd=12,
            max_z_shift_mm=20,
            no_gallbladder_probability=0.1,
            ascites_probability=0.1,
            fat_mm=(7, 20),
            scanners=4,
        ),
    }
)

DOMAINS: Mapping[str, Domain] = MappingProxyType(
    {
        **CT_DOMAINS,
        "mr": replace(CT_DOMAINS["wide"], phases={"t1": 1.0}, modality="mr"),
        "pet": replace(CT_DOMAINS["wide"], phases={"fdg": 1.0}, modality="pet"),
    }
)


@dataclass(frozen=True)
class Scanner:
    """A site's habits: field of view relative to the nominal one (z, y, x), noise grain, the table's shape, and
    whether nothing is reconstructed outside the largest circle."""

    name: str
    field_of_view: tuple[float, float, float]
    noise_grain_voxels: float
    table: str
    circle: bool


SCANNERS: tuple[Scanner, ...] = (
    Scanner("A", (1.0, 1.0, 1.0), 0.5, "curved", False),
    Scanner("B", (1.0, 0.97, 0.97), 0.7, "flat", True),
    Scanner("C", (0.95, 1.0, 1.0), 0.4, "curved", True),
    Scanner("D", (0.98, 0.94, 0.94), 0.6, "none", False),
)
"""Fields of view only shrink, so that a network whose patch is the nominal grid covers every scan in one window."""


@dataclass(frozen=True)
class Patient:
    """One draw of a domain: the body's size and pose, each organ's offset, size and HU, and what is missing or ill."""

    phase: str
    scale: tuple[float, float, float]
    rotation_deg: float
    shift_mm: tuple[float, float, float]
    deformation_mm: float
    fat_mm: float
    offset_mm: Mapping[str, tuple[float, float, float]]
    radius: Mapping[str, float]
    hu: Mapping[str, float]
    gallbladder: bool
    ascites: bool
    lesions: int
    scanner: Scanner
    noise_sd_hu: float
    blur_voxels: float


def domain_of(name: str) -> Domain:
    """The domain of that name.

    Raises:
        InputError: for any other name.
    """
    if name not in DOMAINS:
        raise InputError(f"phantom domain {name!r} is unknown; expected one of {', '.join(DOMAINS)}")
    return DOMAINS[name]


def draw_patient(rng: np.random.Generator, domain: Domain, *, lesions_labelled: bool) -> Patient:
    """Draw one patient and the scanner it lies in.

    Args:
        rng: source of all randomness; the same state gives the same patient.
        domain: ranges to draw from.
        lesions_labelled: lesions are a label, so every domain has them (:data:`LESION_PROBABILITY_LABELLED`).
    """
    names = [organ.name for organ in FLARE22]
    size = rng.uniform(*domain.size_scale)
    aspect = np.exp(rng.normal(0, domain.aspect_sd, 3))
    low, high = domain.size_scale
    scale = np.clip(size * aspect, low * 0.95, high * 1.05)
    probability = LESION_PROBABILITY_LABELLED if lesions_labelled else domain.lesion_probability
    offsets = rng.normal(0, domain.organ_position_sd * POSITION_UNIT_MM, (len(names), 3)).clip(-12, 12)
    radii = np.exp(rng.normal(0, domain.organ_log_radius_sd, len(names)).clip(-0.3, 0.3))
    shifts = rng.normal(0, domain.organ_hu_sd, len(names))
    shift = (rng.uniform(-1, 1) * domain.max_z_shift_mm, rng.uniform(-4, 4), rng.uniform(-4, 4))
    return Patient(
        phase=str(rng.choice(list(domain.phases), p=list(domain.phases.values()))),
        scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        rotation_deg=float(rng.uniform(-1, 1) * domain.max_rotation_deg),
        shift_mm=shift,
        deformation_mm=domain.deformation_mm,
        fat_mm=float(rng.uniform(*domain.fat_mm)),
        offset_mm={n: (float(o[0]), float(o[1]), float(o[2])) for n, o in zip(names, offsets, strict=True)},
        radius={n: float(r) for n, r in zip(names, radii, strict=True)},
        hu={n: float(s) for n, s in zip(names, shifts, strict=True)},
        gallbladder=bool(rng.random() >= domain.no_gallbladder_probability),
        ascites=bool(rng.random() < domain.ascites_probability),
        lesions=int(rng.integers(1, 4)) * int(rng.random() < probability),
        scanner=SCANNERS[int(rng.integers(domain.scanners))],
        noise_sd_hu=float(rng.uniform(*domain.noise_sd_hu)),
        blur_voxels=float(rng.uniform(*domain.blur_voxels)),
    )
