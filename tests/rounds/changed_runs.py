"""Changing a copy of the tiny run."""

from __future__ import annotations

from dataclasses import replace

from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.select import select_round


def select(run: Run) -> None:
    """Select round 0."""
    select_round(run, run.round(0))


def changed(run: Run, **parts: dict) -> Run:
    """The run with some keys of its recipe changed."""
    update = {name: getattr(run.recipe, name).model_copy(update=values) for name, values in parts.items()}
    return replace(run, recipe=run.recipe.model_copy(update=update))


def set_agreement(run: Run, case: str, **organs: float | None) -> None:
    path = run.paths.case(0, case)
    document = read_json(path)
    full, none = dict.fromkeys(document["agreement"], 1.0), dict.fromkeys(document["agreement"], 0.0)
    found = {"present": dict.fromkeys(full, True), "absent_pairs": none}  # both members have every organ
    write_json(path, {**document, **found, "agreement": {**full, **organs}})


def labelled_cases(run: Run) -> list[str]:
    return [c.case for c in read_list(run.paths.unlabelled) if "failed" not in read_json(run.paths.case(0, c.case))]
