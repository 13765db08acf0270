"""TensorBoard as one more of nnU-Net's loggers, where ``nnUNet_tensorboard_enabled=1``: beside Weights & Biases.

nnU-Net hands every value of an epoch to each of its loggers. This one has the methods of stock's ``WandbLogger`` and
writes into ``tensorboard`` in the fold's folder: ``tensorboard --logdir $nnUNet_results`` shows all trainings.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_flare.errors import InputError

SWITCH = "nnUNet_tensorboard_enabled"
FOLDER = "tensorboard"

STARTED, ENDED = "epoch_start_timestamps", "epoch_end_timestamps"
"""nnU-Net's keys, of which the curve ``epoch_seconds`` is made."""


def is_enabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for TensorBoard, in the words that nnU-Net takes for its own loggers.

    Raises:
        InputError: for another word.
    """
    word = environment.get(SWITCH, "0")
    if word not in ("0", "1", "False", "false", "True", "true", ""):
        raise InputError(f"environment variable {SWITCH}: found {word!r}, expected 1 or 0")
    return word in ("1", "True", "true")


class TensorBoardLogger:
    """Writes one training's values.

    Args:
        output_folder: the fold's folder.

    Raises:
        InputError: when TensorBoard is not installed.
    """

    def __init__(self, output_folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f"{SWITCH} is set, but TensorBoard cannot be imported ({error}): pip install "
                f"'nnunet-flare[tensorboard]', or unset {SWITCH}"
            ) from error
        self._make = SummaryWriter
        self.folder = Path(output_folder) / FOLDER
        self._writer: Any = None
        self._config: dict[str, Any] = {}
        self._started = math.nan

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Keep what the training was made with; it is written as a text beside the curves."""
        self._config.update(config)

    def log(self, key: str, value: Any, step: int) -> None:
        """One value of an epoch; before the first of a new training the curves of an earlier one are removed."""
        if self._writer is None and step == 0 and self.folder.is_dir():
            shutil.rmtree(self.folder)
        writer = self._writer_from(step)
        if key == STARTED:
            self._started = float(value)
            return
        if key == ENDED:
            key, value = "epoch_seconds", float(value) - self._started
        writer.add_scalar(key, float(value), step)
        if key == "epoch_seconds":  # the last value of an epoch
            writer.flush()

    def log_summary(self, key: str, value: Any) -> None:
        """A value of the whole training, such as the final validation's Dice."""
        writer = self._writer_from(0)
        writer.add_scalar(key, float(value), 0)
        writer.flush()

    def _writer_from(self, step: int) -> Any:
        """The writer; of a training that goes on, what was written of later epochs before it stopped is hidden."""
        if self._writer is None:
            self._writer = self._make(str(self.folder), purge_step=step or None)
            if self._config:
                text = json.dumps(self._config, indent=1, default=str)
                self._writer.add_text("config", f"```\n{text}\n```", step)
        return self._writer
