"""Plans taken from a trained model (``planner: given-model``): its teacher's, for a run that distils it.

The scans then become exactly the input that the model expects, whatever planned it and on whatever data. Changes of
the network, for a smaller student that learns from the model's logits, keep that input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_flare import plugin
from nnunet_flare.documents import load_json
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import write_json
from nnunet_flare.planners.topology import override_configuration
from nnunet_flare.rounds.run.configurations import INPUT_KEYS, base_configuration, read_plans, resolve
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.trainers.settings import KEY
from nnunet_flare.trusted_names import check_plans, check_plans_name

SAME_INPUT = tuple(key for key in INPUT_KEYS if not key.startswith(("resampling", "preprocessor", "image_reader")))
"""What a student that learns from logits must share with its teacher."""


def model_plans(model: Path, *, trusted: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plans of a model folder, and the resolved configuration that it was trained with, which its name ends on.

    Args:
        model: the folder.
        trusted: whether its network may be any (``--trust_checkpoint``).

    Returns:
        Both; the network is named as by nnU-Net of today where older plans only list its numbers.

    Raises:
        InputError: for plans that are not readable or name what they may not (see :mod:`nnunet_flare.trusted_names`),
            a folder that is not named as nnU-Net does, or a cascade.
    """
    path = model / "plans.json"
    plans = load_json(path)
    name = model.resolve().name.rpartition("__")[2]
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    if not isinstance(configurations, dict) or name not in configurations:
        found = ", ".join(configurations) if isinstance(configurations, dict) else "no configurations"
        raise InputError(
            f"--init_model {model}: expected a folder TRAINER__PLANS__CONFIGURATION as nnU-Net names it, whose "
            f"configuration is in its plans.json; found '{name}', the plans have {found}"
        )
    configuration = resolve(plans, name, path)
    if configuration.get("previous_stage") is not None:
        raise InputError(f"--init_model {model}: is the second stage of a cascade and cannot label scans alone")
    if "architecture" not in configuration:
        from nnunet_flare.networks.planned import with_architecture

        configuration = with_architecture(configuration, path)
    check_plans(plans, configuration, path, trusted=trusted)
    check_plans_name(plans.get("plans_name", "plans"), path)
    return plans, configuration


def write_given_plans(run: Run, base: Base) -> None:
    """Write the plans of ``--init_model``, with the recipe's changes, as plans of the run's own."""
    plans, configuration = model_plans(Path(str(run.settings.init_model)), trusted=run.settings.trust_checkpoint)
    configuration = {key: value for key, value in configuration.items() if key != KEY}
    configuration["data_identifier"] = base.data.name
    if base.changes:
        configuration = override_configuration(configuration, **base.changes)
    document = {**plans, "plans_name": base.plans_name, "dataset_name": run.settings.dataset}
    write_json(base.plans_file, {**document, "configurations": {base.configuration: configuration}})


def check_soft_teacher(run: Run) -> None:
    """Stop early when the final model is to learn from logits of a model that expects other input than its plans give.

    Raises:
        TaskError: naming the differences and what to do.
    """
    if plugin.learns_from(run.final.trainer) != plugin.TEACHER or run.settings.init_model is None:
        return
    plans, configuration = model_plans(Path(run.settings.init_model), trusted=run.settings.trust_checkpoint)
    theirs = {**plans, **configuration}
    base = run.final_base
    ours = {**read_plans(base.plans_file), **base_configuration(base)}
    different = [key for key in SAME_INPUT if ours.get(key) != theirs.get(key)]
    if different:
        raise TaskError(
            f"{run.settings.init_model} expects a different input than {base.plans_name} gives "
            f"({', '.join(different)}), "
            f"but {run.final.trainer} learns from its logits. Start a new run with final.planner=given-model and "
            "final.plan.* for the size of the student, or with final.trainer=nnUNetTrainerFlareST for its labels alone"
        )


def check_start_model(run: Run) -> None:
    """Stop early when the final training is to start from weights of a given model whose network is another one.

    Raises:
        TaskError: saying what to do.
    """
    if run.settings.init_model is None or run.recipe.final.start == "scratch" or run.final.number != 1:
        return
    model, trusted = Path(run.settings.init_model), run.settings.trust_checkpoint
    theirs = model_plans(model, trusted=trusted)[1].get("architecture")
    if base_configuration(run.final_base).get("architecture") != theirs:
        raise TaskError(
            f"final.start is 'member', but the network of {run.settings.init_model} is not that of "
            f"{run.final_base.plans_name}. Start a new run with final.start=scratch, or with planner=given-model"
        )
