"""The parts of a recipe, each a group of keys; :mod:`nnunet_flare.recipes.recipe` puts them together.

Some keys are *one value, or one per round*: of a list shorter than the rounds the last entry goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from nnunet_flare.inference.choices import Backend, Precision, RoiRule, Tta
from nnunet_flare.selection.rule import Absent, Rule
from nnunet_flare.selection.rules import RULES
from nnunet_flare.trainers.settings import MAX_EPOCHS, Augmentation, AugmentationSettings

Value = TypeVar("Value")


def _known_rule(name: str) -> str:
    if name not in RULES:
        raise ValueError(f"found {name!r}, expected one of {', '.join(RULES)}")
    return name


RuleName = Annotated[str, AfterValidator(_known_rule)]

_Unit = Annotated[float, Field(ge=0, le=1)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Size = Annotated[int, Field(ge=1, le=10_000)]
_Folds = Annotated[int, Field(ge=1, le=100)]
_Mm = Annotated[float, Field(gt=0, le=1000)]

ClassName = Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*|given-model)$")]
"""A trainer's or planner's name: it becomes part of folders' names."""

ConfigurationName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]

ONE, PER_ROUND = "(one)", "(per round)"
"""Tags of the two forms of such a key; errors leave them out."""


def _form(value: Any) -> str:
    return PER_ROUND if isinstance(value, (list, tuple)) else ONE


_Count = Annotated[
    Annotated[_Folds, Tag(ONE)] | Annotated[tuple[_Folds, ...], Field(min_length=1), Tag(PER_ROUND)],
    Discriminator(_form),
]
_Rules = Annotated[
    Annotated[RuleName, Tag(ONE)] | Annotated[tuple[RuleName, ...], Field(min_length=1), Tag(PER_ROUND)],
    Discriminator(_form),
]
_Thresholds = Annotated[
    Annotated[_Unit, Tag(ONE)] | Annotated[tuple[_Unit, ...], Field(min_length=1), Tag(PER_ROUND)],
    Discriminator(_form),
]
_Fractions = Annotated[
    Annotated[_Share | None, Tag(ONE)] | Annotated[tuple[_Share | None, ...], Field(min_length=1), Tag(PER_ROUND)],
    Discriminator(_form),
]


_Chains = Annotated[
    Annotated[Augmentation, Tag(ONE)] | Annotated[tuple[Augmentation, ...], Field(min_length=1), Tag(PER_ROUND)],
    Discriminator(_form),
]


def of_round(given: Value | Sequence[Value], number: int) -> Value:
    """What a key that is one value, or one per round, says for a round."""
    if isinstance(given, (list, tuple)):
        return given[min(number, len(given) - 1)]
    return given  # type: ignore[return-value]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PlanChanges(Part):
    """Changes to the planner's base configuration; any of them gives the run plans of its own."""

    spacing_mm: Annotated[tuple[_Mm, ...], Field(min_length=2, max_length=3)] | None = Field(
        None, description="z, y, x; of configuration 2d y, x"
    )
    patch_size: Annotated[tuple[_Size, ...], Field(min_length=2, max_length=3)] | None = Field(
        None, description="z, y, x; of configuration 2d y, x"
    )
    base_features: int | None = Field(None, ge=1, le=100_000)
    max_features: int | None = Field(None, ge=1, le=100_000)
    stages: int | None = Field(None, ge=3, le=20)
    convs_per_stage: int | None = Field(None, ge=1, le=100)
    batch_size: int | None = Field(None, ge=1, le=10_000)
    dropout: float | None = Field(None, ge=0, lt=1, description="after every convolution, in all trainings of the run")
    network: Literal["pretrained"] | None = Field(
        None,
        description="pretrained: take network and patch from training.pretrained_weights and plan the rest for them",
    )

    @model_validator(mode="after")
    def _one_network(self) -> PlanChanges:
        keys = ("base_features", "max_features", "stages", "convs_per_stage", "dropout")
        given = [key for key in keys if getattr(self, key) is not None]
        if self.network is not None and given:
            raise ValueError(f"network: found 'pretrained' beside {', '.join(given)}, which would change its network")
        return self

    def changes(self) -> dict[str, Any]:
        """The keys that are set."""
        return self.model_dump(exclude_none=True)


class Members(Part):
    """What the ensemble of a round is made of: ``count`` folds, or the checkpoints ``at`` of one training.

    One fold is no cross-validation: a single member trains on all cases (fold ``all``) and has no agreement.
    """

    kind: Literal["folds", "checkpoints"] = "folds"
    count: _Count = Field(5, description="one number, or one per round")
    at: tuple[_Share, ...] = ()
    start: Literal["scratch", "member"] = Field(
        "scratch",
        description="from the second round on: new weights, or the weights of the round before (one member only)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Members:
        if self.kind == "checkpoints" and len(self.at) < 2:
            raise ValueError("members of kind 'checkpoints' need at least two fractions in 'at'")
        if self.kind == "folds" and self.at:
            raise ValueError("'at' is only for members of kind 'checkpoints'")
        return self


class Predict(Part):
    """How the unlabelled cases are labelled."""

    step_size: float = Field(0.5, gt=0, le=1)
    tta: Tta = "mirror"
    precision: Precision = "auto"
    backend: Backend = Field(
        "torch",
        description="backend on the CPU; OpenVINO is faster, but first converts every checkpoint of every round",
    )


@dataclass(frozen=True)
class RoundSelection:
    """How one round selects: :class:`Selection` with the round's own values."""

    rule: Rule
    absent: Absent
    threshold: float
    top_fraction: float | None
    per_organ: dict[str, float]
    keep_odd: bool
    complete: bool
    per_domain: bool


class Selection(Part):
    """Which pseudo-labelled cases are taken (``selection/rules``); the first three also one per round."""

    rule: _Rules = "min-organ"
    threshold: _Thresholds = 0.9
    top_fraction: _Fractions = None
    absent: Absent | None = Field(
        None,
        description="agreement on an organ that both members lack: one (as in the papers), skip, zero, or expected: "
        "the probability of its absence, from the labelled cases; None: the rule's default",
    )
    per_organ: dict[str, _Unit] = {}
    keep_odd: bool = Field(False, description="also take odd scans (values unlike a CT, unusual spacing)")
    complete: bool = Field(False, description="only take cases whose pseudo-label has every organ")
    per_domain: bool = Field(
        False, description="take top_fraction of each domain, so that no domain crowds out the others"
    )

    def in_round(self, number: int) -> RoundSelection:
        """What holds for a round."""
        rule = RULES[of_round(self.rule, number)]
        return RoundSelection(
            rule=rule,
            absent=self.absent or rule.absent,
            threshold=of_round(self.threshold, number),
            top_fraction=of_round(self.top_fraction, number),
            per_organ=dict(self.per_organ),
            keep_odd=self.keep_odd,
            complete=self.complete,
            per_domain=self.per_domain,
        )


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"found {text!r}, which is not a regular expression: {error}") from error
    return text


class Domains(Part):
    """What says of an unlabelled scan which domain (a modality, a site) it belongs to; a recipe may ask for none."""

    table: str | None = Field(
        None, min_length=1, description="CSV with the columns case and domain; has priority over names"
    )
    names: dict[str, Annotated[str, Field(min_length=1), AfterValidator(_pattern)]] = Field(
        {}, description="for each domain a regular expression that matches the names of its scans and no others"
    )

    def __bool__(self) -> bool:
        return self.table is not None or bool(self.names)


class Fusion(Part):
    """How the members' outputs become one label.

    ``last`` takes the last of several checkpoints alone, with the test-time augmentation of ``predict.tta``; the
    members are then compared without any (Fosun).
    """

    method: Literal["mean-softmax", "last"] = "mean-softmax"
    components: Literal["all", "largest"] = Field("all", description="largest: keep one component of each organ")
    min_component_mm3: float = Field(
        10.0, ge=0, le=1e9, description="with 'largest': smallest component to keep; below it the organ is removed"
    )
    teachers: tuple[str, ...] = Field(
        (), description="folders of label maps <case>.nii.gz; the union of several loops must agree with them"
    )
    id_maps: tuple[str, ...] = Field(
        (), description="id maps, one for all teachers or one each; see flare-pseudolabel merge"
    )
    on_disagree: Literal["ignore", "zero", "first"] = Field(
        "ignore", description="label of voxels where loops and teachers differ; first: the loops' label"
    )
    uncertain_organs: Literal["drop-case", "ignore"] = Field(
        "drop-case", description="ignore: keep the case and leave out its uncertain organs"
    )
    min_certain_organs: _Unit = Field(0.5, description="with 'ignore': smallest share of certain organs in a case")


def _chain(given: Augmentation | tuple[Augmentation, ...], number: int) -> Augmentation:
    return given if isinstance(given, str) else of_round(given, number)


class RoundAugmentation(Part):
    """The augmentation chain of each role; one, or one per round."""

    labelled: _Chains = "stock"
    pseudo: _Chains = "strong"
    partial: _Chains = "stock"

    def in_round(self, number: int) -> AugmentationSettings:
        """What holds for a round."""
        return AugmentationSettings(
            labelled=_chain(self.labelled, number),
            pseudo=_chain(self.pseudo, number),
            partial=_chain(self.partial, number),
        )


class Roi(Part):
    """Coarse to fine: the model that finds the organs' box in every unlabelled scan, once for all rounds.

    It is trained on the labelled scans, or is given as the folder of a trained ``model``.
    """

    planner: ClassName = "nnUNetPlannerFlareCoarse"
    configuration: ConfigurationName = "3d_fullres"
    trainer: ClassName = "nnUNetTrainerFlareSelective"
    plan: PlanChanges = PlanChanges()
    training: dict[str, Any] = {}
    augmentation: AugmentationSettings = AugmentationSettings(labelled="weak", partial="weak")
    model: str | None = Field(None, min_length=1)
    rule: RoiRule = Field("union", description="what counts as organ in the coarse label map")
    margin_mm: float | None = Field(
        None,
        ge=0,
        le=10_000,
        description="margin around the box in unlabelled scans (default: as the plans have for labelled ones, or 40)",
    )
    test_margin_mm: float = Field(20.0, ge=0, le=10_000, description="margin around the box in held-out scans (--eval)")


class Loop(Part):
    """A loop over some organs; several of them run one after another for ``rounds`` rounds each (HKUST).

    Organs are ids of dataset.json: those listed, or all but those listed.
    """

    name: str = Field(min_length=1)
    organs: tuple[_Size, ...] = ()
    all_but: tuple[_Size, ...] = ()
    absence: Literal["taught", "open"] = Field(
        "taught",
        description="open: pseudo-labels show where these organs are, not where they are absent (for example lesions "
        "in scans that nobody has searched for them)",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Loop:
        if bool(self.organs) == bool(self.all_but):
            raise ValueError(f"loop {self.name}: expected either 'organs' or 'all_but', a list of label ids")
        return self

    def ids(self, labels: Iterable[int]) -> tuple[int, ...]:
        """The loop's organs among those of a dataset."""
        return tuple(sorted(i for i in labels if (i in self.organs if self.organs else i not in self.all_but)))


class FineTuning(Part):
    """One more training, of the final model on the labelled and partial cases alone."""

    num_epochs: int = Field(100, ge=1, le=MAX_EPOCHS)
    initial_lr: float = Field(0.001, gt=0, le=1000)


class Final(Part):
    """The final training on all data; what is not given is as in the rounds.

    A ``planner`` of its own takes no ``plan.*`` keys of the rounds; without one, ``final.plan.*`` come over them.
    """

    planner: ClassName | None = None
    configuration: ConfigurationName | None = None
    trainer: ClassName | None = None
    plan: PlanChanges = PlanChanges()
    num_epochs: int | None = Field(None, ge=1, le=MAX_EPOCHS, description="default: as the last round")
    start: Literal["scratch", "member"] = Field(
        "scratch", description="new weights, or the weights of a member of the last round"
    )
    training: dict[str, Any] = Field({}, description="keys of training that differ in the final training")
    augmentation: AugmentationSettings | None = None
    finetune: FineTuning | None = None


class Stop(Part):
    """Early stop: after ``patience`` rounds without a gain of the mean agreement."""

    patience: int | None = Field(None, ge=1, le=1000)


def without_teacher(document: Any, planner: str) -> Any:
    """A recipe's document with ``teacher.planner`` spelled out: it plans the rounds, the recipe's own the final model.

    ``planner`` is that of a recipe that names none.
    """
    if not isinstance(document, dict) or "teacher" not in document:
        return document
    rest = {key: value for key, value in document.items() if key != "teacher"}
    teacher, final = document["teacher"], rest.get("final") or {}
    if teacher in (None, {"planner": None}) or not isinstance(final, dict):
        return rest  # what is wrong with 'final' is said where it is read
    if not isinstance(teacher, dict) or set(teacher) != {"planner"}:
        raise ValueError(f"teacher: found {teacher!r}, expected only the key planner")
    if final.get("planner") is not None:
        raise ValueError(
            f"teacher.planner: found {teacher['planner']!r}, but final.planner is {final['planner']!r}; then 'planner' "
            "is the teacher's planner: give planner and final.planner, or only teacher.planner"
        )
    return {**rest, "planner": teacher["planner"], "final": {**final, "planner": rest.get("planner", planner)}}
