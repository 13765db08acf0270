"""The official FLARE scoring rules spelled out structure by structure with DeepMind's surface-distance: slow, clear."""

import warnings

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance


def official_scores(reference, prediction, spacing_mm, structures, *, corrected=False):
    """{id: (DSC, NSD)} of two (Z, Y, X) label maps, computed on the (x, y, z) arrays that the official script sees."""
    reference, prediction = reference.transpose(2, 1, 0), prediction.transpose(2, 1, 0)
    spacing_mm = tuple(spacing_mm)[::-1]
    scores = {}
    for structure in structures:
        truth, found = np.isin(reference, structure.labels), np.isin(prediction, structure.labels)
        dsc, nsd = _scores(truth, found, spacing_mm, structure, corrected)
        scores[structure.id] = (dsc, nsd) if corrected else (round(np.float64(dsc), 4), round(np.float64(nsd), 4))
    return scores


def _scores(truth, found, spacing_mm, structure, corrected):
    if not truth.any() and not found.any():
        return 1, 1
    if not truth.any() or not found.any():
        return 0, 0
    if structure.labelled_slices_only:
        slices = np.where(truth)[2]
        first, last = slices.min(), slices.max()
        end = last + 1 if corrected or first == last else last
        truth, found = truth[:, :, first:end], found[:, :, first:end]
    dsc = surface_distance.compute_dice_coefficient(truth, found)
    if dsc < 0.2 and not corrected:
        return dsc, 0
    if not found.any():
        return dsc, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distances = surface_distance.compute_surface_distances(truth, found, spacing_mm)
    return dsc, surface_distance.compute_surface_dice_at_tolerance(distances, structure.nsd_tolerance_mm)
