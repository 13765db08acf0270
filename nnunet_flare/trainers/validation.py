"""Scores of partial cases: on their annotated organs only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

LabelOrRegion = int | tuple[int, ...]


def is_annotated(label: LabelOrRegion, annotated: Sequence[int] | None) -> bool:
    """Whether a label, or every label of a region, is annotated; ``annotated`` None stands for all."""
    if annotated is None:
        return True
    labels = label if isinstance(label, (tuple, list)) else (label,)
    return all(int(each) in annotated for each in labels)


def without_unannotated(summary: Mapping[str, Any], annotated: Mapping[str, Sequence[int] | None]) -> dict[str, Any]:
    """nnU-Net's validation summary without the organs that a case has no annotation of, its means computed anew.

    Args:
        summary: as ``load_summary_json`` returns it, keys of metrics being labels or tuples of labels.
        annotated: label ids of each partial case by case id; a case that is not in it is annotated fully.

    Returns:
        A copy in which such entries are NaN and ``mean`` and ``foreground_mean`` leave them out.
    """
    changed = deepcopy(dict(summary))
    for entry in changed["metric_per_case"]:
        organs = annotated.get(_case_of(entry["prediction_file"]))
        for label, metrics in entry["metrics"].items():
            if not is_annotated(label, organs):
                entry["metrics"][label] = {name: float("nan") for name in metrics}
    for label, means in changed["mean"].items():
        for name in means:
            means[name] = _mean([entry["metrics"][label][name] for entry in changed["metric_per_case"]])
    for name in changed["foreground_mean"]:
        changed["foreground_mean"][name] = _mean([means[name] for means in changed["mean"].values()])
    return changed


def _case_of(prediction_file: str) -> str:
    name = Path(prediction_file).name
    return name[: -len(".nii.gz")] if name.endswith(".nii.gz") else Path(name).stem


def _mean(values: Sequence[float]) -> float:
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")
