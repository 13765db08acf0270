"""Agreement with stock nnU-Net on models that were trained: precisions, runtimes, skipped windows, coarse to fine.

    python benchmarks/trained_models.py -o models

Two models are trained some minutes by ``nnUNetv2_train`` (trainer nnUNetTrainerFlareST) on a real torso CT (shared
data) and phantoms: a small one (4 x 2.5 x 2.5 mm) and a coarse one (8 x 6 x 6 mm) of the same plans, kept in ``-o``.
Reported: agreement of ``flare-predict`` with ``nnUNetv2_predict`` on the training scan and on phantoms never seen;
windows and voxels that ``skip-empty`` leaves out; organ voxels (of the reference labels) outside the coarse box. The
wall time of ``--roi``, coarse pass included, is that of the FLARE22 winner's student (untrained, for time alone) behind
the trained coarse model on the torso resampled to 512 x 512 x 160, against stock without a box.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import predict as whole_prediction
import prediction_setting as setting

from nnunet_flare.images import Volume, read_labels, read_volume, write_labels, write_volume
from nnunet_flare.orientation import turn_between, turn_volume
from nnunet_flare.phantom import write_phantom

RESULTS = Path(__file__).parent / "results" / "trained_models.json"

DATASET = 22
PLANS = "nnUNetPlansFlareSmall"
TRAINER = "nnUNetTrainerFlareST"
COARSE, FINE = "3d_coarse", "3d_fullres"

PLANNED: dict[str, dict[str, Any]] = {
    FINE: {"spacing_mm": (4.0, 2.5, 2.5), "patch_size": (24, 64, 64), "base_features": 8, "stages": 4},
    COARSE: {"spacing_mm": (8.0, 6.0, 6.0), "patch_size": (32, 48, 48), "base_features": 8, "stages": 4},
}

BACKENDS = {"torch fp32": ("torch", "fp32"), "OpenVINO fp32": ("openvino", "fp32"), "torch bf16": ("torch", "bf16"),
            "OpenVINO bf16": ("openvino", "bf16")}  # fmt: skip


def torso() -> tuple[Volume, Volume] | None:
    """The real CT and its organ labels, from head to feet as the phantoms lie, or None where they are missing."""
    folder = Path(os.environ.get("FLARE_SHARED_DATA", setting.ROOT.parent / "shared" / "data"))
    if not (folder / "ts_torso3mm_ct.nii.gz").is_file():
        return None
    image, labels = read_volume(folder / "ts_torso3mm_ct.nii.gz"), read_labels(folder / "ts_torso3mm_flare13.nii.gz")
    turn = turn_between(image.direction)
    return turn_volume(image, turn), turn_volume(labels, turn)


def write_data(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The data set below ``folder/nnUNet_raw``; returns image and reference of the scans to compare on."""
    write_phantom(folder, labelled=3, unlabelled=0, test=2, size=(48, 96, 96))
    raw = next((folder / "nnUNet_raw").glob(f"Dataset{DATASET:03d}_*"))
    compared = {}
    for path in sorted((folder / "test" / "images").glob("*.nii.gz")):
        case = path.name.removesuffix("_0000.nii.gz")
        compared[case] = (path, folder / "test" / "labels" / f"{case}.nii.gz")
    real = torso()
    if real is not None:
        image, labels = raw / "imagesTr" / "torso_0000.nii.gz", raw / "labelsTr" / "torso.nii.gz"
        if not image.is_file():
            write_volume(image, real[0])
            write_labels(labels, real[1].array, real[1])
            document = json.loads((raw / "dataset.json").read_text())
            document["numTraining"] += 1
            (raw / "dataset.json").write_text(json.dumps(document))
        compared["torso"] = (image, labels)
    return compared


def plan(folder: Path) -> None:
    """Plans with a fine and a coarse configuration, and the preprocessed data."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess_dataset

    from nnunet_flare.planners.flare import nnUNetPlannerFlareSmall, plan_dataset

    extract_fingerprints([DATASET], num_processes=1, check_dataset_integrity=False)
    planned = {name: plan_dataset(DATASET, nnUNetPlannerFlareSmall, **of)[0] for name, of in PLANNED.items()}
    plans = planned[FINE]
    coarse = planned[COARSE]["configurations"][FINE]
    plans["configurations"] = {FINE: plans["configurations"][FINE], COARSE: coarse}
    for name, iterations in ((FINE, 30), (COARSE, 40)):
        configuration = plans["configurations"][name]
        configuration["data_identifier"] = f"{PLANS}_{name}"
        configuration["flare"] = {
            "num_epochs": 12, "iterations_per_epoch": iterations, "validation_iterations": 1, "optimizer": "AdamW",
            "initial_lr": 2e-3, "mirroring": False, "final_validation": False, "cpu_precision": "bf16",
            "oversample_foreground": 0.8, "seed": 0, "save_every": 1,
        }  # fmt: skip
    (next((folder / "nnUNet_preprocessed").glob("Dataset*")) / f"{PLANS}.json").write_text(json.dumps(plans, indent=1))
    preprocess_dataset(DATASET, PLANS, (FINE, COARSE), (1, 1))


def training_of(model: Path) -> dict[str, Any]:
    """How a model was trained, from its plans: iterations, patch, features."""
    name = model.name.rpartition("__")[2]
    configuration = json.loads((model / "plans.json").read_text())["configurations"][name]
    settings = configuration["flare"]
    return {
        "iterations": settings["num_epochs"] * settings["iterations_per_epoch"],
        "optimizer": settings["optimizer"],
        "patch": configuration["patch_size"],
        "spacing_mm": configuration["spacing"],
        "features": configuration["architecture"]["arch_kwargs"]["features_per_stage"],
    }


def train(folder: Path) -> dict[str, Path]:
    """The two models' folders; trained where they are not there yet."""
    results = folder / "nnUNet_results"
    script = Path(sys.executable).with_name("nnUNetv2_train")
    models = {}
    for name in (COARSE, FINE):
        found = list(results.glob(f"Dataset*/{TRAINER}__{PLANS}__{name}"))
        if not found or not (found[0] / "fold_all" / "checkpoint_final.pth").is_file():
            start = time.perf_counter()
            words = [str(script), str(DATASET), name, "all", "-tr", TRAINER, "-p", PLANS, "-device", "cpu"]
            if found and (found[0] / "fold_all" / "checkpoint_latest.pth").is_file():
                words.append("--c")
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            print(f"{name} trained in {time.perf_counter() - start:.0f} s", flush=True)
        models[name] = next(results.glob(f"Dataset*/{TRAINER}__{PLANS}__{name}"))
    return models


def mean_dice(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the labels that either map has."""
    scores = []
    for label in np.union1d(np.unique(a), np.unique(b)):
        if label:
            one, two = a == label, b == label
            scores.append(2 * np.count_nonzero(one & two) / (np.count_nonzero(one) + np.count_nonzero(two)))
    return float(np.mean(scores)) if scores else 1.0


def stock_labels(model: Path, scans: dict[str, tuple[Path, Path]], folder: Path) -> dict[str, np.ndarray]:
    """What ``nnUNetv2_predict`` makes of the scans."""
    images = folder / "images"
    images.mkdir()
    for case, (image, _) in scans.items():
        (images / f"{case}_0000.nii.gz").symlink_to(image.resolve())
    subprocess.run(_stock(model, images, folder / "stock", "all"), check=True, stdout=subprocess.DEVNULL)
    return {case: read_labels(folder / "stock" / f"{case}.nii.gz").array for case in scans}


def _stock(model: Path, images: Path, output: Path, fold: str) -> list[str]:
    script = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    return [
        str(script), "-i", str(images), "-o", str(output), "-m", str(model), "-f", fold, "-step_size", "0.9",
        "--disable_tta", "--disable_progress_bar", "-device", "cpu", "-npp", "1", "-nps", "1",
    ]  # fmt: skip


def ours(model: Path, image: Path, backend: str, precision: str, windows: str = "all") -> tuple[np.ndarray, int]:
    """Our label map and the number of windows that the network saw."""
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.settings import Settings

    segmenter = Segmenter.from_model_folder(model, Settings(backend=backend, precision=precision, windows=windows))
    labels, _ = segmenter.segment(segmenter.prepare([read_volume(image)]))
    return labels, segmenter.profile.calls["network"]


def compare(models: dict[str, Path], scans: dict[str, tuple[Path, Path]]) -> list[dict[str, Any]]:
    """Agreement, skipped windows and coarse boxes of every scan."""
    from nnunet_flare.inference.coarse_to_fine import RoiSegmenter
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.roi import RULES
    from nnunet_flare.inference.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        stock = stock_labels(models[FINE], scans, Path(folder))
    rows = []
    for case, (image, reference) in scans.items():
        truth = read_labels(reference).array
        row: dict[str, Any] = {"case": case, "dice_with_truth": mean_dice(stock[case], truth)}
        whole, windows = ours(models[FINE], image, "torch", "fp32")
        row["windows"] = windows
        row["agreement"] = {"torch fp32": mean_dice(whole, stock[case])}
        for name, (backend, precision) in list(BACKENDS.items())[1:]:
            labels, _ = ours(models[FINE], image, backend, precision)
            row["agreement"][name] = mean_dice(labels, stock[case])
        skipped, seen = ours(models[FINE], image, "torch", "fp32", "skip-empty")
        foreground = max(1, np.count_nonzero(whole))
        row["skip_empty"] = {
            "windows": seen,
            "dice_with_all": mean_dice(skipped, whole),
            "voxels_lost": float(np.count_nonzero((whole > 0) & (skipped != whole)) / foreground),
        }
        settings = Settings(backend="torch", precision="fp32")
        both = [Segmenter.from_model_folder(models[name], settings) for name in (COARSE, FINE)]
        row["roi"] = {}
        for rule in RULES:
            roi = RoiSegmenter(*both, rule=rule)
            scan = roi.prepare([read_volume(image)], case)
            inside = np.zeros(truth.shape, bool)
            inside[tuple(slice(low, high) for low, high in roi.box(scan))] = True
            row["roi"][rule] = {
                "volume": float(inside.mean()),
                "organ_voxels_outside": float((~inside & (truth > 0)).sum() / max(1, (truth > 0).sum())),
            }
            if rule == "union":
                row["roi"][rule]["dice_with_whole"] = mean_dice(roi.segment(scan)[0], whole)
        rows.append(row)
        print(table([row], None), flush=True)
    return rows


def large_torso(path: Path) -> None:
    """The torso (or a phantom) at 512 x 512 x 160 voxels, 0.8 x 0.8 x 2.5 mm, air where it ends."""
    from scipy.ndimage import zoom

    real = torso()
    if real is None:
        from nnunet_flare.phantom import make_phantom

        source = make_phantom(0, domain="wide", size=(80, 128, 128))[0]
    else:
        source = real[0]
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


def wall_time(coarse: Path) -> dict[str, Any]:
    """Stock on the whole scan against ours without and with the coarse model, in fresh processes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = setting.write_model(folder / "small", "small")
        large_torso(folder / "in" / "case_0000.nii.gz")
        (folder / "cache").mkdir(mode=0o700)
        environment = {**os.environ, "NNUNET_FLARE_CACHE": str(folder / "cache"), "nnUNet_compile": "f"}
        script = Path(sys.executable).with_name("flare-predict")
        plain = [str(script), "-i", str(folder / "in"), "-o", str(folder / "out"), "-m", str(model), "-device", "cpu"]
        roi = [*plain, "--roi", str(coarse)]
        for warm in (plain, roi):  # converts the networks
            whole_prediction.measure(warm, environment)
        runs = {
            "stock": whole_prediction.measure(_stock(model, folder / "in", folder / "stock", "0"), environment),
            "ours": whole_prediction.measure(plain, environment),
            "ours --roi": whole_prediction.measure(roi, environment),
        }
        return {name: vars(run) for name, run in runs.items()}


def table(rows: Sequence[dict[str, Any]], walls: dict[str, Any] | None) -> str:
    """The result as text."""
    lines = []
    for row in rows:
        lines.append(f"{row['case']}: mean Dice of stock's labels with the truth {row['dice_with_truth']:.3f}")
        agreement = ", ".join(f"{name} {value:.5f}" for name, value in row["agreement"].items())
        lines.append(f"  mean foreground Dice with stock: {agreement}")
        skip = row["skip_empty"]
        lines.append(
            f"  skip-empty: {skip['windows']} of {row['windows']} windows, {100 * skip['voxels_lost']:.3f} % of the "
            f"foreground changed, Dice with all {skip['dice_with_all']:.5f}"
        )
        for rule, found in row["roi"].items():
            text = f"  --roi, {rule}: {100 * found['volume']:.1f} % of the volume, "
            text += f"{100 * found['organ_voxels_outside']:.3f} % of the organs' voxels outside"
            if "dice_with_whole" in found:
                text += f", Dice with the whole volume {found['dice_with_whole']:.4f}"
            lines.append(text)
    if walls:
        stock = walls["stock"]["wall_s"]
        for name, run in walls.items():
            lines.append(
                f"512x512x160, {name:10} {run['wall_s']:7.1f} s wall ({stock / run['wall_s']:5.1f}x), "
                f"{run['cpu_s']:7.1f} s CPU ({walls['stock']['cpu_s'] / run['cpu_s']:5.1f}x), {run['peak_mb']:6.0f} MB"
            )
    return "\n".join(lines)


def main() -> None:
    """Train where needed, compare, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--models", type=Path, required=True, help="data sets and models are kept here")
    parser.add_argument("--parts", nargs="+", choices=("agreement", "wall"), default=["agreement", "wall"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="parts not run now keep their figures")
    args = parser.parse_args()
    folder = args.models.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / name)
    os.environ.update(nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1", nnUNet_compile="f")
    scans = write_data(folder)
    if not list((folder / "nnUNet_preprocessed").glob(f"Dataset*/{PLANS}_{COARSE}")):
        plan(folder)
    models = train(folder)
    record = json.loads(args.output.read_text()) if args.output.is_file() else {}
    record["command"] = "python benchmarks/trained_models.py -o MODELS"
    record["hardware"] = setting.hardware()
    record["training"] = {name: training_of(model) for name, model in models.items()}
    if "agreement" in args.parts:
        record["scans"] = compare(models, scans)
    if "wall" in args.parts:
        record["wall"] = wall_time(models[COARSE])
        print(table([], record["wall"]))
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
