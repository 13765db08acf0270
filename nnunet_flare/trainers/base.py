"""What all trainers of this package share: settings, length, random streams, schedule, and checkpoints that survive.

The roles of cases, sampling and augmentation are the business of the trainers that derive from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist
from torch._dynamo import OptimizedModule

from nnunet_flare.errors import InputError
from nnunet_flare.inference.devices import computes_bf16
from nnunet_flare.trainers import checkpoints, tensorboard
from nnunet_flare.trainers.curves import add_panels
from nnunet_flare.trainers.halves import halve_convolutions
from nnunet_flare.trainers.schedules import EpochSchedule
from nnunet_flare.trainers.seeding import derived_seed, seed_everything
from nnunet_flare.trainers.settings import (
    SETTINGS_OF_ONE,
    TRUST_VARIABLE,
    TrainingSettings,
    checkpoint_epochs,
    read_settings,
    with_environment,
)

THREADS_VARIABLE = "NNUNET_FLARE_THREADS"
"""Torch's threads on the CPU. ``nnUNetv2_train -device cpu`` takes all cores, but two trainings of one thread each give
more than one of two."""
SAVE_EVERY_S = 15 * 60
"""``checkpoint_latest`` is written at the first end of an epoch after this time, if not earlier."""
GRADIENT_NORM = 12
"""Stock's limit."""
PLOT_EVERY_S = 60
"""``progress.png`` takes stock over a second, too long for epochs of seconds."""


class _NoMoreGain(Exception):
    """Ends a training whose validation Dice has not risen for ``patience`` epochs."""


class FlareTrainer(nnUNetTrainer):
    """Base class; nnU-Net is never asked for it by name.

    Raises:
        InputError: from the constructor, for settings or an environment variable that cannot be used.
    """

    # Attributes that stock's constructor sets without a type.
    network: Any
    label_manager: Any
    dataset_class: Any
    _best_ema: Any

    epochs_by_name: ClassVar[int | None] = None
    """Set by the classes named ``<trainer>_<N>epochs``; wins over the settings."""
    curves: ClassVar[tuple[str, ...]] = ()
    """What a trainer logs once an epoch beside stock's curves."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of this trainer that hold where the configuration does not say otherwise."""
    own_settings: ClassVar[frozenset[str]] = frozenset()
    """Those of ``settings.SETTINGS_OF_ONE`` that have an effect in this trainer."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - stock reads this very signature
    ) -> None:
        self.is_continued = bool(plans.get("continue_training", False))
        super().__init__(plans, configuration, fold, dataset_json, device)
        where = f"{self.plans_manager.plans_name}.json, configuration '{configuration}'"
        given = read_settings(self.configuration_manager.configuration, where=where, defaults=self.defaults)
        settings = with_environment(given)
        self.settings: TrainingSettings = settings
        if self.local_rank == 0 and tensorboard.is_enabled():
            logger = tensorboard.TensorBoardLogger(self.output_folder)
            logger.update_config({"configuration": configuration, "fold": fold, "settings": settings.model_dump()})
            self.logger.loggers.append(logger)
        for key, (trainer, why) in SETTINGS_OF_ONE.items():
            if getattr(settings, key) is not None and key not in self.own_settings:
                raise InputError(
                    f"{where}: flare.{key}: {type(self).__name__} {why}; train with -tr {trainer}, or remove the key"
                )
        self.data_label_manager = self.label_manager
        if settings.ignore_label is not None:
            self.label_manager = self._label_manager_with_ignore(settings.ignore_label, where)
        self.reports_dice = True
        for curve in self.curves:
            self.logger.local_logger.my_fantastic_logging[curve] = []
        self._iteration = 0
        self._is_resuming = False
        self._saved_at = self._plotted_at = time.monotonic()
        self.take_settings()

    def take_settings(self) -> None:
        """Set what follows from the settings; the end of the construction, to which other trainers add their own."""
        settings = self.settings
        self.num_epochs = self.epochs_by_name or settings.num_epochs
        self.num_iterations_per_epoch = settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = settings.num_validation_iterations
        self.initial_lr = settings.initial_lr
        self.weight_decay = settings.weight_decay
        self.oversample_foreground_percent = settings.oversample_foreground
        self.save_every = settings.save_every
        if self.device.type == "cuda" and settings.cuda_precision == "bf16":
            self.grad_scaler = None  # bf16 reaches as far as fp32
        self.kept_checkpoints = checkpoint_epochs(settings.checkpoints_at, self.num_epochs)

    def _label_manager_with_ignore(self, value: int, where: str) -> Any:
        """The labels of dataset.json and, for this trainer alone, the value that a round's labels ignore."""
        if self.label_manager.ignore_label == value:
            return self.label_manager
        expected = max(self.label_manager.all_labels) + 1
        if self.label_manager.has_ignore_label or value != expected:
            raise InputError(
                f"{where}: flare.ignore_label: found {value}, expected {self.label_manager.ignore_label or expected}, "
                "one above the highest label of dataset.json"
            )
        labels = {**self.dataset_json["labels"], "ignore": value}
        return self.plans_manager.get_label_manager({**self.dataset_json, "labels": labels})

    def initialize(self) -> None:
        """Builds network, optimizer and loss as stock does; then loads ``init_from``, unless a training is resumed."""
        if self.device.type == "cpu":
            self._set_threads()
            if self.settings.cpu_precision == "bf16" and not computes_bf16(self.device):
                self.print_to_log_file("cpu_precision is bf16, which PyTorch cannot compute on this CPU; fp32 is used.")
        elif self.device.type == "cuda" and self.settings.cuda_precision == "bf16" and not computes_bf16(self.device):
            raise InputError("flare.cuda_precision: found 'bf16', which this GPU does not support; expected 'fp16'")
        if self.settings.seed is not None:
            seed_everything(self.derived_seed("initialize"))
        super().initialize()
        halve_convolutions(self.network, self.device)
        if self._low_precision():
            self.network = self.network.to(memory_format=self._memory_format())
        if not self._is_resuming:
            self._load_initial_weights()

    def _set_threads(self) -> None:
        text = os.environ.get(THREADS_VARIABLE, "").strip()
        if not text:
            return
        if not text.isdecimal() or len(text) > 4 or int(text) < 1:
            raise InputError(
                f"environment variable {THREADS_VARIABLE}: found {text!r}, expected a whole number >= 1, at most 9999"
            )
        torch.set_num_threads(int(text))

    def derived_seed(self, *parts: int | str) -> int:
        """The seed of one purpose of this training; only where the settings have a seed."""
        if self.settings.seed is None:
            raise ValueError("streams are derived only where a seed is set")
        return derived_seed(self.settings.seed, self.settings.round, self.fold, *parts)

    def _unwrapped_network(self) -> torch.nn.Module:
        network = self.network.module if self.is_ddp else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def _load_initial_weights(self) -> None:
        if self.settings.init_from is None:
            return
        from nnunet_flare.pretrained import read_pretrained, take_weights

        source = Path(self.settings.init_from).expanduser()
        given = read_pretrained(source, trust=os.environ.get(TRUST_VARIABLE) == "1")
        part = self.settings.init_part
        taken = take_weights(given, self._unwrapped_network(), part)
        whole = f"the weights of {source}, segmentation head included"
        self.print_to_log_file(f"Started from {whole if part == 'all' else taken}.")
        patch = tuple(self.configuration_manager.patch_size)
        if given.patch_size not in (None, patch):
            self.print_to_log_file(
                f"They were trained on patches of {given.patch_size} voxels, this training has {patch}."
            )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, EpochSchedule]:
        """Stock's SGD, Adam or AdamW; the rate is a closed formula of the epoch, so that ``--c`` resumes it exactly."""
        settings = self.settings
        self._freeze_unused_heads()
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "SGD":
            optimizer = torch.optim.SGD(
                self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay, momentum=0.99, nesterov=True
            )
        else:
            adam = torch.optim.Adam if settings.optimizer == "Adam" else torch.optim.AdamW
            optimizer = adam(
                self.network.parameters(), self.initial_lr, betas=settings.betas, weight_decay=self.weight_decay
            )
        schedule = EpochSchedule(
            optimizer,
            self.initial_lr,
            self.num_epochs,
            schedule=settings.lr_schedule,
            warmup_iterations=settings.warmup_iterations,
            iterations_per_epoch=self.num_iterations_per_epoch,
        )
        return optimizer, schedule

    def _freeze_unused_heads(self) -> None:
        """Without deep supervision only the last head is used: on several GPUs, torch waits for the others' gradients.

        Stock calls :meth:`configure_optimizers` before it wraps the network for them.
        """
        network = self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network
        if not self.enable_deep_supervision:
            for head in list(getattr(network.decoder, "seg_layers", []))[:-1]:
                head.requires_grad_(False)

    # ------------------------------------------------------------------ steps

    def _low_precision(self) -> bool:
        return self.device.type == "cpu" and self.settings.cpu_precision == "bf16" and computes_bf16(self.device)

    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last_3d if len(self.configuration_manager.patch_size) == 3 else torch.channels_last

    def _autocast(self) -> AbstractContextManager[Any]:
        """Stock's autocast on CUDA, or one to bf16; on the CPU only where the settings ask for bf16."""
        if self.device.type == "cuda":
            half = torch.bfloat16 if self.settings.cuda_precision == "bf16" else torch.float16
            return torch.autocast("cuda", dtype=half)
        if self._low_precision():
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return nullcontext()

    def on_device(self, batch: dict) -> dict:
        """A loader's batch with its image on the device, and its target where it has one; a moved batch stays."""
        moved = {**batch, "data": batch["data"].to(self.device, non_blocking=True)}
        if self._low_precision():
            moved["data"] = moved["data"].to(memory_format=self._memory_format())
        target = batch.get("target")
        if isinstance(target, list):
            moved["target"] = [part.to(self.device, non_blocking=True) for part in target]
        elif target is not None:
            moved["target"] = target.to(self.device, non_blocking=True)
        return moved

    def _forward(self, data: torch.Tensor) -> Any:
        output = self.network(data)
        if not self._low_precision():
            return output
        return [part.float() for part in output] if isinstance(output, (list, tuple)) else output.float()

    def compute_loss(self, output: Any, target: Any, batch: dict) -> torch.Tensor:
        """The loss of a training batch: on its labels, and what other trainers of this package add.

        Args:
            output: logits (B, K, Z, Y, X), with deep supervision a list of them, highest resolution first.
            target: labels (B, 1, Z, Y, X), or a list of them.
            batch: the loader's batch on the device; ``batch["keys"]`` names the cases.
        """
        return self.loss_on_labels(output, target, batch)

    def loss_on_labels(self, output: Any, target: Any, batch: dict) -> torch.Tensor:
        """The loss between outputs and labels; arguments as for :meth:`compute_loss`, no more than ``keys`` needed."""
        loss: torch.Tensor = self.loss(output, target)
        return loss

    def train_step(self, batch: dict) -> dict:
        """One iteration, as stock's: its loss and what else it says, as numbers."""
        return fetched(self.learn(batch))

    def learn(self, batch: dict) -> dict[str, Any]:
        """One optimizer step. What it says may lie on the device still, which is not waited for."""
        if self.lr_scheduler.is_warming_up(self.current_epoch, self._iteration):
            self.lr_scheduler.step(self.current_epoch, self._iteration)
        self._iteration += 1
        batch = self.on_device(batch)
        target = batch["target"]
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output = self._forward(batch["data"])
            loss = self.compute_loss(output, target, batch)
        optimizer_step(loss, self.network, self.optimizer, self.grad_scaler)
        return {"loss": loss.detach(), **self.watched(output, target, batch, loss.detach())}

    def watched(self, output: Any, target: Any, batch: dict, loss: torch.Tensor) -> dict[str, Any]:
        """What a training step says beside its loss, for the trainer's own curves; nothing in general.

        Numbers, or tensors of one number on the device.
        """
        return {}

    def log_means(self, outputs: list[dict], *curves: str) -> None:
        """Log the epoch's means of what the training steps returned, over all processes.

        Steps without a number (NaN) do not count; where none has one, neither has the epoch.
        """
        for curve in curves:
            values = [float(output[curve]) for output in outputs]
            if self.is_ddp:
                gathered: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, values)
                values = [value for part in gathered for value in part]
            known = [value for value in values if not np.isnan(value)]
            self.logger.log(curve, float(np.mean(known)) if known else float("nan"), self.current_epoch)

    # ------------------------------------------------------------------ course of a training

    def on_train_start(self) -> None:
        """Stock's start, after removing what a killed training left half-written."""
        if self.local_rank == 0:
            checkpoints.remove_leftovers(Path(self.output_folder))
        super().on_train_start()
        self._saved_at = time.monotonic()

    def print_plans(self) -> None:
        """Stock's record of configuration and plans, pages of it: into the log file, not onto the terminal."""
        self.__dict__["print_to_log_file"] = partial(self.print_to_log_file, also_print_to_console=False)
        try:
            super().print_plans()
        finally:
            del self.__dict__["print_to_log_file"]

    def run_training(self) -> None:
        """Stock's training, which ``patience`` may end before its last epoch, also where it is continued."""
        try:
            super().run_training()
        except _NoMoreGain:
            self.print_to_log_file(
                f"No new best moving validation Dice for {self.settings.patience} epochs: the training ends after "
                f"{self.current_epoch} of {self.num_epochs}."
            )
            if self.local_rank == 0:
                self.plot_progress()
            self.on_train_end()

    def _epochs_without_gain(self) -> int:
        """Epochs since the best moving validation Dice; 0 where none is reported."""
        moving = np.asarray(self.logger.local_logger.my_fantastic_logging["ema_fg_dice"], dtype=float)
        return 0 if np.isnan(moving).all() else len(moving) - 1 - int(np.nanargmax(moving))

    def on_epoch_start(self) -> None:
        if self.settings.patience is not None and self._epochs_without_gain() >= self.settings.patience:
            raise _NoMoreGain
        super().on_epoch_start()
        self._iteration = 0
        if self.settings.seed is not None:
            seed_everything(self.derived_seed("epoch", self.current_epoch, self.local_rank))

    def on_epoch_end(self) -> None:
        """Log, keep checkpoints, plot: stock's steps, with the best Dice known before ``checkpoint_latest``."""
        self.logger.log("epoch_end_timestamps", time.time(), self.current_epoch)
        value = {key: self.logger.get_value(key, step=-1) for key in self.logger.local_logger.my_fantastic_logging}
        self.print_to_log_file("train_loss", np.round(value["train_losses"], decimals=4))
        self.print_to_log_file("val_loss", np.round(value["val_losses"], decimals=4))
        if self.reports_dice:
            dice = [round(float(each), 4) for each in value["dice_per_class_or_region"]]
            self.print_to_log_file("Pseudo dice", dice)
        for curve in self.curves:
            if not np.isnan(value[curve]):  # no pseudo case was drawn, for example
                self.print_to_log_file(curve, np.round(value[curve], decimals=4))
        duration = value["epoch_end_timestamps"] - value["epoch_start_timestamps"]
        self.print_to_log_file(f"Epoch time: {np.round(duration, decimals=2)} s")
        moving = value["ema_fg_dice"]
        if self.reports_dice and not np.isnan(moving) and (self._best_ema is None or moving > self._best_ema):
            self._best_ema = moving
            self.print_to_log_file(f"New best EMA pseudo Dice: {float(self._best_ema):.4f}")
            self.save_checkpoint(join(self.output_folder, "checkpoint_best.pth"))
        done = self.current_epoch + 1
        for name, epochs in self.kept_checkpoints.items():
            if epochs == done:
                self.save_checkpoint(join(self.output_folder, name))
        is_last = done == self.num_epochs
        if not is_last and (done % self.save_every == 0 or time.monotonic() - self._saved_at > SAVE_EVERY_S):
            self.save_checkpoint(join(self.output_folder, "checkpoint_latest.pth"))
            self._saved_at = time.monotonic()
        if self.local_rank == 0 and (is_last or time.monotonic() - self._plotted_at > PLOT_EVERY_S):
            self.plot_progress()
            self._plotted_at = time.monotonic()
        self.current_epoch += 1

    def plot_progress(self) -> None:
        """Stock's ``progress.png``, and our curves below; a picture that cannot be drawn ends no training."""
        try:
            self.logger.plot_progress_png(self.output_folder)
            logged = self.logger.local_logger.my_fantastic_logging
            add_panels(Path(self.output_folder, "progress.png"), {name: logged[name] for name in self.curves})
        except Exception as error:
            self.print_to_log_file(f"progress.png was not drawn ({type(error).__name__}: {error})")

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """Stock's checkpoint, under its name only once it is whole."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with checkpoints.written_whole(Path(filename)) as temporary:
            super().save_checkpoint(str(temporary))
            state, weights = self.state_besides(Path(filename).name), self.exported_weights()
            if state or weights is not None:
                checkpoints.add_state(temporary, state, weights=weights)

    def exported_weights(self) -> dict[str, Any] | None:
        """The weights that a checkpoint predicts with, where they are not those that are trained."""
        return None

    def state_besides(self, filename: str) -> dict[str, Any]:
        """What a checkpoint of this name holds beside stock's content: tensors and numbers; nothing in general."""
        return {}

    def load_state_besides(self, checkpoint: dict | str) -> None:
        """Take over what :meth:`state_besides` had put into a checkpoint (see ``checkpoints.added_state``)."""

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Stock's loading; where ``--c`` meets a broken file it takes the newest good one instead, and says so."""
        self._is_resuming = True
        chosen = filename_or_checkpoint
        if self.is_continued and isinstance(filename_or_checkpoint, (str, os.PathLike)):
            replacement = self._good_checkpoint(Path(filename_or_checkpoint))
            if replacement is None:
                self._is_resuming = False
                if self.was_initialized:
                    self._load_initial_weights()
                else:
                    self.initialize()
                return
            chosen = str(replacement)
        super().load_checkpoint(chosen)
        self.load_state_besides(chosen)
        logged = self.logger.local_logger.my_fantastic_logging
        for curve in self.curves:
            logged.setdefault(curve, [float("nan")] * self.current_epoch)

    def _good_checkpoint(self, path: Path) -> Path | None:
        try:
            checkpoints.read_to_resume(path)
            return path
        except InputError as error:
            self.print_to_log_file(f"This checkpoint is broken: {error}")
        found = checkpoints.newest_good(path.parent, besides=path)
        self.print_to_log_file(
            "No other checkpoint can be read: training starts from the beginning."
            if found is None
            else f"Training continues from the newest good checkpoint, {found.name}."
        )
        return found


def fetched(said: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a step, those among them that lie on the device; it is waited for once."""
    there = {name: value for name, value in said.items() if isinstance(value, torch.Tensor)}
    numbers = torch.stack([value.float() for value in there.values()]).cpu().numpy()
    return {**said, **dict(zip(there, numbers, strict=True))}


def optimizer_step(
    loss: torch.Tensor, network: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: Any | None
) -> None:
    """Stock's step on a loss: gradients clipped to a norm of 12, and scaled where there is a gradient scaler."""
    if scaler is None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
        optimizer.step()
        return
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
    scaler.step(optimizer)
    scaler.update()
