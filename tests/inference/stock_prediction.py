"""Stock nnU-Net's own prediction, the reference of the parity tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor


def predictor(folder: Path, folds: Sequence[int | str], *, step: float = 0.9, mirror: bool = False) -> nnUNetPredictor:
    """Stock's predictor on the CPU, silent."""
    with redirect_stdout(StringIO()):
        stock = nnUNetPredictor(
            step, use_mirroring=mirror, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
        )
        stock.initialize_from_trained_model_folder(str(folder), tuple(folds))
    return stock


def labels(stock: nnUNetPredictor, files: Sequence[Path]) -> np.ndarray:
    """Label map (Z, Y, X) of a case, in the reader's orientation, by stock's preprocessing, network and export.

    Window sums are those of :func:`exact`.
    """
    data, _, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(f) for f in files], None, stock.plans_manager, stock.configuration_manager, stock.dataset_json
    )
    logits = exact(stock.predict_logits_from_preprocessed_data, data)
    with redirect_stdout(StringIO()):
        return np.asarray(
            convert_predicted_logits_to_segmentation_with_correct_shape(
                logits,
                stock.plans_manager,
                stock.configuration_manager,
                stock.label_manager,
                properties,
                num_threads_torch=1,
            )
        )


def exact(predict: Callable[[torch.Tensor], torch.Tensor], data: np.ndarray) -> torch.Tensor:
    """Stock's logits (K, z, y, x) of a preprocessed scan (C, z, y, x), with window sums in single precision.

    In half precision they are off by as much as 0.5 where windows touch with their corners, whose weights are
    subnormal numbers.
    """
    with redirect_stdout(StringIO()), mock.patch.object(torch, "half", torch.float32):
        return predict(torch.from_numpy(data)).float()
