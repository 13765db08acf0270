"""Configurations in the plans file: the base that a run builds on, and one per round, added under a lock."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_flare import shapes
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images.readers import reader_of_plans
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base, Round
from nnunet_flare.trusted_names import check_plans

log = logging.getLogger(__name__)

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


def read_plans(path: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A plans file, checked to have configurations and what ``shape`` names besides."""
    remedy = "restore it from a copy, or remove it and flare-pseudolabel retry plans again"
    plans: dict[str, Any] = read_json(path, {"configurations": {str: dict}, **(shape or {})}, remedy=remedy)
    return plans


def image_reader(run: Run) -> str:
    """The reader of images that the run's plans name."""
    return reader_of_plans(read_plans(run.plans_file))


def base_configuration(base: Base) -> dict[str, Any]:
    """The base configuration, inheritance resolved.

    Raises:
        InputError: when the plans do not have it.
    """
    return resolve(read_plans(base.plans_file), base.configuration, base.plans_file)


def resolve(plans: dict[str, Any], name: str, where: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One configuration of plans with everything that it inherits, which must have what ``shape`` names.

    Raises:
        InputError: for a configuration that is missing, inherits from itself, or lacks what is needed.
    """
    configurations, left = plans["configurations"], [name]
    found: dict[str, Any] = {}
    for wanted in left:
        if wanted not in configurations:
            raise InputError(f"{where}: has no configuration '{wanted}', only {', '.join(configurations)}")
        found = {**configurations[wanted], **found}
        parent = found.pop("inherits_from", None)
        if parent in left:
            raise InputError(
                f"{where}: configuration '{wanted}' and '{parent}' inherit from each other; restore the file from a "
                "copy"
            )
        left += [] if parent is None else [str(parent)]
    problem = shapes.mismatch(found, shape or {}, f"configurations.{name}")
    if problem is not None:
        raise InputError(f"{where}: {problem}; restore it from a copy")
    return found


def configuration_hash(configuration: dict[str, Any]) -> str:
    """Hash of what training and preprocessing depend on."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def check_names(run: Run, base: Base) -> dict[str, Any]:
    """The base configuration, once its plans are known to name only what may be looked up.

    Raises:
        InputError: as :func:`nnunet_flare.trusted_names.check_plans`.
    """
    configuration = base_configuration(base)
    trusted = run.settings.trust_checkpoint
    check_plans(read_plans(base.plans_file), configuration, base.plans_file, trusted=trusted)
    return configuration


def check_base(run: Run, base: Base) -> None:
    """Stop when the base configuration was planned anew since the run started.

    Raises:
        TaskError: naming the plans file and what to do.
    """
    path = run.paths.done(base.task)
    remedy = f"remove it, and flare-pseudolabel retry -o {run.root} checks the plans again"
    marker = read_json(path, {"result": {"base_hash": str}}, remedy=remedy)
    found = configuration_hash(base_configuration(base))
    if found != marker["result"]["base_hash"]:
        raise TaskError(
            f"{base.plans_file}: configuration '{base.configuration}' was planned again after this run started "
            f"(hash {marker['result']['base_hash']} then, {found} now). Start a new run with another --name, "
            "or restore the plans"
        )


def write_configuration(
    run: Run, name: str, of: Round, *, data_identifier: str | None, training: dict[str, Any]
) -> None:
    """Add (or replace) a round's configuration in the plans, under the dataset's lock and by rename.

    Args:
        run: the run.
        name: name of the configuration.
        of: the round, which says what it builds on.
        data_identifier: folder of the round's data; None: the base's.
        training: what stands under ``"flare"``.
    """
    check_base(run, of.base)
    add_configuration(run, of.base, name, data_identifier=data_identifier, training=training)
    log.info("round %d trains configuration %s", of.number, name)


def add_configuration(
    run: Run, base: Base, name: str, *, data_identifier: str | None, training: dict[str, Any]
) -> None:
    """Add (or replace) a configuration that inherits from a base; see :func:`write_configuration`."""
    from nnunet_flare.trainers.settings import KEY

    with LockFile(run.preprocessed / "flare_plans.lock", f"the plans of {run.settings.dataset}", wait=True):
        plans = read_plans(base.plans_file)
        entry: dict[str, Any] = {"inherits_from": base.configuration, KEY: training}
        if data_identifier is not None:
            entry["data_identifier"] = data_identifier
        if plans["configurations"].get(name) != entry:
            plans["configurations"][name] = entry
            write_json(base.plans_file, plans)
