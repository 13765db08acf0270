"""Opening a trained model: plans, data set, checkpoints and network, without loading trainer code where possible.

The trainer module of stock nnU-Net takes seconds to import, and prediction needs it only to build the network. Where
the trainer is known to build what its plans describe, the network is built from the plans alone, without initial
values, and takes the checkpoint's tensors as its parameters. The rest of the checkpoint is not read.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_flare import plugin, trusted_names
from nnunet_flare.checkpoints import load_checkpoint, weights_of
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json
from nnunet_flare.images.readers import READERS
from nnunet_flare.inference.export import check_resampling
from nnunet_flare.inference.inputs import DOCUMENTS
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.opened import Execution, OfDocuments, Runtime, check_stands_alone

STOCK_PLAN_TRAINER = re.compile(r"nnUNetTrainer(_\d+epochs?|NoMirroring|DA5|DAOrd0|NoDA)?")
"""Stock trainers that build the network of their plans unchanged."""

PACKAGES = ("dynamic_network_architectures.", "nnunet_flare.networks.")
"""Where networks come from of which nobody but their packages' authors changes the code."""


@dataclass(frozen=True, eq=False)
class Model(OfDocuments):
    """A member with its plans, data set and weights.

    ``trusted`` if it may hold and name more than data; ``stamps`` are those of its files, taken before they were read.
    """

    member: Member
    plans_manager: Any
    configuration_manager: Any
    dataset_json: dict[str, Any]
    configuration_name: str
    trainer_name: str
    mirroring_axes: tuple[int, ...] | None
    weights: dict[str, torch.Tensor] = field(repr=False)
    trusted: bool = False
    stamps: list[tuple[int, ...]] | None = None

    @cached_property
    def label_manager(self) -> Any:
        """Stock nnU-Net's label manager."""
        return self.plans_manager.get_label_manager(self.dataset_json)

    @property
    def is_planned(self) -> bool:
        """Whether the network is the one that its plans describe, and not whatever its trainer's code builds."""
        return bool(STOCK_PLAN_TRAINER.fullmatch(self.trainer_name)) or plugin.module_of(self.trainer_name) is not None

    @cached_property
    def is_of_packages(self) -> bool:
        """Whether packages' versions tell what the network computes. Own code may change while the weights stay."""
        configuration = self.configuration_manager.configuration
        try:
            trusted_names.check_network(configuration, str(self))
        except InputError:
            return False
        return self.is_planned and self.configuration_manager.network_arch_class_name.startswith(PACKAGES)

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return Path(self.member.folder)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that makes the model."""
        return self.member.files

    def __str__(self) -> str:
        return str(self.member)

    def network(self) -> nn.Module:
        """The network with its weights, in evaluation mode, without deep supervision.

        Raises:
            InputError: when the checkpoint does not fit the network that its plans and trainer describe.
        """
        if self.is_planned:
            with torch.device("meta"):  # no memory and no random numbers for values that are replaced at once
                network = _from_plans(self)
        else:
            network = _from_trainer(self)
        try:
            network.load_state_dict(self.weights, assign=True)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            raise InputError(
                f"{self.member}: its weights do not fit the network that {self.member.folder / 'plans.json'} "
                f"describes ({len(lines)} differences, the first: {lines[0] if lines else error})"
            ) from error
        return network.requires_grad_(False).eval()

    def runtime(self, how: Execution) -> Runtime:
        """What executes the network, see :class:`nnunet_flare.inference.opened.Opened`."""
        from nnunet_flare.inference.torch_runtime import open_runtime

        return open_runtime(self, how)


def open_model(member: Member, *, trust_checkpoint: bool = False, second_stage: bool = False) -> Model:
    """Open one member.

    Args:
        member: the checkpoint.
        trust_checkpoint: whether to open checkpoints that hold more than data, and networks that are not nnU-Net's.
        second_stage: whether it may be the second stage of a cascade, which cannot be used alone.

    Raises:
        InputError: when files are missing or damaged, the model is of a kind that flare-predict does not know, or it
            names what it may not (see :mod:`nnunet_flare.trusted_names`).
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder, stamps = Path(member.folder), member.stamps()
    plans = _read(folder, "plans.json")
    dataset_json = _read(folder, "dataset.json")
    checkpoint = load_checkpoint(member.path, trust=trust_checkpoint)
    name = checkpoint["init_args"]["configuration"]
    if name not in plans["configurations"]:
        raise InputError(
            f"{member}: was trained with configuration {name}, but {folder / 'plans.json'} has "
            f"{sorted(plans['configurations'])}"
        )
    manager = PlansManager(plans)
    try:
        configuration = manager.get_configuration(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'plans.json'}: configuration {name} cannot be used ({error})") from error
    trusted_names.check_plans(plans, configuration.configuration, folder / "plans.json", trusted=trust_checkpoint)
    trusted_names.check_trainer(checkpoint["trainer_name"], str(member))
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    model = Model(
        member,
        manager,
        configuration,
        dataset_json,
        name,
        checkpoint["trainer_name"],
        None if axes is None else tuple(int(a) for a in axes),
        {name: value.clone() for name, value in weights_of(checkpoint).items()},  # the file may be written over
        trust_checkpoint,
        stamps,
    )
    if stamps != member.stamps():
        raise InputError(f"{member}: this file, plans.json or dataset.json changed while it was read; try again")
    if not second_stage:
        check_stands_alone(model)
    _check_supported(model)
    return model


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        document: dict[str, Any] = read_json(path, DOCUMENTS[name], remedy="copy it again")
    except InputError as error:
        raise InputError(f"{error}; expected a trained model's folder (Trainer__Plans__configuration)") from error
    return document


def _check_supported(model: Model) -> None:
    where, configuration = model.member.folder, model.configuration_manager
    reader = model.plans_manager.plans["image_reader_writer"]
    if reader not in READERS:
        raise InputError(f"{where}: reads images with {reader}; flare-predict reads volumes ({', '.join(READERS)})")
    if max(model.label_manager.all_labels) > 255:
        raise InputError(
            f"{where}: has label ids up to {max(model.label_manager.all_labels)}; expected at most 255, "
            "as label maps are uint8"
        )
    check_resampling(configuration)


def _from_plans(model: Model) -> nn.Module:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    configuration = model.configuration_manager
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        model.network_channels,
        model.label_manager.num_segmentation_heads,
        allow_init=False,
        deep_supervision=False,
    )


def _from_trainer(model: Model) -> nn.Module:
    """What the trainer class builds, found as stock nnU-Net finds it."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        trainer = recursive_find_trainer_class_by_name(model.trainer_name)
    except RuntimeError as error:
        raise InputError(
            f"{model.member}: trained by {model.trainer_name}, which is not installed here ({error})"
        ) from error
    except (AssertionError, TypeError) as error:  # something else in nnU-Net's modules has this name
        raise InputError(f"{model.member}: {model.trainer_name!r} is not the name of a trainer") from error
    if trainer is None:
        raise InputError(f"{model.member}: trained by {model.trainer_name}, which is not installed here")
    configuration = model.configuration_manager
    heads = model.label_manager.num_segmentation_heads
    if "plans_manager" in inspect.signature(trainer.build_network_architecture).parameters:
        return trainer.build_network_architecture(
            model.plans_manager, configuration, model.network_channels, heads, enable_deep_supervision=False
        )
    return trainer.build_network_architecture(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        model.network_channels,
        heads,
        enable_deep_supervision=False,
    )
