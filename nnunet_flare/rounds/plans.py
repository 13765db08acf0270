"""The plans of a run: planned and preprocessed once, then one configuration per round is added under a lock."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_flare.cases import FILE_NAME, CaseTable, find_table
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.readers import reader_of_plans
from nnunet_flare.rounds.arrays import ENDINGS, damage
from nnunet_flare.rounds.locks import LockFile
from nnunet_flare.rounds.manifest import Base, Run
from nnunet_flare.rounds.recipe import GIVEN_MODEL

log = logging.getLogger(__name__)

SPLITS = "splits_final.json"

INPUT_KEYS = (
    "spacing",
    "transpose_forward",
    "image_reader_writer",
    "preprocessor_name",
    "normalization_schemes",
    "use_mask_for_norm",
    "foreground_intensity_properties_per_channel",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)
"""What of plans and configuration decides how a scan becomes the network's input."""


def image_reader(run: Run) -> str:
    """The reader of images that the run's plans name."""
    return reader_of_plans(read_json(run.plans_file))


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
        raise InputError(f"planner '{planner}': nnU-Net finds no planner of that name; see flare-doctor")
    return found


def plan_and_preprocess(run: Run, base: Base | None = None) -> str:
    """Fingerprint, plan and preprocess the labelled cases, as far as that was not done before.

    Args:
        run: the run.
        base: what is planned; None: what the rounds build on.

    Returns the hash of the resolved base configuration.
    """
    base = base or run.base
    with LockFile(run.preprocessed / "flare_plans.lock", f"the plans of {run.settings.dataset}", wait=True):
        if not base.plans_file.is_file():
            _plan(run, base)
        configuration = base_configuration(base)
        labelled = raw_cases(run)
        if _not_whole(base, labelled):
            _preprocess(run, base)
            problems = _not_whole(base, labelled)
            if problems:
                raise TaskError(
                    f"{len(problems)} of {len(labelled)} labelled cases are not whole after preprocessing; the first: "
                    f"{problems[0]}. {_room(base)}"
                )
        _write_splits(run, labelled)
        copy_case_table(run)
    return configuration_hash(configuration)


def _plan(run: Run, base: Base) -> None:
    if base.planner == GIVEN_MODEL:
        from nnunet_flare.rounds.given_plans import write_given_plans

        write_given_plans(run, base)
        return
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    from nnunet_flare.planners.flare import plan_dataset

    if os.environ.get("nnUNet_n_proc_DA") == "0":  # noqa: SIM112
        os.environ["nnUNet_n_proc_DA"] = "1"  # noqa: SIM112 (stock planning asks torch for that many threads)
    number = _dataset_id(run)
    processes = num_processes(len(raw_cases(run)))
    extract_fingerprint_dataset(number, num_processes=processes, clean=False, show_progress_bar=False, verbose=False)
    plan_dataset(
        number,
        planner_class(base.planner),
        configuration=base.configuration,
        plans_name=base.plans_name,
        **base.changes,
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
            f"preprocessing the labelled cases failed ({error}). Worker processes that end without an error mostly "
            f"lacked disk space or memory. {_room(base)}"
        ) from error


def _room(base: Base) -> str:
    free = shutil.disk_usage(base.data.parent).free
    return f"{base.data.parent} has {free / 1e9:.1f} GB free; make room, then run the same command again"


def num_processes(cases: int) -> int:
    """Worker processes for preprocessing: nnU-Net's own variable, never more than cores or cases."""
    wanted = int(os.environ.get("nnUNet_def_n_proc", "8"))  # noqa: SIM112 (nnU-Net spells it so)
    return max(1, min(wanted, os.cpu_count() or 1, cases))


def _dataset_id(run: Run) -> int:
    return int(run.settings.dataset[len("Dataset") :][:3])


def dataset_json(run: Run) -> dict[str, Any]:
    """dataset.json as the planner copied it, else the raw one."""
    copied = run.preprocessed / "dataset.json"
    document: dict[str, Any] = read_json(copied if copied.is_file() else run.raw / "dataset.json")
    return document


def raw_cases(run: Run) -> list[str]:
    """Ids of the labelled and partial cases of the raw dataset (file names only; nothing is opened)."""
    document = read_json(run.raw / "dataset.json")
    if "dataset" in document:
        return sorted(document["dataset"])
    ending = document["file_ending"]
    return sorted(p.name[: -len(ending)] for p in (run.raw / "labelsTr").iterdir() if p.name.endswith(ending))


def raw_files(run: Run) -> dict[str, dict[str, Any]]:
    """Image and label files of the raw dataset by case."""
    document = dataset_json(run)
    ending = document["file_ending"]
    raw = read_json(run.raw / "dataset.json")
    if "dataset" in raw:
        entries = {}
        for case, entry in raw["dataset"].items():
            paths = [Path(os.path.expandvars(p)) for p in (*entry["images"], entry["label"])]
            paths = [p if p.is_absolute() else run.raw / p for p in paths]
            entries[case] = {"images": paths[:-1], "label": paths[-1]}
        return entries
    channels = len(document["channel_names"])
    return {
        case: {
            "images": [run.raw / "imagesTr" / f"{case}_{c:04d}{ending}" for c in range(channels)],
            "label": run.raw / "labelsTr" / f"{case}{ending}",
        }
        for case in sorted(p.name[: -len(ending)] for p in (run.raw / "labelsTr").glob(f"*{ending}"))
    }


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
    first = 0 if run.settings.init_model is None else 1
    folds_of_rounds = [run.recipe.member_folds(number) for number in range(first, run.recipe.final_round)]
    count = max((len(folds) for folds in folds_of_rounds if folds != ["all"]), default=0)
    if not count:
        return
    path = run.preprocessed / SPLITS
    if path.is_file():
        folds = len(read_json(path))
        if folds < count:
            raise InputError(
                f"{path} has {folds} folds, members.count is {count}. "
                f"Set members.count={folds}, or remove that file to have it made anew"
            )
        return
    if len(cases) < max(2, count):
        raise InputError(
            f"{run.settings.dataset} has {len(cases)} labelled cases, fewer than members.count={count} folds. "
            f"Set members.count={max(2, len(cases))} or fewer, or add labelled cases"
        )
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    splits = generate_crossval_split(cases, seed=12345, n_splits=max(2, count))
    write_json(path, splits)


def copy_case_table(run: Run) -> None:
    """Carry ``flare_cases.json`` from the raw to the preprocessed dataset, once."""
    source, target = run.raw / FILE_NAME, run.preprocessed / FILE_NAME
    if source.is_file() and not target.is_file():
        write_json(target, read_json(source))


def base_table(run: Run) -> CaseTable:
    """Roles of the labelled and partial cases."""
    return find_table(
        run.preprocessed, run.raw, run.recipe.configuration, is_round=False, labels=dataset_json(run)["labels"]
    )


def base_configuration(base: Base) -> dict[str, Any]:
    """The base configuration, inheritance resolved.

    Raises:
        InputError: when the plans do not have it.
    """
    return resolve(read_json(base.plans_file), base.configuration, base.plans_file)


def resolve(plans: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    """One configuration of plans with everything that it inherits."""
    configurations = plans["configurations"]
    if name not in configurations:
        raise InputError(f"{where}: has no configuration '{name}', only {', '.join(configurations)}")
    configuration = dict(configurations[name])
    parent = configuration.pop("inherits_from", None)
    return configuration if parent is None else {**resolve(plans, parent, where), **configuration}


def configuration_hash(configuration: dict[str, Any]) -> str:
    """Hash of what training and preprocessing depend on."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def check_base(run: Run, base: Base) -> None:
    """Stop when the base configuration was planned anew since the run started.

    Raises:
        TaskError: naming the plans file and what to do.
    """
    marker = read_json(run.paths.done(base.task))
    found = configuration_hash(base_configuration(base))
    if found != marker["result"]["base_hash"]:
        raise TaskError(
            f"{base.plans_file}: configuration '{base.configuration}' was planned anew since this run started "
            f"(hash {marker['result']['base_hash']} then, {found} now). Start a new run with another --name, "
            "or restore the plans"
        )


def write_configuration(
    run: Run, name: str, number: int, *, data_identifier: str | None, training: dict[str, Any]
) -> None:
    """Add (or replace) a round's configuration in the plans, under the dataset's lock and by rename.

    Args:
        run: the run.
        name: name of the configuration.
        number: the round, which says what it builds on.
        data_identifier: folder of the round's data; None: the base's.
        training: what stands under ``"flare"``.
    """
    base = run.base_of(number)
    check_base(run, base)
    add_configuration(run, base, name, data_identifier=data_identifier, training=training)
    log.info("round %d trains configuration %s", number, name)


def add_configuration(
    run: Run, base: Base, name: str, *, data_identifier: str | None, training: dict[str, Any]
) -> None:
    """Add (or replace) a configuration that inherits from a base; see :func:`write_configuration`."""
    from nnunet_flare.trainers.settings import KEY

    with LockFile(run.preprocessed / "flare_plans.lock", f"the plans of {run.settings.dataset}", wait=True):
        plans = read_json(base.plans_file)
        entry: dict[str, Any] = {"inherits_from": base.configuration, KEY: training}
        if data_identifier is not None:
            entry["data_identifier"] = data_identifier
        if plans["configurations"].get(name) != entry:
            plans["configurations"][name] = entry
            write_json(base.plans_file, plans)
