"""A folder of training data, built under another name beside its place and renamed whole.

nnU-Net takes every file in a data folder for a case and a half-built folder for a data set.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.files import link_or_copy, remove_scratch, temporary_prefix
from nnunet_flare.fusion.members import class_locations
from nnunet_flare.labels import Group
from nnunet_flare.rounds.stages.arrays import ENDINGS, write_array, write_properties


class DataFolder:
    """A data folder that is being built; ``links`` counts its linked files by how they were made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.links: Counter[str] = Counter()

    def link(self, source: Path, name: str) -> None:
        """Make one file the same as ``source``."""
        self.links[link_or_copy(source, self._folder / name)] += 1

    def link_case(self, folder: Path, case: str) -> None:
        """Link a whole case of another data folder."""
        for ending in ENDINGS:
            self.link(folder / f"{case}{ending}", f"{case}{ending}")

    def write_label(
        self, case: str, label: np.ndarray, properties: dict[str, Any], *, groups: Sequence[Group], patch: Sequence[int]
    ) -> None:
        """Write a label array (Z, Y, X) and its properties, with the places of ``groups`` for sampling."""
        write_array(self._folder / f"{case}_seg.b2nd", label[None], patch)
        located = class_locations(label, groups)
        write_properties(self._folder / f"{case}.pkl", {**properties, "class_locations": located})


@contextmanager
def building(target: Path) -> Iterator[DataFolder]:
    """Build ``target`` anew. What stood there goes once the new folder is whole; what killed builds left goes too."""
    for left in target.parent.glob(f".tmp-*-{target.name}"):
        remove_scratch(left)
    scratch = target.with_name(f"{temporary_prefix()}{target.name}")
    scratch.mkdir(parents=True)
    yield DataFolder(scratch)
    remove_scratch(target)
    os.replace(scratch, target)
