"""The network that a configuration of plans describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_flare.inference.labels import Labels


def planned_network(configuration: Mapping[str, Any], dataset: Mapping[str, Any], *, allow_init: bool) -> nn.Module:
    """A configuration's network as it is trained: with deep supervision.

    Args:
        configuration: of plans.json, without ``inherits_from``.
        dataset: dataset.json, for the channels and labels.
        allow_init: whether the weights are initialised.
    """
    architecture = configuration["architecture"]
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
