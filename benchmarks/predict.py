"""Whole prediction of one scan, stock nnU-Net against ``flare-predict``, alternating, in fresh processes.

    python benchmarks/predict.py --models small big --slices 160 --rounds 3

Wall time and CPU seconds are those of the whole process tree, memory is the tree's proportional set size, sampled every
0.1 s. The networks are untrained: agreement of label maps between precisions is then an agreement of near ties and says
nothing about accuracy; it is printed to show that nothing is off. The first run of ours converts the network for
OpenVINO and is shown on its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import prediction_setting as setting
import psutil

from nnunet_flare.images import read_volume

RESULTS = Path(__file__).parent / "results" / "predict.json"

VARIANTS = {
    "ours auto": ["--precision", "auto", "--backend", "auto"],
    "ours fp32": ["--precision", "fp32", "--backend", "auto"],
    "ours torch auto": ["--precision", "auto", "--backend", "torch"],
    "ours torch fp32": ["--precision", "fp32", "--backend", "torch"],
}


@dataclass
class Run:
    """One process tree: seconds on the clock, CPU seconds, peak memory in MB."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def measure(command: list[str], environment: dict[str, str]) -> Run:
    """Run a command and watch its process tree."""
    peak, stop = 0.0, threading.Event()
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not stop.wait(0.1):
            total = 0
            try:
                for one in [root, *root.children(recursive=True)]:
                    total += one.memory_full_info().pss
            except psutil.Error:
                continue
            peak = max(peak, total / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    wall = time.perf_counter() - start
    stop.set()
    watcher.join()
    after = os.times()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nfailed with {process.returncode}:\n{errors[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, cpu, peak)


def agreement(one: Path, other: Path) -> tuple[float, float]:
    """Share of equal voxels and mean foreground Dice of two label maps."""
    a, b = read_volume(one).array, read_volume(other).array
    scores = []
    for label in np.union1d(np.unique(a), np.unique(b)):
        if label:
            both = np.count_nonzero((a == label) & (b == label))
            scores.append(2 * both / (np.count_nonzero(a == label) + np.count_nonzero(b == label)))
    return float((a == b).mean()), float(np.mean(scores)) if scores else 1.0


def benchmark(folder: Path, name: str, slices: int, rounds: int, variants: list[str]) -> dict[str, object]:
    """All runs of one model on one scan."""
    model, images = folder / name, folder / f"in{slices}"
    if not model.is_dir():
        setting.write_model(model, name)
    source = "as written before"
    if not images.is_dir():
        source = setting.write_scan(images / "case_0000.nii.gz", slices)
    environment = {**os.environ, "NNUNET_FLARE_CACHE": str(folder / "cache"), "nnUNet_compile": "f"}
    (folder / "cache").mkdir(mode=0o700, exist_ok=True)
    scripts = Path(sys.executable).parent

    def ours(variant: str) -> list[str]:
        out = folder / "out" / variant.replace(" ", "_")
        common = [str(scripts / "flare-predict"), "-i", str(images), "-o", str(out), "-m", str(model), "-device", "cpu"]
        return [*common, "-f", "0", "--disable_progress_bar", *VARIANTS[variant]]

    stock_out = folder / "out" / "stock"
    stock = [
        str(scripts / "nnUNetv2_predict_from_modelfolder"), "-i", str(images), "-o", str(stock_out), "-m", str(model),
        "-f", "0", "-step_size", "0.9", "--disable_tta", "--disable_progress_bar", "-device", "cpu",
    ]  # fmt: skip
    first = measure(ours(variants[0]), environment)
    runs: dict[str, list[Run]] = {"stock": [], **{variant: [] for variant in variants}}
    for _ in range(rounds):
        runs["stock"].append(measure(stock, environment))
        for variant in variants:
            runs[variant].append(measure(ours(variant), environment))
    rows = {}
    for variant, done in runs.items():
        middle = {key: statistics.median(getattr(run, key) for run in done) for key in ("wall_s", "cpu_s", "peak_mb")}
        same, dice = (1.0, 1.0)
        if variant != "stock":
            same, dice = agreement(
                stock_out / "case.nii.gz", folder / "out" / variant.replace(" ", "_") / "case.nii.gz"
            )
        rows[variant] = {**middle, "equal_voxels": same, "foreground_dice": dice, "runs": [asdict(run) for run in done]}
    return {"model": name, "slices": slices, "scan": source, "first_run_with_conversion": asdict(first), "rows": rows}


def table(result: dict[str, object]) -> str:
    """The result as text, ratios against stock."""
    rows = result["rows"]
    stock = rows["stock"]
    lines = [
        f"{result['model']}, 512x512x{result['slices']}, step 0.9, no mirroring",
        " ".join(
            [" " * 16, *(f"{name:>8} {'ratio':>7}" for name in ("wall s", "CPU s", "peak MB")), "   equal    Dice"]
        ),
    ]
    for name, row in rows.items():
        cells = [f"{name:16}"]
        for key in ("wall_s", "cpu_s", "peak_mb"):
            cells.append(f"{row[key]:8.1f} {stock[key] / row[key]:6.1f}x")
        lines.append(" ".join([*cells, f"{row['equal_voxels']:8.5f} {row['foreground_dice']:7.4f}"]))
    first = result["first_run_with_conversion"]
    lines.append(f"first run, with conversion: {first['wall_s']:.1f} s wall, {first['cpu_s']:.1f} s CPU")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(setting.SETTINGS), default=["small", "big"])
    parser.add_argument("--slices", nargs="+", type=int, default=[160])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=["ours auto", "ours fp32"])
    parser.add_argument("--folder", type=Path, help="keep models, scans and outputs here")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for name in args.models:
            for slices in args.slices:
                results.append(benchmark(folder, name, slices, args.rounds, args.variants))
                print(table(results[-1]), flush=True)
    args.output.parent.mkdir(exist_ok=True)
    record = {"command": " ".join(sys.argv), "hardware": setting.hardware(), "results": results}
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
