"""``nnUNetTrainerFlareSelective``: Fosun Aitrox's training (S1, seed-systems 1.4) as a trainer of stock nnU-Net.

Soft Dice with squared denominator over the organs (``class_weights``, which the paper does not have, add a
cross-entropy), no deep supervision, AdamW with steps at 66 and 86 % of the epochs,
labelled and pseudo-labelled samples 1:1, weak augmentation of the first and strong augmentation of the second. Dropout
and the network are the plans' (``nnUNetPlannerFlareFine``). Any setting of the configuration wins over these.
"""

from __future__ import annotations

import torch

from nnunet_flare.trainers.lengths import class_with_length
from nnunet_flare.trainers.self_training import nnUNetTrainerFlareST


class nnUNetTrainerFlareSelective(nnUNetTrainerFlareST):
    """Self-training as in Fosun's system; patches are placed at random, not around the organs."""

    defaults = {
        "optimizer": "AdamW",
        "initial_lr": 1e-3,
        "betas": [0.9, 0.99],
        "weight_decay": 1e-5,
        "lr_schedule": "steps",
        "labelled_to_pseudo": [1, 1],
        "oversample_foreground": 0.0,
        "augmentation": {"labelled": "weak", "pseudo": "strong", "partial": "weak"},
    }

    def take_settings(self) -> None:
        super().take_settings()
        self.enable_deep_supervision = False

    def _build_loss(self) -> torch.nn.Module:
        """The soft Dice, with a cross-entropy beside it where ``class_weights`` are set."""
        return self.soft_dice()


def __getattr__(name: str) -> type:
    return class_with_length(name, globals())
