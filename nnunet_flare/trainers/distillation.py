"""``nnUNetTrainerFlareDistill``: a student learns from labels and from the logits of a frozen teacher.

The loss is (1 - w) (Dice + CE) + w T^2 KL(teacher || student), both softmax at temperature T, on the full-resolution
output only (Hinton et al. 2015); of regions it is the mean of each one's KL, of being in it or not. Fosun's
"distillation" (S1) is a small student on the teacher's hard labels, which any trainer does. The teacher sees the
student's own augmented patch, so both must expect the same input.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_flare.errors import FlareError, InputError
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.model import Model, open_model
from nnunet_flare.inference.normalisation import OF_FOREGROUND
from nnunet_flare.labels import outputs_of
from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.lengths import class_with_length
from nnunet_flare.trainers.resolutions import highest
from nnunet_flare.trainers.self_training import nnUNetTrainerFlareST
from nnunet_flare.trainers.settings import TRUST_VARIABLE


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float, heads: Heads) -> torch.Tensor:
    """T^2 times the mean over voxels of KL(teacher || student) of logits (B, K, ...), in float32.

    A region is a choice of two, whose logits are 0 and its own; the mean is then over voxels and regions, as that of
    the cross-entropy on labels.
    """
    if heads.regions:
        student, teacher = (torch.stack((torch.zeros_like(each), each), dim=1) for each in (student, teacher))
    log_student = torch.log_softmax(student.float() / temperature, dim=1)
    log_teacher = torch.log_softmax(teacher.float() / temperature, dim=1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)
    return divergence.mean() * temperature**2


class nnUNetTrainerFlareDistill(nnUNetTrainerFlareST):
    """Self-training with a teacher: any nnU-Net model folder of the same labels, spacing and normalisation.

    The teacher is never trained, never part of the network and never in a checkpoint. On CUDA it computes in the
    student's autocast, and in single precision from the first batch on that overflows in half.
    """

    own_settings = frozenset({"teacher"})
    teacher: nn.Module
    _teacher_overflowed = False
    _hard_loss: torch.Tensor

    def initialize(self) -> None:
        """Opens the teacher first, so that a wrong one stops the training before it starts.

        Raises:
            InputError: without a teacher in the settings, or when it does not fit the student; both sides are named.
        """
        settings = self.settings.teacher
        if settings is None:
            raise InputError(
                f"{type(self).__name__} needs a teacher: set flare.teacher.folder of configuration "
                f"'{self.configuration_name}' to a trained model's folder"
            )
        member = Member(Path(settings.folder).expanduser(), settings.fold, settings.checkpoint)
        model = open_model(member, trust_checkpoint=os.environ.get(TRUST_VARIABLE) == "1")
        self._check_teacher(model)
        self.teacher = model.network().to(self.device).float()
        self._teachers_name = str(model.member)
        super().initialize()
        self.print_to_log_file(
            f"Teacher: {model.member}, temperature {settings.temperature:g}, weight {settings.weight:g}."
        )

    def _check_teacher(self, model: Model) -> None:
        own, other = self.configuration_manager, model.configuration_manager
        channels = "channel_names" if "channel_names" in self.dataset_json else "modality"
        sides = {
            "labels": (outputs_of(self.dataset_json), outputs_of(model.dataset_json)),
            "channels": (self.dataset_json[channels], model.dataset_json.get(channels)),
            "axis order": (list(self.plans_manager.transpose_forward), list(model.plans_manager.transpose_forward)),
            "first stage of a cascade": (own.previous_stage_name, other.previous_stage_name),
            "spacing": (list(own.spacing), list(other.spacing)),
            "normalisation": (_normalisation(self.plans_manager, own), _normalisation(model.plans_manager, other)),
        }
        for name, (ours, theirs) in sides.items():
            if ours != theirs:
                raise InputError(
                    f"teacher {model.member}: its {name} is {theirs}, the student's ({self.plans_manager.plans_name}, "
                    f"{self.configuration_name}) is {ours}. Soft labels need the same; otherwise label the unlabelled "
                    "cases with the teacher and train nnUNetTrainerFlareST on its hard labels"
                )
        strides = np.prod(other.network_arch_init_kwargs["strides"], axis=0)
        if np.any(np.asarray(own.patch_size) % strides):
            raise InputError(
                f"teacher {model.member}: divides a patch by {strides.tolist()}, the student's patch "
                f"{list(own.patch_size)} is not a multiple of that; plan the student with another patch"
            )

    def compute_loss(self, output: Any, target: Any, batch: dict) -> torch.Tensor:
        """Hard loss on all resolutions, soft loss on the highest; ignored voxels have the soft one only."""
        settings = self.settings.teacher
        hard = super().compute_loss(output, target, batch)
        self._hard_loss = hard.detach()
        if settings is None or settings.weight == 0:
            return hard
        full = highest(output)
        taught = self._taught(batch)
        with torch.autocast(full.device.type, enabled=False):
            soft = soft_loss(full, taught, settings.temperature, self.heads)
        return (1 - settings.weight) * hard + settings.weight * soft

    def watched(self, output: Any, target: Any, batch: dict, loss: torch.Tensor) -> dict[str, Any]:
        """The losses on labels, without what the teacher adds."""
        return super().watched(output, target, batch, self._hard_loss)

    @torch.no_grad()
    def _taught(self, batch: dict) -> torch.Tensor:
        """The teacher's logits (B, K, Z, Y, X), which are finite.

        Raises:
            FlareError: when they are not, although the teacher computes in single precision.
        """
        data = batch["data"]
        if not self._teacher_overflowed:
            with self._teachers_autocast():
                taught: torch.Tensor = self.teacher(data)
            if bool(torch.isfinite(taught).all()):
                return taught
            self._teacher_overflowed = True
            self.print_to_log_file("The teacher's scores overflow in fp16: from here on it computes in fp32.")
        with torch.autocast(data.device.type, enabled=False):
            taught = self.teacher(data.float())
        if not bool(torch.isfinite(taught).all()):
            cases = ", ".join(map(str, batch["keys"]))
            raise FlareError(
                f"teacher {self._teachers_name}: its scores of {cases} are infinite or not a number even "
                "in fp32; its weights or the scans' arrays are damaged"
            )
        return taught

    def _teachers_autocast(self) -> AbstractContextManager[Any]:
        """The student's precision on CUDA; single on the CPU."""
        return self._autocast() if self.device.type == "cuda" else torch.autocast("cpu", enabled=False)


def _normalisation(plans_manager: Any, configuration_manager: Any) -> tuple[Any, ...]:
    """Schemes and masks and, where a scheme reads them, the intensities."""
    schemes = list(configuration_manager.normalization_schemes)
    values = plans_manager.foreground_intensity_properties_per_channel
    keys = ("mean", "std", "percentile_00_5", "percentile_99_5")
    intensities = [
        {key: values[str(channel)][key] for key in keys}
        for channel, scheme in enumerate(schemes)
        if scheme in OF_FOREGROUND
    ]
    return schemes, list(configuration_manager.use_mask_for_norm), intensities


def __getattr__(name: str) -> type:
    return class_with_length(name, globals())
