"""The arms of ``recipes.py`` as data: every system on one tiny network, with one budget.

Papers differ in planner, patch, network and length, which says nothing about how they use unlabelled scans. Here every
arm has the demo's plan, optimiser and augmentation, the same optimiser steps in all its trainings together, and the
same unlabelled predictions (passes of one network over one unlabelled scan).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.recipes.recipe import Recipe


@dataclass(frozen=True)
class Budget:
    """Cases, voxels (z, y, x) of a scan, and optimiser steps of one epoch."""

    labelled: int
    unlabelled: int
    test: int
    size: tuple[int, int, int]
    epoch_steps: int


FULL = Budget(labelled=4, unlabelled=24, test=12, size=(32, 48, 64), epoch_steps=50)
QUICK = Budget(labelled=3, unlabelled=3, test=2, size=(32, 48, 64), epoch_steps=1)
"""To see that everything runs; its figures mean nothing."""

EPOCHS = 28
"""Of all trainings of an arm together."""
MEMBERS = 3

COMMON: Mapping[str, str] = {
    "planner": "nnUNetPlannerFlareTiny",
    "plan.spacing_mm": "[8.5, 5.0, 5.2]",
    "plan.patch_size": "[32, 48, 64]",
    "plan.base_features": "8",
    "plan.max_features": "64",
    "plan.stages": "4",
    "plan.convs_per_stage": "1",
    "plan.batch_size": "1",
    "training.validation_iterations": "1",
    "training.optimizer": "AdamW",
    "training.initial_lr": "0.01",
    "training.warmup_iterations": "20",
    "training.class_weights": "inverse-sqrt-frequency",
    "training.mirroring": "false",
    "training.cpu_precision": "bf16",
    "training.pseudo_folds": "all",
    "training.final_validation": "false",
    "augmentation": "{labelled: stock, pseudo: stock}",
    "predict": "{step_size: 1.0, tta: none}",
}
"""What every arm has: the demo recipe's settings, which were measured to learn."""


@dataclass(frozen=True)
class System:
    """One arm.

    Attributes:
        name: of its runs and result files.
        title: in tables and pictures.
        recipe: the shipped recipe.
        epochs: of each round's training (of each member), the final training last.
        settings: ``--set`` values beyond :data:`COMMON`.
        ensemble: round 0 is the seed's ensemble (:data:`ENSEMBLE`), trained once for all such arms and charged to each.
        labels: what trains: the labelled cases and pseudo-labels, the labelled cases alone, or true labels of all.
    """

    name: str
    title: str
    recipe: str
    epochs: tuple[int, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    ensemble: bool = False
    labels: str = "pseudo"

    @property
    def is_supervised(self) -> bool:
        """Whether one training on labels that are given is all there is."""
        return self.labels != "pseudo"

    def set_values(self, seed: int, budget: Budget) -> dict[str, str]:
        """The ``--set`` values of this arm."""
        length = {
            "training.num_epochs": str(list(self.epochs)),
            "training.iterations_per_epoch": str(budget.epoch_steps),
            "seed": str(seed),
        }
        return {**COMMON, **length, **self.settings}

    def load(self, seed: int, budget: Budget) -> Recipe:
        """The arm's recipe."""
        return load_recipe(self.recipe, self.set_values(seed, budget))


ONE_MODEL = {"members.count": "1", "selection": "{rule: all}"}
WHOLE_SCANS = {
    "configuration": "3d_fullres",
    "roi": "null",
    "training.epoch": "iterations",
    "training.class_weights": "null",
}
"""Systems that train coarse to fine and by passes: the phantom is one patch. Their soft Dice has no weights."""
MEAN_HALF = {"selection": "{rule: mean-organ, threshold: 0.0, top_fraction: 0.5}"}

ENSEMBLE = System("ensemble", "ensemble of three supervised members", "demo", (4, 16))

SYSTEMS: tuple[System, ...] = (
    System("supervised", "supervised only (control)", "demo", (28,), ONE_MODEL, labels="labelled"),
    System("unfiltered", "all pseudo-labels", "demo", (4, 16), {"selection": "{rule: all}"}, ensemble=True),
    System(
        "uncertainty",
        "uncertainty: best half by the worst organ",
        "uncertainty",
        (4, 16),
        {"rounds": "1", "members.count": "3", "selection": "{rule: min-organ, threshold: 0.0, top_fraction: 0.5}"},
        ensemble=True,
    ),
    System("noisy_student", "noisy student: three generations", "noisy_student", (7, 7, 7, 7), {"rounds": "3"}),
    System("oracle", "oracle: true labels of all", "demo", (28,), ONE_MODEL, labels="true"),
    System(
        "selective",
        "selective: best half by the stability of checkpoints",
        "selective",
        (14, 14),
        {
            **WHOLE_SCANS,
            "rounds": "1",
            "selection": "{rule: stability, threshold: 0.0, top_fraction: 0.5}",
        },
    ),
    System(
        "adversarial",
        "adversarial: the discriminator picks, online",
        "adversarial",
        (16,),
        {
            **WHOLE_SCANS,
            "training.adversarial": "{warmup: 0.125, finish: 0.125, augmentation: stock, discriminator_features: 8}",
        },
    ),
    System(
        "partial",
        "partial: a loop for each of three groups of organs",
        "partial",
        (5, 5, 5, 13),
        {
            "rounds": "1",
            "loops": "[{name: large, organs: [1, 2, 3, 5, 6, 11, 13]}, {name: hollow, organs: [9, 10, 12]}, "
            "{name: small, organs: [4, 7, 8]}]",
        },
    ),
    System(
        "blackbean",
        "blackbean: three generations, 23 of 24 that change least",
        "blackbean",
        (7, 7, 7, 7),
        {"members.count": "1", "final": "{num_epochs: 7}"},
    ),
    System("mean_organ", "demo: best half by the mean organ", "demo", (4, 16), MEAN_HALF, ensemble=True),
    System(
        "warm",
        "all pseudo-labels, the student goes on from a teacher",
        "demo",
        (4, 16),
        {"selection": "{rule: all}", "final.start": "member"},
        ensemble=True,
    ),
)
"""In the order in which they run within a seed."""


def find_systems(names: list[str]) -> list[System]:
    """The arms of those names, in the order of :data:`SYSTEMS`; all for an empty list.

    Raises:
        KeyError: for a name that no arm has.
    """
    unknown = sorted(set(names) - {system.name for system in SYSTEMS})
    if unknown:
        raise KeyError(f"no arm {', '.join(unknown)}; there are {', '.join(system.name for system in SYSTEMS)}")
    return [system for system in SYSTEMS if not names or system.name in names]
