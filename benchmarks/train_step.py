"""Seconds and GPU memory of a training step of every trainer, against ``nnUNetTrainer`` with the same batch.

    python benchmarks/train_step.py -device cuda
    python benchmarks/train_step.py -device cpu --models tiny --steps 6

Every trainer gets the same batch, made in memory (pinned for a GPU), so that no data loader is in the figures: what is
measured is the network, the loss, the optimiser and what the trainer adds. Adversarial and mean teacher also get
unlabelled scans, one a step. Trainers take turns, step by step. The ratio is that of the medians; that of the fastest
steps is beside it, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import prediction_setting as setting
import torch
from shown_command import shown_command

from nnunet_flare.files import write_json
from nnunet_flare.plugin import TRAINERS

RESULTS = Path(__file__).parent / "results"
STOCK = "nnUNetTrainer"
CASES = ("a", "b")
TINY = {"spacing": (4.0, 4.0, 4.0), "patch": (16, 32, 32), "features": (4, 8, 8, 8)}
BATCH = 2


def prepare(place: Path, plans: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    """A preprocessed dataset of two cases and two unlabelled scans: trainers look at them when they start."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder = place / "nnUNet_preprocessed" / plans["dataset_name"]
    configuration = plans["configurations"]["3d_fullres"]
    shape = (1, *configuration["patch_size"])
    for suffix in ("", "_un"):
        data = folder / f"{configuration['data_identifier']}{suffix}"
        data.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            seg = np.zeros(shape, np.int8)
            seg[0, 2:-2, 4:-4, 4:-4] = 1
            places = {"class_locations": {1: np.argwhere(seg == 1)[:50]}, "spacing": configuration["spacing"]}
            nnUNetDatasetBlosc2.save_case(
                np.zeros(shape, np.float32), seg, places, str(data / f"{case}{suffix}"), chunks=shape, blocks=shape
            )
    write_json(folder / "dataset.json", dict(dataset))
    write_json(folder / "dataset_fingerprint.json", {})


def started(name: str, plans: Mapping[str, Any], dataset: Mapping[str, Any], model: Path, device: str) -> Any:
    """A trainer in front of its first step."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    own: dict[str, Any] = {**json.loads(json.dumps(plans)), "continue_training": False}
    configuration = own["configurations"]["3d_fullres"]
    configuration["batch_size"] = BATCH
    if name.endswith("Distill"):
        configuration["flare"] = {"teacher": {"folder": str(model), "fold": 0}}
    if name.endswith("Adversarial"):
        configuration["flare"] = {"adversarial": {"warmup": 0, "finish": 0}}
    written = Path(os.environ["nnUNet_preprocessed"], plans["dataset_name"], f"{plans['plans_name']}.json")  # noqa: SIM112
    write_json(written, own)
    trainer = recursive_find_trainer_class_by_name(name)(own, "3d_fullres", "all", dataset, torch.device(device))
    trainer.print_to_log_file = lambda *words, **more: None
    trainer.initialize()
    if hasattr(trainer, "dataloader_unlabelled"):
        trainer.get_tr_and_val_datasets()
    trainer.network.train()
    return trainer


def batch_of(trainer: Any, samples: int, *, channels: int = 1) -> dict[str, Any]:
    """A batch as the trainer's loader would give it."""
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales() if trainer.enable_deep_supervision else [[1.0] * len(patch)]
    blocks = torch.randint(0, trainer.label_manager.num_segmentation_heads, (samples, 1, *(n // 8 for n in patch)))
    targets = []
    for scale in scales:
        size = [round(n * share) for n, share in zip(patch, scale, strict=True)]
        targets.append(torch.nn.functional.interpolate(blocks.float(), size, mode="nearest").to(torch.int16))
    target = targets if trainer.enable_deep_supervision else targets[0]
    batch = {"data": torch.randn(samples, channels, *patch), "target": target, "keys": np.array(CASES[:samples])}
    if trainer.device.type != "cuda":
        return batch
    pin = lambda part: part.pin_memory() if isinstance(part, torch.Tensor) else part  # noqa: E731
    return {
        key: [pin(part) for part in value] if isinstance(value, list) else pin(value) for key, value in batch.items()
    }


def step(trainer: Any, batch: dict[str, Any]) -> float:
    """Seconds of one step."""
    if hasattr(trainer, "dataloader_unlabelled"):
        channels = 2 if "Mean" in type(trainer).__name__ else 1  # the weak and the strong view
        trainer.dataloader_unlabelled = iter([batch_of(trainer, 1, channels=channels)])
    start = time.perf_counter()
    trainer.train_step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, place: Path, *, steps: int, device: str, trainers: Sequence[str]) -> dict[str, Any]:
    """Figures of some trainers, and of stock's, with one model's plans."""
    model = setting.write_model(place / name, name)
    plans, dataset = (json.loads((model / file).read_text()) for file in ("plans.json", "dataset.json"))
    prepare(place, plans, dataset)
    names = [STOCK, *trainers]
    made = {one: started(one, plans, dataset, model, device) for one in names}
    batches = {one: batch_of(trainer, BATCH) for one, trainer in made.items()}
    memory = {one: _memory_of_first_steps(made[one], batches[one]) for one in names}
    seconds: dict[str, list[float]] = {one: [] for one in names}
    for _ in range(steps):
        for one in names:
            seconds[one].append(step(made[one], batches[one]))
    stock, fastest = statistics.median(seconds[STOCK]), min(seconds[STOCK])
    ratios = {
        one: {"ratio": statistics.median(times) / stock, "ratio_of_fastest": min(times) / fastest}
        for one, times in seconds.items()
    }
    return {
        one: {"s": statistics.median(times), **ratios[one], **memory[one], "runs": times}
        for one, times in seconds.items()
    }


def _memory_of_first_steps(trainer: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Warm up; with a GPU the allocator's peak over what lay there before."""
    if trainer.device.type != "cuda":
        step(trainer, batch)
        return {}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        step(trainer, batch)
    return {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 2**20}


def main() -> None:
    """Run the benchmark and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=["tiny", *setting.SETTINGS], default=["small"])
    parser.add_argument("--trainers", nargs="+", choices=sorted(TRAINERS), default=list(TRAINERS), metavar="TRAINER")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, as nnU-Net trains by default")
    parser.add_argument("--output", type=Path, help="default: results/train_step_DEVICE.json")
    args = parser.parse_args()
    setting.SETTINGS["tiny"] = TINY
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (place / folder).mkdir()
            os.environ[folder] = str(place / folder)
        os.environ.update(nnUNet_compile="t" if args.compile else "f", nnUNet_n_proc_DA="0")
        torch.backends.cudnn.benchmark = args.device == "cuda"  # as nnUNetv2_train has it
        how = {"steps": args.steps, "device": args.device, "trainers": args.trainers}
        rows = {name: measure(name, place, **how) for name in args.models}
    for name, trainers in rows.items():
        print(f"{name}, batch {BATCH}")
        for trainer, row in trainers.items():
            memory = f" {row['peak_mb']:8.0f} MB" if "peak_mb" in row else ""
            fastest = f"(fastest {row['ratio_of_fastest']:.2f})"
            print(f"  {trainer:32} {row['s']:8.3f} s a step {row['ratio']:6.2f} x stock {fastest}{memory}")
    record = {"command": shown_command(), "hardware": setting.hardware(args.device), "rows": rows}
    write_json(args.output or RESULTS / f"train_step_{args.device}.json", record)


if __name__ == "__main__":
    main()
