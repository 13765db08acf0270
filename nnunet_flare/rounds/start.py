"""Starting a run: all input is checked first, then the manifest and the frozen list of cases are written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.datasets import check_dataset, dataset_reader, read_dataset_json, resolve_dataset
from nnunet_flare.documents import load_json
from nnunet_flare.errors import FlareError, InputError
from nnunet_flare.plugin import PLANNERS
from nnunet_flare.recipes.recipe import GIVEN_MODEL, NAME_PATTERN, Recipe
from nnunet_flare.rounds.check_loop_data import check_loop_data, roles_of
from nnunet_flare.rounds.run.configurations import resolve
from nnunet_flare.rounds.run.manifest import FOLDERS, Run, create_run
from nnunet_flare.rounds.run.paths import RunPaths
from nnunet_flare.rounds.run.settings import RunSettings
from nnunet_flare.rounds.run.unlabelled import find_sources, freeze, not_taken, read_list, size_of, write_list
from nnunet_flare.rounds.stages.evaluate import check_held_out
from nnunet_flare.rounds.stages.given_plans import model_plans
from nnunet_flare.rounds.stages.mapped import check_id_map
from nnunet_flare.rounds.stages.plan import default_plans_name
from nnunet_flare.rounds.stages.replanned import has_same_arrays
from nnunet_flare.trusted_names import check_plans

log = logging.getLogger(__name__)

STOCK_CHECKPOINT_BYTES = 250_000_000
"""A checkpoint of nnU-Net's usual 31 M parameter network with its optimiser's state."""


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
class Plan:
    """A checked run that was not started: what ``--dry-run`` shows and :func:`start_run` writes."""

    run: Run
    labelled: tuple[str, ...]
    channels: int
    file_ending: str


def plan_run(request: Request, recipe: Recipe, folders: Mapping[str, Path]) -> Plan:
    """Check all input; nothing is written.

    Raises:
        InputError: all problems of the input at once.
    """
    raw = resolve_dataset(request.dataset, folders["nnUNet_raw"])
    name = request.name or recipe.name.replace("_", "-")
    if not NAME_PATTERN.fullmatch(name):
        raise InputError(f"--name {name}: expected letters, digits and hyphens")
    root = (request.run_dir or folders["nnUNet_results"] / raw.name / f"flare_{name}").absolute()
    problems: list[str] = []
    document = read_dataset_json(raw, problems) or {}
    is_new = not RunPaths(root).manifest.is_file()
    is_readable = not problems
    if is_readable and is_new:
        problems = check_dataset(raw)
    other_labels = _check_labels(document)
    problems += other_labels
    found = _Problems([f"{raw}: {len(problems)} problem(s):\n  " + "\n  ".join(problems)] if problems else [])
    if not is_readable or other_labels or not ("dataset" in document or (raw / "labelsTr").is_dir()):
        found.raise_all()
    labelled = _labelled(raw, document)
    channels, ending = len(document["channel_names"]), document["file_ending"]
    sources: Mapping[str, Sequence[Path]] = {}
    with found.collected():
        sources = find_sources(request.unlabelled, channels)
        _check_ids(request, sources, labelled)
    if request.eval_images is not None and request.eval_labels is not None:
        used = set(labelled) | set(sources)
        ids = set(document["labels"].values()) if is_new else None
        with found.collected():
            check_held_out(
                request.eval_images,
                request.eval_labels,
                ending,
                channels,
                used,
                allowed=ids,
                reader=dataset_reader(raw, document),
            )
    init_folds: list[str] = []
    with found.collected():
        init_folds = _init_folds(request, document, recipe)
        check_init_members(request, init_folds, recipe)
    with found.collected():
        _check_coarse_model(recipe, channels, trusted=request.trust_checkpoint)
    with found.collected():
        _check_first_weights(recipe, trusted=request.trust_checkpoint)
    if is_new and not problems:
        with found.collected():
            check_loop_data(recipe, roles_of(raw, labelled, document["labels"]), document["labels"], set(sources))
    found.raise_all()
    settings = RunSettings(
        name=name,
        dataset=raw.name,
        plans_name=_plans_name(recipe, name, request),
        final_plans_name=_final_plans_name(recipe, name, request),
        coarse_plans_name=_coarse_plans_name(recipe, name),
        unlabelled_dir=str(request.unlabelled.absolute()),
        recipe=recipe.model_dump(mode="json"),
        folders={variable: str(Path(folders[variable]).absolute()) for variable in FOLDERS},
        device=request.device,
        shards=request.shards,
        init_model=None if request.init_model is None else str(request.init_model.absolute()),
        init_folds=tuple(init_folds),
        init_map=_absolute_map(request.init_map),
        eval_images=None if request.eval_images is None else str(request.eval_images.absolute()),
        eval_labels=None if request.eval_labels is None else str(request.eval_labels.absolute()),
        trust_checkpoint=request.trust_checkpoint,
    )
    return Plan(Run(root, settings, recipe), tuple(labelled), channels, ending)


class _Problems:
    """What is wrong with a run's input, collected, so that the user hears of everything at once."""

    def __init__(self, known: Sequence[str]) -> None:
        self._messages = list(known)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A block whose error is kept for :meth:`raise_all`."""
        try:
            yield
        except InputError as error:
            self._messages.append(str(error))

    def raise_all(self) -> None:
        """Raise what was collected, one message as it is."""
        if len(self._messages) > 1:
            numbered = [f"{number}. {message}" for number, message in enumerate(self._messages, start=1)]
            raise InputError(f"{len(numbered)} things must be mended first:\n" + "\n".join(numbered))
        if self._messages:
            raise InputError(self._messages[0])


def start_run(plan: Plan) -> Run:
    """Write the manifest and freeze the unlabelled cases; an existing run with the same settings is returned.

    Raises:
        InputError: when the folder or the name belongs to another run.
        FlareError: when the disk cannot hold the preprocessed scans.
    """
    run = create_run(plan.run.root, plan.run.settings, plan.run.recipe)
    if run.paths.unlabelled.is_file():
        _report_late_files(run, Path(run.settings.unlabelled_dir), plan.channels)
        return run
    freeze_unlabelled(plan)
    return run


def freeze_unlabelled(plan: Plan) -> None:
    """Link the unlabelled scans and write the list of them into the run's folder.

    Raises:
        FlareError: when the disk cannot hold what the run will write.
    """
    run = plan.run
    sources = find_sources(Path(run.settings.unlabelled_dir), plan.channels)
    check_disk(run, sources)
    cases = freeze(
        sources,
        raw=run.raw,
        preprocessed=run.preprocessed,
        file_ending=plan.file_ending,
        reader=dataset_reader(run.raw, read_dataset_json(run.raw, []) or {}),
    )
    left = not_taken(Path(run.settings.unlabelled_dir), plan.channels)
    for name, reason in sorted(left.items()):
        log.warning("not taken: %s: %s", name, reason)
    write_list(run.paths.unlabelled, cases, left)


def _check_ids(request: Request, sources: Mapping[str, Any], labelled: Sequence[str]) -> None:
    shared = sorted(set(sources) & set(labelled))
    if shared:
        raise InputError(
            f"-u {request.unlabelled}: {len(shared)} case ids are labelled cases too ({', '.join(shared[:5])}). "
            "Rename the unlabelled files, or remove them if they are the same scans"
        )


def _check_first_weights(recipe: Recipe, *, trusted: bool) -> None:
    """Weights that a training starts from are data: stock nnU-Net will unpickle the file."""
    path = recipe.training.get("pretrained_weights")
    if path:
        from nnunet_flare.checkpoints import read_weights

        read_weights(Path(str(path)), trust=trusted)


def _check_coarse_model(recipe: Recipe, channels: int, *, trusted: bool) -> None:
    """A given coarse model must be a trained model's folder for as many channels."""
    if recipe.roi is None or recipe.roi.model is None:
        return
    folder = Path(recipe.roi.model)
    if not (folder / "plans.json").is_file() or not any(folder.glob("fold_*/checkpoint_final.pth")):
        raise InputError(f"roi.model: {folder} is no trained model's folder (plans.json, fold_*/checkpoint_final.pth)")
    model = load_json(folder / "dataset.json")
    there = len(model.get("channel_names", ())) if isinstance(model, dict) else 0
    if there != channels:
        raise InputError(f"roi.model: {folder} takes {there} channel(s), the dataset has {channels}")
    _check_names(folder, trusted=trusted)


def _check_names(folder: Path, *, trusted: bool) -> None:
    """A given model's plans may name only what may be looked up, in every configuration."""
    path = folder / "plans.json"
    plans = load_json(path)
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    for name in configurations if isinstance(configurations, dict) else ():
        check_plans(plans, resolve(plans, name, path), path, trusted=trusted)


def _check_labels(document: Mapping[str, Any]) -> list[str]:
    """The loop needs a plain label map: whole numbers from 0 up, no regions, no *ignore* label of the dataset's own."""
    labels = document.get("labels")
    if not isinstance(labels, dict):
        return []  # check_dataset has said so
    if any(not isinstance(value, int) for value in labels.values()):
        return ["dataset.json: labels are regions; flare-pseudolabel needs one whole number per organ"]
    if "ignore" in labels:
        return ["dataset.json: has an 'ignore' label; flare-pseudolabel sets ignored voxels itself, remove it"]
    return []


def _labelled(raw: Path, document: Mapping[str, Any]) -> list[str]:
    if "dataset" in document:
        return sorted(document["dataset"])
    ending = document["file_ending"]
    return sorted(p.name[: -len(ending)] for p in (raw / "labelsTr").iterdir() if p.name.endswith(ending))


def _plans_name(recipe: Recipe, name: str, request: Request) -> str:
    """The planner's own plans; plans of the run's own where the recipe changes them, or they name others' data."""
    default = _default_plans_name(recipe.planner, request)
    return f"{default}_{name}" if recipe.plan.changes() or not _names_its_data(recipe.planner) else default


def _names_its_data(planner: str) -> bool:
    """Whether a planner's data folders are named by its plans: not those of a given model, nor of stock's ResEnc."""
    return planner in (*PLANNERS, "ExperimentPlanner")


def _default_plans_name(planner: str, request: Request) -> str:
    if planner != GIVEN_MODEL:
        return default_plans_name(planner)
    if request.init_model is None:
        raise InputError(f"planner {GIVEN_MODEL}: takes the plans of a trained model; give its folder, --init_model")
    plans, _ = model_plans(request.init_model, trusted=request.trust_checkpoint)
    return str(plans.get("plans_name", "plans"))


def _final_plans_name(recipe: Recipe, name: str, request: Request) -> str | None:
    """The final model's plans, named alike; None where it has those of the rounds."""
    planner, _, changes = final = recipe.base_changes(final=True)
    rounds = recipe.base_changes(final=False)
    if final == rounds:
        return None
    if (planner, changes) == (rounds[0], rounds[2]):  # another configuration of the same plans
        return _plans_name(recipe, name, request)
    default = _default_plans_name(planner, request)
    return f"{default}_{name}-final" if changes or not _names_its_data(planner) else default


def _coarse_plans_name(recipe: Recipe, name: str) -> str | None:
    """The coarse model's plans, named alike; None where the run trains no coarse model."""
    roi = recipe.roi
    if roi is None or roi.model is not None:
        return None
    default = default_plans_name(roi.planner)
    return f"{default}_{name}-coarse" if roi.plan.changes() or not _names_its_data(roi.planner) else default


def check_init_members(request: Request, folds: Sequence[str], recipe: Recipe) -> None:
    """Refuse given models that the recipe's rule could not judge the labels of.

    Raises:
        InputError: for one model where the rule needs agreement, for several folds where checkpoints are compared, and
            where nothing is labelled at all.
    """
    rule = recipe.selection_of(0).rule
    if request.init_model is not None and recipe.is_online:
        raise InputError(
            f"--init_model {request.init_model}: recipe {recipe.name} has no round that a given model could label; "
            "start the training from its weights with --set training.pretrained_weights=CHECKPOINT"
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
            raise InputError(f"--init_map {request.init_map}: maps the labels of --init_model, which was not given")
        return []
    checkpoint = "checkpoint_final.pth"
    if not (folder / "plans.json").is_file() or not (folder / "dataset.json").is_file():
        raise InputError(f"--init_model {folder}: no nnU-Net model folder (plans.json or dataset.json is missing)")
    model = load_json(folder / "dataset.json")
    there = model.get("labels") if isinstance(model, dict) else None
    if request.init_map is not None:
        check_id_map(request.init_map, there, document["labels"], recipe, where=f"--init_model {folder}")
    elif there != document["labels"]:
        raise InputError(
            f"--init_model {folder}: its labels are {there}, the dataset's {document['labels']}; give --init_map with "
            "their ids, or start from its weights alone with --set training.pretrained_weights=CHECKPOINT"
        )
    found = sorted(p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}"))
    numbered = [fold for fold in found if fold != "all"]
    folds = list(request.init_folds) or numbered or found
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


def _absolute_map(name: str | None) -> str | None:
    """An id map as the manifest keeps it: a shipped one by name, a file by its place."""
    return name if name is None or not name.endswith((".yaml", ".yml")) else str(Path(name).absolute())


def _report_late_files(run: Run, folder: Path, channels: int) -> None:
    """The list is frozen at the start; say what appeared or vanished since."""
    frozen = {case.case for case in read_list(run.paths.unlabelled)}
    try:
        now = set(find_sources(folder, channels))
    except InputError as error:
        log.warning("%s; the run goes on with what it has linked", error)
        return
    if now - frozen:
        names = ", ".join(sorted(now - frozen)[:5])
        log.warning("%d unlabelled scans appeared after the start and are left out: %s", len(now - frozen), names)
    if frozen - now:
        names = ", ".join(sorted(frozen - now)[:5])
        log.warning("%d unlabelled scans are gone since the start: %s", len(frozen - now), names)


def disk_needed(run: Run, sources: Mapping[str, Sequence[Path]]) -> dict[str, int]:
    """Estimate of the bytes that the run will write, by what they are.

    A preprocessed array takes about twice its compressed scan (float32 against int16); the labels of a round about 2 %
    of that per member map, for the members, the training label and the map on the image's grid. A final model with
    plans of its own takes every scan once more.
    """
    recipe = run.recipe
    arrays = 2 * sum(size_of(path) for paths in sources.values() for path in paths)
    maps = sum(len(recipe.member_folds(r)) * len(recipe.member_checkpoints(r)) + 2 for r in range(recipe.final_round))
    first = 0 if run.settings.init_model is None else 1
    trainings = sum(len(recipe.member_folds(number)) for number in range(first, recipe.final_round + 1))
    trainings += (recipe.final.finetune is not None) + (run.coarse_base is not None)
    kept = 2 + len(recipe.members.at)
    return {
        "unlabelled arrays": arrays,
        **({"arrays for the final model": arrays} if prepares_again(run) else {}),
        "labels of all rounds": int(0.02 * arrays * maps),
        "checkpoints": trainings * kept * _checkpoint_bytes(run),
    }


def prepares_again(run: Run) -> bool:
    """Whether the final model's plans preprocess the scans once more; as far as is known before they are planned."""
    if run.final_base == run.base:
        return False
    planned = run.base.plans_file.is_file() and run.final_base.plans_file.is_file()
    return not (planned and has_same_arrays(run.base, run.final_base))


def _checkpoint_bytes(run: Run) -> int:
    """Size of a checkpoint: of an earlier training with these plans, else of stock nnU-Net's usual network."""
    found = [path.stat().st_size for path in run.results.glob(f"*{run.settings.plans_name}__*/fold_*/checkpoint_*.pth")]
    return max(found, default=STOCK_CHECKPOINT_BYTES)


def check_disk(run: Run, sources: Mapping[str, Sequence[Path]]) -> None:
    """Raise when the preprocessed scans, or labels and checkpoints, will not fit where they go."""
    needed = disk_needed(run, sources)
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, size in (
        (run.preprocessed, needed["unlabelled arrays"] + needed.get("arrays for the final model", 0)),
        (run.results, needed["labels of all rounds"] + needed["checkpoints"]),
    ):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        device = place.stat().st_dev
        wanted[device] = (place, wanted.get(device, (place, 0))[1] + size)
    for place, size in wanted.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise FlareError(
                f"{place}: the run needs about {size / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free. "
                "Free disk space, or set nnUNet_preprocessed and nnUNet_results to larger disks"
            )
