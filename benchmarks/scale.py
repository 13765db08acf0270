"""Thousands of unlabelled cases through everything that is not a network: select, build, ledger, status, report.

    python benchmarks/scale.py [--cases 500 2000] [--skip_data]

Cases are tiny (8 x 16 x 16 voxels) but have every file that a real one has; each stage runs in a process of its own, so
seconds and peak memory are its own. The second table compares what a round writes per pseudo case with preprocessing
the case again by stock nnU-Net, on real CT arrays of the shared data, and multiplies by 2000. Prints both and writes
benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from label_maps import ROOT, environment

from nnunet_flare.files import link_or_copy, read_json, write_json
from nnunet_flare.fusion.members import class_locations, training_label
from nnunet_flare.images import read_labels, read_volume
from nnunet_flare.organs import FLARE22
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.configurations import base_configuration, configuration_hash
from nnunet_flare.rounds.run.ledger import read_ledger, rebuild
from nnunet_flare.rounds.run.manifest import Run, create_run, load_run
from nnunet_flare.rounds.run.settings import RunSettings
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, write_list
from nnunet_flare.rounds.stages.arrays import label_hash, read_array, read_properties, write_array, write_properties
from nnunet_flare.rounds.stages.build import build_round
from nnunet_flare.rounds.stages.preprocess import state_file
from nnunet_flare.rounds.stages.select import select_round
from nnunet_flare.rounds.status import status

SHAPE = (8, 16, 16)
PATCH = (40, 224, 192)
PSEUDO_CASES = 2000
LABELLED = 50


def make_run(folder: Path, cases: int) -> Run:
    """A run whose round 0 is labelled but not selected."""
    labels = {"background": 0, **{organ.name: organ.id for organ in FLARE22}}
    recipe = load_recipe("uncertainty", {"rounds": "1"})
    folders = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    settings = RunSettings(
        name="scale", dataset="Dataset001_Scale", plans_name="nnUNetPlans", unlabelled_dir=str(folder),
        recipe=recipe.model_dump(mode="json"), folders=folders, device="cpu", shards=1,
    )  # fmt: skip
    run = create_run(folder / "run", settings, recipe)
    base = [f"labelled{i:04d}" for i in range(LABELLED)]
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": LABELLED}
    dataset["dataset"] = {case: {"images": [], "label": ""} for case in base}
    write_json(run.raw / "dataset.json", dataset)
    configuration = {"patch_size": list(PATCH), "spacing": [2.5, 1, 1], "data_identifier": run.base_identifier}
    write_json(run.plans_file, {"configurations": {recipe.configuration: configuration}})
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, *SHAPE)).astype(np.float32)
    label = rng.integers(0, 14, SHAPE).astype(np.uint8)
    write_array(folder / "image.b2nd", image, PATCH)
    write_array(folder / "seg.b2nd", label[None].astype(np.int16), PATCH)
    write_properties(folder / "p.pkl", {"class_locations": class_locations(label.astype(np.int16), range(1, 14))})
    contents = [(folder / name).read_bytes() for name in ("image.b2nd", "seg.b2nd", "p.pkl")]
    for name in base:
        for content, ending in zip(contents, (".b2nd", "_seg.b2nd", ".pkl"), strict=True):
            _put(run.base_data / f"{name}{ending}", content)
    listed = []
    for number in range(cases):
        case = f"case{number:06d}"
        _put(run.unlabelled_data / f"{case}.b2nd", contents[0])
        _put(run.paths.training_label(0, case), contents[1])
        _put(run.paths.properties(0, case), contents[2])
        _put(state_file(run.unlabelled_data, case), b'{"odd": []}')
        names = [organ.name for organ in FLARE22]
        agreement = dict(zip(names, rng.uniform(0.88, 1, 13).round(4).tolist(), strict=True))
        document = {
            "case": case, "round": 0, "agreement": agreement,
            "present": dict.fromkeys(names, True), "volume_mm3": dict.fromkeys(names, 1e5), "members": 5,
            "label_sha256": label_hash(label), "odd": [], "seconds": 1.0,
        }  # fmt: skip
        _put(run.paths.case(0, case), json.dumps(document).encode())
        listed.append(UnlabelledCase(case, f"/scans/{case}.nii.gz", (f"/scans/{case}_0000.nii.gz",), 1000))
    write_list(run.paths.unlabelled, listed)
    for task in graph(run).values():
        if task.stage in ("plan", "unlabelled", "train", "label", "build") and task.round in (None, 0):
            result = {"base_hash": configuration_hash(base_configuration(run.base))}
            write_json(run.paths.done(task.name), {"task": task.name, "seconds": 1.0, "result": result})
    return run


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _report(run: Run) -> None:
    from nnunet_flare.report.page import write_report

    write_report(run, pictures=0)


PHASES: dict[str, Callable[[Run], Any]] = {
    "select": lambda run: select_round(run, run.round(0)),
    "build": lambda run: build_round(run, run.round(1)),
    "ledger, read": lambda run: read_ledger(run.paths),
    "ledger, rebuilt": lambda run: rebuild(run.paths),
    "status": status,
    "report, no pictures": _report,
}


def one_phase(name: str, root: Path) -> None:
    """Run a phase of a run and print its seconds and the process's peak memory as JSON."""
    run = load_run(root)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    PHASES[name](run)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": round(seconds, 3), "peak_mb": round(peak / 1024), "more_mb": (peak - before) // 1024}))


def scale(cases: int) -> dict[str, dict[str, float]]:
    """Every phase on a fresh run of that many cases."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_run(Path(folder), cases).root
        rows = {}
        for name in PHASES:
            command = [sys.executable, __file__, "--phase", name, "--root", str(root)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{name} failed:\n{done.stderr}")
            rows[name] = json.loads(done.stdout.splitlines()[-1])
    return rows


def round_data(folder: Path) -> dict[str, Any]:
    """Per case: what a round writes and how long it takes, against stock preprocessing of the same scan."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    shared = Path(os.environ.get("FLARE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    found: dict[str, list[float]] = {key: [] for key in ("again_s", "round_s", "again_bytes", "round_bytes")}
    for scan, reference in (("ts_torso3mm_ct", "ts_torso3mm_flare13"), ("ts_slab512_ct", "ts_slab512_flare13")):
        image, labels = read_volume(shared / f"{scan}.nii.gz"), read_labels(shared / f"{reference}.nii.gz")
        stock = _Stock()
        start = time.perf_counter()
        data, seg, properties = stock.run(DefaultPreprocessor(verbose=False), image, labels.array)
        write_array(folder / "again.b2nd", data.astype(np.float32), PATCH)
        write_array(folder / "again_seg.b2nd", seg.astype(np.int16), PATCH)
        write_properties(folder / "again.pkl", properties)
        found["again_s"].append(time.perf_counter() - start)
        label = np.maximum(seg[0], 0).astype(np.uint8)
        mask = np.minimum(seg[0], 0).astype(np.int16)
        start = time.perf_counter()
        made = training_label(label, mask)
        digest = label_hash(label)
        write_array(folder / "new_seg.b2nd", made[None], PATCH)
        located = class_locations(made, range(1, 14))
        write_properties(folder / "new.pkl", {**properties, "class_locations": located})
        assert label_hash(np.maximum(read_array(folder / "new_seg.b2nd")[0], 0)) == digest
        read_properties(folder / "new.pkl")
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            source = folder / ("again.b2nd" if ending == ".b2nd" else f"new{ending}")
            link_or_copy(source, folder / f"linked{ending}")
        found["round_s"].append(time.perf_counter() - start)
        found["again_bytes"].append(sum(p.stat().st_size for p in folder.glob("again*")))
        found["round_bytes"].append(sum(p.stat().st_size for p in folder.glob("new*")))
    totals = {key: float(np.mean(values)) * PSEUDO_CASES for key, values in found.items()}
    return {
        "scans": 2,
        "cases": PSEUDO_CASES,
        "preprocessed again, hours": totals["again_s"] / 3600,
        "a round's data, hours": totals["round_s"] / 3600,
        "preprocessed again, GB": totals["again_bytes"] / 1e9,
        "a round's data, GB": totals["round_bytes"] / 1e9,
        "time ratio": totals["round_s"] / totals["again_s"],
        "disk ratio": totals["round_bytes"] / totals["again_bytes"],
    }


class _Stock:
    """The plans that stock preprocessing asks for: FLARE22's spacing, CT normalisation, stock resampling."""

    def run(self, preprocessor: Any, image: Any, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        seg = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
        configuration = {
            "data_identifier": "x", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
            "patch_size": list(PATCH), "architecture": {},
            "spacing": [2.5, 0.8, 0.8], "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False], "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": resampling, "resampling_fn_seg_kwargs": seg,
        }  # fmt: skip
        intensities = {"mean": 80.0, "std": 140.0, "percentile_00_5": -960.0, "percentile_99_5": 325.0}
        plans = PlansManager(
            {
                "dataset_name": "x", "plans_name": "x", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
                "configurations": {"c": configuration}, "label_manager": "LabelManager",
                "foreground_intensity_properties_per_channel": {"0": intensities},
            }
        )  # fmt: skip
        dataset = {"labels": {"background": 0, **{o.name: o.id for o in FLARE22}}, "channel_names": {"0": "CT"}}
        properties = {"spacing": list(image.spacing_mm)}
        data, seg_array, properties = preprocessor.run_case_npy(
            image.array[None].astype(np.float32), labels[None].astype(np.int8), properties, plans,
            plans.get_configuration("c"), dataset,
        )  # fmt: skip
        return data, seg_array, properties


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--skip_data", action="store_true")
    parser.add_argument("--phase", choices=tuple(PHASES), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        one_phase(args.phase, args.root)
        return
    counts = {cases: scale(cases) for cases in args.cases}
    print(f"{'stage':<22}" + "".join(f"{cases:>9} cases        MB" for cases in counts))
    for name in PHASES:
        cells = (f"{rows[name]['seconds']:>13.2f} s{rows[name]['peak_mb']:>10}" for rows in counts.values())
        print(f"{name:<22}" + "".join(cells))
    path = ROOT / "benchmarks" / "results" / "scale.json"
    document = read_json(path) if path.is_file() else {}
    document.setdefault("stages", {}).update({str(cases): rows for cases, rows in counts.items()})
    if not args.skip_data:
        with tempfile.TemporaryDirectory() as folder:
            document["round_data"] = round_data(Path(folder))
        for key, value in document["round_data"].items():
            print(f"{key:<30}{value:>12.4g}")
    write_json(path, {**document, "environment": environment("numpy", "blosc2", "nnunetv2", "pydantic")})


if __name__ == "__main__":
    main()
