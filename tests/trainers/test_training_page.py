"""The page on training names every setting, with its default."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_flare.trainers.settings import TrainingSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_page_lists_every_setting_and_no_other() -> None:
    rows = re.findall(
        r"^\| ([^|]+)\| ([^|]+)\|", PAGE.read_text().split("## Settings")[1].split("## Augmentation")[0], re.M
    )
    names = [name for row, _ in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(TrainingSettings.model_fields)


def test_the_page_gives_the_defaults() -> None:
    text = PAGE.read_text()
    defaults = TrainingSettings()
    for key in ("num_epochs", "iterations_per_epoch", "oversample_foreground", "save_every", "warmup_iterations"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{key}`"))
        assert row.split("|")[2].strip() == str(getattr(defaults, key)), key
    for key in ("optimizer", "lr_schedule", "cpu_precision", "cuda_precision", "pseudo_folds"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{key}`"))
        assert row.split("|")[2].strip() == f"`{getattr(defaults, key)}`", key
