"""The input of a run and its checks: each check is a function in :data:`CHECKS`, and all problems are told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nnunet_flare import plugin
from nnunet_flare.datasets import check_dataset, dataset_reader, read_dataset_json
from nnunet_flare.documents import load_json
from nnunet_flare.errors import InputError
from nnunet_flare.labels import allowed_ids, has_regions, ignore_id, label_problems, outputs_of
from nnunet_flare.recipes.recipe import Recipe
from nnunet_flare.rounds.check_loop_data import check_loop_data, roles_of
from nnunet_flare.rounds.run.configurations import resolve
from nnunet_flare.rounds.run.domains import domains_of
from nnunet_flare.rounds.run.unlabelled import find_sources
from nnunet_flare.rounds.stages.evaluate import check_held_out
from nnunet_flare.rounds.stages.mapped import check_id_map
from nnunet_flare.rounds.stages.plan import SPLITS, check_folds
from nnunet_flare.trusted_names import check_plans

Value = TypeVar("Value")

WITHOUT_IGNORE = ("nnUNetTrainerFlareAdversarial",)
"""Trainers that look at whole label maps."""


@dataclass(frozen=True)
class Request:
    """What the user asked for on the command line of ``flare-pseudolabel run``."""

    dataset: str
    unlabelled: Path
    run_dir: Path | None = None
    name: str | None = None
    device: str = "cuda"
    shards: int = 1
    init_model: Path | None = None
    init_folds: Sequence[str] = ()
    init_map: str | None = None
    eval_images: Path | None = None
    eval_labels: Path | None = None
    trust_checkpoint: bool = False


@dataclass(frozen=True)
class RunInput:
    """A request with its recipe and the data that it names.

    Attributes:
        request: what the user asked for.
        recipe: the recipe.
        raw: folder of the labelled dataset.
        preprocessed: its folder in nnUNet_preprocessed, which may not exist yet.
        document: its dataset.json.
        labelled: ids of its labelled and partial cases.
        is_new: whether the run's folder has no run yet.
        is_sound: whether nothing is wrong with the labelled cases.
        sources: files of the unlabelled scans by id; empty if they cannot be listed.
        init_folds: folds of the given model that are members.
    """

    request: Request
    recipe: Recipe
    raw: Path
    preprocessed: Path
    document: Mapping[str, Any]
    labelled: tuple[str, ...]
    is_new: bool
    is_sound: bool
    sources: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    init_folds: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of a scan."""
        return len(self.document["channel_names"])


def checked_input(request: Request, recipe: Recipe, raw: Path, *, preprocessed: Path, is_new: bool) -> RunInput:
    """The input of a run, once every check has passed; nothing is written.

    Raises:
        InputError: all problems at once.
    """
    problems: list[str] = []
    document = read_dataset_json(raw, problems) or {}
    is_readable = not problems
    if is_readable and is_new:
        problems = check_dataset(raw)
    other_labels = label_problems(document) if is_readable else []
    if not is_new:  # check_dataset has not looked
        problems += other_labels
    found = _Problems([f"{raw}: {len(problems)} problem(s):\n  " + "\n  ".join(problems)] if problems else [])
    if not is_readable or other_labels or not ("dataset" in document or (raw / "labelsTr").is_dir()):
        found.raise_all()
    given = RunInput(
        request, recipe, raw, preprocessed, document, _labelled(raw, document), is_new, is_sound=not problems
    )
    sources = found.attempt(lambda: find_sources(request.unlabelled, given.channels))
    folds = found.attempt(lambda: _init_folds(request, document, recipe))
    given = replace(given, sources=sources or {}, init_folds=tuple(folds or ()))
    for check in CHECKS:
        found.attempt(partial(check, given))
    found.raise_all()
    return given


class _Problems:
    """What is wrong with a run's input, collected, so that the user hears of everything at once."""

    def __init__(self, known: Sequence[str]) -> None:
        self._messages = list(known)

    def attempt(self, function: Callable[[], Value]) -> Value | None:
        """What a function returns; None where it says what is wrong, which is kept for :meth:`raise_all`."""
        try:
            return function()
        except InputError as error:
            self._messages.append(str(error))
            return None

    def raise_all(self) -> None:
        """Raise what was collected, one message as it is."""
        if len(self._messages) > 1:
            numbered = [f"{number}. {message}" for number, message in enumerate(self._messages, start=1)]
            raise InputError(f"{len(numbered)} problems must be fixed first:\n" + "\n".join(numbered))
        if self._messages:
            raise InputError(self._messages[0])


def _check_ids(given: RunInput) -> None:
    """No id is both a labelled and an unlabelled case."""
    shared = sorted(set(given.sources) & set(given.labelled))
    if shared:
        raise InputError(
            f"-u {given.request.unlabelled}: {len(shared)} case ids are also labelled cases ({', '.join(shared[:5])}). "
            "Rename the unlabelled files, or remove them if they are the same scans"
        )


def _check_domains(given: RunInput) -> None:
    """Of every unlabelled scan the domain is known, where the recipe asks for domains; of a run that goes on it was."""
    if given.is_new:
        domains_of(given.sources, given.recipe.domains)


def _check_held_out_cases(given: RunInput) -> None:
    """Held-out cases can be used and take no part in the training."""
    images, labels = given.request.eval_images, given.request.eval_labels
    if images is None or labels is None:
        return
    check_held_out(
        images,
        labels,
        given.document["file_ending"],
        given.channels,
        {*given.labelled, *given.sources},
        allowed=set(allowed_ids(given.document["labels"])) if given.is_new else None,
        reader=dataset_reader(given.raw, given.document),
    )


def _check_members(given: RunInput) -> None:
    """A given model's labels can be judged by the recipe's rule."""
    if given.init_folds or given.request.init_model is None:  # what is wrong with its folds was said
        check_init_members(given.request, given.init_folds, given.recipe)


def _check_folds(given: RunInput) -> None:
    """There are as many labelled cases as the recipe has folds; asked of a new run, whose splits may be missing."""
    if given.is_new and given.labelled:
        splits = given.preprocessed / SPLITS
        check_folds(given.recipe, given.labelled, splits, starts_given=given.request.init_model is not None)


def _check_loops(given: RunInput) -> None:
    """A recipe with loops fits the annotations; asked of sound data of a new run."""
    if given.is_new and given.is_sound:
        labels = given.document["labels"]
        check_loop_data(given.recipe, roles_of(given.raw, given.labelled, labels), labels, set(given.sources))


def _check_first_weights(given: RunInput) -> None:
    """Weights that a training starts from are data: stock nnU-Net will unpickle the file."""
    path = given.recipe.training.get("pretrained_weights")
    if path:
        from nnunet_flare.checkpoints import read_weights

        read_weights(Path(str(path)), trust=given.request.trust_checkpoint)


def _check_coarse_model(given: RunInput) -> None:
    """A given coarse model must be a trained model's folder for as many channels."""
    roi, channels = given.recipe.roi, given.channels
    if roi is None or roi.model is None:
        return
    folder = Path(roi.model)
    if not (folder / "plans.json").is_file() or not any(folder.glob("fold_*/checkpoint_final.pth")):
        raise InputError(
            f"roi.model: {folder} is not a trained model's folder (plans.json, fold_*/checkpoint_final.pth)"
        )
    model = load_json(folder / "dataset.json")
    there = len(model.get("channel_names", ())) if isinstance(model, dict) else 0
    if there != channels:
        raise InputError(f"roi.model: {folder} takes {there} channel(s), the dataset has {channels}")
    _check_names(folder, trusted=given.request.trust_checkpoint)


def _check_names(folder: Path, *, trusted: bool) -> None:
    """A given model's plans may name only what may be looked up, in every configuration."""
    path = folder / "plans.json"
    plans = load_json(path)
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    for name in configurations if isinstance(configurations, dict) else ():
        check_plans(plans, resolve(plans, name, path), path, trusted=trusted)


def _check_trainers(given: RunInput) -> None:
    """Refuse trainers that cannot learn from an *ignore* label, and class weights of regions, where there are such."""
    labels, recipe = given.document["labels"], given.recipe
    named = {"trainer": recipe.trainer, "final.trainer": recipe.final.trainer}
    problems = []
    for key, trainer in named.items():
        base = trainer and plugin.without_epochs(trainer)
        if ignore_id(labels) is not None and base in WITHOUT_IGNORE:
            problems.append(
                f"{key} {trainer}: compares whole label maps, but dataset.json has an 'ignore' label; expected "
                "another trainer, such as nnUNetTrainerFlareST"
            )
    weights = {"training": recipe.training, "final.training": recipe.final.training}
    for key, training in weights.items():
        if has_regions(labels) and training.get("class_weights") is not None:
            problems.append(
                f"{key}.class_weights: found {training['class_weights']!r}, but dataset.json has regions, and their "
                "loss has no class weights; leave it out (--set training.class_weights=null)"
            )
    if problems:
        raise InputError(f"recipe {recipe.name}: {'; '.join(problems)}")


def _labelled(raw: Path, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids of the labelled and partial cases, by file names."""
    if "dataset" in document:
        return tuple(sorted(document["dataset"]))
    ending = document["file_ending"]
    return tuple(sorted(p.name[: -len(ending)] for p in (raw / "labelsTr").iterdir() if p.name.endswith(ending)))


def check_init_members(request: Request, folds: Sequence[str], recipe: Recipe) -> None:
    """Refuse given models whose labels the recipe's rule cannot judge.

    Raises:
        InputError: for one model where the rule needs agreement, for several folds where checkpoints are compared, and
            where nothing is labelled at all.
    """
    rule = recipe.selection_of(0).rule
    if request.init_model is not None and recipe.is_online:
        raise InputError(
            f"--init_model {request.init_model}: recipe {recipe.name} has no round that a given model could label; "
            "start from its weights with --set training.pretrained_weights=CHECKPOINT"
        )
    if request.init_model is None or rule.needs == "nothing":
        return
    if recipe.members.kind == "checkpoints":
        if len(folds) > 1:
            raise InputError(
                f"--init_model {request.init_model}: members.kind 'checkpoints' compares checkpoints of one training, "
                f"found folds {', '.join(folds)}; choose one with -f"
            )
        return
    if len(folds) < 2:
        raise InputError(
            f"--init_model {request.init_model} -f {' '.join(folds)}: one member has no agreement, which "
            f"selection.rule '{rule.name}' needs; give more folds, or --set selection.rule=all"
        )


def _init_folds(request: Request, document: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The folds of ``--init_model`` that are members, checked to exist and to have checkpoints and these labels."""
    folder = request.init_model
    if folder is None:
        if request.init_map is not None:
            raise InputError(f"--init_map {request.init_map}: maps the labels of --init_model; give that too")
        if request.init_folds:
            raise InputError(
                f"-f {' '.join(request.init_folds)}: chooses folds of --init_model; give that too, or set how many "
                "folds the run trains with --set members.count"
            )
        return []
    checkpoint = "checkpoint_final.pth"
    if not (folder / "plans.json").is_file() or not (folder / "dataset.json").is_file():
        raise InputError(f"--init_model {folder}: no nnU-Net model folder (plans.json or dataset.json is missing)")
    model = load_json(folder / "dataset.json")
    there = model.get("labels") if isinstance(model, dict) else None
    if request.init_map is not None:
        check_id_map(request.init_map, there, document["labels"], recipe, where=f"--init_model {folder}")
    elif not isinstance(there, dict) or outputs_of(model) != outputs_of(document):
        raise InputError(
            f"--init_model {folder}: its labels are {there}, the dataset's {document['labels']}; give --init_map with "
            "their ids, or start only from its weights with --set training.pretrained_weights=CHECKPOINT"
        )
    found = sorted(p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}"))
    numbered = [fold for fold in found if fold != "all"]
    folds = list(request.init_folds) or numbered or found
    if len(set(folds)) < len(folds):
        raise InputError(
            f"-f {' '.join(folds)}: names a fold twice, and a model always agrees with itself; give each once"
        )
    missing = [fold for fold in folds if fold not in found]
    if missing or not folds:
        raise InputError(
            f"--init_model {folder}: no {checkpoint} for fold {', '.join(missing) or '(any)'}; has {found}"
        )
    absent = [
        f"fold_{fold}/{name} (after {share:.0%} of the training)"
        for fold in folds
        for name, share in zip(recipe.given_checkpoints, recipe.members.at, strict=False)
        if not (folder / f"fold_{fold}" / name).is_file()
    ]
    if absent:
        raise InputError(
            f"--init_model {folder}: no {', no '.join(absent)}; train it with flare.checkpoints_at "
            f"{list(recipe.members.at)}, or choose members.kind=folds"
        )
    _check_names(folder, trusted=request.trust_checkpoint)
    return folds


CHECKS: tuple[Callable[[RunInput], None], ...] = (
    _check_trainers,
    _check_ids,
    _check_domains,
    _check_held_out_cases,
    _check_folds,
    _check_members,
    _check_coarse_model,
    _check_first_weights,
    _check_loops,
)
"""What is asked of the input of a run, in this order."""
