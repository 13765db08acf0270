"""What is written of a case besides its label map: further forms of it, each a file or more, or a row of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnunet_flare.files import name_problem
from nnunet_flare.images import Volume
from nnunet_flare.images.orientation import Turn
from nnunet_flare.inference.inputs import InputCase


@dataclass(frozen=True, eq=False)
class Finished:
    """A predicted case.

    ``labels`` (Z, Y, X) are those of the label map that is written, ``grid`` is the scan's without voxels, ``members``
    are the members' label maps, and ``image`` is the scan's first channel as stored, where a form wants them.
    """

    case: InputCase
    labels: np.ndarray
    grid: Volume
    members: Sequence[np.ndarray] = ()
    image: Volume | None = None


@dataclass(frozen=True)
class View:
    """How slices of scores lie in a scan, in the axis order of the network (axis 0 is sliced).

    Attributes:
        heads: classes or regions.
        members: whose scores come one after the other.
        shape: of the whole scan.
        box: first voxel and one past the last, per axis, of the part that has scores (stock's crop).
        backward: the transposition to the reader's axis order.
        turn: from the stored axis order to the reader's.
        has_regions: whether heads are regions, each with a sigmoid of its own.
        properties: stock nnU-Net's of the scan, without those of its reader.
        grid: the whole scan's, without voxels.
        placed: which part of it this is, first voxel and one past the last per stored axis (Z, Y, X).
    """

    heads: int
    members: int
    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    backward: tuple[int, ...]
    turn: Turn
    has_regions: bool
    properties: dict[str, Any]
    grid: Volume
    placed: tuple[tuple[int, int], ...]

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of the part that has scores."""
        return tuple(high - low for low, high in self.box)


class Receiver(Protocol):
    """Takes a case's scores on the image's grid, slice by slice, so that they are never in memory as a whole."""

    @property
    def apart(self) -> bool:
        """Whether it wants the members' scores apart; else their mean, as one member's."""
        ...

    def begin(self, view: View) -> None:
        """Before the first slice; again where a prediction is repeated, as in another precision."""
        ...

    def take(self, targets: np.ndarray, scores: np.ndarray) -> None:
        """Scores (members, heads, rows, columns), float32 logits, of some slices of the part, all with the same."""
        ...


@dataclass(frozen=True)
class Form:
    """A further form of every label map.

    Attributes:
        name: in the mark of a label map; short, without spaces.
        what: it is called, for the terminal.
        files: that it writes of a case.
        write: writes them; gets the receiver of scores of this case, or None. Called before the label map is written.
        is_whole: whether all of it is there already, of a case.
        receiver: makes what takes a case's scores on the image's grid (:class:`Receiver`).
        wants_image: whether ``write`` needs the stored voxels.
        wants_members: whether ``write`` needs the members' label maps.
        of_folder: whether ``files`` are the same for all cases.
        problem: why it cannot be made of a case, in words, or None; asked before the case is predicted.
    """

    name: str
    what: str
    files: Callable[[InputCase], tuple[Path, ...]]
    write: Callable[[Finished, Any], None]
    is_whole: Callable[[InputCase], bool]
    receiver: Callable[[InputCase], Receiver] | None = None
    wants_image: bool = False
    wants_members: bool = False
    of_folder: bool = False
    problem: Callable[[InputCase], str | None] = lambda case: None


def problem_of(case: InputCase, form: Form) -> str | None:
    """Why a form cannot be made of a case, or its name is too long for the files, in words; None where all is well."""
    found = form.problem(case)
    if found is not None or form.of_folder:
        return found
    problems = (
        name_problem(case.name, path.parent, [f"{{}}{path.name[len(case.name) :]}"]) for path in form.files(case)
    )
    return next((problem for problem in problems if problem is not None), None)
