"""Pipelines as YAML text that explains itself: comments say what each figure comes from and what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from nnunet_flare.files import write_text
from nnunet_flare.postprocessing.learn import Learned, rounded_down
from nnunet_flare.postprocessing.pipeline import PipelineFile
from nnunet_flare.postprocessing.steps import RemoveSmallOrgans
from nnunet_flare.postprocessing.tune import Trial, Tuned

WIDTH = 100
LARGEST_GAINS = 3
"""Organs that a comment names."""


def write_pipeline(
    path: Path, content: PipelineFile, *, notes: Sequence[Sequence[str]], remarks: Sequence[str] = ()
) -> None:
    """Write a pipeline by rename: ``notes`` are the comment lines above each step, ``remarks`` those at the end."""
    lines = _entry("description", content.description)
    lines += _entry("labels", content.labels) if content.labels else []
    lines.append("steps:" if content.steps else "steps: []")
    for step, comments in zip(content.steps, notes, strict=True):
        lines += [f"  # {comment}" for comment in comments]
        entries = [line for key, value in step.model_dump(mode="json").items() for line in _entry(key, value)]
        lines += [f"  {'-' if place == 0 else ' '} {line}" for place, line in enumerate(entries)]
    lines += [f"# {remark}" for remark in remarks]
    write_text(path, "\n".join(lines) + "\n")


def _entry(key: str, value: object) -> list[str]:
    """``key: value`` as lines of YAML, lists and mappings on few lines."""
    nested = isinstance(value, (list, dict))
    style = None if nested else False
    return yaml.safe_dump({key: value}, sort_keys=False, width=WIDTH, default_flow_style=style).splitlines()


def learned_notes(content: PipelineFile, learned: Learned) -> tuple[list[list[str]], list[str]]:
    """The notes of each step and the closing remarks of a learned pipeline."""
    own = ["smallest volume of each organ in training, and the case that has it:"]
    own += [f"  {e.organ}: {rounded_down(e.volume_mm3)} mm3 in {e.case} ({e.cases} cases)" for e in learned.smallest]
    notes = [own if isinstance(step, RemoveSmallOrgans) else [] for step in content.steps]
    remarks = [f"organs without any training voxel, not judged: {', '.join(learned.unseen)}"] if learned.unseen else []
    return notes, remarks


def tuned_notes(tuned: Tuned) -> tuple[list[list[str]], list[str]]:
    """The notes of each step and the closing remarks of a tuned pipeline."""
    notes = [_kept_note(trial) for trial in tuned.trials if trial.step is not None]
    remarks = ["tried and not kept:"] if len(notes) < len(tuned.trials) else []
    remarks += [f"  {t.title}: {t.reason}{_change(t)}" for t in tuned.trials if t.step is None]
    return notes, remarks


def _kept_note(trial: Trial) -> list[str]:
    ranked = sorted(trial.gains.items(), key=lambda item: -item[1])
    best = ", ".join(f"{organ} {gain:+.4f}" for organ, gain in ranked[:LARGEST_GAINS] if gain > 0)
    organ, worst = ranked[-1]
    lost = f"; the largest loss is {organ} {worst:+.4f}" if worst < 0 else "; no organ loses"
    return [
        f"{trial.title}: mean Dice {trial.before:.4f} to {trial.after:.4f} ({trial.after - trial.before:+.4f})",
        f"gains: {best}{lost}",
    ]


def _change(trial: Trial) -> str:
    return f" (mean {trial.after - trial.before:+.4f})" if trial.after != trial.before else ""
