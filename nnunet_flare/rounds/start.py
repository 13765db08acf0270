"""Starting a run: all input is checked first, then the manifest and the frozen list of cases are written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_flare.datasets import dataset_reader, read_dataset_json, resolve_dataset
from nnunet_flare.errors import InputError
from nnunet_flare.plugin import PLANNERS
from nnunet_flare.recipes.recipe import GIVEN_MODEL, NAME_PATTERN, Recipe
from nnunet_flare.rounds.check_input import Request, checked_input
from nnunet_flare.rounds.disk import check_disk
from nnunet_flare.rounds.run.domains import domains_of
from nnunet_flare.rounds.run.manifest import FOLDERS, Run, create_run
from nnunet_flare.rounds.run.paths import RunPaths
from nnunet_flare.rounds.run.settings import RunSettings
from nnunet_flare.rounds.run.unlabelled import find_sources, freeze, not_taken, read_list, write_list
from nnunet_flare.rounds.stages.given_plans import model_plans
from nnunet_flare.rounds.stages.plan import default_plans_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A checked run that is not started yet: ``--dry-run`` shows it, :func:`start_run` writes it."""

    run: Run
    labelled: tuple[str, ...]
    channels: int
    file_ending: str


def plan_run(request: Request, recipe: Recipe, folders: Mapping[str, Path]) -> Plan:
    """Check all input and write nothing.

    Raises:
        InputError: all problems of the input at once.
    """
    raw = resolve_dataset(request.dataset, folders["nnUNet_raw"])
    name = request.name or recipe.name.replace("_", "-")
    if not NAME_PATTERN.fullmatch(name):
        raise InputError(f"--name {name}: expected letters, digits and hyphens")
    root = (request.run_dir or folders["nnUNet_results"] / raw.name / f"flare_{name}").absolute()
    is_new, preprocessed = not RunPaths(root).manifest.is_file(), folders["nnUNet_preprocessed"] / raw.name
    given = checked_input(request, recipe, raw, preprocessed=preprocessed, is_new=is_new)
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
        init_folds=given.init_folds,
        init_map=_absolute_map(request.init_map),
        eval_images=None if request.eval_images is None else str(request.eval_images.absolute()),
        eval_labels=None if request.eval_labels is None else str(request.eval_labels.absolute()),
        trust_checkpoint=request.trust_checkpoint,
    )
    return Plan(Run(root, settings, recipe), given.labelled, given.channels, given.document["file_ending"])


def start_run(plan: Plan) -> Run:
    """Write the manifest and freeze the unlabelled cases, or return the existing run with the same settings.

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


def unlabelled_ids(plan: Plan) -> set[str]:
    """Ids of the unlabelled cases: those the run has frozen, or those it would start with."""
    run = plan.run
    if run.paths.unlabelled.is_file():
        return {case.case for case in read_list(run.paths.unlabelled)}
    return set(find_sources(Path(run.settings.unlabelled_dir), plan.channels))


def freeze_unlabelled(plan: Plan) -> None:
    """Link the unlabelled scans and write the list of them into the run's folder.

    Raises:
        FlareError: when the disk cannot hold what the run will write.
    """
    run = plan.run
    sources = find_sources(Path(run.settings.unlabelled_dir), plan.channels)
    domains = domains_of(sources, run.recipe.domains)
    check_disk(run, sources)
    cases = freeze(
        sources,
        raw=run.raw,
        preprocessed=run.preprocessed,
        file_ending=plan.file_ending,
        reader=dataset_reader(run.raw, read_dataset_json(run.raw, []) or {}),
    )
    cases = [replace(case, domain=domains.get(case.case)) for case in cases]
    left = not_taken(Path(run.settings.unlabelled_dir), plan.channels)
    for name, reason in sorted(left.items()):
        log.warning("not taken: %s: %s", name, reason)
    write_list(run.paths.unlabelled, cases, left)


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
        raise InputError(
            f"planner {GIVEN_MODEL}: takes the plans of a trained model; give its folder with --init_model"
        )
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


def _absolute_map(name: str | None) -> str | None:
    """An id map as the manifest keeps it: a shipped one by name, a file by its place."""
    return name if name is None or not name.endswith((".yaml", ".yml")) else str(Path(name).absolute())


def _report_late_files(run: Run, folder: Path, channels: int) -> None:
    """The list is frozen at the start; say what appeared or vanished since."""
    frozen = {case.case for case in read_list(run.paths.unlabelled)}
    try:
        now = set(find_sources(folder, channels))
    except InputError as error:
        log.warning("%s; the run goes on with the scans that it has linked", error)
        return
    if now - frozen:
        names = ", ".join(sorted(now - frozen)[:5])
        log.warning("%d unlabelled scans were added after the start and are left out: %s", len(now - frozen), names)
    if frozen - now:
        names = ", ".join(sorted(frozen - now)[:5])
        log.warning("%d unlabelled scans were removed since the start: %s", len(frozen - now), names)
