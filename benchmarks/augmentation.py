"""Cost of the augmentations per training sample of the Radboud plan (patch 40 x 224 x 192).

    python benchmarks/augmentation.py [--samples 120] [--repeats 3]

Each chain gets the same sample, a synthetic abdomen with 13 organs of the size that nnU-Net's loader cuts out, on one
thread, as in an augmenter worker. The chains take turns; the mean processor time of a sample is taken in each turn
(wall time would depend on what else the machine does), and the median over the turns is reported. Prints a table and
writes benchmarks/results/augmentation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from shown_command import shown_command
from threadpoolctl import threadpool_limits

from nnunet_flare.phantom import make_phantom
from nnunet_flare.trainers.augmentation import Geometry, strong_transforms, weak_transforms, with_tail
from nnunet_flare.trainers.seeding import seed_everything
from nnunet_flare.trainers.transforms.window import channel_windows

PATCH = (40, 224, 192)
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
INTENSITIES = {"mean": 80.3, "std": 141.4, "percentile_00_5": -970.0, "percentile_99_5": 279.0}
TARGET = 1.3
"""Strong against stock augmentation, at most."""


def geometry() -> Geometry:
    """What the stock trainer configures for this patch: dummy 2-D augmentation, rotation by any angle in the plane."""
    rotation = (-np.pi, np.pi)
    initial = get_patch_size(PATCH, rotation, rotation, rotation, (0.85, 1.25))
    dummy_2d = max(PATCH) / PATCH[0] > ANISO_THRESHOLD
    if dummy_2d:
        initial[0] = PATCH[0]
    return Geometry(PATCH, tuple(int(edge) for edge in initial), rotation, (0, 1, 2), dummy_2d)


def chains(configured: Geometry) -> dict[str, BasicTransform]:
    """The three chains, from the loaded sample to the targets of deep supervision."""
    scales = [list(scale) for scale in 1 / np.cumprod(np.vstack(STRIDES), axis=0)][:-1]
    windows = channel_windows(["CTNormalization"], {"0": INTENSITIES})
    tail = nnUNetTrainer.get_validation_transforms(scales)
    organs = range(1, 14)
    stock = nnUNetTrainer.get_training_transforms(
        np.array(PATCH), configured.rotation, scales, configured.mirror_axes, configured.dummy_2d
    )
    return {
        "stock": stock,
        "weak": with_tail(weak_transforms(configured, organs, windows), tail, None),
        "strong": with_tail(strong_transforms(configured, organs, windows), tail, None),
    }


def sample(configured: Geometry) -> dict[str, torch.Tensor]:
    """A z-scored abdomen at 4 x 1.2 x 1.2 mm of the size that the loader cuts out, and its labels."""
    volume, labels = make_phantom(1, domain="wide", size=configured.initial_patch_size, spacing_mm=(4.0, 1.2, 1.2))
    image = np.clip(volume.array, INTENSITIES["percentile_00_5"], INTENSITIES["percentile_99_5"]).astype(np.float32)
    image = (image - INTENSITIES["mean"]) / INTENSITIES["std"]
    return {"image": torch.from_numpy(image)[None], "segmentation": torch.from_numpy(labels.astype(np.int16))[None]}


def seconds_per_sample(chain: BasicTransform, given: dict[str, torch.Tensor], samples: int, seed: int) -> float:
    """Mean over ``samples`` draws."""
    seed_everything(seed)
    spent = 0.0
    for _ in range(samples):
        copy = {key: value.clone() for key, value in given.items()}
        start = time.thread_time()
        chain(**copy)
        spent += time.thread_time() - start
    return spent / samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    configured = geometry()
    given, compared = sample(configured), chains(configured)
    times: dict[str, list[float]] = {name: [] for name in compared}
    torch.set_num_threads(1)
    with threadpool_limits(limits=1):
        for chain in compared.values():
            seconds_per_sample(chain, given, 20, seed=0)  # stock's blur measures itself on its first samples
        for turn in range(arguments.repeats):
            for name, chain in compared.items():
                times[name].append(seconds_per_sample(chain, given, arguments.samples, seed=turn))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'augmentation':<14}{'ms per sample':>14}{'x stock':>10}")
    for name, value in medians.items():
        print(f"{name:<14}{1000 * value:>14.1f}{value / medians['stock']:>10.2f}")
    ratio = medians["strong"] / medians["stock"]
    print(f"target: strong <= {TARGET} x stock: {'met' if ratio <= TARGET else 'missed'}")
    report = {
        "command": shown_command(),
        "patch": PATCH,
        "initial_patch": configured.initial_patch_size,
        "samples": arguments.samples,
        "seconds_per_sample": medians,
        "turns": times,
        "ratio_to_stock": {name: value / medians["stock"] for name, value in medians.items()},
        "target": TARGET,
        "met": ratio <= TARGET,
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1},
        "versions": {
            name: version(name) for name in ("nnunet-flare", "nnunetv2", "batchgeneratorsv2", "torch", "numpy")
        }
        | {"python": platform.python_version()},
    }
    target = Path(__file__).parent / "results" / "augmentation.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
