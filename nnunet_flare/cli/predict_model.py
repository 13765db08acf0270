"""The model of ``flare-predict``: which folder the options name, and what predicts with it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare.cli.common import nnunet_folder
from nnunet_flare.errors import InputError

if TYPE_CHECKING:
    from nnunet_flare.images import Volume
    from nnunet_flare.inference.cascade import CascadeSegmenter
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.folder import PredictsScans
    from nnunet_flare.inference.profile import Profile


def model_folder(args: argparse.Namespace) -> Path:
    """The folder that ``-m``, or ``-d -c -tr -p``, names; of a zip file, where it was unpacked to."""
    if args.model is not None and args.model.is_file():
        from nnunet_flare.inference.zipped import unpacked_model

        return unpacked_model(
            args.model,
            checkpoint=args.checkpoint,
            dataset=args.dataset,
            trainer=args.trainer,
            plans=args.plans,
            configuration=args.configuration,
            beside=[] if args.roi is None else [args.roi],
        )
    if (args.model is None) == (args.dataset is None):
        raise InputError("give the model either as -m MODEL_FOLDER or as -d DATASET -c CONFIGURATION")
    if args.model is not None:
        if any((args.configuration, args.trainer, args.plans)):
            raise InputError("-c, -tr and -p go with -d; -m names the whole folder")
        return args.model
    if not args.configuration:
        raise InputError("-d needs -c, for example -c 3d_fullres")
    dataset = _dataset_folder(nnunet_folder("nnUNet_results"), args.dataset)
    pattern = f"{args.trainer or '*'}__{args.plans or '*'}__{args.configuration}"
    found = sorted(path for path in dataset.glob(pattern) if path.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        there = sorted(path.name for path in dataset.glob("*__*__*"))
        raise InputError(f"{dataset}: no model {pattern}; it holds {there or 'none'}")
    raise InputError(f"{dataset}: several models fit, {[path.name for path in found]}; choose with -tr and -p")


def _dataset_folder(root: Path, name: str) -> Path:
    """``22``, ``022`` or ``Dataset022_Name`` in one of nnU-Net's folders."""
    if (root / name).is_dir():
        return root / name
    found = sorted(root.glob(f"Dataset{int(name):03d}_*")) if name.isdigit() else []
    if len(found) == 1:
        return found[0]
    there = sorted(path.name for path in root.glob("Dataset*"))
    raise InputError(f"{root}: no dataset {name}; it holds {there or 'none'}")


def check_dataset(name: str, trained: dict[str, Any], folder: Path) -> None:
    """Refuse a model that was trained with other labels or channels than its dataset now has."""
    root = os.environ.get("nnUNet_raw")  # noqa: SIM112
    if not root or not Path(root).is_dir():
        return
    from nnunet_flare.inference.inputs import model_dataset

    try:
        raw = _dataset_folder(Path(root), name)
    except InputError:  # the raw dataset is not needed for prediction
        return
    if not (raw / "dataset.json").is_file():
        return
    now = model_dataset(raw)
    for key in ("labels", "channel_names"):
        if now.get(key) != trained.get(key):
            raise InputError(
                f"{folder} was trained with {key} {trained.get(key)}, {raw / 'dataset.json'} says {now.get(key)}; "
                "use -m to predict with the model as it is"
            )


def member_count(args: argparse.Namespace, folder: Path) -> int:
    """The number of folds that predict, known before they are opened."""
    from nnunet_flare.inference.exported import Exported, is_exported
    from nnunet_flare.inference.members import find_folds

    if is_exported(folder):
        return len(Exported.read(folder).manifest["networks"])
    return len(find_folds(folder, args.folds, args.checkpoint))


def open_model(args: argparse.Namespace, folder: Path, profile: Profile) -> PredictsScans:
    """What predicts with the model, coarse model and settings that the options name."""
    with profile.stage("imports"):
        from nnunet_flare.inference.cascade import open_any
        from nnunet_flare.inference.cpus import limit_torch_threads
        from nnunet_flare.inference.settings import PredictionSettings
    settings = PredictionSettings(
        step_size=args.step_size,
        tta=args.tta,
        device=args.device,
        precision=args.precision,
        backend=args.backend,
        windows=args.windows,
        max_memory_gb=args.max_memory,
        gpu_memory_gb=args.gpu_memory,
        trust_checkpoint=args.trust_checkpoint,
        from_cache=True,
    )
    with profile.stage("model"):
        segmenter = open_any(
            folder,
            settings,
            folds=args.folds,
            checkpoint=args.checkpoint,
            profile=profile,
            previous=args.prev_stage,
        )
        if sys.modules.get("torch") is not None:
            limit_torch_threads()
        if args.uncertainty == "disagreement" and len(segmenter.models) < 2:
            raise InputError(
                f"--uncertainty disagreement: {folder} is used with one fold, so there is no disagreement; use "
                "entropy, or more folds"
            )
        return segmenter if args.roi == "none" else _with_roi(args, segmenter)


def _with_roi(args: argparse.Namespace, fine: Segmenter | CascadeSegmenter) -> PredictsScans:
    """The fine model behind a coarse one."""
    from nnunet_flare.images import write_volume
    from nnunet_flare.inference.coarse_to_fine import RoiSegmenter, open_coarse
    from nnunet_flare.inference.folder import ROI
    from nnunet_flare.inference.roi import MARGIN_MM

    ending = fine.models[0].dataset_json["file_ending"]

    def save(case: str, crops: Sequence[Volume]) -> None:
        for channel, crop in enumerate(crops):
            write_volume(args.output / ROI / f"{case}_{channel:04d}{ending}", crop)

    return RoiSegmenter(
        open_coarse(args.roi, fine),
        fine,
        rule=args.roi_rule or "union",
        margin_mm=MARGIN_MM if args.roi_margin is None else args.roi_margin,
        on_crop=save if args.save_roi else None,
    )
