"""The post-processing operations spelled out with SciPy, one binary mask an organ: slow, obvious, independent."""

import numpy as np
from scipy import ndimage

BALL26 = np.ones((3, 3, 3), dtype=bool)


def components(mask):
    """The 26-connected components of a binary mask, as masks."""
    numbered, count = ndimage.label(mask, structure=BALL26)
    return [numbered == number for number in range(1, count + 1)]


def remove_small_organs(labels, spacing_mm, minimum_mm3):
    result = labels.copy()
    for organ, minimum in minimum_mm3.items():
        mask = labels == organ
        if mask.sum() * np.prod(spacing_mm) < minimum:
            result[mask] = 0
    return result


def close_organs(labels, organs, size):
    result = labels.copy()
    margin = 2 * max(size)
    for organ in organs:
        padded = np.pad(result == organ, margin)
        closed = ndimage.binary_closing(padded, structure=np.ones(size))
        result[closed[margin:-margin, margin:-margin, margin:-margin]] = organ
    return result


def keep_axial_field(labels, spacing_mm, references, gap_mm, below_mm):
    has = [bool(np.isin(plane, references).any()) for plane in labels]
    if not any(has):
        return labels.copy()
    top = max(place for place, present in enumerate(has) if present)
    if gap_mm is None:
        end = min(place for place, present in enumerate(has) if present)
    else:
        end, place = 0, top
        while place > 0:
            place -= 1
            further_down = max(0, place - int(gap_mm / spacing_mm[0]))
            if not has[place] and not has[further_down]:
                end = place
                break
    bottom = max(0, end - int(below_mm / spacing_mm[0]))
    result = labels.copy()
    result[:bottom] = 0
    result[top + 1 :] = 0
    return result


def remove_small_components(labels, spacing_mm, organs, share, minimum_mm3=0.0):
    result = labels.copy()
    for organ in organs:
        mask = labels == organ
        for component in components(mask):
            too_small = component.sum() < share * mask.sum()
            if too_small or component.sum() * np.prod(spacing_mm) < minimum_mm3:
                result[component] = 0
    return result


def keep_largest(labels, spacing_mm, organs, minimum_mm3=0.0):
    result = labels.copy()
    for organ in organs:
        found = components(labels == organ)
        result[labels == organ] = 0
        if found:
            largest = max(found, key=lambda component: component.sum())
            if largest.sum() * np.prod(spacing_mm) > minimum_mm3:
                result[largest] = organ
    return result


def keep_largest_pooled(labels, spacing_mm, organs, minimum_mm3, at_most):
    pooled = [(organ, component) for organ in organs for component in components(labels == organ)]
    # equally large components: the one that comes first in the volume wins
    pooled.sort(key=lambda item: (-item[1].sum(), np.flatnonzero(item[1])[0]))
    result = labels.copy()
    result[np.isin(labels, organs)] = 0
    for organ, component in pooled[:at_most]:
        if component.sum() * np.prod(spacing_mm) <= minimum_mm3:
            break
        result[component] = organ
    return result


def absorb_enclosed(labels, organ, into, only_if_several):
    result = labels.copy()
    found = components(labels == organ)
    if only_if_several and len(found) < 2:
        return result
    for component in found:
        for place in range(labels.shape[0]):
            if not component[place].any():
                continue
            contour = ndimage.binary_dilation(component[place]) & ~component[place]
            if set(labels[place][contour].tolist()) == {into}:
                result[component] = into
                break
    return result


def fill_holes(labels, spacing_mm, organs, maximum_mm3=None):
    result = labels.copy()
    for organ in organs:
        mask = labels == organ
        holes = ndimage.binary_fill_holes(mask) & ~mask
        numbered, count = ndimage.label(holes)
        for number in range(1, count + 1):
            hole = numbered == number
            if maximum_mm3 is None or hole.sum() * np.prod(spacing_mm) <= maximum_mm3:
                result[hole & (result == 0)] = organ
    return result


FLARE22_SMALLEST = {1: 1037420.7, 2: 107952.7, 3: 51560.1, 4: 41522.0, 5: 40533.6, 6: 41437.5, 7: 1385.6, 8: 2445.2}
FLARE22_SMALLEST |= {9: 4276.8, 10: 6978.7, 11: 140339.3, 12: 43615.0, 13: 102572.2}


def flare22(labels, spacing_mm):
    """Radboud's pipeline in its code's order and with its lists, the two faults mended."""
    smallest = {2: 107952.7, 3: 51560.1, 4: 41522.0, 7: 1385.6, 8: 2445.2, 9: 4276.8, 13: 102572.2}
    labels = remove_small_organs(labels, spacing_mm, {organ: 0.5 * volume for organ, volume in smallest.items()})
    labels = close_organs(labels, [7, 8], (5, 5, 5))
    labels = keep_axial_field(labels, spacing_mm, [5, 6, 10], 20, 20)
    labels = remove_small_components(labels, spacing_mm, [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13], 0.1)
    return absorb_enclosed(labels, 9, 1, only_if_several=True)


def flare22_paper(labels, spacing_mm):
    """Radboud's pipeline as its paper tells it."""
    labels = remove_small_organs(labels, spacing_mm, {o: 0.5 * volume for o, volume in FLARE22_SMALLEST.items()})
    labels = close_organs(labels, [7, 8], (5, 5, 5))
    labels = keep_axial_field(labels, spacing_mm, [5, 6, 10], None, 0)
    labels = absorb_enclosed(labels, 9, 1, only_if_several=False)
    return remove_small_components(labels, spacing_mm, range(1, 14), 0.1)


def sztu(labels, spacing_mm):
    """The largest component of each organ, above 0.3 of the smallest volume of the FLARE22 training set."""
    labels = keep_largest(labels, spacing_mm, range(1, 14))
    return remove_small_organs(labels, spacing_mm, {o: 0.3 * volume for o, volume in FLARE22_SMALLEST.items()})


PIPELINES = {
    "flare22": flare22,
    "flare22-paper": flare22_paper,
    "single-label": lambda labels, spacing_mm: keep_largest_pooled(labels, spacing_mm, range(1, 14), 100, 30),
    "sztu": sztu,
    "largest": lambda labels, spacing_mm: keep_largest(labels, spacing_mm, range(1, 14)),
}
