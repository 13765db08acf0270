"""Label maps of one case from several places, which must lie on one grid to be merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.fusion.ids import IdMap, load_id_map
from nnunet_flare.fusion.partial import Merged, Source
from nnunet_flare.images import Volume, geometry_difference, read_labels, write_labels

NO_MAP = "none"
"""Word for a teacher whose label maps have the dataset's ids already."""


def teacher_ids(names: Sequence[str], teachers: int) -> list[IdMap | None]:
    """The id map of each teacher: none, one for all, or one each."""
    each = list(names) * teachers if len(names) == 1 else list(names) or [NO_MAP] * teachers
    return [None if name == NO_MAP else load_id_map(name) for name in each]


@dataclass(frozen=True, eq=False)
class CaseMaps:
    """The first label map of a case, whose grid the others must have, and the ids that they may hold."""

    case: str
    path: Path
    first: Volume
    allowed: tuple[int, ...]

    @classmethod
    def open(cls, case: str, path: Path, allowed: Sequence[int]) -> CaseMaps:
        """Read the first label map.

        Raises:
            CaseError: when it cannot be used.
        """
        return cls(case, path, read_labels(path, case, allowed=allowed), tuple(allowed))

    def read(self, path: Path, *, any_ids: bool = False) -> np.ndarray:
        """A further label map (Z, Y, X) of the case.

        Raises:
            CaseError: when it cannot be used or lies on another grid.
        """
        volume = read_labels(path, self.case, allowed=None if any_ids else self.allowed)
        difference = geometry_difference(self.first, volume)
        if difference:
            raise CaseError(self.case, f"{self.path} and {path} differ in {difference}")
        return volume.array

    def source(self, path: Path, id_map: IdMap | None) -> Source:
        """A further label map as a source of a merge, its ids mapped to the dataset's.

        Raises:
            CaseError: as :meth:`read`, and for ids that the map does not have.
        """
        array = self.read(path, any_ids=id_map is not None)
        if id_map is None:
            return Source(array)
        try:
            return Source(id_map.apply(array), id_map.knows)
        except ValueError as error:
            raise CaseError(self.case, f"{path}: {error}") from error

    def write(self, target: Path, merged: Merged) -> None:
        """Write a merged map on the case's grid, unless it has one value only."""
        if not merged.is_constant:
            write_labels(target, merged.labels, self.first)
