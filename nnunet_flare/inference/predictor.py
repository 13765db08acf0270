"""``FlarePredictor``: this package's prediction under stock nnU-Net's interface, and its Python API.

::

    predictor = FlarePredictor.from_model_folder("Dataset022/nnUNetTrainerFlareST__nnUNetPlansFlare__3d_fullres")
    labels = predictor.predict("scan_0000.nii.gz")  # (Z, Y, X), uint8, on the scan's grid

With ``roi=`` a coarse model finds the organs' box first, as ``flare-predict --roi`` does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume, from_sitk, read_volume
from nnunet_flare.inference.arrays import to_host
from nnunet_flare.inference.choices import DEFAULT_CHECKPOINT, Fold
from nnunet_flare.inference.coarse_to_fine import RoiSegmenter, open_coarse
from nnunet_flare.inference.core import MembersPrediction, Segmenter
from nnunet_flare.inference.devices import of_torch, open_device
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.model import Model
from nnunet_flare.inference.roi import MARGIN_MM
from nnunet_flare.inference.settings import DEFAULT_STEP_SIZE, PredictionSettings

__all__ = ["FlarePredictor", "Member", "MembersPrediction"]

Image = Any
"""A path, a ``Volume``, a SimpleITK image, or an array (Z, Y, X) together with ``spacing_mm``."""

Coarse = Union[Path, str, "FlarePredictor"]
"""A coarse model: its folder, the name of a configuration trained beside the fine model, or an opened predictor."""


class FlarePredictor(nnUNetPredictor):
    """A drop-in replacement of ``nnUNetPredictor``: stock's methods work, with our windows, precision and loading."""

    def __init__(
        self,
        tile_step_size: float = DEFAULT_STEP_SIZE,
        use_gaussian: bool = True,
        use_mirroring: bool = False,
        perform_everything_on_device: bool = True,
        device: torch.device | str = "cpu",
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        precision: str = "auto",
        backend: str = "auto",
        trust_checkpoint: bool = False,
    ) -> None:
        named, device = str(device), of_torch(open_device(str(device)))
        benchmark = torch.backends.cudnn.benchmark
        with redirect_stdout(StringIO()):  # stock prints a remark about every device but cuda
            super().__init__(
                tile_step_size,
                use_gaussian,
                use_mirroring,
                perform_everything_on_device,
                device,
                verbose,
                verbose_preprocessing,
                allow_tqdm,
            )
        torch.backends.cudnn.benchmark = benchmark  # stock switches it on for the whole process; a prediction holds it
        self._settings = PredictionSettings(
            step_size=tile_step_size,
            tta="mirror" if use_mirroring else "none",
            device=named,
            precision=precision,
            trust_checkpoint=trust_checkpoint,
            gaussian=use_gaussian,
            backend=backend,
        )
        self._segmenter: Segmenter | None = None
        self._roi: RoiSegmenter | None = None

    @classmethod
    def from_model_folder(
        cls,
        folder: Path | str,
        *,
        folds: Sequence[Fold] | None = None,
        checkpoint: str = DEFAULT_CHECKPOINT,
        step_size: float = DEFAULT_STEP_SIZE,
        tta: str = "none",
        device: str = "cpu",
        precision: str = "auto",
        backend: str = "auto",
        windows: str = "all",
        max_memory_gb: float | None = None,
        gpu_memory_gb: float | None = None,
        roi: Coarse | None = None,
        roi_rule: str | None = None,
        roi_margin_mm: float | None = None,
        trust_checkpoint: bool = False,
    ) -> FlarePredictor:
        """Open the folds of a trained model (all numbered ones by default).

        Args:
            folder: folder of a trained model, ``Trainer__Plans__configuration``, or what ``flare-export`` wrote, whose
                stored defaults are not used here.
            folds: the folds to average.
            checkpoint: file name of the checkpoint.
            step_size: step between windows as a share of the patch.
            tta: ``none``, ``mirror`` or ``crop-rotate``.
            device: ``cpu``, ``cuda``, ``mps``, or ``auto``: CUDA if PyTorch finds it, else the CPU.
            precision: ``auto``, ``fp32``, ``fp16`` or ``bf16``.
            backend: ``auto``, ``torch`` or ``openvino``.
            windows: ``all``, ``skip-empty`` or ``huang``.
            max_memory_gb: limit for the whole process; scans that need more are refused.
            gpu_memory_gb: limit for GPU memory, CUDA's context included.
            roi: a coarse model that finds the organs' box: its folder, the name of a configuration trained beside this
                model, or a predictor. :meth:`predict` then sees only that part of a scan.
            roi_rule: what counts for the box: ``union`` (default), ``fosun`` or ``sztu``.
            roi_margin_mm: margin around the box (default 20).
            trust_checkpoint: load checkpoints that hold more than data, and build networks from packages other than
                nnU-Net and this one, if the plans name them; both can run any program.

        Raises:
            InputError: when something is missing, damaged or unknown.
        """
        settings = PredictionSettings(
            step_size=step_size,
            tta=tta,
            device=device,
            precision=precision,
            trust_checkpoint=trust_checkpoint,
            backend=backend,
            windows=windows,
            max_memory_gb=max_memory_gb,
            gpu_memory_gb=gpu_memory_gb,
        )
        if roi is None and not (roi_rule is None and roi_margin_mm is None):
            raise InputError("roi_rule and roi_margin_mm go with roi, a coarse model")
        segmenter = Segmenter.from_model_folder(Path(folder), settings, folds=folds, checkpoint=checkpoint)
        predictor = cls._of(segmenter)
        if roi is not None:
            coarse = roi.segmenter if isinstance(roi, FlarePredictor) else open_coarse(str(roi), segmenter)
            margin = MARGIN_MM if roi_margin_mm is None else roi_margin_mm
            predictor._roi = RoiSegmenter(coarse, segmenter, rule=roi_rule or "union", margin_mm=margin)
        return predictor

    @classmethod
    def from_members(
        cls,
        members: Sequence[Member],
        *,
        step_size: float = DEFAULT_STEP_SIZE,
        tta: str = "none",
        device: str = "cpu",
        precision: str = "auto",
        backend: str = "auto",
        windows: str = "all",
        trust_checkpoint: bool = False,
    ) -> FlarePredictor:
        """Open members from any folders with the same preprocessing and labels.

        Raises:
            InputError: when something is missing, damaged or unknown, or two members do not fit together.
        """
        settings = PredictionSettings(
            step_size=step_size,
            tta=tta,
            device=device,
            precision=precision,
            trust_checkpoint=trust_checkpoint,
            backend=backend,
            windows=windows,
        )
        return cls._of(Segmenter.from_members(members, settings))

    @property
    def segmenter(self) -> Segmenter:
        """The opened models.

        Raises:
            InputError: when no model was opened yet.
        """
        if self._segmenter is None:
            raise InputError("no model is open; use FlarePredictor.from_model_folder(...)")
        return self._segmenter

    def predict(self, image: Image | Sequence[Image], *, spacing_mm: Sequence[float] | None = None) -> np.ndarray:
        """Predict an image: its label map (Z, Y, X), uint8, on the image's own grid.

        Args:
            image: a path, a ``Volume``, a SimpleITK image, or an array (Z, Y, X); a list of them for several channels.
            spacing_mm: (z, y, x), for arrays.

        Raises:
            CaseError: when the image cannot be predicted with this model.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        case = str(images[0]) if isinstance(images[0], (str, os.PathLike)) else "image"
        volumes = [_as_volume(one, spacing_mm, case, self.segmenter.reader) for one in images]
        if self._roi is not None:
            return self._roi.segment(self._roi.prepare(volumes, case))[0]
        return self.segmenter.segment(self.segmenter.prepare(volumes, case))[0]

    def predict_members(
        self, data: np.ndarray | torch.Tensor, *, only: Sequence[int] | None = None
    ) -> MembersPrediction:
        """The label map of every member and their mean softmax, for a preprocessed scan (C, z, y, x), float32.

        ``only`` lists the classes that the members were trained for; the softmax of the others counts as background.

        Raises:
            InputError: for a predictor with a coarse model, which only takes stored scans.
        """
        self._refuse_preprocessed()
        found = self.segmenter.predict_members(_as_array(data), only=only)
        return replace(found, mean_softmax=to_host(found.mean_softmax))

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[Fold] | str | None,
        checkpoint_name: str = DEFAULT_CHECKPOINT,
    ) -> None:
        """As in stock nnU-Net. Without ``use_folds``: all numbered folds, or fold ``all`` if there are none."""
        folds = [use_folds] if isinstance(use_folds, str) else use_folds
        self._adopt(
            Segmenter.from_model_folder(
                Path(model_training_output_dir), self._settings, folds=folds, checkpoint=checkpoint_name
            )
        )

    def manual_initialization(self, *args: Any, **kwargs: Any) -> None:
        """As in stock nnU-Net: from then on its methods use the network that was given, not a model opened before."""
        super().manual_initialization(*args, **kwargs)
        self._segmenter = self._roi = None

    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """As in stock nnU-Net: the averaged logits of the folds (K, z, y, x) on the CPU, in single precision."""
        if self._segmenter is None:  # after stock's manual_initialization with a network
            return super().predict_logits_from_preprocessed_data(data)
        self._refuse_preprocessed()
        return torch.from_numpy(self._segmenter.logits(_as_array(data)))

    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """As in stock nnU-Net, for the folds that were opened."""
        if self._segmenter is None:
            return super().predict_sliding_window_return_logits(input_image)
        self._refuse_preprocessed()
        return torch.from_numpy(self._segmenter.logits(_as_array(input_image)))

    def _refuse_preprocessed(self) -> None:
        if self._roi is not None:
            raise InputError(
                "a predictor with roi= crops scans before preprocessing, so it takes only stored scans; use "
                "predict(image), "
                "or open the model without roi="
            )

    @classmethod
    def _of(cls, segmenter: Segmenter) -> FlarePredictor:
        settings = segmenter.settings
        predictor = cls(settings.step_size, use_mirroring=settings.tta == "mirror", device=settings.device)
        predictor._adopt(segmenter)
        return predictor

    def _adopt(self, segmenter: Segmenter) -> None:
        """Set what stock's methods read."""
        self._settings, self._roi = segmenter.settings, None
        first = segmenter.models[0]
        self._segmenter = segmenter
        self.plans_manager = segmenter.plans_manager
        self.configuration_manager = segmenter.configuration_manager
        self.dataset_json = first.dataset_json
        self.allowed_mirroring_axes = first.mirroring_axes
        trained = [model for model in segmenter.models if isinstance(model, Model)]
        self.label_manager = segmenter.label_manager if trained else None  # an exported model has no stock objects
        self.trainer_name = trained[0].trainer_name if trained else None
        self.list_of_parameters = [model.weights for model in trained]


def _as_volume(image: Image, spacing_mm: Sequence[float] | None, case: str, reader: str) -> Volume:
    if isinstance(image, Volume):
        return image
    if isinstance(image, (str, os.PathLike)):
        return read_volume(Path(image), case, reader=reader)
    if isinstance(image, np.ndarray):
        if spacing_mm is None or len(spacing_mm) != 3:
            raise InputError("an array needs its spacing: predict(array, spacing_mm=(z, y, x))")
        if image.ndim != 3:
            raise InputError(f"an array has axes (Z, Y, X), this one {image.ndim}; give several channels as a list")
        if not all(0 < float(step) < float("inf") for step in spacing_mm):
            raise InputError(f"spacing_mm is {tuple(map(float, spacing_mm))}; expected three numbers above 0")
        return Volume(image, (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2])))
    if hasattr(image, "GetSpacing"):
        return from_sitk(image, case)
    raise InputError(f"cannot predict a {type(image).__name__}; give a path, a Volume, a SimpleITK image or an array")


def _as_array(data: Any) -> Any:
    """A tensor on a GPU as it is, anything else as an array."""
    is_there = isinstance(data, torch.Tensor) and data.device.type != "cpu"
    return data if is_there else np.asarray(data)
