"""One scan in a fresh container or home: an exported, really trained model against stock nnU-Net, alternating.

    python benchmarks/one_scan.py -m MODEL [--slices 160 300 600] [--rounds 3] [--stock_rounds 1]

The model is exported, and predicts alone and behind a coarse copy of itself (``--roi``). Every run is a process in
a new home. The scan is a real CT, as it is, and resampled along z to so many slices of the same extent. Wall
time, CPU seconds and memory are those of ``predict.py``, memory of a run of its own, because its sampling takes time
from a command of seconds; stock uses the same windows (step 0.9, no mirroring).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import prediction_setting as setting
from predict import SAME_WINDOWS, Run, agreement, measure, stock_predict, summary
from real_network import coarser
from shown_command import shown_command

from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, read_volume, write_volume

RESULTS = Path(__file__).parent / "results" / "one_scan.json"


def resampled(scan: Volume, slices: int) -> Volume:
    """The scan with another number of slices on the same extent."""
    from scipy.ndimage import zoom

    factor = slices / scan.array.shape[0]
    array = zoom(scan.array, (factor, 1, 1), order=1, grid_mode=True, mode="nearest")
    z, y, x = scan.spacing_mm
    return Volume(np.ascontiguousarray(array), (z / factor, y, x), scan.origin, scan.direction)


def ways_of(model: Path, folder: Path) -> dict[str, list[str]]:
    """Options of ``flare-predict`` for the exported model, alone and behind a coarse copy of itself."""
    export = Path(sys.executable).with_name("flare-export")
    fine = folder / "exported"
    subprocess.run([export, "-m", model, "-o", fine, "--trust_checkpoint"], check=True)
    return {"alone": ["-m", str(fine)], "roi": ["-m", str(fine), "--roi", str(coarser(fine, folder / "coarse"))]}


def fresh(command: list[str], folder: Path, *, memory: bool) -> Run:
    """Run a command in a home that nothing was run in yet."""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "NNUNET_FLARE_"))}
        return measure(command, {**kept, "HOME": home, "nnUNet_compile": "f"}, memory=memory)


def one_size(
    scan: Volume, folder: Path, ways: dict[str, list[str]], stock: Path, rounds: int, stock_rounds: int
) -> Any:
    """Stock and ours on one scan."""
    write_volume(folder / "in" / "case_0000.nii.gz", scan)
    commands = {
        name: [
            str(Path(sys.executable).with_name("flare-predict")),
            *("-i", str(folder / "in"), "-o", str(folder / name), *options),
            *("--profile", "--disable_progress_bar"),
        ]
        for name, options in ways.items()
    }
    folds = sorted(path.name.removeprefix("fold_") for path in stock.glob("fold_*"))
    words = ["-f", *folds, *SAME_WINDOWS, "-device", "cpu"]
    commands["stock"] = stock_predict(folder / "in", folder / "stock", stock, *words)
    if not stock_rounds:
        del commands["stock"]
    watched = {name: fresh(command, folder, memory=True) for name, command in commands.items()}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            if name != "stock" or number < stock_rounds:
                runs[name].append(fresh(command, folder, memory=False))
    rows = {name: {**summary(done), "peak_mb": watched[name].peak_mb} for name, done in runs.items()}
    for name in ways if stock_rounds else ():
        rows[name]["wall_of_stock"] = rows[name]["wall_s"] / rows["stock"]["wall_s"]
        _, dice = agreement(folder / "stock" / "case.nii.gz", folder / name / "case.nii.gz")
        rows[name]["dice_to_stock"] = dice
    return {"shape": list(scan.array.shape), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="model", type=Path, required=True, help="a trained model's folder")
    parser.add_argument("--slices", type=int, nargs="+", default=[160, 300, 600])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock_rounds", type=int, default=1)
    parser.add_argument("--stock_slices", type=int, default=300, help="stock is not run on more slices (memory)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    scan = read_volume(setting.REAL_SCAN)
    results: dict[str, Any] = {"command": shown_command(), "hardware": setting.hardware(), "scans": {}}
    with tempfile.TemporaryDirectory() as work:
        ways = ways_of(args.model, Path(work))
        for slices in [scan.array.shape[0], *args.slices]:
            stock_rounds = args.stock_rounds if slices <= args.stock_slices else 0
            found = one_size(
                resampled(scan, slices), Path(work) / str(slices), ways, args.model, args.rounds, stock_rounds
            )
            results["scans"][f"{slices} slices"] = found
            rows = {name: {k: v for k, v in row.items() if k != "runs"} for name, row in found["rows"].items()}
            print(slices, json.dumps(rows, indent=1), flush=True)
            write_json(args.output, results)


if __name__ == "__main__":
    main()
