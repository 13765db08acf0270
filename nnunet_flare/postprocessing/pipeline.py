"""Post-processing pipelines: ordered steps as YAML, checked, bound to a label set and applied to label maps.

Built in are ``flare22`` and ``flare22-paper`` (Radboud), ``single-label`` (Fosun Aitrox), ``sztu`` and ``largest``; any
YAML file of the same form serves as well::

    description: why these steps
    labels: flare22            # optional: flare22, flare23, a dataset.json or its "labels"; the default
    steps:
      - operation: remove_small_components
        organs: [liver, spleen]
        share: 0.1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from nnunet_flare.documents import load_yaml, parse_yaml
from nnunet_flare.errors import InputError
from nnunet_flare.images.geometry import LPS
from nnunet_flare.images.orientation import turn_between
from nnunet_flare.postprocessing.components import foreground_rectangle
from nnunet_flare.postprocessing.labelset import LabelSet, label_set
from nnunet_flare.postprocessing.steps import Operation, Step, UnknownOrgan

BUILT_IN: tuple[str, ...] = ("flare22", "flare22-paper", "single-label", "sztu", "largest")

DEFAULT_LABELS = "flare22"

CONTOUR_VOXELS = 1
"""Margin around the labelled voxels within which operations look at neighbours."""


class PipelineFile(BaseModel):
    """The content of a pipeline's YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    labels: str | dict[str, Any] | None = None
    steps: list[Step]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline bound to a label set, ready to be applied."""

    name: str
    content: PipelineFile
    labels: LabelSet
    operations: tuple[Operation, ...]

    def apply(self, labels: np.ndarray, spacing_mm: Sequence[float], *, direction: Sequence[float] = LPS) -> np.ndarray:
        """The post-processed label map, uint8 on the same grid; the input is not changed.

        Args:
            labels: integer label map (Z, Y, X) as stored.
            spacing_mm: (z, y, x) of that array.
            direction: SimpleITK's direction of the image, by which "axial" and "above" are found; the default is an
                array whose axis 0 ascends towards the head.

        Raises:
            InputError: for label ids outside the label set, no usable spacing, or an array that is no label map.
        """
        self._check(labels, spacing_mm)
        turn = turn_between(direction)
        turned = turn.apply(labels)
        y, x = foreground_rectangle(turned, margin=CONTOUR_VOXELS)
        region = np.ascontiguousarray(turned[:, y, x], dtype=np.uint8)
        spacing = turn.spacing_mm(spacing_mm)
        for operation in self.operations if region.size else ():
            region = operation(region, spacing)
        result = np.zeros(turned.shape, dtype=np.uint8)
        result[:, y, x] = region
        return np.ascontiguousarray(turn.undo(result))

    def _check(self, labels: np.ndarray, spacing_mm: Sequence[float] | None) -> None:
        if labels.ndim != 3 or labels.dtype.kind not in "iu":
            raise InputError(
                f"pipeline {self.name}: array of {labels.ndim} dimensions and type {labels.dtype}, expected an integer "
                "label map (z, y, x)"
            )
        if spacing_mm is None or len(spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing_mm):
            raise InputError(
                f"pipeline {self.name}: spacing (z, y, x) is {spacing_mm}, expected three numbers of mm above 0; "
                "volumes cannot be computed without it"
            )
        unknown = sorted(set(_ids_of(labels)) - self.labels.allowed)
        if unknown:
            raise InputError(
                f"pipeline {self.name}: the label map holds ids {unknown}, which are not in {self.labels.source} "
                f"{sorted(self.labels.allowed)}; name its label set with --labels (flare23 has the lesions)"
            )


def _ids_of(labels: np.ndarray) -> list[int]:
    return [int(i) for i in np.unique(labels[labels != 0])]


def load_pipeline(name_or_path: str | Path, *, labels: str | Mapping[str, Any] | None = None) -> Pipeline:
    """A built-in pipeline by name, or one from a YAML file.

    Args:
        name_or_path: one of :data:`BUILT_IN` or a file.
        labels: the label set of the maps: ``flare22``, ``flare23``, a dataset.json's path or its ``labels`` entry.
            Default: what the file says, else FLARE22's.

    Raises:
        InputError: with the file and the key, for what is no pipeline, unknown operations, organs or keys, and values
            out of range; all problems at once.
    """
    name, document = _read(name_or_path)
    return _bound(name, document, labels)


def stored_pipeline(name: str, document: Mapping[str, Any], *, labels: str | Mapping[str, Any]) -> Pipeline:
    """A pipeline of which only the content was kept, as ``Pipeline.content.model_dump(mode="json")`` gives it.

    Raises:
        InputError: as :func:`load_pipeline`.
    """
    return _bound(name, document, labels)


def _bound(name: str, document: Any, labels: str | Mapping[str, Any] | None) -> Pipeline:
    try:
        content = PipelineFile.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{name}: {_problems(error)}") from error
    return bind_pipeline(name, content, label_set(labels if labels is not None else content.labels or DEFAULT_LABELS))


def bind_pipeline(name: str, content: PipelineFile, known: LabelSet) -> Pipeline:
    """A pipeline's content bound to a label set.

    Raises:
        InputError: naming every organ that the label set lacks, with its place.
    """
    operations, problems = [], []
    for place, step in enumerate(content.steps):
        try:
            operations.append(step.bind(known))
        except UnknownOrgan as error:
            problems.append(f"steps.{place}.{error.key}: {error}")
    if problems:
        raise InputError(f"{name}: " + "; ".join(problems))
    return Pipeline(name, content, known, tuple(operations))


def _read(name_or_path: str | Path) -> tuple[str, Any]:
    if str(name_or_path) in BUILT_IN:
        file = resources.files("nnunet_flare.postprocessing") / "pipelines" / f"{name_or_path}.yaml"
        return str(name_or_path), parse_yaml(file.read_text(encoding="utf-8"), str(name_or_path))
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(f"pipeline {name_or_path}: not built in ({', '.join(BUILT_IN)}) and not a file")
    return str(path), load_yaml(path)


def _problems(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        # The names of union members and dictionary markers in pydantic's places mean nothing in the file.
        place = ".".join(str(part) for part in _place_in_file(problem["loc"]))
        given = problem["input"]
        found = f" (found {given!r})" if isinstance(given, (str, int, float)) else ""
        lines.append(f"{place or 'file'}: {problem['msg']}{found}")
    return "; ".join(dict.fromkeys(lines))


def _place_in_file(loc: tuple[int | str, ...]) -> list[int | str]:
    # loc is ("steps", 2, "remove_small_components", "share"): the third part repeats the operation's name
    return [part for place, part in enumerate(loc) if not (place == 2 and loc[0] == "steps")]
