"""Weights that the rounds start from: their network for the plans, or the plans checked against them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_flare import plugin
from nnunet_flare.errors import InputError
from nnunet_flare.rounds.run.configurations import base_configuration
from nnunet_flare.rounds.run.dataset import dataset_json
from nnunet_flare.rounds.run.manifest import Run

log = logging.getLogger(__name__)


def weights_file(run: Run) -> Path | None:
    """The file that the recipe names; None where trainings start from random weights."""
    given = run.recipe.training.get("pretrained_weights")
    return None if not given else Path(str(given)).expanduser()


def with_pretrained_network(run: Run, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's changes of the plan, ``network: pretrained`` spelled out: network and, if none is given, patch.

    Raises:
        InputError: when the file does not say what its network is.
    """
    spelled = {key: value for key, value in changes.items() if key != "network"}
    path = weights_file(run)
    if "network" not in changes or path is None:
        return spelled
    from nnunet_flare.pretrained import read_pretrained
    from nnunet_flare.trusted_names import check_network

    given = read_pretrained(path, trust=run.settings.trust_checkpoint)
    if given.architecture is None:
        raise InputError(
            f"{path}: does not say which network its weights belong to; leave out plan.network, and plan the same "
            "network with planner and plan.*"
        )
    if not run.settings.trust_checkpoint:
        check_network({"architecture": given.architecture}, path)
    patch = {} if given.patch_size is None else {"patch_size": given.patch_size}
    return {**patch, **spelled, "architecture": given.architecture}


def check_pretrained(run: Run) -> None:
    """Stop early when the given weights do not fit the planned network; say where they saw other patches.

    Raises:
        InputError: naming what is missing or different.
    """
    path = weights_file(run)
    if path is None:
        return
    import torch

    from nnunet_flare.networks.planned import planned_network
    from nnunet_flare.pretrained import check_transfer, plan_transfer, read_pretrained

    given = read_pretrained(path, trust=run.settings.trust_checkpoint)
    configuration, dataset = base_configuration(run.base), dataset_json(run)
    with torch.device("meta"):
        network = planned_network(configuration, dataset, allow_init=False)
    ours = plugin.learns_from(run.recipe.trainer) is not None
    part = str(run.recipe.training.get("pretrained_part", "but-head")) if ours else "but-head"
    transfer = plan_transfer(given, network, part)
    check_transfer(transfer, given, part)
    log.info("%s: %d weights (%s) fit the plan, %d are not used", path, len(transfer.taken), part, len(transfer.unused))
    patch = tuple(configuration["patch_size"])
    if given.patch_size not in (None, patch):
        log.warning("%s: was trained on patches of %s voxels, the plan has %s", path, given.patch_size, patch)
