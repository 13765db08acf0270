"""A round of a run as a value: its training data, trainer, model folder and members."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nnunet_flare.recipes.parts import Loop

Kind = Literal["supervised", "self-training", "final", "fine-tuning"]
"""Supervised rounds train on annotations alone (the first, or the first of a loop), self-training ones on the labels of
the round before as well. The final training follows the last labelling; a fine-tuning of its model may follow it."""


@dataclass(frozen=True)
class Base:
    """Plans and configuration of trainings: those of the rounds, of the final model, or of the coarse model.

    ``task`` plans it and preprocesses the labelled cases; ``changes`` are the recipe's changes of the plan.
    """

    preprocessed: Path
    plans_name: str
    configuration: str
    planner: str
    changes: dict[str, Any]
    task: str

    @property
    def plans_file(self) -> Path:
        return self.preprocessed / f"{self.plans_name}.json"

    @property
    def data(self) -> Path:
        """The preprocessed labelled cases."""
        return self.preprocessed / f"{self.plans_name}_{self.configuration}"


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: 0, 1, ...; paths, tasks and tables have it in their names.
        planned: the round number for the recipe's settings; it differs if an early stop moved the final training.
        kind: what it learns from.
        loop: its loop over some of the organs, in recipes with loops.
        base: its plans and configuration.
        trainer: class name of its trainer.
        configuration: name of its configuration in the plans.
        data: folder of its training data.
        model: its model folder, named as in stock nnU-Net; in round 0 the given model, if any.
        members: (fold, checkpoint file) of every member of its ensemble.
    """

    number: int
    planned: int
    kind: Kind
    loop: Loop | None
    base: Base
    trainer: str
    configuration: str
    data: Path
    model: Path
    members: tuple[tuple[str, str], ...]

    @property
    def labels_cases(self) -> bool:
        """Whether its members label the unlabelled cases."""
        return self.kind in ("supervised", "self-training")

    @property
    def learns_from(self) -> int | None:
        """The round whose labels it trains on; None if it trains only on annotations."""
        return self.number - 1 if self.number and self.kind in ("self-training", "final") else None

    @property
    def folds(self) -> tuple[str, ...]:
        """The folds of its members."""
        return tuple(dict.fromkeys(fold for fold, _ in self.members))

    @property
    def name(self) -> str:
        """Its name in tables: ``r0``, ``final``, ``tuned``."""
        return {"final": "final", "fine-tuning": "tuned"}.get(self.kind, f"r{self.number}")
