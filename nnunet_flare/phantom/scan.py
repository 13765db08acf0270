"""Scanning a patient: any grid, partial volume, noise and field of view; and scans that went wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter

from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume
from nnunet_flare.phantom.domains import Patient, domain_of, draw_patient
from nnunet_flare.phantom.modalities import acquire
from nnunet_flare.phantom.painting import Frame, Painter, draw_contents
from nnunet_flare.phantom.shapes import Point

DEMO_SIZE = (32, 48, 64)
"""Voxels (z, y, x) with which a network of a few minutes on two CPU cores learns all organs."""

FIELD_OF_VIEW_MM: Point = (272.0, 240.0, 332.8)
"""Nominal extent (z, y, x) of a scan: 32 x 48 x 64 voxels of 8.5 x 5.0 x 5.2 mm."""

MIN_SIZE = 8
"""Fewer voxels along an axis show no organ."""

BLOCK_VOXELS = 1_500_000
"""Voxels painted at a time; bounds the memory of a full-size scan."""

HU_RANGE = (-1024, 3071)
ORIGIN_MM = (-300.0, -60.0)
"""Range of the scans' origins: tables stand where they stand."""

JUNK_NOISE_HU, JUNK_BLUR_VOXELS, JUNK_LOST_SHARE = (90.0, 180.0), (1.5, 2.5), (0.3, 0.5)


def make_phantom(
    seed: int,
    *,
    domain: str = "wide",
    size: tuple[int, int, int] = DEMO_SIZE,
    spacing_mm: tuple[float, float, float] | None = None,
    lesions: bool = False,
) -> tuple[Volume, np.ndarray]:
    """One synthetic abdominal scan and its labels; the same arguments give the same bytes.

    The array axes run towards the head, the back and the patient's left (LPS, identity direction), so the patient's
    right side is the left of the picture. The patient is the same on every grid; only the noise depends on it.

    Args:
        seed: decides patient, scanner and noise.
        domain: ``narrow``, ``between``, ``wide``, ``mr`` or ``pet`` (:data:`nnunet_flare.phantom.domains.DOMAINS`).
        size: voxels (z, y, x).
        spacing_mm: nominal spacing (z, y, x); by default the one with which ``size`` covers
            :data:`FIELD_OF_VIEW_MM`. Scanners other than the first have a field of view up to 6 % smaller.
        lesions: lesions are label 14 (FLARE23), else part of their organ's label.

    Returns:
        The scan (Z, Y, X), int16 HU (of an MR without a unit, of a PET float32 SUV), and its labels, uint8 (Z, Y, X),
        with the ids of :mod:`nnunet_flare.organs`.

    Raises:
        InputError: for an unknown domain or a grid too small to show anything.
    """
    if min(size) < MIN_SIZE:
        raise InputError(f"phantom size (z, y, x) {size}: every axis needs at least {MIN_SIZE} voxels")
    rng = np.random.default_rng(seed)
    drawn_from = domain_of(domain)
    patient = draw_patient(rng, drawn_from, lesions_labelled=lesions)
    if spacing_mm is None:
        spacing_mm = (FIELD_OF_VIEW_MM[0] / size[0], FIELD_OF_VIEW_MM[1] / size[1], FIELD_OF_VIEW_MM[2] / size[2])
    z, y, x = (spacing * part for spacing, part in zip(spacing_mm, patient.scanner.field_of_view, strict=True))
    origin = tuple(float(o) for o in rng.uniform(*ORIGIN_MM, 3).round(1))
    scanned, labels = _scan(
        rng, patient, drawn_from.modality, size=size, spacing_mm=(z, y, x), lesions_labelled=lesions
    )
    return Volume(scanned, (z, y, x), origin), labels


def degrade(seed: int, scan: Volume) -> Volume:
    """A junk version of a CT: blurred, drowned in noise, and with a part of its slices lost (set to air)."""
    rng = np.random.default_rng(seed)
    hu = gaussian_filter(scan.array.astype(np.float32), rng.uniform(*JUNK_BLUR_VOXELS))
    hu += _noise(rng, hu.shape, 0.6, rng.uniform(*JUNK_NOISE_HU))
    lost = int(len(hu) * rng.uniform(*JUNK_LOST_SHARE))
    start = int(rng.integers(len(hu) // 4, len(hu) // 2))
    hu[start : start + lost] = HU_RANGE[0]
    return scan.with_array(_to_ct_numbers(hu))


def _scan(
    rng: np.random.Generator,
    patient: Patient,
    modality: str,
    *,
    size: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    lesions_labelled: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The scan (int16; float32 of a PET) and labels (uint8), both (Z, Y, X), on a grid centred on the trunk."""
    if modality != "ct":
        patient = replace(patient, scanner=replace(patient.scanner, table="none"))
    frame = Frame(rng, patient)
    contents = draw_contents(rng, patient)
    painter = Painter(patient, frame, contents, lesions_labelled=lesions_labelled)
    z, y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing_mm, strict=True))
    hu, labels = np.empty(size, np.float32), np.empty(size, np.uint8)
    slices = max(1, BLOCK_VOXELS // (size[1] * size[2]))
    for start in range(0, size[0], slices):
        block = slice(start, start + slices)
        hu[block], labels[block] = painter.block(z[block], y, x)
    outside = np.zeros(size[1:], bool)
    if patient.scanner.circle:
        half_y, half_x = size[1] * spacing_mm[1] / 2, size[2] * spacing_mm[2] / 2
        outside = (y[:, None] / half_y) ** 2 + (x / half_x) ** 2 > 1
    if modality != "ct":
        signal = acquire(rng, modality, hu, (z, y, x))
        signal[:, outside] = 0
        return signal, labels
    gaussian_filter(hu, patient.blur_voxels, output=hu)
    hu += _noise(rng, size, patient.scanner.noise_grain_voxels, patient.noise_sd_hu)
    hu[:, outside] = HU_RANGE[0]
    return _to_ct_numbers(hu), labels


def _to_ct_numbers(hu: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(hu), *HU_RANGE).astype(np.int16)


def _noise(rng: np.random.Generator, size: tuple[int, ...], grain_voxels: float, sd_hu: float) -> np.ndarray:
    """White noise smoothed within the slices, as a reconstruction kernel does, of standard deviation ``sd_hu``."""
    noise = rng.standard_normal(size, np.float32)
    gaussian_filter(noise, (0, grain_voxels, grain_voxels), output=noise)
    noise *= np.float32(sd_hu / max(float(noise.std()), 1e-6))
    return noise
