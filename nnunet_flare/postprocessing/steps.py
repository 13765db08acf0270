"""The steps of a pipeline as data: one validated model per operation, bound to the ids of a label set.

Organs are named as in the label set (or given by id); volumes are mm3, lengths mm, shares 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from nnunet_flare.labels import Group
from nnunet_flare.postprocessing import operations
from nnunet_flare.postprocessing.labelset import LabelSet

Operation = Callable[[np.ndarray, operations.Spacing], np.ndarray]
"""A bound step: (label map (Z, Y, X) in LPS, spacing (z, y, x) in mm) to a new label map."""


def _three(value: Any) -> Any:
    return (value, value, value) if isinstance(value, int) else value


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd, so that the box has a middle")
    return value


Organ = int | str
Organs = Annotated[list[Organ], Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
OddSize = Annotated[int, Field(ge=1, le=999), AfterValidator(_odd)]


class UnknownOrgan(ValueError):
    """An organ that the label set lacks; ``key`` is the step's key that names it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _ids(labels: LabelSet, key: str, names: list[Organ] | Literal["all"]) -> tuple[int, ...]:
    """Organs of one label each, for operations that give voxels to a label."""
    if names == "all":
        return tuple(labels.organs.values())
    return tuple(_id(labels, key, name) for name in names)


def _id(labels: LabelSet, key: str, name: Organ) -> int:
    found = _group(labels, key, name)
    if isinstance(found, tuple):
        raise UnknownOrgan(key, f"'{name}' is a region of the labels {list(found)}; expected an organ of one label")
    return found


def _groups(labels: LabelSet, key: str, names: list[Organ] | Literal["all"]) -> tuple[Group, ...]:
    """Organs and regions, for operations that only erase."""
    if names == "all":
        return (*labels.regions.values(), *labels.organs.values())
    return tuple(_group(labels, key, name) for name in names)


def _group(labels: LabelSet, key: str, name: Organ) -> Group:
    try:
        return labels.find(name)
    except ValueError as error:
        raise UnknownOrgan(key, str(error)) from error


class RemoveSmallOrgans(_Step):
    """Erase an organ whose volume is below ``fraction`` times its minimum."""

    operation: Literal["remove_small_organs"]
    minimum_mm3: Annotated[dict[Organ, NonNegative], Field(min_length=1)]
    fraction: NonNegative = 1.0

    def bind(self, labels: LabelSet) -> Operation:
        minimum = {
            _group(labels, f"minimum_mm3.{name}", name): volume * self.fraction
            for name, volume in self.minimum_mm3.items()
        }
        return partial(operations.remove_small_organs, minimum_mm3=minimum)


class CloseOrgans(_Step):
    """Morphological closing with a box of ``size_voxels`` (z, y, x)."""

    operation: Literal["close_organs"]
    organs: Organs
    size_voxels: Annotated[tuple[OddSize, OddSize, OddSize], BeforeValidator(_three)]

    def bind(self, labels: LabelSet) -> Operation:
        organs = _ids(labels, "organs", self.organs)
        return partial(operations.close_organs, organs=organs, size_voxels=self.size_voxels)


class KeepAxialField(_Step):
    """Erase the slices beyond the reach of reference organs; see the operation for ``gap_mm`` and ``below_mm``."""

    operation: Literal["keep_axial_field"]
    references: Organs
    gap_mm: NonNegative | None = None
    below_mm: NonNegative = 0.0

    def bind(self, labels: LabelSet) -> Operation:
        references = _ids(labels, "references", self.references)
        return partial(operations.keep_axial_field, references=references, gap_mm=self.gap_mm, below_mm=self.below_mm)


class RemoveSmallComponents(_Step):
    """Erase components below a share of their organ, or below a volume."""

    operation: Literal["remove_small_components"]
    organs: Organs | Literal["all"] = "all"
    share: Share = 0.0
    minimum_mm3: NonNegative = 0.0

    def bind(self, labels: LabelSet) -> Operation:
        organs = _groups(labels, "organs", self.organs)
        return partial(
            operations.remove_small_components, organs=organs, share=self.share, minimum_mm3=self.minimum_mm3
        )


class KeepLargest(_Step):
    """Keep the largest component of each organ, above a volume."""

    operation: Literal["keep_largest"]
    organs: Organs | Literal["all"] = "all"
    minimum_mm3: NonNegative = 0.0

    def bind(self, labels: LabelSet) -> Operation:
        organs = _groups(labels, "organs", self.organs)
        return partial(operations.keep_largest, organs=organs, minimum_mm3=self.minimum_mm3)


class KeepLargestPooled(_Step):
    """Single-label components: the organs' components compete in one list."""

    operation: Literal["keep_largest_pooled"]
    organs: Organs | Literal["all"] = "all"
    minimum_mm3: NonNegative = 100.0
    at_most: Annotated[int, Field(ge=1)] = 30

    def bind(self, labels: LabelSet) -> Operation:
        organs = _ids(labels, "organs", self.organs)
        return partial(
            operations.keep_largest_pooled, organs=organs, minimum_mm3=self.minimum_mm3, at_most=self.at_most
        )


class AbsorbEnclosed(_Step):
    """Turn components of ``organ`` that lie inside ``into`` into it."""

    operation: Literal["absorb_enclosed"]
    organ: Organ
    into: Organ
    only_if_several: bool = True

    def bind(self, labels: LabelSet) -> Operation:
        organ, into = _id(labels, "organ", self.organ), _id(labels, "into", self.into)
        return partial(operations.absorb_enclosed, organ=organ, into=into, only_if_several=self.only_if_several)


class FillHoles(_Step):
    """Fill background that an organ encloses, hole by hole up to a volume."""

    operation: Literal["fill_holes"]
    organs: Organs | Literal["all"] = "all"
    maximum_mm3: NonNegative | None = None

    def bind(self, labels: LabelSet) -> Operation:
        return partial(operations.fill_holes, organs=_ids(labels, "organs", self.organs), maximum_mm3=self.maximum_mm3)


Step = Annotated[
    RemoveSmallOrgans
    | CloseOrgans
    | KeepAxialField
    | RemoveSmallComponents
    | KeepLargest
    | KeepLargestPooled
    | AbsorbEnclosed
    | FillHoles,
    Field(discriminator="operation"),
]
