"""``nnUNetTrainerFlareAdversarial``: SZTU's training with a discriminator and a stream of unlabelled scans (S4).

Each iteration has three steps (:mod:`nnunet_flare.trainers.adversarial_steps`), but for the first and the last tenth of
the epochs, which are supervised only. The network that is trained, saved and predicted with is the generator: any
nnU-Net plan. The discriminator lives in the checkpoints that a training can be continued from, not in the final one.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from nnunet_flare.errors import InputError
from nnunet_flare.networks.discriminator import Discriminator
from nnunet_flare.trainers import adversarial_steps as steps
from nnunet_flare.trainers import checkpoints
from nnunet_flare.trainers.base import optimizer_step
from nnunet_flare.trainers.halves import halve_convolutions
from nnunet_flare.trainers.lengths import class_with_length
from nnunet_flare.trainers.resolutions import at_resolutions, highest
from nnunet_flare.trainers.settings import AdversarialSettings
from nnunet_flare.trainers.unlabelled import LearnsFromUnlabelled

DISCRIMINATOR_LOSS = "discriminator_loss"
UNLABELLED_LOSS = "unlabelled_loss"
WINNER_SCORE = "winner_score"
"""Curves: the discriminator's cross-entropy, the generator's weighted loss on unlabelled scans, and how sure the
discriminator is of the mask that it prefers (0.5 to 1). No numbers while the training is supervised only."""


class nnUNetTrainerFlareAdversarial(LearnsFromUnlabelled):
    """Supervised training and, beside it, a discriminator that tells the generator which of its masks to learn."""

    own_settings = frozenset({"adversarial"})
    defaults = {
        "num_epochs": 500,
        "iterations_per_epoch": 20,
        "optimizer": "Adam",
        "initial_lr": 1e-3,
        "betas": [0.9, 0.99],
        "weight_decay": 1e-5,
        "lr_schedule": "steps",
        "mirroring": False,
        "oversample_foreground": 0.0,
        "augmentation": {"labelled": "shift", "pseudo": "shift", "partial": "shift"},
    }
    curves = (*LearnsFromUnlabelled.curves, DISCRIMINATOR_LOSS, UNLABELLED_LOSS, WINNER_SCORE)

    discriminator: Any
    discriminator_optimizer: torch.optim.Optimizer
    discriminator_scaler: Any = None

    def take_settings(self) -> None:
        super().take_settings()
        self.adversarial = self.stream = self.settings.adversarial or AdversarialSettings()
        self.enable_deep_supervision = self.adversarial.deep_supervision

    def initialize(self) -> None:
        """The generator as usual, then the discriminator with an optimizer of its own.

        Raises:
            InputError: for labels or a configuration that the discriminator cannot look at.
        """
        self._check()
        super().initialize()
        discriminator: Any = Discriminator(
            self.num_input_channels,
            self.label_manager.num_segmentation_heads - self.heads.first_organ,
            self.configuration_manager.patch_size,
            features=self.adversarial.discriminator_features,
        ).to(self.device)
        halve_convolutions(discriminator, self.device)
        self.discriminator_optimizer = torch.optim.Adam(
            discriminator.parameters(),
            self.adversarial.discriminator_lr,
            betas=self.settings.betas,
            weight_decay=self.weight_decay,
        )
        if self.is_ddp:
            discriminator = DistributedDataParallel(discriminator, device_ids=[self.local_rank])
        self.discriminator = discriminator
        self.discriminator_scaler = copy.deepcopy(self.grad_scaler)  # unused so far

    def _check(self) -> None:
        manager = self.label_manager
        where = f"{self.plans_manager.plans_name}.json, configuration '{self.configuration_name}'"
        if manager.has_ignore_label:
            raise InputError(
                f"{type(self).__name__}: dataset.json has an ignore label, expected a label for every voxel, as the "
                "discriminator compares these"
            )
        if len(self.configuration_manager.patch_size) != 3:
            raise InputError(
                f"{where}: is 2-D, but {type(self).__name__} has a 3-D discriminator; train a 3-D configuration"
            )

    def _build_loss(self) -> torch.nn.Module:
        """The soft Dice, with a cross-entropy beside it where ``class_weights`` are set; with stock's weights of the
        resolutions where there are several.
        """
        loss = self.soft_dice()
        if not self.enable_deep_supervision:
            return loss
        stock: Any = self.stock_loss()
        stock.loss = loss
        return stock

    def batches_taken(self, epochs: int) -> int:
        """Only the epochs with all three steps take from the stream."""
        return self._adversarial_epochs(epochs) * self.num_iterations_per_epoch

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """As for self-training.

        Raises:
            InputError: where a partial case would train: an incomplete truth teaches the discriminator to like gaps.
        """
        partial = self.case_table().with_role(self.do_split()[0], "partial")
        if partial:
            raise InputError(
                f"{type(self).__name__}: {len(partial)} training cases are partial ({', '.join(partial[:5])}); the "
                "discriminator needs complete labels. Complete them with flare-pseudolabel merge, or leave them out"
            )
        datasets: tuple[Any, Any] = super().get_tr_and_val_datasets()
        return datasets

    # ------------------------------------------------------------------ steps

    def is_adversarial(self, epoch: int) -> bool:
        """Whether an epoch has all three steps."""
        settings = self.adversarial
        return steps.is_adversarial(epoch, self.num_epochs, warmup=settings.warmup, finish=settings.finish)

    def _adversarial_epochs(self, before: int) -> int:
        return sum(self.is_adversarial(epoch) for epoch in range(before))

    def learn(self, batch: dict) -> dict[str, Any]:
        """One iteration: discriminator, generator on labelled, generator on unlabelled scans."""
        if not self.is_adversarial(self.current_epoch):
            nothing = dict.fromkeys((DISCRIMINATOR_LOSS, UNLABELLED_LOSS, WINNER_SCORE), float("nan"))
            return {**super().learn(batch), **nothing}
        batch = self.on_device(batch)
        discriminator_loss = self.discriminator_step(batch)
        supervised = super().learn(batch)
        unlabelled = self.unlabelled_step(next(self.dataloader_unlabelled))
        return {**supervised, DISCRIMINATOR_LOSS: discriminator_loss, **unlabelled}

    def discriminator_step(self, batch: dict) -> torch.Tensor:
        """Step 1: the discriminator tells the truth of a batch from the generator's mask; returns its loss."""
        batch = self.on_device(batch)
        data, target = batch["data"], batch["target"]
        self.network.eval()
        with torch.no_grad(), self._autocast():
            prediction = self._probabilities(data)
        self.network.train()
        self.discriminator.train()
        truth = self.heads.certain(highest(target), prediction.shape[1]).float()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        with self._judging():
            loss = steps.discriminator_loss(
                self.discriminator,
                data,
                self._shown(truth),
                self._shown(prediction),
                truth_first=torch.rand(1).item() < 0.5,
            )
        optimizer_step(loss, self.discriminator, self.discriminator_optimizer, self.discriminator_scaler)
        return loss.detach()

    def unlabelled_step(self, batch: dict) -> dict[str, torch.Tensor]:
        """Step 3: of two copies of each scan the generator learns, on the loser's, the winner's mask."""
        clean = self.on_device({"data": batch["data"]})["data"]
        noised = steps.with_noise(clean, self.adversarial.noise_std)
        self.discriminator.eval()
        with torch.no_grad(), self._autocast():
            first, second = self._probabilities(noised), self._probabilities(clean)
        with self._judging():
            choice = steps.choose(
                self.discriminator,
                noised,
                clean,
                self._shown(first),
                self._shown(second),
            )
        image, labels = steps.lesson(choice, noised, clean, first, second, heads=self.heads)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output = self._forward(image)
            loss = steps.weighted_loss(self.loss, output, at_resolutions(labels, output), choice.score)
        optimizer_step(loss, self.network, self.optimizer, self.grad_scaler)
        return {UNLABELLED_LOSS: loss.detach(), WINNER_SCORE: choice.score.mean()}

    def _judging(self) -> AbstractContextManager[Any]:
        """The precision of the discriminator: as the generator's where a gradient scaler skips bad steps, else single.

        In bf16, which has no scaler, many of its gradients are infinite, and training ends in NaN.
        """
        return nullcontext() if self.grad_scaler is None else self._autocast()

    def _probabilities(self, data: torch.Tensor) -> torch.Tensor:
        """The generator's probabilities at full resolution, the background's included, float32."""
        return self.heads.probabilities(highest(self._forward(data)))

    def _shown(self, probabilities: torch.Tensor) -> torch.Tensor:
        return steps.shown_masks(probabilities, heads=self.heads, poison=self.adversarial.poison_masks)

    # ------------------------------------------------------------------ course of a training

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        self.log_means(train_outputs, DISCRIMINATOR_LOSS, UNLABELLED_LOSS, WINNER_SCORE)

    def state_besides(self, filename: str) -> dict[str, Any]:
        """The discriminator and its optimizer, but for the final checkpoint, which nothing goes on from."""
        if filename == "checkpoint_final.pth":
            return {}
        scaler = self.discriminator_scaler
        return {
            "discriminator_weights": self._unwrapped_discriminator().state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "discriminator_scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_besides(self, checkpoint: dict | str) -> None:
        """Takes over the discriminator; without one in the checkpoint it starts anew, and the log says so."""
        state = checkpoints.added_state(checkpoint)
        if not state:
            if self.current_epoch < self.num_epochs:
                self.print_to_log_file(
                    "This checkpoint has no discriminator: the discriminator starts from random weights."
                )
            return
        self._unwrapped_discriminator().load_state_dict(state["discriminator_weights"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        if self.discriminator_scaler is not None and state["discriminator_scaler"] is not None:
            self.discriminator_scaler.load_state_dict(state["discriminator_scaler"])

    def _unwrapped_discriminator(self) -> torch.nn.Module:
        network: torch.nn.Module = self.discriminator.module if self.is_ddp else self.discriminator
        return network


def __getattr__(name: str) -> type:
    return class_with_length(name, globals())
