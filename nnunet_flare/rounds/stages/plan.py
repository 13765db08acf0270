"""The stage ``plan``: the labelled cases are planned, preprocessed and split, as far as that was not done before."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_flare import shapes
from nnunet_flare.cases import FILE_NAME, read_table
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.parallel import num_processes
from nnunet_flare.recipes.recipe import GIVEN_MODEL, Recipe
from nnunet_flare.rounds.run.configurations import check_names, configuration_hash
from nnunet_flare.rounds.run.dataset import dataset_json, raw_cases, raw_files, read_dataset
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.rounds.run.sources import labels_of, table_path, write_table
from nnunet_flare.rounds.stages.arrays import ENDINGS, damage
from nnunet_flare.rounds.stages.pretrained import check_pretrained, with_pretrained_network
from nnunet_flare.rounds.stages.refresh import changed_cases, preprocess_cases, present_sources, refresh_ground_truth
from nnunet_flare.trusted_names import check_name

log = logging.getLogger(__name__)

FINGERPRINT = "dataset_fingerprint.json"
SPLITS = "splits_final.json"
ALONE = (
    "members.kind=checkpoints and members.at=[0.5, 0.75, 1.0], to compare the checkpoints of one training (with "
    "selection.rule=mean-organ), or members.count=1 and selection.rule=all, to take all labels of one network"
)
"""What to set for a single labelled case."""


def default_plans_name(planner: str) -> str:
    """The plans name that a planner writes by default.

    Raises:
        InputError: when nnU-Net finds no planner of that name.
    """
    import inspect

    found = planner_class(planner)
    default = inspect.signature(found.__init__).parameters["plans_name"].default
    return str(getattr(found, "plans_name", default))


def planner_class(planner: str) -> Any:
    """A planner's class, found as ``nnUNetv2_plan_and_preprocess -pl`` finds it."""
    import nnunetv2
    from nnunetv2.utilities import find_class_by_name

    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    found = find_class_by_name.recursive_find_python_class(folder, planner, "nnunetv2.experiment_planning")
    if found is None:
        raise InputError(f"planner '{planner}': nnU-Net finds no planner with that name; see flare-doctor")
    check_name("planner", planner, "planner")
    return found


def plan_and_preprocess(run: Run, base: Base | None = None) -> str:
    """Fingerprint, plan and preprocess the labelled cases, as far as that was not done before.

    Cases whose scan or label map was changed since then are preprocessed anew.

    Args:
        run: the run.
        base: what is planned; None: what the rounds build on.

    Returns the hash of the resolved base configuration.
    """
    base = base or run.base
    with LockFile(run.preprocessed / "flare_plans.lock", f"the plans of {run.settings.dataset}", wait=True):
        is_other = _refresh_dataset_json(run)
        copy_case_table(run)  # planners read it
        if not (run.preprocessed / FINGERPRINT).is_file():  # a training wants it, whoever made the plans
            _extract_fingerprint(run)
        if not base.plans_file.is_file():
            _plan(run, base)
        configuration = check_names(run, base)
        _provide_dataset_json(run, base, configuration)
        labelled, labels = raw_cases(run), dataset_json(run)["labels"]
        files = raw_files(run)
        now = present_sources(base.data, files)
        if _not_whole(base, labelled):
            _preprocess(run, base)
            problems = _not_whole(base, labelled)
            if problems:
                raise TaskError(
                    f"{len(problems)} of {len(labelled)} labelled cases are incomplete after preprocessing; the first: "
                    f"{problems[0]}. {_room(base)}"
                )
        else:
            changed = changed_cases(base.data, now)
            noted = labels_of(table_path(base.data))
            if is_other if noted is None else noted != labels:
                changed = {case: changed.get(case, ["dataset.json"]) for case in labelled}
            _preprocess_changed(run, base, files, changed)
            _remove_gone(base, labelled)
        write_table(table_path(base.data), now, labels=labels)
        copied = refresh_ground_truth(run.preprocessed / "gt_segmentations", files, dataset_json(run)["file_ending"])
        if copied:
            log.info("label maps copied again for validation: %s", ", ".join(copied))
        _write_splits(run, labelled)
    if base == run.base:
        check_pretrained(run)
    return configuration_hash(configuration)


def _extract_fingerprint(run: Run) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    processes = num_processes(len(raw_cases(run)))
    extract_fingerprint_dataset(
        _dataset_id(run), num_processes=processes, clean=False, show_progress_bar=False, verbose=False
    )


def _plan(run: Run, base: Base) -> None:
    if base.planner == GIVEN_MODEL:
        from nnunet_flare.rounds.stages.given_plans import write_given_plans

        write_given_plans(run, base)
        return
    from nnunet_flare.planners.flare import plan_dataset

    if os.environ.get("nnUNet_n_proc_DA") == "0":  # noqa: SIM112
        os.environ["nnUNet_n_proc_DA"] = "1"  # noqa: SIM112 (stock planning asks torch for that many threads)
    plan_dataset(
        _dataset_id(run),
        planner_class(base.planner),
        configuration=base.configuration,
        plans_name=base.plans_name,
        **with_pretrained_network(run, base.changes),
    )


def _preprocess(run: Run, base: Base) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    log.info(
        "preprocessing the labelled cases of %s for %s, %s", run.settings.dataset, base.plans_name, base.configuration
    )
    try:
        preprocess_dataset(
            _dataset_id(run),
            base.plans_name,
            (base.configuration,),
            num_processes=[num_processes(len(raw_cases(run)))],
            show_progress_bar=False,
        )
    except RuntimeError as error:  # stock writes through memory maps: on a full disk its workers die without a word
        raise TaskError(
            f"preprocessing the labelled cases failed ({error}). Worker processes that end without an error usually "
            f"ran out of disk space or memory. {_room(base)}"
        ) from error


def _preprocess_changed(run: Run, base: Base, files: dict[str, Any], changed: dict[str, list[str]]) -> None:
    """Make the arrays anew of the cases whose files are other ones than they were made from."""
    if not changed:
        return
    names = "; ".join(f"{case} ({', '.join(found)})" for case, found in sorted(changed.items()))
    log.warning("%s: changed since they were preprocessed, so preprocessed again: %s", base.data.name, names)
    arguments = (files, base.data, base.plans_file, base.configuration, dataset_json(run))
    preprocess_cases(sorted(changed), *arguments, workers=num_processes(len(changed)))


def _remove_gone(base: Base, labelled: list[str]) -> None:
    """Remove the arrays of cases that the dataset has no longer: nnU-Net trains on all that lies in the folder."""
    gone = sorted({path.stem for path in base.data.glob("*.pkl")} - set(labelled))
    if gone:
        log.warning("%s: no longer labelled cases, so their arrays are removed: %s", base.data.name, ", ".join(gone))
    for case in gone:
        for ending in ENDINGS:
            (base.data / f"{case}{ending}").unlink(missing_ok=True)


def _provide_dataset_json(run: Run, base: Base, configuration: dict[str, Any]) -> None:
    """Copy dataset.json for plans that were made elsewhere: a given model's, or moved from another dataset.

    Raises:
        InputError: when those plans are for another number of channels.
    """
    document = read_dataset(run.raw / "dataset.json")
    found, needed = len(configuration.get("normalization_schemes", ())), len(document["channel_names"])
    if found != needed:
        raise InputError(
            f"{base.plans_file}: configuration '{base.configuration}' normalises {found} channel(s), "
            f"{run.settings.dataset} has {needed}; use plans of a dataset with as many channels, or remove the file "
            "to plan again"
        )
    copy = run.preprocessed / "dataset.json"
    if not copy.is_file():
        write_json(copy, document)


def _refresh_dataset_json(run: Run) -> bool:
    """Copy dataset.json again where the raw one says something else; returns whether its labels are others.

    Raises:
        TaskError: when its channels are others, which the plans were made for.
    """
    raw, copy = run.raw / "dataset.json", run.preprocessed / "dataset.json"
    if not copy.is_file():
        return False
    new, old = read_dataset(raw), read_dataset(copy)
    if new == old:
        return False
    if new["channel_names"] != old["channel_names"]:
        raise TaskError(
            f"{raw}: has the channels {new['channel_names']}, but the plans in {run.preprocessed} were made for "
            f"{old['channel_names']}. Plan the dataset again (remove that folder), or restore dataset.json"
        )
    log.warning("%s changed since the dataset was planned; it is copied again", raw)
    write_json(copy, new)
    return bool(new["labels"] != old["labels"])


def _room(base: Base) -> str:
    free = shutil.disk_usage(base.data.parent).free
    return f"{base.data.parent} has {free / 1e9:.1f} GB free; make room, then run the same command again"


def _dataset_id(run: Run) -> int:
    return int(run.settings.dataset[len("Dataset") :][:3])


def _not_whole(base: Base, cases: list[str]) -> list[str]:
    """What is wrong with the preprocessed cases, each read once; as soon as a file is missing nothing is read."""
    for case in cases:
        for ending in ENDINGS:
            if not (base.data / f"{case}{ending}").is_file():
                return [f"{base.data / case}{ending} is missing"]
    checked = tqdm(cases, desc="preprocessed cases", unit="case", disable=None)
    return [found for case in checked if (found := damage(base.data, case)) is not None]


def _write_splits(run: Run, cases: list[str]) -> None:
    """nnU-Net's cross-validation split over the labelled and partial cases, made once for the dataset."""
    path, starts_given = run.preprocessed / SPLITS, run.settings.init_model is not None
    check_folds(run.recipe, cases, path, starts_given=starts_given)
    if not _folds(run.recipe, starts_given=starts_given):
        return
    if path.is_file():
        _say_what_no_fold_has(path, cases)
        return
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    splits = generate_crossval_split(cases, seed=12345, n_splits=folds_of_split(run))
    write_json(path, splits)


def folds_of_split(run: Run) -> int:
    """Folds of the split, of which a round may train fewer; before it is made, those that it will have."""
    path = run.preprocessed / SPLITS
    if path.is_file():
        return len(read_json(path, shapes.SPLITS, remedy="remove it, then it is made again"))
    return max(2, _folds(run.recipe, starts_given=run.settings.init_model is not None))


def _say_what_no_fold_has(path: Path, cases: list[str]) -> None:
    splits = read_json(path, shapes.SPLITS, remedy="remove it, then it is made again")
    named = {case for fold in splits for part in ("train", "val") for case in fold[part]}
    missing = [case for case in cases if case not in named]
    if missing:
        log.warning(
            "%s: %d of %d labelled cases are in no fold (%s), so that no fold trains or validates on them. Remove the "
            "file, then it is made again",
            path, len(missing), len(cases), ", ".join(missing[:5]),
        )  # fmt: skip


def _folds(recipe: Recipe, *, starts_given: bool) -> int:
    """The most folds that a round trains; 0 where all train on every case."""
    rounds = [recipe.member_folds(number) for number in range(int(starts_given), recipe.final_round)]
    return max((len(folds) for folds in rounds if folds != ["all"]), default=0)


def check_folds(recipe: Recipe, cases: Sequence[str], splits: Path, *, starts_given: bool) -> None:
    """Refuse more folds than there are labelled cases, or than the dataset was split into before, and folds of cases
    that are labelled no longer.

    Args:
        recipe: how many it trains.
        cases: labelled and partial cases.
        splits: the dataset's ``splits_final.json``, where it has one.
        starts_given: whether a given model takes the place of round 0.

    Raises:
        InputError: saying what to set.
    """
    count = _folds(recipe, starts_given=starts_given)
    if not count:
        return
    if splits.is_file():
        folds = read_json(splits, shapes.SPLITS, remedy="remove it, then it is made again")
        if len(folds) < count:
            raise InputError(
                f"{splits} has {len(folds)} folds, members.count is {count}. "
                f"Set members.count={len(folds)}, or remove that file, then it is made again"
            )
        named = {case for fold in folds[:count] for part in ("train", "val") for case in fold[part]}
        gone = sorted(named - set(cases))
        if gone:
            raise InputError(
                f"{splits} has {len(gone)} case(s) that are no labelled cases of {splits.parent.name} "
                f"({', '.join(gone[:5])}). Remove that file, then it is made again"
            )
    elif len(cases) < count:
        remedy = f"members.count={len(cases)}" if len(cases) > 1 else ALONE
        raise InputError(
            f"{splits.parent.name} has {len(cases)} labelled case(s), but members.count={count} needs {count}, one to "
            f"leave out of each training. Set {remedy}; or label more cases"
        )


def copy_case_table(run: Run) -> None:
    """Carry ``flare_cases.json`` from the raw to the preprocessed dataset, again where the raw one changed.

    Raises:
        InputError: for one in the preprocessed dataset alone; the roles that were checked are those of the raw one.
    """
    source, target = run.raw / FILE_NAME, run.preprocessed / FILE_NAME
    if not source.is_file():
        if target.is_file():
            raise InputError(
                f"{target}: gives roles to cases, but there is no {source}, of which it is a copy. Remove it if all "
                "label maps are complete now, else copy it there"
            )
        return
    if target.is_file():
        found = source.stat()
        is_newer = max(found.st_mtime_ns, found.st_ctime_ns) > target.stat().st_mtime_ns
        if not is_newer or read_json(source) == read_json(target):
            return
        log.warning("%s changed since it was copied; it is copied again", source)
    read_table(source, labels=dataset_json(run)["labels"])
    write_json(target, read_json(source))
