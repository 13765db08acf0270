"""The arms of ``recipes.py`` as data: every system on one tiny network, every network with the same steps.

Papers differ in planner, patch, network and length, which says nothing about how they use unlabelled scans. Here every
arm has the demo's plan and optimiser, one augmentation for all its scans, class weights in the cross-entropy, and as
many labelled as pseudo-labelled samples. Every network that an arm trains gets :data:`STEPS` optimiser steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nnunet_flare.recipes.load import load_recipe, shipped_recipes
from nnunet_flare.recipes.recipe import Recipe


@dataclass(frozen=True)
class Budget:
    """Cases, voxels (z, y, x) of a scan, optimiser steps of one epoch, and how often the epochs are repeated."""

    labelled: int
    unlabelled: int
    test: int
    size: tuple[int, int, int]
    epoch_steps: int
    times: int = 1


FULL = Budget(labelled=4, unlabelled=24, test=12, size=(32, 48, 64), epoch_steps=50, times=3)
QUICK = Budget(labelled=3, unlabelled=3, test=2, size=(32, 48, 64), epoch_steps=1)
"""To see that everything runs; its figures mean nothing."""

EPOCHS = 8
"""Of every network, as often as the budget says."""
LONG = 4 * EPOCHS
"""Of a network that is trained until it gains no more."""
STEPS = EPOCHS * FULL.epoch_steps * FULL.times
"""With a third of it true labels of all scans gain nothing, so that nothing can be learnt about pseudo-labels."""
MEMBERS = 3
SEEDS = (1, 2, 3, 4, 5)

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
    "training.lr_schedule": "poly",
    "training.weight_decay": "0.00003",
    "training.warmup_iterations": "20",
    "training.class_weights": "inverse-sqrt-frequency",
    "training.oversample_foreground": "0.0",
    "training.labelled_to_pseudo": "[1, 1]",
    "training.mirroring": "false",
    "training.cpu_precision": "bf16",
    "training.pseudo_folds": "all",
    "training.final_validation": "false",
    "predict": "{step_size: 1.0, tta: none}",
}
"""What every arm has: the demo recipe's settings, which were measured to learn."""


@dataclass(frozen=True)
class System:
    """One arm.

    Attributes:
        arm: what it is; with the augmentation its :attr:`name`.
        title: in tables and pictures.
        recipe: the shipped recipe.
        settings: ``--set`` values beyond :data:`COMMON`.
        teachers: the arm whose model makes the first labels (its own first round then trains nothing), or None.
        labels: what trains: the labelled cases and pseudo-labels, the labelled cases alone, or true labels of all.
        epochs: of every network, each of :attr:`Budget.epoch_steps`, repeated :attr:`Budget.times`.
        augmentation: of all scans: ``stock`` or ``strong``.
    """

    arm: str
    title: str
    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)
    teachers: str | None = None
    labels: str = "pseudo"
    epochs: int = EPOCHS
    augmentation: str = "stock"

    @property
    def name(self) -> str:
        """Of its runs and result files."""
        return self.arm if self.augmentation == "stock" else f"{self.arm}_{self.augmentation}"

    @property
    def teacher(self) -> str | None:
        """The name of the arm that teaches it."""
        return None if self.teachers is None else replace(self, arm=self.teachers).name

    @property
    def is_supervised(self) -> bool:
        """Whether one round of trainings on labels that are given is all there is."""
        return self.labels != "pseudo"

    def set_values(self, seed: int, budget: Budget) -> dict[str, str]:
        """The ``--set`` values of this arm."""
        kind = self.augmentation
        given = {
            "training.num_epochs": str(self.epochs * budget.times),
            "training.iterations_per_epoch": str(budget.epoch_steps),
            "augmentation": f"{{labelled: {kind}, pseudo: {kind}, partial: {kind}}}",
            "seed": str(seed),
        }
        return {**COMMON, **given, **self.settings}

    def load(self, seed: int, budget: Budget) -> Recipe:
        """The arm's recipe."""
        return load_recipe(self.recipe, self.set_values(seed, budget))


ONE_MODEL = {"members.count": "1", "selection": "{rule: all}"}
MEMBERS_COUNT = {"rounds": "1", "members.count": str(MEMBERS)}
WHOLE_SCANS = {"configuration": "3d_fullres", "roi": "null", "training.epoch": "iterations"}
"""Systems that train coarse to fine and by passes: the phantom is one patch."""


def half_by(rule: str) -> dict[str, str]:
    """The better half by a rule: the papers' thresholds pass nobody with models as weak as these."""
    return {**MEMBERS_COUNT, "selection": f"{{rule: {rule}, threshold: 0.0, top_fraction: 0.5}}"}


CONTROL, ORACLE, ENSEMBLE = "supervised", "oracle", "ensemble"
SINGLE = "supervised_fp32"

_STOCK: tuple[System, ...] = (
    System(CONTROL, "supervised only (control)", "demo", ONE_MODEL, labels="labelled"),
    System(ENSEMBLE, "three supervised folds together", "demo", MEMBERS_COUNT, labels="labelled"),
    System(ORACLE, "oracle: true labels of all", "demo", ONE_MODEL, labels="true"),
    System("unfiltered", "all pseudo-labels", "demo", {**MEMBERS_COUNT, "selection": "{rule: all}"}, ENSEMBLE),
    System("ours", "ours: best half by `steady`", "demo", half_by("steady"), ENSEMBLE),
    System("mean_organ", "demo: best half by the mean organ", "demo", half_by("mean-organ"), ENSEMBLE),
    System("uncertainty", "uncertainty: best half by the worst organ", "uncertainty", half_by("min-organ"), ENSEMBLE),
    System(
        "per_organ",
        "per organ: what agrees is learnt, the rest ignored",
        "demo",
        {
            **MEMBERS_COUNT,
            "selection": "{rule: mean-organ, threshold: 0.6}",
            "fusion": "{uncertain_organs: ignore, min_certain_organs: 0.0}",
        },
        ENSEMBLE,
    ),
    System("noisy_student", "noisy student: one generation", "noisy_student", {}, CONTROL),
    System(
        "generations",
        "noisy student: three generations, each going on from the one before",
        "noisy_student",
        {"rounds": "3", "members": "{kind: folds, count: 1, start: member}", "final": "{start: member}"},
        CONTROL,
    ),
    System(
        "blackbean",
        "blackbean: three generations, 23 of 24 that change least",
        "blackbean",
        {"members": "{kind: folds, count: 1}", "final": "{}"},
        CONTROL,
    ),
    System(
        "selective",
        "selective: best half by the stability of checkpoints",
        "selective",
        {**WHOLE_SCANS, "rounds": "1", "selection": "{rule: stability, threshold: 0.0, top_fraction: 0.5}"},
    ),
    System(
        "partial",
        "partial: a loop for each of three groups of organs",
        "partial",
        {
            "rounds": "1",
            "loops": "[{name: large, organs: [1, 2, 3, 5, 6, 11, 13]}, {name: hollow, organs: [9, 10, 12]}, "
            "{name: small, organs: [4, 7, 8]}]",
        },
    ),
    System(
        "adversarial",
        "adversarial: the discriminator picks, online",
        "adversarial",
        {
            **WHOLE_SCANS,
            # of 5 epochs 2 are supervised, and 3 have two steps of the generator each: EPOCHS in all
            "training.adversarial": "{warmup: 0.2, finish: 0.2, augmentation: stock, discriminator_features: 8}",
        },
        epochs=5,
    ),
    System(
        "mean_teacher",
        "mean teacher: labels from a moving average, online",
        "mean_teacher",
        # the recipe's average reaches over 1000 iterations, nearly as many as there are here
        {**WHOLE_SCANS, "training.mean_teacher": "{decay: 0.975, threshold: 0.9, weight: 1.0, ramp_up: 0.25}"},
    ),
    System(
        "supervised_x2", "supervised only, twice the steps", "demo", ONE_MODEL, labels="labelled", epochs=2 * EPOCHS
    ),
    System("supervised_x4", "supervised only, four times the steps", "demo", ONE_MODEL, labels="labelled", epochs=LONG),
    System(
        "unfiltered_x4",
        "all pseudo-labels",
        "demo",
        {**MEMBERS_COUNT, "selection": "{rule: all}"},
        ENSEMBLE,
        epochs=LONG,
    ),
    System(
        "uncertainty_x4",
        "uncertainty: best half by the worst organ",
        "uncertainty",
        half_by("min-organ"),
        ENSEMBLE,
        epochs=LONG,
    ),
)

_ALSO_STRONG = (CONTROL, ENSEMBLE, ORACLE, "unfiltered", "ours", "mean_teacher", "supervised_x4")
"""Arms that another table has, with strong augmentation in all of them."""


def systems() -> tuple[System, ...]:
    """Every arm whose recipe is shipped, in the order in which they run within a seed."""
    there = [system for system in _STOCK if system.recipe in shipped_recipes()]
    return (*there, *(replace(system, augmentation="strong") for system in there if system.arm in _ALSO_STRONG))


SYSTEMS = systems()


def _variant(of: str, arm: str, settings: Mapping[str, str], *, epochs: int) -> System:
    (system,) = (one for one in SYSTEMS if one.name == of)
    return replace(system, arm=arm, settings={**system.settings, **settings}, epochs=epochs)


def _course(warmup: float, finish: float) -> dict[str, str]:
    given = f"warmup: {warmup}, finish: {finish}, augmentation: stock, discriminator_features: 8"
    return {"training.adversarial": f"{{{given}}}"}


VARIANTS = (
    _variant("adversarial", "adversarial_off", _course(0.99, 0.0), epochs=5),
    _variant("adversarial", "adversarial_late", _course(0.5, 0.1666), epochs=6),
    _variant(
        "mean_teacher",
        "mean_teacher_all",
        {"training.mean_teacher": "{decay: 0.975, threshold: 0.0, weight: 1.0, ramp_up: 0.25}"},
        epochs=EPOCHS,
    ),
    _variant(CONTROL, SINGLE, {"training.cpu_precision": "fp32"}, epochs=EPOCHS),
)
"""Arms that explain others, run when they are named: no lessons on unlabelled scans, later ones, no threshold, and what
a control of single precision has, as every arm is on a CPU that does not compute in bfloat16."""


def find_systems(names: list[str]) -> list[System]:
    """The arms of those names, in the order of :data:`SYSTEMS` and :data:`VARIANTS`; the former for an empty list.

    Raises:
        KeyError: for a name that no arm has.
    """
    every = (*SYSTEMS, *VARIANTS)
    unknown = sorted(set(names) - {system.name for system in every})
    if unknown:
        raise KeyError(f"no arm {', '.join(unknown)}; there are {', '.join(system.name for system in every)}")
    return [system for system in every if system.name in names] if names else list(SYSTEMS)
