"""Everything in a scan that is no labelled organ: trunk, cavity, lungs, bones, muscles, bowel and the table.

These are the confounders. Like the organs they are functions of the patient's coordinates (z, y, x) in mm; all of
them work on one block of the grid at a time, so that a full-size scan needs no full-size scratch arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_flare.phantom.shapes import Shape, Tube

TRUNK_MM = (100.0, 142.0)
"""Half axes (y, x) of the trunk's skin."""

CAVITY_CENTRE_Y_MM = -10.0
WALL_MM = 13.0
"""Abdominal wall: muscle between subcutaneous and visceral fat."""

DOMES = ((110.0, 4.0, -64.0), (100.0, 8.0, 64.0), (94.0, -14.0, 0.0))
"""Highest points (z, y, x) of the diaphragm: right half, left half, and the tendon between them."""

DOME_RADII_MM = (78.0, 62.0)
DOME_DEPTH_MM = 60.0
DOME_POWER = 1.7
VERTEBRA_MM = 34.0
DISC_SHARE = 0.24
RIB_PITCH_MM = 27.0

AIR_HU, FAT_HU, LUNG_HU, GAS_HU = -1000.0, -105.0, -850.0, -940.0


@dataclass(frozen=True)
class BodySurface:
    """Where the body's layers are in one block, (Z, Y, X): masks, and the cavity's level (1 at the wall)."""

    body: np.ndarray
    wall: np.ndarray
    cavity: np.ndarray
    lung: np.ndarray
    abdomen: np.ndarray
    cavity_level: np.ndarray


def trunk_surface(points: np.ndarray, fat_mm: float) -> BodySurface:
    """Skin, abdominal wall, cavity, lungs and the space below the diaphragm at ``points`` (3, Z, Y, X)."""
    z, y, x = points
    width = 1 - np.float32(0.05) * np.clip((z + 20) / 120, -1, 1) ** 2
    half_y, half_x = TRUNK_MM
    skin = _superellipse(y / (half_y * width), x / (half_x * width), 2.4)
    inner_y, inner_x = half_y - fat_mm, half_x - fat_mm
    muscle = _superellipse(y / (inner_y * width), x / (inner_x * width), 2.3)
    cavity_y = (inner_y - WALL_MM + 2 * CAVITY_CENTRE_Y_MM + inner_y - WALL_MM) / 2
    level = _superellipse((y - CAVITY_CENTRE_Y_MM) / (cavity_y * width), x / ((inner_x - WALL_MM) * width), 2.2)
    cavity = level < 1
    dome = np.full(z.shape, -np.inf, np.float32)
    for top, centre_y, centre_x in DOMES:
        across = ((y - centre_y) / DOME_RADII_MM[0]) ** 2 + ((x - centre_x) / DOME_RADII_MM[1]) ** 2
        np.maximum(dome, top - DOME_DEPTH_MM * across ** np.float32(DOME_POWER), out=dome)
    mediastinum = np.abs(x - 4) < 26 + 14 * (y < -10)
    above = cavity & (z > dome)
    return BodySurface(
        body=skin < 1,
        wall=(muscle < 1) & ~cavity,
        cavity=cavity,
        lung=above & ~mediastinum,
        abdomen=cavity & (z < dome - 3),
        cavity_level=level,
    )


def _superellipse(a: np.ndarray, b: np.ndarray, power: float) -> np.ndarray:
    exponent = np.float32(power)
    return np.abs(a) ** exponent + np.abs(b) ** exponent


def paint_skeleton(hu: np.ndarray, points: np.ndarray, surface: BodySurface, muscle_hu: float, fat_mm: float) -> None:
    """Psoas and back muscles, vertebrae with discs, canal and processes, and ribs, painted into ``hu`` (Z, Y, X)."""
    z, y, x = points
    aside = np.abs(x)
    girth = np.clip((30 - z) / 90, 0.2, 1)
    psoas = ((aside - (32 - 0.06 * z)) / (18 * girth)) ** 2 + ((y - 48) / (17 * girth)) ** 2 < 1
    hu[psoas & (z < 12 - 0.5 * (y - 48))] = muscle_hu
    back = ((aside - 30) / 28) ** 2 + ((y - 76) / 17) ** 2 < 1
    hu[back & surface.body] = muscle_hu
    vertebra = (x / 22) ** 2 + ((y - 50) / 18) ** 2
    height = np.mod(z / VERTEBRA_MM, 1)
    disc = height < DISC_SHARE
    body = vertebra < 1
    hu[body] = np.where(disc[body], 85, np.where(vertebra[body] > 0.72, 420, 190))
    arch = (aside < 6) & (np.abs(y - 82) < 10) & (height > 0.35)
    lamina = (np.abs(np.hypot(x, y - 71) - 11) < 4.5) & (y > 64)
    transverse = (aside < 38) & (np.abs(y - 66) < 4.5) & (np.abs(height - 0.65) < 0.16)
    hu[arch | lamina | transverse] = 330
    hu[np.hypot(x, y - 71) < 7.5] = 25
    half_y, half_x = TRUNK_MM[0] - fat_mm, TRUNK_MM[1] - fat_mm
    ring = _superellipse((y + 1) / (half_y - 7), x / (half_x - 7), 2.3) ** np.float32(1 / 2.3)
    slope = np.float32(0.42) * (y - 60)
    phase = np.mod((z - slope) / RIB_PITCH_MM, 1) - 0.5
    lower_edge = -38 - 0.6 * np.minimum(y, 20)
    rib = ((ring - 1) * 110 / 6.0) ** 2 + (phase * RIB_PITCH_MM / 7.5) ** 2 < 1
    rib &= (z > lower_edge) & (aside > 28) & surface.body
    hu[rib] = 320


def paint_heart(hu: np.ndarray, points: np.ndarray, surface: BodySurface, blood_hu: float) -> None:
    """The heart's lower half, in the cavity above the diaphragm."""
    z, y, x = points
    inside = ((z - 136) / 36) ** 2 + ((y + 38) / 36) ** 2 + ((x - 26) / 52) ** 2 < 1
    hu[inside & surface.cavity & ~surface.abdomen] = blood_hu


@dataclass(frozen=True)
class BowelLoop:
    """A piece of bowel: its shape, wall and content HU, and the height of the fluid level (gas in front of it)."""

    shape: Shape
    wall_hu: float
    content_hu: float
    gas_in_front_of_y: float


def draw_bowel(rng: np.random.Generator, wall_hu: float) -> list[BowelLoop]:
    """Small-bowel loops and the colon's frame, some with gas, fluid, stool or oral contrast."""
    loops = []
    contrast = rng.random() < 0.25
    for _ in range(int(rng.integers(20, 30))):
        start = np.array([rng.uniform(-135, -34), rng.uniform(-68, 8), rng.uniform(-76, 86)])
        points = np.cumsum([start, rng.normal(0, 20, 3), rng.normal(0, 20, 3)], axis=0).clip(
            (-150, -74, -92), (-24, 18, 94)
        )
        radius = rng.uniform(10, 14)
        content = rng.uniform(150, 260) if contrast and rng.random() < 0.5 else rng.uniform(8, 45)
        gas = points[0][1] - radius * 0.2 if rng.random() < 0.2 else -np.inf
        loops.append(BowelLoop(_tube(points, radius), wall_hu, content, gas))
    frame = (
        [(-140, 6, -96), (-96, 2, -98), (-62, -8, -96)],
        [(-58, -40, -86), (-44, -62, -40), (-48, -68, 10), (-24, -54, 62), (8, -30, 96)],
        [(-2, 0, 104), (-50, 14, 104), (-96, 12, 102), (-140, 6, 92)],
    )
    for path in frame:
        points = np.asarray(path, float) + rng.normal(0, 5, (len(path), 3))
        radius = rng.uniform(15, 20)
        gas = points[:, 1].mean() - rng.uniform(-6, 8) if rng.random() < 0.7 else -np.inf
        loops.append(BowelLoop(_tube(points, radius), wall_hu, rng.uniform(15, 60), gas))
    return loops


def _tube(points: np.ndarray, radius: float) -> Tube:
    knots: Sequence[tuple[float, float, float]] = [(p[0], p[1], p[2]) for p in points]
    return Tube(knots, [radius] * len(knots))


def paint_table(hu: np.ndarray, y: np.ndarray, x: np.ndarray, back_mm: float, kind: str) -> None:
    """The couch under a patient whose back lies at ``back_mm``; scan coordinates in mm, broadcast over (Z, Y, X)."""
    if kind == "none":
        return
    top = back_mm + 3 - (x**2 / 1500 if kind == "curved" else 0 * x)
    depth = y - top
    wide = np.abs(x) < 200
    hu[np.broadcast_to(wide & (depth > 0) & (depth < 22), hu.shape)] = -880
    hu[np.broadcast_to(wide & (depth > 0) & (depth < 5), hu.shape)] = -180
