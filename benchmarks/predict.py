"""Whole prediction of one scan, stock nnU-Net against ``flare-predict``, alternating, in fresh processes.
Untrained networks: *big* is Radboud's plan, *small* the FLARE22 winner's student.

    python benchmarks/predict.py --models small big --slices 160 400 --rounds 3
    python benchmarks/predict.py --parts defaults stages memory
    python benchmarks/predict.py -device cuda --parts same further --slices 160 300

Wall time and CPU seconds are those of the whole process tree, memory is the tree's proportional set size, sampled every
0.1 s; with ``-device cuda`` also the memory of the card in use, and the figures go to a file of their own. The networks
are untrained: agreement of label maps between precisions is then an agreement of near ties and says nothing about
accuracy; it is printed to show that nothing is off. The first run of ours converts the network for OpenVINO and is
shown on its own. The parts:

``same``
    The same windows on both sides (step 0.9, no mirroring); of ours, the wall time without the network too. With 160
    and 400 slices, which have the same windows, also the memory of a further slice.
``further``
    A further scan in a process that is warm: what four copies of the scan take beyond one, by three.
``defaults``
    Stock as shipped (step 0.5, mirroring) against ours as shipped, small model, one run each.
``stages``
    Where the time of stock goes, stage by stage, in one process (the table of ours comes from ``--profile``).
``memory``
    Ours alone on 512 x 512 x 1000 voxels.

Figures of other runs in the output file are kept, if they are of the same hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import prediction_setting as setting
import psutil
from shown_command import shown_command

from nnunet_flare.evaluation.gpu import open_gpu
from nnunet_flare.files import link_or_copy, write_json
from nnunet_flare.images import read_volume

RESULTS = {name: Path(__file__).parent / "results" / file for name, file in (
    ("cpu", "predict.json"), ("cuda", "predict_cuda.json"),
)}  # fmt: skip
"""By device."""

VARIANTS = {
    "ours auto": ["--precision", "auto", "--backend", "auto"],
    "ours fp32": ["--precision", "fp32", "--backend", "auto"],
    "ours torch auto": ["--precision", "auto", "--backend", "torch"],
    "ours torch fp32": ["--precision", "fp32", "--backend", "torch"],
}

PARTS = ("same", "further", "defaults", "stages", "memory")

COPIES = 4
"""Scans of the part ``further``."""

LONG_SCAN = 1000
"""Slices of the part ``memory``."""

STAGE = re.compile(r"^(?P<name>\S.*?)  +(?P<seconds>\d+\.\d+)(?:  +\d+)?$", re.MULTILINE)
"""A line of the table that ``--profile`` prints."""


@dataclass
class Run:
    """One process tree: seconds on the clock, CPU seconds, peak memory in MB; seconds per stage where it told them.

    ``card_mb``: the GPU's memory in use at its peak, over what was in use before; 0 without a GPU.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float
    card_mb: float = 0.0
    stages_s: dict[str, float] = field(default_factory=dict)

    @property
    def without_network_s(self) -> float | None:
        """Wall time of everything but the network, start-up included; None where the stages are unknown."""
        return self.wall_s - self.stages_s["network"] if "network" in self.stages_s else None


def measure(command: list[str], environment: dict[str, str], *, memory: bool = True) -> Run:
    """Run a command and watch its process tree; without ``memory``, whose sampling costs a short command time."""
    peak, card, stop = 0.0, 0.0, threading.Event()
    gpu = open_gpu(0)
    others = gpu.read(()).device_mb if gpu else 0.0
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak, card
        root = psutil.Process(process.pid)
        while not stop.wait(0.1):
            total = 0
            try:
                for one in [root, *root.children(recursive=True)]:
                    total += one.memory_full_info().pss
            except psutil.Error:
                continue
            peak = max(peak, total / 2**20)
            if gpu:
                card = max(card, gpu.read(()).device_mb - others)

    watcher = threading.Thread(target=watch)
    if memory:
        watcher.start()
    output, errors = process.communicate()
    wall = time.perf_counter() - start
    stop.set()
    if memory:
        watcher.join()
    after = os.times()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nfailed with {process.returncode}:\n{errors[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, cpu, peak, card, stages_in(output))


def stages_in(output: str) -> dict[str, float]:
    """Seconds per stage that a command told: the table of ``--profile``, or the JSON of ``stock_stages.py``."""
    if output.startswith("{"):
        return {name: float(seconds) for name, seconds in json.loads(output).items()}
    _, _, rows = output.partition("stage")
    return {row["name"]: float(row["seconds"]) for row in STAGE.finditer(rows)}


def flare_predict(images: Path, output: Path, model: Path, *options: str) -> list[str]:
    """Our command, telling its stages."""
    script = Path(sys.executable).with_name("flare-predict")
    words = [str(script), "-i", str(images), "-o", str(output), "-m", str(model)]
    return [*words, "--profile", "--disable_progress_bar", *options]


def stock_predict(images: Path, output: Path, model: Path, *options: str) -> list[str]:
    """Stock's command."""
    script = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    words = [str(script), "-i", str(images), "-o", str(output), "-m", str(model)]
    return [*words, "--disable_progress_bar", *options]


FIRST = "first run, converts"
"""Our run that fills the cache of converted networks."""

SAME_WINDOWS = ("-step_size", "0.9", "--disable_tta")
"""Options that make stock use the windows that ours uses by default."""


class Workplace:
    """Models, scans, the cache of converted networks and outputs in one folder, made when they are first wanted."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        (folder / "cache").mkdir(mode=0o700, exist_ok=True)
        self.environment = {**os.environ, "NNUNET_FLARE_CACHE": str(folder / "cache"), "nnUNet_compile": "f"}

    def model(self, name: str) -> Path:
        """The folder of an untrained model."""
        if not (self.folder / name).is_dir():
            setting.write_model(self.folder / name, name)
        return self.folder / name

    def images(self, slices: int, copies: int = 1) -> Path:
        """The folder of a scan, or of so many copies of it."""
        if copies > 1:
            folder = self.folder / f"in{slices}x{copies}"
            for number in range(copies):
                link_or_copy(self.images(slices) / "case_0000.nii.gz", folder / f"case{number}_0000.nii.gz")
            return folder
        if not (self.folder / f"in{slices}").is_dir():
            setting.write_scan(self.folder / f"in{slices}" / "case_0000.nii.gz", slices)
        return self.folder / f"in{slices}"

    def output(self, name: str) -> Path:
        """Where a command writes."""
        return self.folder / "out" / name.replace(" ", "_")

    def measure(self, command: list[str]) -> Run:
        """Run one of the two commands here."""
        return measure([*command, "-device", self.device], self.environment)


def agreement(one: Path, other: Path) -> tuple[float, float]:
    """Share of equal voxels and mean foreground Dice of two label maps."""
    a, b = read_volume(one).array, read_volume(other).array
    scores = []
    for label in np.union1d(np.unique(a), np.unique(b)):
        if label:
            both = np.count_nonzero((a == label) & (b == label))
            scores.append(2 * both / (np.count_nonzero(a == label) + np.count_nonzero(b == label)))
    return float((a == b).mean()), float(np.mean(scores)) if scores else 1.0


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians of several runs of one command."""
    middle = {
        key: statistics.median(getattr(run, key) for run in runs) for key in ("wall_s", "cpu_s", "peak_mb", "card_mb")
    }
    if not middle["card_mb"]:
        del middle["card_mb"]  # no GPU
    others = [run.without_network_s for run in runs if run.without_network_s is not None]
    if others:
        middle["without_network_s"] = statistics.median(others)
    return {**middle, "runs": [{**asdict(run), "without_network_s": run.without_network_s} for run in runs]}


def figures(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Rows by command, and seconds per stage of the last run of each command that tells them."""
    stages = {name: done[-1].stages_s for name, done in runs.items() if done[-1].stages_s}
    rows = {name: summary(done) for name, done in runs.items()}
    return {"rows": rows, "stages_s": stages} if stages else {"rows": rows}


def same_windows(
    place: Workplace, name: str, slices: int, *, rounds: int, stock_rounds: int, variants: list[str]
) -> dict[str, Any]:
    """Stock and ours on one scan with the same windows."""
    model, images = place.model(name), place.images(slices)

    def ours(variant: str) -> list[str]:
        return flare_predict(images, place.output(variant), model, *VARIANTS[variant])

    stock = stock_predict(images, place.output("stock"), model, "-f", "0", *SAME_WINDOWS)
    first, *_ = [place.measure(ours(variant)) for variant in variants]  # precisions are converted apart
    runs: dict[str, list[Run]] = {**({"stock": []} if stock_rounds else {}), **{variant: [] for variant in variants}}
    for number in range(rounds):
        if number < stock_rounds:
            runs["stock"].append(place.measure(stock))
        for variant in variants:
            runs[variant].append(place.measure(ours(variant)))
    result = figures(runs)
    for variant in variants if stock_rounds else ():
        same, dice = agreement(place.output("stock") / "case.nii.gz", place.output(variant) / "case.nii.gz")
        result["rows"][variant].update(equal_voxels=same, foreground_dice=dice)
    result["rows"][FIRST] = summary([first])
    return result


def further_scan(
    place: Workplace, name: str, slices: int, *, rounds: int, stock_rounds: int, variants: list[str]
) -> dict[str, Any]:
    """What a scan takes that is not the first of its process; memory is that of the process with several scans."""
    model = place.model(name)

    def one_more(command: Callable[[Path], list[str]]) -> Run:
        one, several = (place.measure(command(place.images(slices, copies))) for copies in (1, COPIES))
        steps = COPIES - 1
        return replace(
            several,
            wall_s=(several.wall_s - one.wall_s) / steps,
            cpu_s=(several.cpu_s - one.cpu_s) / steps,
            stages_s={stage: (took - one.stages_s[stage]) / steps for stage, took in several.stages_s.items()},
        )

    def ours(variant: str) -> Callable[[Path], list[str]]:
        return lambda images: flare_predict(images, place.output(variant), model, *VARIANTS[variant])

    def stock(images: Path) -> list[str]:
        return stock_predict(images, place.output("stock"), model, "-f", "0", *SAME_WINDOWS)

    commands = {**({"stock": stock} if stock_rounds else {}), **{variant: ours(variant) for variant in variants}}
    runs: dict[str, list[Run]] = {who: [] for who in commands}
    for variant in variants:
        place.measure(commands[variant](place.images(slices)))  # converts the network
    for number in range(rounds):
        for who, command in commands.items():
            if who != "stock" or number < stock_rounds:
                runs[who].append(one_more(command))
    return figures(runs)


def as_shipped(place: Workplace, name: str, slices: int) -> dict[str, Any]:
    """Both sides as they come: stock with step 0.5 and mirroring, ours with step 0.9 and without."""
    model, images = place.model(name), place.images(slices)
    ours = flare_predict(images, place.output("ours"), model)
    place.measure(ours)  # converts the network
    runs = {
        "ours": [place.measure(ours)],
        "stock": [place.measure(stock_predict(images, place.output("stock defaults"), model, "-f", "0"))],
    }
    return figures(runs)


def long_scan(place: Workplace, name: str) -> dict[str, Any]:
    """Ours alone on a scan of 512 x 512 x 1000 voxels and a model of 14 classes."""
    run = place.measure(flare_predict(place.images(LONG_SCAN), place.output("long"), place.model(name)))
    return figures({"ours": [run]})


def stock_stages(place: Workplace, name: str, slices: int) -> dict[str, Any]:
    """Stock's seconds per stage, in one process."""
    place.output("stock stages").mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(Path(__file__).with_name("stock_stages.py"))]
    image, output = place.images(slices) / "case_0000.nii.gz", place.output("stock stages") / "case.nii.gz"
    words += ["-i", str(image), "-m", str(place.model(name)), "-o", str(output)]
    run = measure(words, place.environment)
    return figures({"stock in one process": [run]})


def title(name: str, slices: int) -> str:
    """What a result is about: the key of the record."""
    return f"{name}, 512x512x{slices}"


def memory_per_slice(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """MB per further slice of each model and variant that was run on two lengths."""
    lengths: dict[str, dict[int, Any]] = {}
    for key, result in results.items():
        name, _, size = key.partition(", ")
        lengths.setdefault(name, {})[int(size.rpartition("x")[2])] = result["rows"]
    found: dict[str, dict[str, float]] = {}
    for name, rows in lengths.items():
        short, long = min(rows), max(rows)
        if short < long:
            found[name] = {
                variant: (rows[long][variant]["peak_mb"] - row["peak_mb"]) / (long - short)
                for variant, row in rows[short].items()
                if variant in rows[long] and variant != FIRST
            }
    return found


def table(name: str, result: dict[str, Any]) -> str:
    """The result as text, ratios against stock where it was run."""
    rows = result["rows"]
    keys = {"wall_s": "wall s", "cpu_s": "CPU s", "peak_mb": "peak MB", "card_mb": "card MB"}
    keys = {key: column for key, column in keys.items() if any(row.get(key) for row in rows.values())}
    lines = [
        name,
        " ".join(
            [" " * 22, *(f"{column:>8} {'ratio':>7}" for column in keys.values()), "  but network   equal    Dice"]
        ),
    ]
    for variant, row in rows.items():
        cells = [f"{variant:22}"]
        for key in keys:
            value, stock = row.get(key, 0.0), rows.get("stock", {}).get(key)
            cells.append(f"{value:8.1f} " + (f"{stock / value:6.1f}x" if stock and value else " " * 7))
        cells.append(f"{row['without_network_s']:11.1f} s" if "without_network_s" in row else " " * 13)
        if "equal_voxels" in row:
            cells.append(f"{row['equal_voxels']:8.5f} {row['foreground_dice']:7.4f}")
        lines.append(" ".join(cells))
    for variant, stages in result.get("stages_s", {}).items():
        lines.append(f"{variant}: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items()))
    return "\n".join(lines)


def kept(path: Path, hardware: dict[str, Any]) -> dict[str, Any]:
    """The figures that other runs left in a file, unless they are of other hardware or versions, which is said."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("hardware", hardware) == hardware:
        return record
    print(f"{path}: its figures are of other hardware or versions and will be replaced")
    return {}


def main() -> None:
    """Run the benchmark and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["same"])
    parser.add_argument("--models", nargs="+", choices=sorted(setting.SETTINGS), default=["small", "big"])
    parser.add_argument("--slices", nargs="+", type=int, default=[160])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock_rounds", type=int, help="fewer rounds of stock, or 0 (default: as many)")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=["ours auto", "ours fp32"])
    parser.add_argument("--folder", type=Path, help="keep models, scans and outputs here")
    parser.add_argument("-device", choices=sorted(RESULTS), default="cpu")
    parser.add_argument("--output", type=Path, help="default: results/predict.json, for cuda results/predict_cuda.json")
    args = parser.parse_args()
    args.output = args.output or RESULTS[args.device]
    args.stock_rounds = args.rounds if args.stock_rounds is None else args.stock_rounds
    if args.device != "cpu" and "stages" in args.parts:
        parser.error("--parts stages runs on the CPU")
    command = shown_command()
    hardware = setting.hardware(args.device)
    record = kept(args.output, hardware)
    with tempfile.TemporaryDirectory() as temporary:
        if args.folder:
            args.folder.mkdir(parents=True, exist_ok=True)
        place = Workplace((args.folder or Path(temporary)).resolve(), args.device)

        def keep(part: str, name: str, slices: int, result: dict[str, Any]) -> None:
            key = title(name, slices)
            print(table(f"{part}: {key}", result), flush=True)
            record.setdefault(part, {})[key] = {**result, "command": command}
            record.update(command="python benchmarks/predict.py", hardware=hardware)
            record["scan"] = setting.source_name()
            if part == "same" and (further := memory_per_slice(record["same"])):
                record["memory_per_slice_mb"] = further
            write_json(args.output, record)

        for name in args.models:
            for slices in args.slices:
                rounds = {"rounds": args.rounds, "stock_rounds": args.stock_rounds}
                if "same" in args.parts:
                    keep("same", name, slices, same_windows(place, name, slices, variants=args.variants, **rounds))
                if "further" in args.parts:
                    keep("further", name, slices, further_scan(place, name, slices, variants=args.variants, **rounds))
                if "stages" in args.parts:
                    keep("stages", name, slices, stock_stages(place, name, slices))
        if "defaults" in args.parts:
            keep("defaults", "small", args.slices[0], as_shipped(place, "small", args.slices[0]))
        if "memory" in args.parts:
            keep("memory", "small", LONG_SCAN, long_scan(place, "small"))
    for name, variants in record.get("memory_per_slice_mb", {}).items():
        print(f"{name}: MB per further slice: " + ", ".join(f"{key} {value:.2f}" for key, value in variants.items()))


if __name__ == "__main__":
    main()
