"""What only a GPU can confirm, and the figures that the pages wait for, within a budget of time.

    python benchmarks/gpu.py [--budget SECONDS] [-o FOLDER]
    python benchmarks/gpu.py -device cpu --tiny -o FOLDER

Runs the tests marked ``gpu``, then ``predict.py`` and ``train_step.py`` against stock, each as a command of its own,
the most important first. What the budget does not reach is named. ``FOLDER/gpu.json`` says after each command what has
run on which card, ``gpu.txt`` what it printed; figures lie in JSON files beside them. With ``-device cpu --tiny`` the
commands are tried without a GPU; their figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prediction_setting as setting
import torch
from shown_command import shown_command

from nnunet_flare.files import write_json, write_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TESTS = ("tests/inference/test_gpu_prediction.py", "tests/trainers/test_gpu_training.py")
COMPILED = ("nnUNetTrainerFlareST", "nnUNetTrainerFlareSelective", "nnUNetTrainerFlarePartial")
"""Trainers whose step is held against stock's with ``torch.compile`` as well, which takes a minute for each."""


@dataclass(frozen=True)
class Step:
    """A command and the seconds that it is worth starting with."""

    name: str
    least_s: float
    command: tuple[str, ...]


def steps(device: str, folder: Path, *, tiny: bool) -> list[Step]:
    """The commands, the most important first."""

    def predict(name: str, least_s: float, *words: str) -> Step:
        # each to the same file, which keeps what other commands wrote
        output = ("--output", str(folder / f"predict_{device}.json"))
        command = (sys.executable, str(HERE / "predict.py"), "-device", device, *words, *output)
        return Step(f"predict_{name}", least_s, command)

    def train(name: str, least_s: float, *words: str) -> Step:
        output = ("--output", str(folder / f"train_step_{device}_{name}.json"))
        command = (sys.executable, str(HERE / "train_step.py"), "-device", device, *words, *output)
        return Step(f"train_{name}", least_s, command)

    tests = Step("tests", 30, (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TESTS))
    long, short = ("20", "16") if tiny else ("300", "160")
    few = ("--variants", "ours auto")
    if tiny:
        return [
            tests,
            predict("same", 0, "--models", "small", "--slices", long, "--rounds", "1", "--stock_rounds", "0", *few),
            train("tiny", 0, "--models", "tiny", "--steps", "2"),
        ]
    return [
        tests,
        predict("same", 60, "--models", "small", "--slices", long, "--rounds", "2", "--stock_rounds", "1"),
        predict("further", 30, "--parts", "further", "--models", "small", "--slices", long, "--rounds", "2",
                "--stock_rounds", "0", *few),
        train("small", 40, "--models", "small"),
        train("compiled", 90, "--models", "small", "--compile", "--trainers", *COMPILED),
        predict("short", 60, "--models", "small", "--slices", short, "--rounds", "2", "--stock_rounds", "1", *few),
        predict("big", 60, "--models", "big", "--slices", long, "--rounds", "1", "--stock_rounds", "1"),
        train("big", 40, "--models", "big", "--steps", "10"),
    ]  # fmt: skip


def run_within(budget_s: float, wanted: Sequence[Step], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run commands one after the other until the time is up; their rows of ``gpu.json``."""
    end = time.monotonic() + budget_s
    rows: dict[str, Any] = {}
    said = ""
    for step in wanted:
        left = max(0.0, end - time.monotonic())
        if left < step.least_s:
            rows[step.name] = {"left_out": f"{left:.0f} s were left, it needs {step.least_s:.0f}"}
            continue
        begun = time.monotonic()
        code, text = _run(step.command, left, environment)
        said += f"== {step.name}\n{text}\n"
        seconds = time.monotonic() - begun
        write_text(folder / "gpu.txt", said)
        last = [line for line in text.splitlines() if line.strip()][-1:]
        rows[step.name] = {"exit_code": code, "seconds": round(seconds, 1), "last_line": "".join(last)}
        print(f"{step.name}: {'stopped' if code is None else f'exit code {code}'} after {seconds:.0f} s", flush=True)
        write_json(folder / "gpu.json", {**_about(), "commands": rows})
    write_json(folder / "gpu.json", {**_about(), "commands": rows})
    return rows


def _run(command: Sequence[str], limit_s: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit code, None where the time was up, and what a command said; all that it started ends with it."""
    process = subprocess.Popen(
        command, cwd=HERE.parent, env=environment, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit_s)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def _about() -> dict[str, Any]:
    return {"command": shown_command(), "hardware": setting.hardware("cuda" if torch.cuda.is_available() else "cpu")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the commands; the exit code is 1 unless each ran and succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=900, metavar="SECONDS", help="for everything (default: 900)")
    parser.add_argument("-device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="only try the commands")
    parser.add_argument("-o", dest="folder", type=Path, default=RESULTS, help="default: benchmarks/results")
    args = parser.parse_args(argv)
    if not args.budget > 0:
        parser.error(f"--budget {args.budget:g}: expected seconds above 0")
    if args.device == "cpu" and not args.tiny:
        parser.error("-device cpu only tries the commands: give --tiny too")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; -device cpu --tiny tries the commands without one")
    args.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FLARE_GPU_TEST_DEVICE": args.device, "nnUNet_compile": "f", "MPLBACKEND": "Agg"}
    folder = args.folder.resolve()
    rows = run_within(args.budget, steps(args.device, folder, tiny=args.tiny), folder, environment)
    wrong = [name for name, row in rows.items() if row.get("exit_code") != 0]
    for name in wrong:
        row = rows[name]
        print(f"{name}: {row.get('left_out') or row['last_line']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
