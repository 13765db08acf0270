"""The operations that tuning tries, with the values of the published systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nnunet_flare.postprocessing.labelset import LabelSet
from nnunet_flare.postprocessing.learn import FRACTION
from nnunet_flare.postprocessing.steps import (
    AbsorbEnclosed,
    CloseOrgans,
    FillHoles,
    KeepAxialField,
    KeepLargest,
    KeepLargestPooled,
    Organ,
    RemoveSmallComponents,
    RemoveSmallOrgans,
    Step,
)

SHARE = 0.1
"""Radboud's share of an organ's volume below which a component goes."""

CLOSING_VOXELS = (5, 5, 5)
"""Radboud's box."""

FIELD_MM = 20.0
"""Radboud's gap and margin below the vessels."""

Make = Callable[[tuple[str, ...]], Step]


@dataclass(frozen=True)
class Candidate:
    """An operation to try: ``make`` gives its step for some of ``organs``; without organs it cannot be tried.

    ``by_organ`` False: its effect on one organ cannot be had without that on the others, so it is taken or left.
    """

    title: str
    organs: tuple[str, ...]
    make: Make
    by_organ: bool = True


def candidates(labels: LabelSet, minimum_mm3: Mapping[Organ, float]) -> list[Candidate]:
    """What to try on a label set, in the order of Radboud's code, nnU-Net's and Fosun Aitrox's rules after it.

    ``minimum_mm3`` are smallest plausible volumes by organ name; organs without one are not judged by volume.
    """
    every, erasable = tuple(labels.organs), tuple(labels.structures)
    volumes = {organ: volume for name, volume in minimum_mm3.items() for organ in _present(labels, name)}
    vessels = _organs_alone(labels, "aorta", "inferior_vena_cava", "esophagus")
    inside = _organs_alone(labels, "gallbladder", "liver")

    def small_organs(organs: tuple[str, ...]) -> Step:
        minimum = {organ: volumes[organ] for organ in organs}
        return RemoveSmallOrgans(operation="remove_small_organs", minimum_mm3=minimum, fraction=FRACTION)

    def closing(organs: tuple[str, ...]) -> Step:
        return CloseOrgans(operation="close_organs", organs=list(organs), size_voxels=CLOSING_VOXELS)

    def field(organs: tuple[str, ...]) -> Step:
        return KeepAxialField(operation="keep_axial_field", references=list(organs), gap_mm=FIELD_MM, below_mm=FIELD_MM)

    def components(organs: tuple[str, ...]) -> Step:
        return RemoveSmallComponents(operation="remove_small_components", organs=list(organs), share=SHARE)

    def largest(organs: tuple[str, ...]) -> Step:
        return KeepLargest(operation="keep_largest", organs=list(organs))

    def pooled(organs: tuple[str, ...]) -> Step:
        return KeepLargestPooled(operation="keep_largest_pooled", organs=list(organs))

    def enclosed(organs: tuple[str, ...]) -> Step:
        return AbsorbEnclosed(operation="absorb_enclosed", organ=organs[0], into=organs[1])

    def holes(organs: tuple[str, ...]) -> Step:
        return FillHoles(operation="fill_holes", organs=list(organs))

    return [
        Candidate("erase organs below half their smallest volume", tuple(volumes), small_organs),
        Candidate("close gaps", every, closing),
        Candidate("keep the slices of the great vessels", vessels, field, by_organ=False),
        Candidate("erase components below a tenth of their organ", erasable, components),
        Candidate(
            "give gallbladder inside the liver to the liver", inside[:2] if len(inside) > 1 else (), enclosed, False
        ),
        Candidate("keep the largest component", erasable, largest),
        Candidate("keep the largest components of all organs together", every, pooled, by_organ=False),
        Candidate("fill holes", every, holes),
    ]


def _organs_alone(labels: LabelSet, *names: Organ) -> tuple[str, ...]:
    """Those of them that are organs of one label, which operations that give voxels to a label need."""
    return tuple(name for name in _present(labels, *names) if name in labels.organs)


def _present(labels: LabelSet, *names: Organ) -> tuple[str, ...]:
    """The label set's own names of those organs that it has."""
    own = {labels.find(organ): organ for organ in labels.structures}
    found = []
    for name in names:
        try:
            found.append(own[labels.find(name)])
        except ValueError:
            continue
    return tuple(found)
