"""The network that a configuration of plans describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_flare.errors import InputError
from nnunet_flare.inference.labels import Labels


def with_architecture(configuration: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """A configuration with its network as plans name it today; older ones list its numbers alone.

    Raises:
        InputError: when it says nothing of a network that nnU-Net knows.
    """
    try:
        found: dict[str, Any] = ConfigurationManager(dict(configuration)).configuration
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{where}: does not say which network it plans ({type(error).__name__}: {error}); restore it from a copy"
        ) from error
    return found


def planned_network(configuration: Mapping[str, Any], dataset: Mapping[str, Any], *, allow_init: bool) -> nn.Module:
    """A configuration's network as it is trained: with deep supervision.

    Args:
        configuration: of plans.json, without ``inherits_from``.
        dataset: dataset.json, for the channels and labels.
        allow_init: whether the weights are initialised.
    """
    architecture = with_architecture(configuration, "plans")["architecture"]
    network: nn.Module = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        len(dataset["channel_names"]),
        Labels(dataset).heads,
        allow_init=allow_init,
        deep_supervision=True,
    )
    return network
