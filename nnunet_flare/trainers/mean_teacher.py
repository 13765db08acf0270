"""``nnUNetTrainerFlareMeanTeacher``: an average of the network's own weights labels unlabelled patches, online.

Tarvainen & Valpola 2017. The teacher is the exponential moving average of the student; it sees the weak view of an
unlabelled patch, the student the strong one, which differs in its intensities alone. What the teacher draws is the
label where it is sure (of every region, where there are regions), elsewhere the *ignore* label; the loss is nnU-Net's,
on all resolutions, and its weight rises over the first part of the training. Both batches go through the network
together: one forward pass, one step.

The average is what validates, what every checkpoint predicts with, and what ``checkpoint_final.pth`` holds; the
checkpoints that a training can be continued from hold the student beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnunet_flare.trainers import checkpoints
from nnunet_flare.trainers.augmentation import intensity_transforms
from nnunet_flare.trainers.averages import WeightAverage, ramp_up
from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.lengths import class_with_length
from nnunet_flare.trainers.resolutions import at_resolutions, highest, samples_of
from nnunet_flare.trainers.settings import MeanTeacherSettings
from nnunet_flare.trainers.transforms.two_views import TwoViews
from nnunet_flare.trainers.unlabelled import LearnsFromUnlabelled

UNLABELLED_LOSS = "unlabelled_loss"
SURE_SHARE = "sure_share"
"""Curves: the loss on the teacher's labels, not weighted, and the share of voxels that the teacher is sure of."""

LONGEST_MEMORY = 0.1
"""The share of a training over which the average may reach."""


@dataclass(frozen=True)
class Lesson:
    """What the student learns from unlabelled patches: a target with *ignore*, and its weight."""

    labels: torch.Tensor
    weight: float


def too_long_a_memory(decay: float, iterations: int) -> str | None:
    """What to say of a decay whose average still holds the weights of the start when the training ends, or None."""
    memory, longest = 1 / (1 - decay), LONGEST_MEMORY * iterations
    if memory <= max(1.0, longest):
        return None
    best = "0 (no average)" if longest <= 1 else f"{math.floor((1 - 1 / longest) * 1000) / 1000:g}"
    return (
        f"mean_teacher.decay {decay:g} averages the weights of about {memory:.0f} iterations, and the training has "
        f"{iterations}: the saved model still holds much of its first weights. Set decay to at most {best}"
    )


def sure_labels(logits: torch.Tensor, threshold: float, heads: Heads) -> torch.Tensor:
    """What a teacher draws, ignored in the voxels whose class, or any of whose regions, it is not sure of.

    Args:
        logits: (B, K, Z, Y, X).
        threshold: of the probability of what is drawn, 0 to 1.
        heads: what the outputs stand for, with a label to ignore.

    Returns:
        A target with *ignore*: labels (B, 1, Z, Y, X), or maps of the regions and of *ignore* (B, R + 1, Z, Y, X).
    """
    probabilities = heads.probabilities(logits)
    label = heads.drawn(probabilities)
    return heads.ignoring(label, heads.confidence(probabilities, label) < threshold)


class nnUNetTrainerFlareMeanTeacher(LearnsFromUnlabelled):
    """Self-training with a teacher that is the average of the student: no rounds, and no teacher to train first."""

    own_settings = frozenset({"mean_teacher"})
    curves = (*LearnsFromUnlabelled.curves, UNLABELLED_LOSS, SURE_SHARE)

    average: WeightAverage

    def take_settings(self) -> None:
        super().take_settings()
        self.mean_teacher = self.stream = self.settings.mean_teacher or MeanTeacherSettings()
        if not self.label_manager.has_ignore_label:
            where = f"{self.plans_manager.plans_name}.json, configuration '{self.configuration_name}'"
            self.label_manager = self._label_manager_with_ignore(int(max(self.label_manager.all_labels)) + 1, where)

    def initialize(self) -> None:
        """The network as usual, then its average."""
        super().initialize()
        self.average = WeightAverage(self._unwrapped_network())
        warning = too_long_a_memory(self.mean_teacher.decay, self.num_epochs * self.num_iterations_per_epoch)
        if warning is not None:
            self.print_to_log_file(f"WARNING: {warning}")

    def unlabelled_chain(self) -> BasicTransform:
        """The weak view, and the strong one behind it along the channels."""
        return ComposeTransforms(
            [super().unlabelled_chain(), TwoViews(ComposeTransforms(intensity_transforms(self._windows())))]
        )

    # ------------------------------------------------------------------ steps

    def weight_now(self) -> float:
        """The weight of the loss on unlabelled patches in this iteration."""
        settings = self.mean_teacher
        rising = settings.ramp_up * self.num_epochs * self.num_iterations_per_epoch
        done = self.current_epoch * self.num_iterations_per_epoch + self._iteration
        return settings.weight * (ramp_up(done / rising) if rising else 1.0)

    def learn(self, batch: dict) -> dict[str, Any]:
        """One step on a labelled and an unlabelled batch together, then the average moves."""
        weight = self.weight_now()
        views = self.on_device({"data": next(self.dataloader_unlabelled)["data"]})["data"]
        weak, strong = views.chunk(2, dim=1)
        batch = self.on_device(batch)
        batch = {**batch, "data": torch.cat([batch["data"], strong]), "lesson": Lesson(self.labels_of(weak), weight)}
        said = super().learn(batch)
        self.average.update(self._unwrapped_network(), self.mean_teacher.decay)
        return said

    @torch.no_grad()
    def labels_of(self, weak: torch.Tensor) -> torch.Tensor:
        """The teacher's labels, as a target, of the weak views (B, C, Z, Y, X)."""
        self.average.network.eval()
        with self._autocast():
            logits = highest(self.average.network(weak))
        return sure_labels(logits, self.mean_teacher.threshold, self.heads)

    def compute_loss(self, output: Any, target: Any, batch: dict) -> torch.Tensor:
        """The loss on labels and, in a training step, the weighted one on the teacher's labels."""
        lesson: Lesson | None = batch.get("lesson")
        if lesson is None:
            return super().compute_loss(output, target, batch)
        labelled = len(batch["keys"])
        hard = super().compute_loss(samples_of(output, slice(labelled)), target, batch)
        taught = samples_of(output, slice(labelled, None))
        soft = self.loss(taught, at_resolutions(lesson.labels, taught))
        self._losses = hard.detach(), soft.detach()
        return hard + lesson.weight * soft

    def watched(self, output: Any, target: Any, batch: dict, loss: torch.Tensor) -> dict[str, Any]:
        """The losses on labels and on the teacher's labels, and how many of those count."""
        hard, soft = self._losses
        labelled = samples_of(output, slice(len(batch["keys"])))
        counted = self.heads.counted(batch["lesson"].labels)
        sure = 1.0 if counted is None else counted.float().mean()
        return {**super().watched(labelled, target, batch, hard), UNLABELLED_LOSS: soft, SURE_SHARE: sure}

    def validation_step(self, batch: dict) -> dict:
        """As in self-training, of the average."""
        trained, self.network = self.network, self.average.network
        try:
            self.network.eval()
            return super().validation_step(batch)
        finally:
            self.network = trained

    # ------------------------------------------------------------------ course of a training

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        self.log_means(train_outputs, UNLABELLED_LOSS, SURE_SHARE)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validates the average, which the network becomes: after a training nothing needs the student any more."""
        self._unwrapped_network().load_state_dict(self.average.network.state_dict())
        super().perform_actual_validation(save_probabilities)

    def exported_weights(self) -> dict[str, Any]:
        return self.average.network.state_dict()

    def state_besides(self, filename: str) -> dict[str, Any]:
        """The student, but for the final checkpoint, which nothing goes on from."""
        if filename == "checkpoint_final.pth":
            return {}
        return {"student_weights": self._unwrapped_network().state_dict(), "updates": self.average.updates}

    def load_state_besides(self, checkpoint: dict | str) -> None:
        """The network holds the average so far: it is kept, and the student takes its place.

        Without a student in the checkpoint it goes on from the average, and the log says so.
        """
        network = self._unwrapped_network()
        self.average.network.load_state_dict(network.state_dict())
        state = checkpoints.added_state(checkpoint)
        if state:
            network.load_state_dict(state["student_weights"])
            self.average.updates = state["updates"]
        elif self.is_continued and self.current_epoch < self.num_epochs:
            self.print_to_log_file("This checkpoint has no student: training continues from the average.")


def __getattr__(name: str) -> type:
    return class_with_length(name, globals())
