"""Choosing a pipeline by validation Dice: each operation is tried in turn and kept where it helps.

nnU-Net keeps only the largest component, of an organ or of all, when the mean Dice rises and no class falls. Here the
same rule judges every operation, with a stated loss that a single organ may take. Operations that work organ by organ
are first tried on all organs; those that gain are then judged together as one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.evaluation.overlap import annotated_alone, region_dice
from nnunet_flare.evaluation.pairs import CasePair, find_pairs, read_pair
from nnunet_flare.organs import FLARE22
from nnunet_flare.parallel import Workers
from nnunet_flare.postprocessing.candidates import Candidate, candidates
from nnunet_flare.postprocessing.labelset import LabelSet
from nnunet_flare.postprocessing.pipeline import Pipeline, PipelineFile, bind_pipeline
from nnunet_flare.postprocessing.steps import Organ, Step

SMALLEST_GAIN = 1e-6
"""A smaller rise of the mean Dice is none."""


@dataclass(frozen=True)
class Trial:
    """A candidate that was tried: its step if it is kept, mean Dice before and after, gain of each organ, and why."""

    title: str
    step: Step | None
    before: float
    after: float
    gains: Mapping[str, float]
    reason: str


@dataclass(frozen=True)
class Tuned:
    """The chosen pipeline, all trials in order, the cases used and left out, and mean Dice before and after."""

    content: PipelineFile
    trials: tuple[Trial, ...]
    cases: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    before: float
    after: float


def tune(
    predictions: Path,
    references: Path,
    labels: LabelSet,
    *,
    minimum_mm3: Mapping[Organ, float] | None = None,
    max_loss: float = 0.0,
    processes: int | None = None,
    progress: bool = True,
) -> Tuned:
    """Try every operation on validation predictions and keep what helps.

    Args:
        predictions: folder of predicted label maps.
        references: folder of their references; cases on one side only are left out.
        labels: the label set of both.
        minimum_mm3: smallest plausible organ volumes by name (default FLARE22's); half of each is the threshold.
        max_loss: mean Dice that a single organ may lose by a step that raises the mean over all organs.
        processes: workers; default one per core.
        progress: show bars where there is a terminal.

    Raises:
        InputError: when no case can be scored.
    """
    if minimum_mm3 is None:
        minimum_mm3 = {organ.name: organ.min_volume_mm3 for organ in FLARE22 if organ.min_volume_mm3 is not None}
    with Workers(processes, progress=progress) as workers:
        pairing = find_pairs(references, predictions)
        bench = _Bench(pairing.pairs, labels, workers, list(pairing.left))
        scores = start = bench.scores([], "as predicted")
        steps: list[Step] = []
        trials = []
        for candidate in candidates(labels, minimum_mm3):
            trial, scores = _try(candidate, bench, steps, scores, max_loss)
            trials.append(trial)
            if trial.step is not None:
                steps.append(trial.step)
    before, after = float(start.mean()), float(scores.mean())
    description = f"chosen on {len(bench.pairs)} validation cases, mean Dice {before:.4f} before and {after:.4f} after"
    content = PipelineFile(description=description, labels=labels.in_file, steps=steps)
    cases = tuple(pair.case for pair in bench.pairs)
    return Tuned(content, tuple(trials), cases, tuple(bench.failed), before, after)


@dataclass
class _Bench:
    """Scores pipelines on the validation cases; a case that cannot be scored is left out from the first pass on."""

    pairs: Sequence[CasePair]
    labels: LabelSet
    workers: Workers
    failed: list[tuple[str, str]] = field(default_factory=list)

    def scores(self, steps: Sequence[Step], title: str) -> np.ndarray:
        """Mean Dice over the cases of every organ (organs and regions,) after the steps."""
        work = partial(_dice_after, pipeline=bind_pipeline("trial", PipelineFile(steps=list(steps)), self.labels))
        found = {}
        for pair, outcome in self.workers.each_case(work, self.pairs, description=title):
            if isinstance(outcome, CaseError):
                self.failed.append((outcome.case, outcome.reason))
            else:
                found[pair.case] = outcome
        if not found:
            reasons = "; ".join(f"{case}: {reason}" for case, reason in self.failed)
            raise InputError(f"no case could be scored: {reasons or 'predictions and references share no case'}")
        self.pairs = [pair for pair in self.pairs if pair.case in found]
        return np.mean([found[pair.case] for pair in self.pairs], axis=0)


def _dice_after(pair: CasePair, *, pipeline: Pipeline) -> list[float]:
    reference, prediction, _ = read_pair(pair)
    unknown = sorted(set(np.unique(prediction.array).tolist()) - pipeline.labels.allowed)
    if unknown:
        raise CaseError(pair.case, f"{pair.prediction}: holds the ids {unknown}, not in {pipeline.labels.source}")
    result = pipeline.apply(prediction.array, prediction.spacing_mm, direction=prediction.direction)
    truth, found = annotated_alone(reference.array, result, pipeline.labels.ignored)
    return region_dice(truth, found, list(pipeline.labels.structures.values()))


def _try(
    candidate: Candidate, bench: _Bench, steps: list[Step], scores: np.ndarray, max_loss: float
) -> tuple[Trial, np.ndarray]:
    organs = tuple(bench.labels.structures)
    before = float(scores.mean())
    if not candidate.organs:
        return Trial(candidate.title, None, before, before, {}, "the label set lacks its organs"), scores
    step = candidate.make(candidate.organs)
    tried = bench.scores([*steps, step], candidate.title)
    if candidate.by_organ:
        gaining = tuple(o for o in candidate.organs if (tried - scores)[organs.index(o)] > SMALLEST_GAIN)
        if not gaining:
            return Trial(candidate.title, None, before, float(tried.mean()), {}, "no organ gains"), scores
        if gaining != candidate.organs:
            step = candidate.make(gaining)
            tried = bench.scores([*steps, step], f"{candidate.title}, chosen organs")
    gain = tried - scores
    gains = {organ: float(value) for organ, value in zip(organs, gain, strict=True)}
    after = float(tried.mean())
    worst = min(gains, key=lambda organ: gains[organ])
    if after - before <= SMALLEST_GAIN:
        reason = "the mean Dice does not rise"
    elif gains[worst] < -max_loss - SMALLEST_GAIN:
        reason = f"{worst} loses {-gains[worst]:.4f}, more than {max_loss:g}"
    else:
        return Trial(candidate.title, step, before, after, gains, "kept"), tried
    return Trial(candidate.title, None, before, after, gains, reason), scores
