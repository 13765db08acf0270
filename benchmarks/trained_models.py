"""Agreement with stock nnU-Net on models that were trained: precisions, runtimes, skipped windows, coarse to fine.

    python benchmarks/trained_models.py -o models

The models are those of ``short_training.py``, trained where ``-o`` does not hold them yet. They are compared on 20
phantoms never seen, and on the real scans of the shared data, of which only the torso was a training case:

``agreement``
    Foreground Dice of ``flare-predict`` with ``nnUNetv2_predict`` for every precision and runtime; organ voxels (of the
    reference labels) outside the box of the coarse model; Dice of both models with the reference.
``skipping``
    Windows that ``skip-empty`` leaves out, voxels lost by it and its foreground Dice with all windows; with the model's
    own windows, which are as large as the abdomen, and with windows of half that size, of which there are many. Models
    of some minutes call something an organ nearly everywhere; what the rule leaves to a network that is never wrong,
    whose output is the reference, stands beside.
``wall``
    Time of ``--roi``, coarse pass included: the FLARE22 winner's student (untrained, for time alone) behind the trained
    coarse model on the torso resampled to 512 x 512 x 160, against stock without a box, in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import predict as whole_prediction
import prediction_setting as setting
import short_training
from short_training import COARSE, FINE, HALVED, Scan

from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, read_labels, read_volume, write_volume

RESULTS = Path(__file__).parent / "results" / "trained_models.json"

PARTS = ("agreement", "skipping", "wall")

REFERENCE = "torch fp32"

BACKENDS = {REFERENCE: ("torch", "fp32"), "OpenVINO fp32": ("openvino", "fp32"), "torch bf16": ("torch", "bf16"),
            "OpenVINO bf16": ("openvino", "bf16")}  # fmt: skip

Maps = dict[str, np.ndarray]
"""Case name to label map (Z, Y, X)."""

Figures = dict[str, dict[str, float]]
"""Case name to figures by name."""


def mean_dice(one: np.ndarray, other: np.ndarray, labels: Sequence[int] | None = None) -> float:
    """Mean over the labels that either map has, or over those of ``labels`` that either map has."""
    present = set(np.union1d(np.unique(one), np.unique(other)).tolist()) - {0}
    scores = []
    for label in sorted(present if labels is None else present & set(labels)):
        a, b = one == label, other == label
        scores.append(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
    return float(np.mean(scores)) if scores else 1.0


def stock_labels(model: Path, scans: dict[str, Scan]) -> Maps:
    """What ``nnUNetv2_predict`` makes of the scans."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        for case, scan in scans.items():
            (folder / "images" / f"{case}_0000.nii.gz").symlink_to(scan.image.resolve())
        options = ("-f", "all", *whole_prediction.SAME_WINDOWS, "-npp", "1", "-nps", "1")
        words = whole_prediction.stock_predict(folder / "images", folder / "out", model, *options)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return {case: read_labels(folder / "out" / f"{case}.nii.gz").array for case in scans}


def our_labels(
    model: Path, scans: dict[str, Scan], backend: str, precision: str, windows: str = "all"
) -> tuple[Maps, dict[str, int]]:
    """Our label maps, and how many windows the network saw of each scan."""
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.settings import PredictionSettings

    settings = PredictionSettings(backend=backend, precision=precision, windows=windows)
    segmenter = Segmenter.from_model_folder(model, settings)
    maps, seen, before = {}, {}, 0
    for case, scan in scans.items():
        maps[case], _ = segmenter.segment(segmenter.prepare([read_volume(scan.image)], case))
        seen[case] = segmenter.profile.calls["network"] - before
        before = segmenter.profile.calls["network"]
    return maps, seen


def behind_coarse(models: dict[str, Path], scans: dict[str, Scan], whole: Maps) -> Figures:
    """Of every scan: the coarse model's Dice, the box of each rule, and the fine model's result inside the box."""
    from nnunet_flare.inference.choices import ROI_RULES
    from nnunet_flare.inference.coarse_to_fine import RoiSegmenter
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.settings import PredictionSettings

    settings = PredictionSettings(backend="torch", precision="fp32")
    coarse, fine = (Segmenter.from_model_folder(models[name], settings) for name in (COARSE, FINE))
    rows: Figures = {}
    for case, scan in scans.items():
        image, truth = read_volume(scan.image), reference_of(scan)
        labels, _ = coarse.segment(coarse.prepare([image], case))
        rows[case] = {"coarse_dice": mean_dice(labels, truth, scan.annotated)}
        for rule in ROI_RULES:
            roi = RoiSegmenter(coarse, fine, rule=rule)
            prepared = roi.prepare([image], case)
            inside = np.zeros(truth.shape, bool)
            inside[tuple(slice(low, high) for low, high in roi.box(prepared))] = True
            rows[case][f"{rule}_share_of_volume"] = float(inside.mean())
            outside = (~inside & (truth > 0)).sum() / max(1, (truth > 0).sum())
            rows[case][f"{rule}_organ_voxels_outside"] = float(outside)
            if rule == "union":
                fine_labels, _ = roi.segment(prepared)
                rows[case]["fine_dice"] = mean_dice(fine_labels, truth, scan.annotated)
                rows[case]["dice_with_whole"] = mean_dice(fine_labels, whole[case])
    return rows


def reference_of(scan: Scan) -> np.ndarray:
    """The reference label map (Z, Y, X)."""
    return read_labels(scan.reference).array


def compare(models: dict[str, Path], scans: dict[str, Scan], backends: Sequence[str]) -> dict[str, Figures]:
    """Figures of every scan: accuracy, agreement with stock, and, with the reference, coarse boxes."""
    stock = stock_labels(models[FINE], scans)
    ours: dict[str, Maps] = {}
    for name in backends:
        ours[name], _ = our_labels(models[FINE], scans, *BACKENDS[name])
    figures: dict[str, Figures] = {name: {} for name in ("accuracy", "agreement")}
    for case, scan in scans.items():
        truth = reference_of(scan)
        maps = {"stock": stock, **ours}
        figures["accuracy"][case] = {name: mean_dice(of[case], truth, scan.annotated) for name, of in maps.items()}
        figures["agreement"][case] = {name: mean_dice(of[case], stock[case]) for name, of in ours.items()}
    if REFERENCE in ours:
        figures["roi"] = behind_coarse(models, scans, ours[REFERENCE])
    return figures


def skipping(fine: Path, halved: Path, scans: dict[str, Scan]) -> dict[str, Figures]:
    """Figures of every scan: windows left out and what that costs, for two sizes of windows."""
    figures: dict[str, Figures] = {}
    for name, model in (("skip_empty", fine), ("skip_empty_with_halved_windows", halved)):
        whole, windows = our_labels(model, scans, *BACKENDS[REFERENCE])
        skipped, seen = our_labels(model, scans, *BACKENDS[REFERENCE], "skip-empty")
        figures[name] = {}
        for case, scan in scans.items():
            lost = np.count_nonzero((whole[case] > 0) & (skipped[case] != whole[case]))
            one, other = whole[case] > 0, skipped[case] > 0
            truth = reference_of(scan)
            figures[name][case] = {
                "windows": seen[case],
                "windows_of_all": windows[case],
                "foreground_dice_with_all": float(2 * (one & other).sum() / max(1, one.sum() + other.sum())),
                "dice_with_all": mean_dice(skipped[case], whole[case]),
                "voxels_lost": float(lost / max(1, np.count_nonzero(whole[case]))),
                "dice_of_all_with_reference": mean_dice(whole[case], truth, scan.annotated),
                "dice_with_reference": mean_dice(skipped[case], truth, scan.annotated),
            }
    for name, divisor in (("ideal_skip_empty", 1), ("ideal_skip_empty_with_halved_windows", 2)):
        figures[name] = ideal_skipping(fine, scans, divisor)
    return figures


def ideal_skipping(fine: Path, scans: dict[str, Scan], divisor: int) -> Figures:
    """As :func:`skipping`, of a network whose output is the reference; edges of windows are divided by ``divisor``."""
    from scipy.ndimage import zoom

    from nnunet_flare.inference.devices import CPU
    from nnunet_flare.inference.settings import DEFAULT_STEP_SIZE
    from nnunet_flare.inference.skipping import BODY_HU, slide_growing
    from nnunet_flare.inference.windows import window_starts

    configuration = json.loads((fine / "plans.json").read_text())["configurations"][FINE]
    patch = [edge // divisor for edge in configuration["patch_size"]]
    rows: Figures = {}
    for case, scan in scans.items():
        image = read_volume(scan.image)
        factors = np.divide(image.spacing_mm, configuration["spacing"])
        hu = zoom(image.array.astype(np.float32), factors, order=1, grid_mode=True, mode="nearest")
        labels = zoom(reference_of(scan), factors, order=0, grid_mode=True, mode="nearest")
        heads = int(labels.max()) + 1

        def network(window: np.ndarray, heads: int = heads) -> np.ndarray:
            return np.moveaxis(np.eye(heads, dtype=np.float32)[window[0, 1].astype(int)], -1, 0)

        found: list[np.ndarray] = []
        windows = slide_growing(
            np.stack([hu, labels.astype(np.float32)]),
            network,
            lambda scores, found=found: found.append(scores.argmax(0)),  # type: ignore[misc]
            heads=heads,
            patch=patch,
            step_size=DEFAULT_STEP_SIZE,
            device=CPU,
            foreground=lambda scores: scores.argmax(0) > 0,
            body_above=BODY_HU,
        )
        starts = window_starts(np.maximum(hu.shape, patch), patch, DEFAULT_STEP_SIZE)
        lost = np.count_nonzero((labels > 0) & (np.concatenate(found) != labels))
        rows[case] = {
            "windows": windows,
            "windows_of_all": float(np.prod([len(of_axis) for of_axis in starts])),
            "voxels_lost": float(lost / max(1, np.count_nonzero(labels))),
        }
    return rows


def summary(figures: Figures) -> Figures:
    """The real scans one by one, and of the phantoms mean, smallest and largest of every figure."""
    phantoms = [row for case, row in figures.items() if case.startswith("phantom")]
    rows = {case: row for case, row in figures.items() if not case.startswith("phantom")}
    for name, of in (("mean", np.mean), ("smallest", np.min), ("largest", np.max)):
        rows[f"{len(phantoms)} phantoms, {name}"] = {
            key: float(of([row[key] for row in phantoms])) for key in phantoms[0]
        }
    return rows


def text(name: str, rows: Figures) -> str:
    """A table of figures."""
    width = max(len(name), *map(len, rows)) + 2
    columns = list(next(iter(rows.values())))
    lines = [f"{name.replace('_', ' '):{width}}" + "  ".join(columns)]
    for case, row in rows.items():
        lines.append(f"{case:{width}}" + "  ".join(f"{row[key]:{len(key)}.4f}" for key in columns))
    return "\n".join(lines)


def large_torso(path: Path) -> None:
    """The torso (or a phantom) at 512 x 512 x 160 voxels, 0.8 x 0.8 x 2.5 mm, air where it ends."""
    from scipy.ndimage import zoom

    source = short_training.torso()
    if source is None:
        from nnunet_flare.phantom import make_phantom

        source = make_phantom(0, domain="wide", size=(80, 128, 128))[0]
    wanted = np.array((2.5, setting.IN_PLANE_MM, setting.IN_PLANE_MM))
    array = zoom(source.array, np.array(source.spacing_mm) / wanted, order=1, grid_mode=True, mode="nearest")
    shape = (160, 512, 512)
    full = np.full(shape, -1000, np.int16)
    starts = [max(0, (n - size) // 2) for n, size in zip(array.shape, shape, strict=True)]
    cut = array[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]
    at = tuple(slice((size - n) // 2, (size - n) // 2 + n) for n, size in zip(cut.shape, shape, strict=True))
    full[at] = cut
    noise = np.random.default_rng(0).integers(-12, 13, shape, np.int16)
    write_volume(path, Volume(full + noise, tuple(wanted.tolist())))


def wall_time(coarse: Path, rounds: int) -> dict[str, Any]:
    """Stock on the whole scan against ours without and with the coarse model, in fresh processes, alternating."""
    with tempfile.TemporaryDirectory() as temporary:
        place = whole_prediction.Workplace(Path(temporary))
        large_torso(Path(temporary) / "torso" / "case_0000.nii.gz")
        images, model = Path(temporary) / "torso", place.model("small")
        options = ("-f", "0", *whole_prediction.SAME_WINDOWS)
        commands = {
            "stock": whole_prediction.stock_predict(images, place.output("stock"), model, *options),
            "ours": whole_prediction.flare_predict(images, place.output("ours"), model),
            "ours --roi": whole_prediction.flare_predict(images, place.output("roi"), model, "--roi", str(coarse)),
        }
        for name in ("ours", "ours --roi"):  # converts the networks
            place.measure(commands[name])
        runs: dict[str, list[whole_prediction.Run]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                runs[name].append(place.measure(command))
        return whole_prediction.figures(runs)


def main() -> None:
    """Train where needed, compare, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--models", type=Path, required=True, help="data sets and models are kept here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="of the part agreement")
    parser.add_argument("--rounds", type=int, default=1, help="of the part wall")
    parser.add_argument("--output", type=Path, default=RESULTS, help="what is not run now keeps its figures")
    args = parser.parse_args()
    folder = args.models.resolve()
    scans = short_training.write_data(folder)
    models = short_training.train(folder)
    os.environ["NNUNET_FLARE_CACHE"] = str(folder / "cache")
    (folder / "cache").mkdir(mode=0o700, exist_ok=True)
    record = json.loads(args.output.read_text()) if args.output.is_file() else {}
    record["command"] = f"python benchmarks/trained_models.py -o MODELS --rounds {args.rounds}"
    record["hardware"] = setting.hardware()
    record["training"] = {name: short_training.training_of(model) for name, model in models.items()}
    for part, measured in (
        ("agreement", lambda: compare(models, scans, args.backends)),
        ("skipping", lambda: skipping(models[FINE], models[HALVED], scans)),
    ):
        if part in args.parts:
            for name, figures in measured().items():
                kept = record.setdefault("runs", {}).setdefault(name, {})
                for case, row in figures.items():
                    kept[case] = {**kept.get(case, {}), **row}
                record[name] = summary(kept)
                print(text(name, record[name]), flush=True)
            write_json(args.output, record)
    if "wall" in args.parts:
        record["wall"] = wall_time(models[COARSE], args.rounds)
        print(whole_prediction.table("torso, 512x512x160", record["wall"]))
        write_json(args.output, record)


if __name__ == "__main__":
    main()
