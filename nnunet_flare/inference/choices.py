"""The words that prediction takes; nothing is imported, so that recipes and commands know them without PyTorch."""

from __future__ import annotations

from typing import Literal, get_args

Fold = int | str
"""A fold's number, or ``"all"``."""

DEFAULT_CHECKPOINT = "checkpoint_final.pth"

Tta = Literal["none", "mirror", "crop-rotate"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
Backend = Literal["auto", "torch", "openvino"]
Windows = Literal["all", "skip-empty", "huang"]
RoiRule = Literal["union", "fosun", "sztu"]
Uncertainty = Literal["entropy", "disagreement"]

TTA: tuple[Tta, ...] = get_args(Tta)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
WINDOWS: tuple[Windows, ...] = get_args(Windows)
ROI_RULES: tuple[RoiRule, ...] = get_args(RoiRule)
UNCERTAINTIES: tuple[Uncertainty, ...] = get_args(Uncertainty)
