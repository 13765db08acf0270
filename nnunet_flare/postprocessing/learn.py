"""Minimum organ volumes learned from a training set, put into a pipeline that says where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import read_labels_alone, stem_of
from nnunet_flare.parallel import Workers
from nnunet_flare.postprocessing.components import slice_counts
from nnunet_flare.postprocessing.folder import label_files
from nnunet_flare.postprocessing.labelset import LabelSet
from nnunet_flare.postprocessing.pipeline import Pipeline, PipelineFile
from nnunet_flare.postprocessing.steps import Organ, RemoveSmallOrgans

FRACTION = 0.5
"""Radboud's margin: an organ is erased below half of the smallest volume seen in training."""


@dataclass(frozen=True)
class SmallestOrgan:
    """The smallest volume of one organ in the training set, the case that has it, and in how many cases it occurs."""

    organ: str
    volume_mm3: float
    case: str
    cases: int


@dataclass(frozen=True)
class Learned:
    """Smallest organs in the order of the label set, organs never seen, cases read, and those that could not be."""

    smallest: tuple[SmallestOrgan, ...]
    unseen: tuple[str, ...]
    cases: int
    failed: tuple[tuple[str, str], ...]


def smallest_organs(source: Path, labels: LabelSet, *, processes: int | None = None, progress: bool = True) -> Learned:
    """The smallest volume of every organ and region over the label maps of a folder; cases without it do not count.

    A case with voxels that nobody annotated is left out: how large its organs are is not known.

    Raises:
        InputError: when the folder holds no label map, or none that can be read.
    """
    files, left = label_files(source)
    volumes: dict[str, dict[str, float]] = {}
    failed = list(left.items())
    work = partial(_volumes_mm3, labels=labels)
    with Workers(processes, progress=progress) as workers:
        for path, outcome in workers.each_case(work, files, description="measuring organs"):
            if isinstance(outcome, CaseError):
                failed.append((outcome.case, outcome.reason))
            else:
                volumes[stem_of(path)] = outcome
    if not any(volumes.values()):
        reasons = "; ".join(f"{case}: {reason}" for case, reason in sorted(failed)) or "all label maps are empty"
        raise InputError(f"{source}: no organ could be measured: {reasons}")
    smallest, unseen = [], []
    for organ in labels.structures:
        seen = {case: found[organ] for case, found in sorted(volumes.items()) if organ in found}
        if not seen:
            unseen.append(organ)
            continue
        case = min(seen, key=lambda name: seen[name])
        smallest.append(SmallestOrgan(organ, seen[case], case, len(seen)))
    return Learned(tuple(smallest), tuple(unseen), len(volumes), tuple(sorted(failed)))


def _volumes_mm3(path: Path, *, labels: LabelSet) -> dict[str, float]:
    case = stem_of(path)
    volume = read_labels_alone(path, case, allowed=sorted(labels.allowed))
    counts = slice_counts(volume.array.astype(np.uint8)).sum(axis=0)
    if labels.ignored is not None and labels.ignored < counts.size and counts[labels.ignored]:
        unknown = int(counts[labels.ignored])
        raise CaseError(case, f"{unknown} voxels are not annotated ('ignore'), so its organ volumes are unknown")
    found = {name: sum(counts[i] for i in ids if i < counts.size) for name, ids in labels.structures.items()}
    return {name: float(count * volume.voxel_mm3) for name, count in found.items() if count}


def with_learned_volumes(base: Pipeline, learned: Learned, *, fraction: float = FRACTION) -> PipelineFile:
    """The base pipeline with its minimum volumes replaced by the learned ones.

    The organs are those that the base judges by volume; a base that judges none gets such a step for every organ seen,
    in front. Organs that the training set never shows keep no minimum.
    """
    volumes = {entry.organ: rounded_down(entry.volume_mm3) for entry in learned.smallest}
    steps: list[Any] = []
    for step in base.content.steps:
        if isinstance(step, RemoveSmallOrgans):
            judged = {base.labels.find(name) for name in step.minimum_mm3}
            own = {organ: v for organ, v in volumes.items() if base.labels.find(organ) in judged}
            steps += [_step(own, fraction)] if own else []
        else:
            steps.append(step)
    if not any(isinstance(step, RemoveSmallOrgans) for step in base.content.steps):
        steps.insert(0, _step(volumes, fraction))
    description = f"{base.name} with the smallest organ volumes of {learned.cases} training cases"
    return PipelineFile(description=description, labels=base.labels.in_file, steps=steps)


def rounded_down(volume_mm3: float) -> float:
    """To seven digits or a tenth, so that small organs keep a minimum, and the smallest in training is not below it."""
    digits = max(1, 6 - math.floor(math.log10(volume_mm3)))
    return math.floor(volume_mm3 * 10**digits) / 10**digits


def _step(minimum_mm3: Mapping[str, float], fraction: float) -> RemoveSmallOrgans:
    return RemoveSmallOrgans(operation="remove_small_organs", minimum_mm3=dict(minimum_mm3), fraction=fraction)


def volumes_of(pipeline: Pipeline) -> dict[Organ, float]:
    """The smallest organ volumes that a pipeline holds, by the names it uses.

    Raises:
        InputError: when it judges no organ by volume.
    """
    volumes = {
        organ: volume
        for step in pipeline.content.steps
        if isinstance(step, RemoveSmallOrgans)
        for organ, volume in step.minimum_mm3.items()
    }
    if not volumes:
        raise InputError(f"pipeline {pipeline.name}: holds no organ volumes; make one with flare-postprocess learn")
    return volumes
