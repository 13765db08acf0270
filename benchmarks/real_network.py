"""What the fast ways cost a network that knows its organs: precision, skipped windows, a box, steps, mirroring.

    flare-export -m MODEL -o EXPORTED --precision fp32
    python benchmarks/real_network.py -m EXPORTED [--int8]

Every way is compared with fp32, all windows, step 0.9, no mirroring: mean Dice of the organs to its label map and to
the reference labels, windows, and CPU seconds (user and system) of all but reading and writing. The ways take turns on
a scan within one process. On a machine that others use too CPU seconds rise with its load, so that only the ratios
within one scan say something. ``roi`` uses the same network on a grid of 1.5 times the spacing as the coarse model.
``--int8`` (NNCF: ``pip install 'nncf>=3.4'``) adds the network in int8, calibrated on windows of all shared scans but
the one that is predicted: all convolutions, the rest in single precision, or the pointwise ones, the rest in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import prediction_setting as setting
from quantised import calibration_windows, quantised, require_nncf
from shown_command import shown_command
from trained_models import mean_dice

from nnunet_flare.files import write_json
from nnunet_flare.images import read_labels, read_volume
from nnunet_flare.inference.coarse_to_fine import RoiSegmenter
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.exported import write_checksums
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.settings import PredictionSettings

RESULTS = Path(__file__).parent / "results" / "real_network.json"

SHARED = Path(os.environ.get("FLARE_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

SCANS = {"chaos3": ("chaos3_ct", "chaos3_liver_gt"), "ts_torso3mm": ("ts_torso3mm_ct", "ts_torso3mm_flare13")}
"""Case to image and reference labels in the shared data."""

CALIBRATING = [*(image for image, _ in SCANS.values()), "ts_slab512_ct"]
"""Images that calibrate int8 where they are not predicted themselves."""

REFERENCE = "fp32"

WAYS: dict[str, dict[str, Any]] = {
    REFERENCE: {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, skip-empty": {"precision": "bf16", "windows": "skip-empty"},
    "bf16, roi": {"precision": "bf16"},
    "bf16, step 0.7": {"precision": "bf16", "step_size": 0.7},
    "bf16, step 0.5": {"precision": "bf16", "step_size": 0.5},
    "bf16, mirroring": {"precision": "bf16", "tta": "mirror"},
}

INT8: dict[str, dict[str, Any]] = {"int8": {"precision": "fp32"}, "int8, pointwise": {"precision": "bf16"}}
"""Ways of ``--int8``, and the precision of what is not int8. OpenVINO does not compile all of it beside bfloat16."""

COARSE = "coarse"

COARSER = 1.5


def coarser(model: Path, folder: Path) -> Path:
    """The same exported network for a grid of another spacing."""
    shutil.copytree(model, folder)
    plans = json.loads((folder / "plans.json").read_text())
    for configuration in plans["configurations"].values():
        configuration["spacing"] = [COARSER * mm for mm in configuration["spacing"]]
    write_json(folder / "plans.json", plans)
    (folder / "checksums.json").unlink()
    write_checksums(folder)
    return folder


def in_int8(model: Path, folder: Path, case: str, ways: Sequence[str]) -> dict[str, Path]:
    """The model in int8 in each of those ways, which has not seen the case."""
    images = [name for name in CALIBRATING if name != SCANS[case][0]]
    windows = calibration_windows(model, [read_volume(SHARED / f"{name}.nii.gz") for name in images])
    return {
        name: quantised(model, folder / name.replace(", ", "_"), windows, only_pointwise=name.endswith("pointwise"))
        for name in INT8
        if name in ways
    }


def opened(models: Mapping[str, Path], name: str) -> tuple[Any, Profile]:
    """What predicts in one way, its networks built, and its profile; models by way, fp32 for every other one."""
    profile, settings = Profile(), PredictionSettings(**(WAYS | INT8)[name])
    one: Any = Segmenter.from_model_folder(models.get(name, models[REFERENCE]), settings, profile=profile)
    if name.endswith("roi"):
        one = RoiSegmenter(Segmenter.from_model_folder(models[COARSE], settings, profile=profile), one)
    one.load()
    return one, profile


def measured(segmenter: Any, profile: Profile, case: str, image: Any) -> tuple[np.ndarray, int, float]:
    """Label map, windows and CPU seconds of one scan."""
    before, start = profile.calls.get("network", 0), time.process_time()
    labels, _ = segmenter.segment(segmenter.prepare([image], case))
    return labels, profile.calls["network"] - before, time.process_time() - start


def compare(model: Path, case: str, ways: Sequence[str], rounds: int) -> Iterator[dict[str, dict[str, Any]]]:
    """Figures of one scan by way, after each of them; CPU seconds are the least of the rounds."""
    image, truth = (SHARED / f"{name}.nii.gz" for name in SCANS[case])
    volume, reference = read_volume(image), read_labels(truth).array
    annotated = sorted(set(np.unique(reference).tolist()) - {0})
    expected: np.ndarray | None = None
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        models = {REFERENCE: model, COARSE: coarser(model, Path(temporary) / COARSE)}
        if set(INT8) & set(ways):
            models |= in_int8(model, Path(temporary), case, ways)
        for _ in range(rounds):
            for name in ways:
                labels, windows, seconds = measured(*opened(models, name), case, volume)
                expected = labels if expected is None else expected  # fp32 comes first
                seconds = min(seconds, rows.get(name, {}).get("cpu_s", seconds))
                rows[name] = {
                    "windows": windows,
                    "cpu_s": seconds,
                    "cpu_of_fp32": seconds / rows.get(REFERENCE, {"cpu_s": seconds})["cpu_s"],
                    "dice_to_fp32": mean_dice(labels, expected),
                    "dice_to_reference": mean_dice(labels, reference, annotated),
                }
                yield rows


def main() -> None:
    """Compare, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True, help="what flare-export --precision fp32 wrote")
    parser.add_argument("--scans", nargs="+", choices=SCANS, default=list(SCANS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--int8", nargs="*", choices=INT8, help="also these (without names both); needs NNCF")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="what is not run now keeps its figures")
    args = parser.parse_args()
    int8 = [] if args.int8 is None else args.int8 or list(INT8)
    if int8:
        require_nncf()
    record = json.loads(args.output.read_text()) if args.output.is_file() else {}
    record["command"] = shown_command()
    record["hardware"] = setting.hardware()
    ways = list(dict.fromkeys([REFERENCE, *args.ways, *int8]))
    for case in args.scans:
        for rows in compare(args.model.resolve(), case, ways, args.rounds):
            kept = record.setdefault("scans", {}).setdefault(case, {})
            kept.update(rows)
            write_json(args.output, record)
            print(case, list(rows)[-1], rows[list(rows)[-1]], flush=True)


if __name__ == "__main__":
    main()
