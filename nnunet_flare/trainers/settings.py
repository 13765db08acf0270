"""What a configuration tells our trainers: the key ``"flare"`` of a configuration in the plans.

Stock nnU-Net carries unknown keys of a configuration through and saves them with the model, so the same
``nnUNetv2_train`` command trains the same way by hand, on a cluster and inside the loop. Every key has the class
default; an unknown key or an impossible value is an error that names its place. No torch is imported here, because
``rounds`` reads and writes these settings too.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nnunet_flare import plugin
from nnunet_flare.errors import InputError

KEY = "flare"
MAX_EPOCHS = 1_000_000
MAX_ITERATIONS = 1_000_000_000
MAX_SEED = 2**63 - 1
"""What a training may be asked for; more is a slip of the hand, which would fill the disk or never end."""

ITERATIONS_VARIABLE = "NNUNET_FLARE_ITERATIONS"
SEED_VARIABLE = "NNUNET_FLARE_SEED"
TRUST_VARIABLE = "NNUNET_FLARE_TRUST_CHECKPOINT"
"""``1``: a teacher may be what ``--trust-checkpoint`` admits."""

Augmentation = Literal["stock", "elastic", "weak", "jitter", "strong", "shift", "modality"]
InitPart = Literal["all", "but-head", "encoder"]
Fraction = Annotated[float, Field(gt=0, le=1)]
_Positive = Annotated[float, Field(gt=0, le=1e6)]
_NotNegative = Annotated[float, Field(ge=0, le=1e9)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]


class AugmentationSettings(BaseModel):
    """The augmentation chain of each role: ``stock`` nnU-Net's, or another of ``trainers.augmentation``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labelled: Augmentation = "stock"
    pseudo: Augmentation = "strong"
    partial: Augmentation = "stock"


class TeacherSettings(BaseModel):
    """The frozen teacher of ``nnUNetTrainerFlareDistill``: a checkpoint of a trained model's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    folder: str = Field(min_length=1, description="Trainer__Plans__configuration, of stock nnU-Net or ours")
    fold: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    checkpoint: str = Field("checkpoint_final.pth", min_length=1)
    temperature: _Positive = Field(2.0, description="softens teacher and student alike")
    weight: float = Field(0.5, ge=0, le=1, description="weight of the soft loss; the labels get the rest")


class StreamSettings(BaseModel):
    """The stream of unlabelled scans beside the labelled batches, of every trainer that learns from one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    unlabelled: str | None = Field(
        None, min_length=1, description="data folder of the scans; None: the configuration's folder with _un appended"
    )
    unlabelled_batch_size: int | None = Field(
        None, ge=1, le=10_000, description="unlabelled scans per batch; None: half the plans' batch size, at least 1"
    )
    augmentation: Augmentation = Field("weak", description="augmentation of the unlabelled scans")


class AdversarialSettings(StreamSettings):
    """What ``nnUNetTrainerFlareAdversarial`` needs besides: the discriminator and the course."""

    augmentation: Augmentation = Field("shift", description="augmentation of the unlabelled scans")
    noise_std: _NotNegative = Field(0.1, description="largest standard deviation of the noise on one of the two copies")
    warmup: _Share = Field(0.1, description="share of the epochs at the start that are supervised only")
    finish: _Share = Field(0.1, description="share of the epochs at the end that are supervised only")
    deep_supervision: bool = Field(False, description="True: the generator's loss counts lower resolutions too")
    poison_masks: bool = Field(False, description="True: the discriminator sees masks with random noise in them")
    discriminator_features: int = Field(
        64, ge=1, le=100_000, description="channels of its first layers; the last have 8 times as many"
    )
    discriminator_lr: _Positive = Field(1e-3, description="learning rate of the discriminator (constant)")

    @model_validator(mode="after")
    def _some_epochs_are_left(self) -> AdversarialSettings:
        if self.warmup + self.finish >= 1:
            raise ValueError(
                f"warmup {self.warmup:g} and finish {self.finish:g}: expected shares that leave some epochs between "
                "them"
            )
        return self


class MeanTeacherSettings(StreamSettings):
    """What ``nnUNetTrainerFlareMeanTeacher`` needs besides: the average that teaches, and how much it counts."""

    decay: float = Field(0.999, ge=0, lt=1, description="decay of the average of the weights, per iteration")
    threshold: float = Field(0.9, ge=0, le=1, description="voxels where the teacher is less certain are left out")
    weight: _NotNegative = Field(
        1.0, description="weight of the loss on unlabelled scans, relative to the loss on labels"
    )
    ramp_up: float = Field(0.25, ge=0, le=1, description="share of the training over which the weight rises")


STREAMS = {"adversarial": "nnUNetTrainerFlareAdversarial", "mean_teacher": "nnUNetTrainerFlareMeanTeacher"}
"""The key of each trainer that learns from a stream of unlabelled scans, and the trainer."""

SETTINGS_OF_ONE = {
    "teacher": ("nnUNetTrainerFlareDistill", "learns from no teacher"),
    "adversarial": (STREAMS["adversarial"], "has no discriminator"),
    "mean_teacher": (STREAMS["mean_teacher"], "has no average that teaches"),
}
"""Settings that a single trainer uses: its name, and what the others say."""


def stream_key(trainer: str) -> str | None:
    """The key of a trainer that learns from unlabelled scans, also as ``<trainer>_<N>epochs``; None for any other."""
    name = plugin.without_epochs(trainer)
    return next((key for key, owner in STREAMS.items() if owner == name), None)


class TrainingSettings(BaseModel):
    """Settings of ``nnUNetTrainerFlareST``; the defaults are stock's, but pseudo cases are augmented strongly."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_epochs: int = Field(
        1000, ge=1, le=MAX_EPOCHS, description="training length; _<N>epochs in the trainer's name wins"
    )
    iterations_per_epoch: int = Field(250, ge=1, le=MAX_ITERATIONS)
    validation_iterations: int | None = Field(
        None, ge=1, le=MAX_ITERATIONS, description="None: a fifth of the iterations, at least 1"
    )
    augmentation: AugmentationSettings = AugmentationSettings()
    references: str | None = Field(
        None, min_length=1, description="data folder of the scans whose histograms the augmentation modality matches"
    )
    mirroring: bool = Field(True, description="False: no mirroring in training, and none allowed at inference")
    labelled_to_pseudo: tuple[_NotNegative, _NotNegative] | None = Field(
        None, description="ratio of labelled and partial to pseudo samples; None: every case alike, times its weight"
    )
    pseudo_folds: Literal["split", "all"] = Field(
        "split", description="split: each fold trains on 4/5 of the pseudo cases; all: on all of them"
    )
    checkpoints_at: tuple[Fraction, ...] = Field(
        (), description="fractions of the training that are kept as checkpoints"
    )
    optimizer: Literal["SGD", "Adam", "AdamW"] = "SGD"
    initial_lr: _Positive = 0.01
    weight_decay: _NotNegative = 3e-5
    betas: tuple[_Momentum, _Momentum] = Field(
        (0.9, 0.99), description="for optimizers other than SGD; values of Fosun and SZTU"
    )
    lr_schedule: Literal["poly", "steps"] = Field(
        "poly", description="steps: x0.1 after 66 %, x0.05 after 86 % (Fosun)"
    )
    warmup_iterations: int = Field(
        0, ge=0, le=MAX_ITERATIONS, description="iterations over which the rate rises linearly from zero"
    )
    class_weights: Literal["inverse-sqrt-frequency"] | tuple[_NotNegative, ...] | None = Field(
        None,
        description="weights of the classes, background first, in the cross-entropy; trainers with soft Dice alone, as "
        "in their papers, add one",
    )
    oversample_foreground: float = Field(0.33, ge=0, le=1)
    init_from: str | None = Field(
        None, min_length=1, description="checkpoint to start from, of nnU-Net, this package or nnssl"
    )
    init_part: InitPart = Field(
        "all", description="which weights are taken from init_from: but-head if the labels differ"
    )
    teacher: TeacherSettings | None = Field(
        None, description="settings of nnUNetTrainerFlareDistill; other trainers refuse them"
    )
    adversarial: AdversarialSettings | None = Field(
        None, description="settings of nnUNetTrainerFlareAdversarial (None: the defaults); other trainers refuse them"
    )
    mean_teacher: MeanTeacherSettings | None = Field(
        None, description="settings of nnUNetTrainerFlareMeanTeacher (None: the defaults); other trainers refuse them"
    )
    ignore_label: int | None = Field(
        None, ge=1, le=65_535, description="voxel value in a round's labels that the loss leaves out"
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=MAX_EPOCHS,
        description="epochs without a new best moving validation Dice after which the training ends; None: all epochs",
    )
    final_validation: bool = Field(True, description="False: the validation after training is skipped")
    cpu_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast and channels-last on a CPU that has it (AVX-512); fp32 on others"
    )
    cuda_precision: Literal["fp16", "bf16"] = Field(
        "fp16", description="autocast on CUDA; fp16 is stock's, with a gradient scaler; bf16 needs none"
    )
    save_every: int = Field(
        10, ge=1, le=MAX_EPOCHS, description="epochs between two checkpoint_latest; at least every 15 minutes anyway"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="all random numbers follow from seed, round, fold and epoch"
    )
    run: str | None = None
    round: int | None = Field(None, ge=0, description="set by flare-pseudolabel: the round of this configuration")
    recipe_hash: str | None = None

    @field_validator("labelled_to_pseudo")
    @classmethod
    def _some_sample(cls, ratio: tuple[float, float] | None) -> tuple[float, float] | None:
        if ratio is not None and sum(ratio) == 0:
            raise ValueError("expected at least one of the two shares above 0")
        return ratio

    @field_validator("checkpoints_at")
    @classmethod
    def _increasing(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in itertools.pairwise(fractions)):
            raise ValueError("expected increasing fractions")
        return fractions

    @model_validator(mode="after")
    def _weights_not_all_zero(self) -> TrainingSettings:
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            raise ValueError("class_weights: expected at least one weight above 0")
        return self

    @model_validator(mode="after")
    def _checkpoints_are_reached(self) -> TrainingSettings:
        if self.patience is not None and self.checkpoints_at:
            raise ValueError(
                f"patience {self.patience}: a training that ends early may not reach the checkpoints at "
                f"{list(self.checkpoints_at)} of its length; give one of the two"
            )
        return self

    @property
    def num_validation_iterations(self) -> int:
        """Validation iterations of an epoch: as set, else a fifth of the training iterations, at least 1."""
        if self.validation_iterations is not None:
            return self.validation_iterations
        return max(1, self.iterations_per_epoch // 5)

    def to_json(self) -> dict[str, Any]:
        """What to write under ``"flare"``: the keys that were given; for the others the trainer has its defaults."""
        dumped: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True)
        return dumped


def read_settings(
    configuration: Mapping[str, Any], *, where: str = "configuration", defaults: Mapping[str, Any] | None = None
) -> TrainingSettings:
    """The settings of a configuration; where it has none, those of the trainer and else the class defaults.

    Args:
        configuration: one entry of the plans' ``configurations``, inheritance resolved.
        where: what to call it in an error, e.g. ``nnUNetPlansFlare.json, configuration 3d_fullres``.
        defaults: a trainer's own.

    Raises:
        InputError: every wrong or unknown key at once, each with its path, what was found and what is allowed.
    """
    given = configuration.get(KEY, {})
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: '{KEY}' must be an object of settings, found {type(given).__name__}")
    try:
        # Strict JSON rules: lists become tuples and 1 becomes 1.0, but "5" is no number and true is no 1.
        return TrainingSettings.model_validate_json(json.dumps({**(defaults or {}), **given}), strict=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"'{KEY}' is not plain JSON ({error})"
    problems = []
    for problem in error.errors():
        path = ".".join([KEY, *(str(part) for part in problem["loc"])])
        if problem["type"] == "extra_forbidden":
            parts: dict[Any, type[BaseModel]] = {
                "augmentation": AugmentationSettings,
                "teacher": TeacherSettings,
                "adversarial": AdversarialSettings,
                "mean_teacher": MeanTeacherSettings,
            }
            model = parts[problem["loc"][0]] if len(problem["loc"]) > 1 else TrainingSettings
            problems.append(f"{path}: unknown key, allowed are {', '.join(model.model_fields)}")
        else:
            problems.append(f"{path}: found {problem['input']!r}: {problem['msg']}")
    return f"{len(problems)} problem(s) in the settings: " + "; ".join(problems)


def with_environment(settings: TrainingSettings, environment: Mapping[str, str] | None = None) -> TrainingSettings:
    """The settings with the two variables for tests applied: ``NNUNET_FLARE_ITERATIONS`` and ``NNUNET_FLARE_SEED``.

    The first sets the training iterations of an epoch (validation = a fifth, at least 1), the second the seed.

    Raises:
        InputError: when a variable is not a whole number (of at least 1 and 0).
    """
    environment = os.environ if environment is None else environment
    changes: dict[str, Any] = {}
    bounds = ((ITERATIONS_VARIABLE, "iterations_per_epoch", 1, MAX_ITERATIONS), (SEED_VARIABLE, "seed", 0, MAX_SEED))
    for variable, key, lowest, highest in bounds:
        text = environment.get(variable, "").strip()
        if not text:
            continue
        if not text.isdecimal() or len(text) > 20 or not lowest <= int(text) <= highest:
            raise InputError(
                f"environment variable {variable}: found {text[:40]!r}, expected a whole number >= {lowest}, at most "
                f"{highest}"
            )
        changes[key] = int(text)
    if "iterations_per_epoch" in changes:
        changes["validation_iterations"] = None
    return settings.model_copy(update=changes)


def checkpoint_epochs(fractions: Sequence[float], num_epochs: int) -> dict[str, int]:
    """File name to number of completed epochs of each kept checkpoint: ``checkpoint_<k>of<n>.pth`` after
    ``max(1, ceil(f N))`` epochs. Fractions may coincide in a short training; all their files are written then.
    """
    # Rounded first: 0.07 * 100 is 7.000000000000001 in floating point.
    epochs = [max(1, math.ceil(round(fraction * num_epochs, 6))) for fraction in fractions]
    return {f"checkpoint_{k}of{len(epochs)}.pth": epoch for k, epoch in enumerate(epochs, start=1)}
