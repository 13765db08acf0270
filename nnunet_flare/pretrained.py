"""Weights that a training starts from, of stock nnU-Net and of nnssl (OpenMind and other self-supervised models).

A file is read as data and its weights get the names that they have in nnU-Net's networks. What is taken of them is the
encoder, all but the segmentation heads (other labels), or everything; every weight of that part must be there in the
same shape, so that nothing starts from chance unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_flare.checkpoints import read_weights, weights_of
from nnunet_flare.errors import InputError
from nnunet_flare.planners.layers import STOCK_LAYERS

NNSSL_KEY = "nnssl_adaptation_plan"
"""In a checkpoint of nnssl: its network, its patch, and where in it encoder and stem are."""
ENCODER, STAGES, STEM, HEADS = "encoder.", "encoder.stages", "encoder.stem", ".seg_layers."
"""Names in nnU-Net's networks."""
SHOWN = 5

RES_ENC_L = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    **STOCK_LAYERS,
}
"""What nnssl means by ``ResEncL``."""
REQUIRES_IMPORT = ["conv_op", "norm_op", "dropout_op", "nonlin"]


@dataclass(frozen=True, eq=False)
class Pretrained:
    """Weights of a trained or pretrained network.

    Attributes:
        source: the file.
        weights: by their names in nnU-Net's networks.
        architecture: as in a configuration of plans; None where the file does not say.
        patch_size: voxels of the patches that it was trained on; None where the file does not say.
    """

    source: Path
    weights: Mapping[str, torch.Tensor]
    architecture: dict[str, Any] | None
    patch_size: tuple[int, ...] | None


@dataclass(frozen=True)
class Transfer:
    """What goes from a file into a network: names of weights, as the network has them.

    ``missing`` and ``different`` (with both shapes) are of the part that was asked for; ``fresh`` is the rest of the
    network, which keeps its random values; ``unused`` is in the file alone, or not in the part.
    """

    taken: tuple[str, ...]
    missing: tuple[str, ...]
    different: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def read_pretrained(path: Path, *, trust: bool = False) -> Pretrained:
    """Read a checkpoint of stock nnU-Net, of this package or of nnssl.

    Raises:
        InputError: when it cannot be read as data, or is of none of these.
    """
    content = read_weights(path, trust=trust)
    if not isinstance(content, dict) or not isinstance(content.get("network_weights"), dict):
        found = ", ".join(map(str, list(content)[:SHOWN])) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path}: holds {found or 'nothing'}, expected 'network_weights' as nnU-Net and nnssl write them"
        )
    weights = weights_of(content)
    strange = next((name for name, value in weights.items() if not isinstance(value, torch.Tensor)), None)
    if strange is not None:
        raise InputError(f"{path}: network_weights.{strange} is {type(weights[strange]).__name__}, expected a tensor")
    plan = content.get(NNSSL_KEY)
    try:
        if plan is not None:
            return _of_nnssl(path, weights, plan)
        return Pretrained(path, weights, *_of_stock(content.get("init_args")))
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError) as error:
        place = NNSSL_KEY if plan is not None else "init_args"
        raise InputError(
            f"{path}: {place} is not what its program writes ({type(error).__name__}: {error}); take the original file"
        ) from error


def _of_stock(arguments: Any) -> tuple[dict[str, Any] | None, tuple[int, ...] | None]:
    if arguments is None:
        return None, None
    configurations, name = arguments["plans"]["configurations"], arguments["configuration"]
    found: dict[str, Any] = {}
    seen: set[str] = set()
    while name is not None and name not in seen:  # what it inherits stands behind what it says itself
        seen.add(name)
        found = {**configurations[name], **found}
        name = found.pop("inherits_from", None)
    patch = found.get("patch_size")
    return deepcopy(found.get("architecture")), None if patch is None else tuple(int(edge) for edge in patch)


def _of_nnssl(path: Path, weights: Mapping[str, torch.Tensor], plan: Any) -> Pretrained:
    kind, given = plan["architecture_plans"]["arch_class_name"], plan["architecture_plans"].get("arch_kwargs")
    if kind not in ("ResEncL", "ResidualEncoderUNet", "PlainConvUNet"):
        raise InputError(
            f"{path}: is a {kind}, expected a convolutional network (ResEncL, ResidualEncoderUNet, PlainConvUNet), "
            "which nnU-Net's plans describe"
        )
    arch = RES_ENC_L if given is None else {**STOCK_LAYERS, **given}
    class_name = "PlainConvUNet" if kind == "PlainConvUNet" else "ResidualEncoderUNet"
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{class_name}",
        "arch_kwargs": deepcopy(dict(arch)),
        "_kw_requires_import": list(REQUIRES_IMPORT),
    }
    patch = plan.get("recommended_downstream_patchsize")
    if not patch:
        patch = next(iter(plan["pretrain_plan"]["configurations"].values()))["patch_size"]
    places = ((str(plan["key_to_encoder"]), STAGES), (str(plan["key_to_stem"]), STEM))
    renamed = {_renamed(name, places): value for name, value in weights.items()}
    return Pretrained(path, renamed, architecture, tuple(int(edge) for edge in patch))


def _renamed(name: str, places: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in places:
        if name.startswith(f"{theirs}."):
            return (ours if theirs.endswith(("stages", "stem")) else ENCODER.rstrip(".")) + name[len(theirs) :]
    return name


def plan_transfer(pretrained: Pretrained, network: nn.Module, part: str) -> Transfer:
    """Compare a file with a network, which may be on the ``meta`` device.

    Args:
        pretrained: the file's content.
        network: without wrappers.
        part: ``all``, ``but-head`` (without segmentation heads) or ``encoder``.
    """
    names: dict[int, list[str]] = {}
    own = network.state_dict(keep_vars=True)
    for name, value in own.items():  # networks of nnU-Net have one weight under several names
        names.setdefault(id(value), []).append(name)
    taken, missing, different, fresh = [], [], [], []
    for aliases in names.values():
        if not _is_in(aliases[0], part):
            fresh.append(aliases[0])
            continue
        there = next((name for name in aliases if name in pretrained.weights), None)
        if there is None:
            missing.append(aliases[0])
            continue
        theirs, ours = tuple(pretrained.weights[there].shape), tuple(own[there].shape)
        if theirs == ours:
            taken.append(there)
        else:
            different.append(f"{there} {theirs}, here {ours}")
    wanted = {name for aliases in names.values() if _is_in(aliases[0], part) for name in aliases}
    unused = [name for name in pretrained.weights if name not in wanted]
    return Transfer(*(tuple(part) for part in (taken, missing, different, fresh, unused)))


def _is_in(name: str, part: str) -> bool:
    if part == "encoder":
        return name.startswith(ENCODER)
    return part == "all" or HEADS not in f".{name}"


def check_transfer(transfer: Transfer, pretrained: Pretrained, part: str) -> None:
    """Refuse a file that lacks weights of the part, or has them in other shapes.

    Raises:
        InputError: naming them, and what to do.
    """
    problems = [
        *(f"{len(names)} {what} ({_some(names)})" for names, what in _bad(transfer) if names),
        *(
            ["its heads are for other labels"]
            if part == "all" and any(HEADS in f".{n}" for n in _all(transfer))
            else []
        ),
    ]
    if transfer.missing or transfer.different:
        raise InputError(
            f"{pretrained.source}: its network differs from this configuration's in {part} weights: "
            f"{'; '.join(problems)}. Set training.pretrained_part to encoder or but-head, or plan its network with "
            "plan.network=pretrained"
        )


def _bad(transfer: Transfer) -> tuple[tuple[tuple[str, ...], str], ...]:
    return (transfer.missing, "missing there"), (transfer.different, "of another shape")


def _all(transfer: Transfer) -> tuple[str, ...]:
    return (*transfer.missing, *transfer.different)


def _some(names: tuple[str, ...]) -> str:
    return "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def take_weights(pretrained: Pretrained, network: nn.Module, part: str) -> str:
    """Copy a part of the weights into a network; returns what was taken, in words.

    Raises:
        InputError: as :func:`check_transfer`; the network is then as it was.
    """
    transfer = plan_transfer(pretrained, network, part)
    check_transfer(transfer, pretrained, part)
    own = network.state_dict()
    with torch.no_grad():
        for name in transfer.taken:
            own[name].copy_(pretrained.weights[name])
    words = [f"{len(transfer.taken)} weights ({part}) of {pretrained.source}"]
    if transfer.fresh:
        words.append(f"{len(transfer.fresh)} start from random values ({_some(transfer.fresh)})")
    if transfer.unused:
        words.append(f"{len(transfer.unused)} weights of the file are not used ({_some(transfer.unused)})")
    return "; ".join(words)
