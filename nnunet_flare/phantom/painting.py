"""Painting one patient on a grid, block by block: which organ and which HU every voxel has, before any scanner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nnunet_flare.phantom.anatomy import (
    HEPATIC_VESSELS,
    LABEL_IDS,
    LESION_ID,
    PHASE_HU,
    SINUS,
    THORACIC,
    Lesion,
    draw_lesions,
    organ_shapes,
)
from nnunet_flare.phantom.domains import Patient
from nnunet_flare.phantom.shapes import Point, Shape, SmoothField
from nnunet_flare.phantom.surroundings import (
    AIR_HU,
    FAT_HU,
    GAS_HU,
    LUNG_HU,
    TRUNK_MM,
    BodySurface,
    BowelLoop,
    draw_bowel,
    paint_heart,
    paint_skeleton,
    paint_table,
    trunk_surface,
)

FIELDS_MM: Point = (400.0, 360.0, 460.0)
"""Extent of the smooth fields: any field of view with its shift and rotation."""

DEFORMATION_KNOT_MM = 65.0
TEXTURE_KNOT_MM, TEXTURE_PEAK_HU = 14.0, 16.0
SHADING_KNOT_MM, SHADING_PEAK_HU = 120.0, 7.0
"""Tissue is uneven on the scale of a lobule, and a scanner's HU on the scale of the body."""

WALL_LEVEL = 0.8
"""The outer fifth of a hollow organ's radius is its wall."""

CORTEX_LEVEL = 0.72
FLUID_HU, ASCITES_HU = 24.0, 8.0
ASCITES_LEVEL = 0.8


class Frame:
    """The map from scan to patient coordinates: shift, axial rotation, scale, then a smooth deformation."""

    def __init__(self, rng: np.random.Generator, patient: Patient) -> None:
        angle = np.deg2rad(patient.rotation_deg)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
        self._scale = np.asarray(patient.scale)
        self._turn = turn / self._scale[:, None]
        self._back = turn.T * self._scale
        self._shift = np.asarray(patient.shift_mm)
        self._reach = patient.deformation_mm
        self._fields = [SmoothField(rng, FIELDS_MM, DEFORMATION_KNOT_MM, patient.deformation_mm) for _ in range(3)]

    def points(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Patient coordinates (3, Z, Y, X) of the grid spanned by 1-D scan coordinates, all in mm."""
        world = np.meshgrid(z - self._shift[0], y - self._shift[1], x - self._shift[2], indexing="ij", sparse=True)
        points = np.stack([field(z, y, x) for field in self._fields])
        for row in range(3):
            for axis in range(3):
                if self._turn[row, axis]:
                    points[row] += world[axis].astype(np.float32) * np.float32(self._turn[row, axis])
        return points

    def slices(self, shape: Shape, axes: tuple[np.ndarray, ...]) -> tuple[slice, slice, slice] | None:
        """The part of a grid that can hold ``shape``, or None where it lies outside."""
        lower, upper = (corner + sign * self._reach for corner, sign in zip(shape.box(), (-1, 1), strict=True))
        corners = np.array(np.meshgrid(*zip(lower, upper, strict=True), indexing="ij")).reshape(3, 8)
        world = self._back @ corners + self._shift[:, None]
        found = []
        for axis, low, high in zip(axes, world.min(1), world.max(1), strict=True):
            inside = slice(int(np.searchsorted(axis, low)), int(np.searchsorted(axis, high, "right")))
            if inside.start >= inside.stop:
                return None
            found.append(inside)
        return found[0], found[1], found[2]


@dataclass(frozen=True)
class Contents:
    """Everything inside the patient that one seed decides, ready to be painted on any grid."""

    organs: Mapping[str, Shape]
    lesions: list[Lesion]
    bowel: list[BowelLoop]
    texture: SmoothField
    shading: SmoothField
    stomach_gas_y_mm: float
    air_in_esophagus: bool


def draw_contents(rng: np.random.Generator, patient: Patient) -> Contents:
    """Draw what :class:`Patient` leaves open: lesions, bowel, gas and the tissue's texture.

    Lesions have a stream of their own, so that a patient with and without them is otherwise the same.
    """
    lesion_rng = rng.spawn(1)[0]
    return Contents(
        organs=organ_shapes(patient),
        lesions=draw_lesions(lesion_rng, patient),
        bowel=draw_bowel(rng, PHASE_HU[patient.phase]["bowel"]),
        texture=SmoothField(rng, FIELDS_MM, TEXTURE_KNOT_MM, TEXTURE_PEAK_HU),
        shading=SmoothField(rng, FIELDS_MM, SHADING_KNOT_MM, SHADING_PEAK_HU),
        stomach_gas_y_mm=float(rng.uniform(-66, -36)) if rng.random() < 0.75 else -np.inf,
        air_in_esophagus=bool(rng.random() < 0.3),
    )


class Painter:
    """Paints one patient block by block; the arrays of a block are ``hu`` float32 and ``labels`` uint8, (Z, Y, X)."""

    def __init__(self, patient: Patient, frame: Frame, contents: Contents, *, lesions_labelled: bool) -> None:
        self._patient = patient
        self._frame = frame
        self._contents = contents
        self._lesions_labelled = lesions_labelled
        self._tissue = PHASE_HU[patient.phase]

    def block(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """HU and labels of the grid spanned by the 1-D scan coordinates in mm."""
        axes = (z, y, x)
        points = self._frame.points(z, y, x)
        hu = np.full(points.shape[1:], AIR_HU, np.float32)
        labels = np.zeros(points.shape[1:], np.uint8)
        back = TRUNK_MM[0] * self._patient.scale[1] + self._patient.shift_mm[1]
        paint_table(hu, y[:, None], x, back, self._patient.scanner.table)
        surface = trunk_surface(points, self._patient.fat_mm)
        hu[surface.body] = FAT_HU
        hu[surface.wall] = self._tissue["muscle"]
        paint_skeleton(hu, points, surface, self._tissue["muscle"], self._patient.fat_mm)
        hu[surface.lung] = LUNG_HU
        paint_heart(hu, points, surface, self._tissue["aorta"] * 0.8)
        if self._patient.ascites:
            hu[surface.abdomen & (surface.cavity_level > ASCITES_LEVEL)] = ASCITES_HU
        for loop in self._contents.bowel:
            self._paint_loop(loop, axes, points, surface.abdomen, hu)
        for name, shape in self._contents.organs.items():
            self._paint_organ(name, shape, axes, points, surface, hu, labels)
        self._paint_vessels(axes, points, hu, labels)
        for lesion in self._contents.lesions:
            self._paint_lesion(lesion, axes, points, hu, labels)
        soft = surface.body & (hu > -300)
        hu += soft * self._contents.texture(z, y, x)
        hu += surface.body * self._contents.shading(z, y, x)
        return hu, labels

    def _paint_loop(
        self, loop: BowelLoop, axes: tuple[np.ndarray, ...], points: np.ndarray, abdomen: np.ndarray, hu: np.ndarray
    ) -> None:
        where = self._frame.slices(loop.shape, axes)
        if where is None:
            return
        level = loop.shape.level(_part(points, where))
        inside = (level < 1) & abdomen[where]
        lumen = inside & (level < WALL_LEVEL)
        part = hu[where]
        part[inside] = loop.wall_hu
        part[lumen] = np.where(points[1][where][lumen] < loop.gas_in_front_of_y, GAS_HU, loop.content_hu)

    def _paint_organ(
        self,
        name: str,
        shape: Shape,
        axes: tuple[np.ndarray, ...],
        points: np.ndarray,
        surface: BodySurface,
        hu: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        where = self._frame.slices(shape, axes)
        if where is None:
            return
        level = shape.level(_part(points, where))
        inside = (level < 1) & (surface.cavity if name in THORACIC else surface.abdomen)[where]
        part = hu[where]
        shift = self._patient.hu[name]
        part[inside] = self._tissue[name] + shift
        if name in SINUS:
            sinus = SINUS[name].varied(self._patient.offset_mm[name], self._patient.radius[name])
            part[inside & (level < CORTEX_LEVEL)] = self._tissue["medulla"] + shift
            fat = inside & (sinus.level(_part(points, where)) < 1)
            part[fat] = FAT_HU
            inside &= ~fat
        elif name in ("stomach", "duodenum"):
            lumen = inside & (level < WALL_LEVEL)
            gas_y = self._contents.stomach_gas_y_mm if name == "stomach" else -np.inf
            part[lumen] = np.where(points[1][where][lumen] < gas_y, GAS_HU, FLUID_HU)
        elif name == "esophagus" and self._contents.air_in_esophagus:
            part[inside & (level < 0.35)] = GAS_HU
        labels[where][inside] = LABEL_IDS[name]

    def _paint_vessels(
        self, axes: tuple[np.ndarray, ...], points: np.ndarray, hu: np.ndarray, labels: np.ndarray
    ) -> None:
        vessels = HEPATIC_VESSELS.varied(self._patient.offset_mm["liver"], 1.0)
        where = self._frame.slices(vessels, axes)
        if where is not None:
            inside = (vessels.level(_part(points, where)) < 1) & (labels[where] == LABEL_IDS["liver"])
            hu[where][inside] = self._tissue["hepatic vessels"]

    def _paint_lesion(
        self, lesion: Lesion, axes: tuple[np.ndarray, ...], points: np.ndarray, hu: np.ndarray, labels: np.ndarray
    ) -> None:
        where = self._frame.slices(lesion.shape, axes)
        if where is None:
            return
        inside = (lesion.shape.level(_part(points, where)) < 1) & (labels[where] == LABEL_IDS[lesion.organ])
        hu[where][inside] = self._tissue[lesion.organ] + lesion.contrast_hu
        if self._lesions_labelled:
            labels[where][inside] = LESION_ID


def _part(points: np.ndarray, where: tuple[slice, slice, slice]) -> np.ndarray:
    z, y, x = where
    return points[:, z, y, x]
