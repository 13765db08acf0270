"""A recipe: one published system as data, and what follows from its keys for each round.

:mod:`nnunet_flare.recipes.load` reads and checks recipes, :mod:`nnunet_flare.recipes.parts` has the groups of their
keys. The hash of a recipe names its settings in the ledger and in every model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from nnunet_flare import plugin
from nnunet_flare.recipes.parts import (
    ONE,
    PER_ROUND,
    ClassName,
    ConfigurationName,
    Domains,
    Final,
    Fusion,
    Loop,
    Members,
    Part,
    PlanChanges,
    Predict,
    Roi,
    RoundAugmentation,
    RoundSelection,
    Selection,
    Stop,
    of_round,
    without_teacher,
)
from nnunet_flare.trainers.settings import MAX_SEED, TrainingSettings, stream_key
from nnunet_flare.wording import did_you_mean

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
"""Names of runs: letters, digits, hyphen."""
RECIPE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Names of recipes, which may have underscores too."""

LOOP_KEYS = (
    "augmentation",
    "checkpoints_at",
    "run",
    "round",
    "recipe_hash",
    "init_from",
    "init_part",
    "ignore_label",
    "references",
    "seed",
)
"""Training settings that the loop sets itself, from other keys of the recipe."""

RUN_KEYS = ("num_gpus", "pretrained_weights", "pretrained_part")
"""Keys of ``training`` that are no setting of a trainer."""

GIVEN_MODEL = "given-model"
"""In place of a planner: the plans of ``--init_model``."""

MATCHING = "modality"
"""The augmentation that matches histograms."""

EPOCHS = ("iterations", "pass")
"""What ``training.epoch`` may be: ``iterations_per_epoch``, or a pass over the data (``stages/epoch_lengths.py``)."""


class Recipe(Part):
    """One system, complete: everything that the loop needs to know besides the data."""

    name: str
    summary: str
    paper: str
    planner: ClassName = "nnUNetPlannerFlare"
    configuration: ConfigurationName = "3d_fullres"
    trainer: ClassName = "nnUNetTrainerFlareST"
    rounds: int = Field(1, ge=1, le=100, description="how often the unlabelled cases are labelled and selected")
    plan: PlanChanges = PlanChanges()
    members: Members = Members()
    training: dict[str, Any] = {}
    augmentation: RoundAugmentation = RoundAugmentation()
    roi: Roi | None = None
    loops: tuple[Loop, ...] = ()
    predict: Predict = Predict()
    domains: Domains = Domains()
    selection: Selection = Selection()
    fusion: Fusion = Fusion()
    final: Final = Final()
    stop: Stop = Stop()
    seed: int | None = Field(None, ge=0, le=MAX_SEED)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not RECIPE_PATTERN.fullmatch(name):
            raise ValueError("expected letters, digits and hyphens or underscores")
        return name

    @model_validator(mode="before")
    @classmethod
    def _with_teacher(cls, document: Any) -> Any:
        return without_teacher(document, cls.model_fields["planner"].default)

    def loop_of(self, number: int) -> Loop | None:
        """The loop that a round belongs to; None for the final training, and in recipes without loops."""
        return self.loops[number // self.rounds] if self.loops and number < self.final_round else None

    def starts(self, number: int) -> bool:
        """Whether a round trains on the labelled and partial cases alone: the first of all, or of a loop."""
        return number == 0 or (self.loop_of(number) is not None and number % self.rounds == 0)

    def last_rounds(self) -> list[int]:
        """The last round of each loop."""
        return [(index + 1) * self.rounds - 1 for index in range(len(self.loops))]

    def selection_of(self, number: int) -> RoundSelection:
        """How a round selects."""
        return self.selection.in_round(number)

    def has_one_member(self, number: int) -> bool:
        """Whether one model labels the cases of a round, so that there is no agreement to judge them by."""
        return self.members.kind == "folds" and of_round(self.members.count, number) == 1

    def judges_agreement(self, number: int) -> bool:
        """Whether a round judges organs by the agreement of members."""
        return not self.has_one_member(number) and self.selection_of(number).rule.table != "rounds"

    def needs_change(self, number: int) -> bool:
        """Whether this round or a later one is judged by how much the labels change from round to round."""
        return any(self.selection_of(later).rule.table == "rounds" for later in range(max(1, number), self.final_round))

    @property
    def num_gpus(self) -> int:
        """GPUs of one training (nnU-Net's DDP)."""
        return int(self.training.get("num_gpus", 1))

    @property
    def is_online(self) -> bool:
        """Whether the only training learns from the unlabelled scans as they are: nothing is labelled before it."""
        return plugin.learns_from(self.trainer) == plugin.UNLABELLED

    @property
    def final_round(self) -> int:
        """Number of the final training: how often unlabelled cases are labelled before it."""
        return 0 if self.is_online else self.rounds * max(1, len(self.loops))

    @property
    def hash(self) -> str:
        """Short hash of all settings."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def base_changes(self, *, final: bool) -> tuple[str, str, dict[str, Any]]:
        """Planner, configuration and changes of the plan that the rounds, or the final model, are trained with."""
        rounds = (self.planner, self.configuration, self.plan.changes())
        if not final:
            return rounds
        inherited = {} if self.final.planner is not None else rounds[2]
        return (
            self.final.planner or self.planner,
            self.final.configuration or self.configuration,
            {**inherited, **self.final.plan.changes()},
        )

    def num_epochs(self, number: int) -> int:
        """Training length of a round; of a list shorter than the rounds the last entry goes on."""
        if number > self.final_round and self.final.finetune is not None:
            return self.final.finetune.num_epochs
        if number >= self.final_round and self.final.num_epochs is not None:
            return self.final.num_epochs
        epochs = self.training.get("num_epochs", 1000)
        return int(of_round(epochs, number))

    def settings(
        self,
        number: int,
        *,
        run: str | None,
        stored_round: int | None = None,
        ignore_label: int | None = None,
        init_from: str | None = None,
        init_part: str | None = None,
        iterations: int | None = None,
        unlabelled: str | None = None,
        references: str | None = None,
        teacher: Mapping[str, Any] | None = None,
    ) -> TrainingSettings:
        """The ``"flare"`` entry of a round's configuration.

        Args:
            number: the round; :attr:`final_round` is the final training and one more its fine-tuning.
            run: name of the run; None: of no run.
            stored_round: the number that is written, other than ``number`` after an early stop.
            ignore_label: value in the round's labels that the loss leaves out.
            init_from: checkpoint to start from.
            init_part: what is taken of it; None: everything.
            iterations: of a pass over the data, where :attr:`counts_passes` and once it is known.
            unlabelled: data folder of the unlabelled scans, where :attr:`is_online`.
            references: that folder, where the round's augmentation matches histograms (:meth:`matches_histograms`).
            teacher: the model that the training learns from, where the recipe names none.
        """
        final = number >= self.final_round
        given = {k: v for k, v in self.training.items() if k not in RUN_KEYS}
        self._check_loop_keys("training", given, LOOP_KEYS)
        if final:
            self._check_loop_keys("final.training", self.final.training, (*LOOP_KEYS, *RUN_KEYS, "num_epochs"))
            given |= self.final.training
        if number > self.final_round and self.final.finetune is not None:
            given |= {"initial_lr": self.final.finetune.initial_lr}
        stream = stream_key(self.trainer)
        if unlabelled is not None and stream is not None:
            given |= {stream: {**(given.get(stream) or {}), "unlabelled": unlabelled}}
        if teacher is not None:
            given = {"teacher": dict(teacher)} | given
        given = _with_epoch("training", given, iterations)
        augmentation = self.final.augmentation if final else None
        augmentation = augmentation or self.augmentation.in_round(number)
        stored = number if stored_round is None else stored_round
        document = {
            **given,
            "num_epochs": self.num_epochs(number),
            "augmentation": augmentation.model_dump(),
            "checkpoints_at": list(self.members.at) if self.members.kind == "checkpoints" and not final else [],
            "ignore_label": ignore_label,
            "init_from": init_from,
            "init_part": init_part,
            "references": references,
            "seed": self.seed,
            "run": run,
            "round": None if run is None else stored,
            "recipe_hash": None if run is None else self.hash,
        }
        return _training_settings("training.", given, document)

    def matches_histograms(self, number: int) -> bool:
        """Whether a round's augmentation takes scans to the grey values of the unlabelled ones."""
        settings = self.settings(number, run=None)
        streams = [
            stream.augmentation for stream in (settings.adversarial, settings.mean_teacher) if stream is not None
        ]
        return MATCHING in (*settings.augmentation.model_dump().values(), *streams)

    @property
    def counts_passes(self) -> bool:
        """Whether an epoch is a pass over the data."""
        return self.training.get("epoch") == "pass"

    @property
    def coarse_counts_passes(self) -> bool:
        """Whether an epoch of the coarse model is a pass over the labelled cases."""
        return self.roi is not None and self.roi.training.get("epoch") == "pass"

    def coarse_settings(self, *, run: str | None, iterations: int | None = None) -> TrainingSettings:
        """The ``"flare"`` entry of the coarse model's configuration; ``iterations`` as for :meth:`settings`."""
        if self.roi is None:
            raise ValueError("the recipe has no coarse model")
        self._check_loop_keys("roi.training", self.roi.training, (*LOOP_KEYS, *RUN_KEYS))
        given = _with_epoch("roi.training", self.roi.training, iterations)
        document = {
            **given,
            "augmentation": self.roi.augmentation.model_dump(),
            "seed": self.seed,
            "run": run,
            "recipe_hash": None if run is None else self.hash,
        }
        return _training_settings("roi.training.", given, document)

    @staticmethod
    def _check_loop_keys(where: str, given: Mapping[str, Any], loop_keys: Sequence[str]) -> None:
        taken = sorted(set(given) & set(loop_keys))
        if taken:
            raise ValueError(f"{where}.{taken[0]}: is set by the loop and cannot be given here")

    def member_folds(self, number: int) -> list[str]:
        """The folds that a round trains: the final one ``all``, checkpoints and a single member one on ``all``."""
        if number >= self.final_round or self.members.kind == "checkpoints" or self.has_one_member(number):
            return ["all"]
        return [str(fold) for fold in range(of_round(self.members.count, number))]

    def member_checkpoints(self, number: int) -> list[str]:
        """Checkpoint files that are members of each trained fold; those that coincide count once."""
        if number >= self.final_round or self.members.kind == "folds":
            return ["checkpoint_final.pth"]
        epochs = self.checkpoint_epochs(number)
        last = {epoch: f"checkpoint_{k}of{len(epochs)}.pth" for k, epoch in enumerate(epochs, start=1)}
        return list(last.values())

    @property
    def given_checkpoints(self) -> list[str]:
        """Checkpoint files of a given model (``--init_model``) that are members of each of its folds."""
        if self.members.kind == "folds":
            return ["checkpoint_final.pth"]
        return [f"checkpoint_{k}of{len(self.members.at)}.pth" for k in range(1, len(self.members.at) + 1)]

    def checkpoint_epochs(self, number: int) -> list[int]:
        """Epochs of a round's training after which its members are kept."""
        from nnunet_flare.trainers.settings import checkpoint_epochs

        return list(checkpoint_epochs(self.members.at, self.num_epochs(number)).values())


def _with_epoch(where: str, training: Mapping[str, Any], iterations: int | None) -> dict[str, Any]:
    """Training settings without the key ``epoch``, and with the iterations of a pass where an epoch is one."""
    given = dict(training)
    epoch = given.pop("epoch", "iterations")
    if epoch not in EPOCHS:
        raise ValueError(f"{where}.epoch: found {epoch!r}, expected {' or '.join(EPOCHS)}")
    if epoch == "iterations":
        return given
    if "iterations_per_epoch" in given:
        raise ValueError(
            f"{where}.iterations_per_epoch: found {given['iterations_per_epoch']!r}, but {where}.epoch is 'pass'; "
            "give one of the two"
        )
    return given if iterations is None else {**given, "iterations_per_epoch": iterations}


def _training_settings(prefix: str, given: Mapping[str, Any], document: Mapping[str, Any]) -> TrainingSettings:
    """Validated settings: what was given, and what the loop sets; the trainer has its defaults for the others."""
    known = {key: value for key, value in document.items() if value is not None or key in given}
    try:
        return TrainingSettings.model_validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, prefix, model=TrainingSettings))) from error


def known_keys(model: type[BaseModel]) -> list[str]:
    """Every dotted key that a model takes."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(name)
        for below in _models_in(field.annotation):
            keys += [f"{name}.{key}" for key in known_keys(below)]
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def explain(error: ValidationError, prefix: str = "", *, model: type[BaseModel]) -> list[str]:
    """Each problem of a validation of a model with the path of its key, in words."""
    problems = []
    for problem in error.errors():
        path = prefix + ".".join(str(part) for part in problem["loc"] if part not in (ONE, PER_ROUND))
        if problem["type"] == "extra_forbidden":
            problems.append(f"{path}: unknown key{did_you_mean(path, [prefix + key for key in known_keys(model)])}")
        elif problem["type"] == "value_error":
            problems.append(f"{path + ': ' if path else ''}{problem['msg'].removeprefix('Value error, ')}")
        else:
            problems.append(f"{path}: found {problem['input']!r}: {problem['msg']}")
    return problems
