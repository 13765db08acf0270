"""One picture per case: three planes through the organ that the members agree on least.

A picture is a grid of three by three square panels. Columns: axial, coronal, sagittal. Rows: the whole plane with the
fused label; the organ from near, with each member's contour; the same with the share of members that contradict the
fused label. All panels of a row show the same millimetres per pixel in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.drawing import WINDOW_HU, Panel, overlay, rgb, upright
from nnunet_flare.files import replacing
from nnunet_flare.images import Volume
from nnunet_flare.rounds.run.configurations import read_plans, resolve
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.arrays import network_spacing_mm, read_array, read_properties
from nnunet_flare.rounds.stages.replanned import STOCK_PREPROCESSOR

PANEL = 300
"""Pixels of a square panel."""

MARGIN_MM = 15.0
LEAST_ZOOM_MM = 60.0
"""The near view shows the organ and a margin, but never less than this."""

MEMBER_COLOURS = ("#FFFFFF", "#F0E442", "#56B4E9", "#E69F00", "#CC79A7")
"""Contours of member 1, 2, ...; light colours of Okabe and Ito's palette, told apart on grey by most eyes."""

DISAGREEMENT = "#D55E00"


@dataclass(frozen=True)
class Scene:
    """A case on the network grid, superior, anterior and right first: scan in HU, fused label, members' labels."""

    scan: np.ndarray
    fused: np.ndarray
    members: np.ndarray
    spacing_mm: tuple[float, float, float]


def read_scene(run: Run, number: int, case: str) -> Scene:
    """Read a case of a round.

    Raises:
        OSError: when one of its files is missing or damaged (``clean`` removes the members' label maps).
    """
    plans = read_plans(run.plans_file, {"transpose_backward": [int]})
    configuration = resolve(plans, run.recipe.configuration, run.plans_file, {"spacing": [float]})
    backward = plans["transpose_backward"]
    is_unlabelled = any(scan.case == case for scan in read_list(run.paths.unlabelled))
    folder = run.unlabelled_data if is_unlabelled else run.base_data  # of a partial case that a loop completes
    properties = read_properties(folder / f"{case}.pkl")
    direction = direction_of(properties)
    array = read_array(folder / f"{case}.b2nd")[0]
    on_grid: Sequence[float] = configuration["spacing"]
    if len(on_grid) < array.ndim or configuration.get("preprocessor_name", STOCK_PREPROCESSOR) != STOCK_PREPROCESSOR:
        on_grid = network_spacing_mm(properties, plans["transpose_forward"], array.shape)  # slices, scans of one size
    spacing = tuple(float(on_grid[axis]) for axis in backward)

    def shown(array: np.ndarray) -> Volume:
        return upright(Volume(array.transpose(backward), spacing, direction=direction))  # type: ignore[arg-type]

    scan = shown(_in_hu(array, plans, configuration))
    fused = shown(np.maximum(read_array(run.paths.training_label(number, case))[0], 0))
    members = [shown(member).array for member in read_array(run.paths.members(number, case))]
    return Scene(scan.array, fused.array, np.stack(members), scan.spacing_mm)


def direction_of(properties: dict[str, Any]) -> tuple[float, ...]:
    """The direction (row-major, LPS) of the array that nnU-Net's reader made, from the properties that it kept."""
    if "sitk_stuff" in properties:
        return tuple(properties["sitk_stuff"]["direction"])
    if "nibabel_stuff" not in properties:
        return Volume.direction
    kept = properties["nibabel_stuff"]
    affine = np.array(kept.get("reoriented_affine", kept["original_affine"]), dtype=float)[:3, :3]
    affine[:2] *= -1  # nibabel's world is RAS
    return tuple((affine / np.linalg.norm(affine, axis=0)).ravel().tolist())


def _in_hu(array: np.ndarray, plans: dict[str, Any], configuration: dict[str, Any]) -> np.ndarray:
    """Undo nnU-Net's CT normalisation; other normalisations are stretched from their 1st to 99th percentile."""
    if configuration["normalization_schemes"][0] == "CTNormalization":
        statistics = plans["foreground_intensity_properties_per_channel"]["0"]
        return np.asarray(array * max(statistics["std"], 1e-8) + statistics["mean"])
    low, high = np.percentile(array, (1, 99))
    return np.asarray(np.interp(array, (low, max(high, low + 1e-6)), WINDOW_HU))


def draw_case(scene: Scene, organ: Sequence[int]) -> np.ndarray:
    """The picture (3 x PANEL, 3 x PANEL, 3) as uint8 of a case around one organ, or region, of these label ids."""
    first = scene.members[0]
    seen, contested = np.isin(first, organ), np.zeros(first.shape, bool)
    for member in scene.members[1:]:  # one by one: whole volumes of all members at once would be large
        seen |= np.isin(member, organ)
        contested |= member != first
    contested &= seen
    columns = [_draw_plane(scene, organ, axis, _best_plane(seen, contested, axis)) for axis in range(3)]
    return np.concatenate(columns, axis=1)


def _best_plane(seen: np.ndarray, contested: np.ndarray, axis: int) -> int:
    """The plane with the most voxels that members give to the organ and contradict each other on."""
    others = tuple(a for a in range(3) if a != axis)
    contested_voxels, voxels = contested.sum(axis=others), seen.sum(axis=others)
    if not voxels.any():
        return seen.shape[axis] // 2
    return int(np.lexsort((voxels, contested_voxels))[-1])


def _draw_plane(scene: Scene, organ: Sequence[int], axis: int, index: int) -> np.ndarray:
    """The three panels of one plane, one above the other."""
    scan = scene.scan.take(index, axis).astype(np.float32)
    fused = scene.fused.take(index, axis)
    members = scene.members.take(index, axis + 1)
    spacing = np.delete(np.array(scene.spacing_mm), axis)
    whole_centre = np.array(scan.shape) * spacing / 2
    whole_mm = float((np.array(scan.shape) * spacing).max())
    centre, width_mm = _near(np.asarray(np.isin(members, organ).any(axis=0)), spacing, whole_centre, whole_mm)
    top = Panel(spacing, whole_centre, whole_mm, PANEL)
    near = Panel(spacing, centre, width_mm, PANEL)
    panels = [overlay(top.scan(scan), top.labels(fused), 0.45)]
    _frame(panels[0], (centre - whole_centre) / whole_mm, width_mm / whole_mm)
    grey = overlay(near.scan(scan), np.zeros((PANEL, PANEL), np.uint8))
    contours, heat = grey.copy(), grey.copy()
    for number, member in enumerate(members):
        edge = _edge(np.isin(near.labels(member), organ))
        contours[edge] = rgb(MEMBER_COLOURS[number % len(MEMBER_COLOURS)])
    share = near.labels((members != fused).mean(axis=0))[..., None] * 0.9
    heat = (1 - share) * heat + share * np.array(rgb(DISAGREEMENT))
    panels += [contours, heat]
    for panel in panels:  # a thin dark border between the panels
        panel[:, -1] = panel[-1] = 0
    return (np.concatenate(panels, axis=0) * 255).round().astype(np.uint8)


def _near(mask: np.ndarray, spacing: np.ndarray, whole_centre: np.ndarray, whole_mm: float) -> tuple[np.ndarray, float]:
    """Centre (mm) and width (mm) of the square around a mask; the whole plane where it is empty."""
    if not mask.any():
        return whole_centre, whole_mm
    where = np.argwhere(mask)
    low, high = where.min(axis=0) * spacing, (where.max(axis=0) + 1) * spacing
    width = float((high - low).max()) + 2 * MARGIN_MM
    return (low + high) / 2, min(max(width, LEAST_ZOOM_MM), whole_mm)


def _edge(mask: np.ndarray) -> np.ndarray:
    """The outline of a mask, two pixels wide."""
    from scipy.ndimage import binary_erosion

    return mask & ~np.asarray(binary_erosion(mask, iterations=2, border_value=1))


def _frame(panel: np.ndarray, offset: np.ndarray, share: float) -> None:
    """Draw on the whole plane where the near view lies; nothing where it is the whole plane."""
    if share > 0.95:
        return
    low = ((0.5 + offset - share / 2) * PANEL).round().astype(int).clip(0, PANEL - 2)
    high = ((0.5 + offset + share / 2) * PANEL).round().astype(int).clip(1, PANEL - 1)
    panel[low[0] : high[0] + 1, [low[1], high[1]]] = 1.0
    panel[[low[0], high[0]], low[1] : high[1] + 1] = 1.0


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture as JPEG, by rename."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="JPEG", quality=85, subsampling=0)
