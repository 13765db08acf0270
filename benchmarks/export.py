"""From scores to a label map: stock nnU-Net's interpolation of all classes and argmax, against slice by slice.

    python benchmarks/export.py --slices 160

14 classes on the small model's grid (100 x 273 x 273) to 512 x 512 x slices, each in a fresh process with one thread:
seconds of CPU, and peak memory over that of the scores themselves. The scores are made of a real label map.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import prediction_setting as setting
from shown_command import shown_command

RESULTS = Path(__file__).parent / "results" / "export.json"

GRIDS = {"separate-z": ((100, 273, 273), 0), "3-D": ((100, 273, 273), 1)}


def scores(shape: tuple[int, ...]):
    """Logits as a trained network gives them, from a real label map: blurred, a little noisy, in half precision."""
    import torch
    from scipy.ndimage import gaussian_filter

    labels = setting.organ_labels(shape)
    rng = np.random.default_rng(0)
    result = torch.empty((14, *shape), dtype=torch.float16)
    for k in range(14):
        blurred = gaussian_filter((labels == k).astype(np.float32), 1.0)
        result[k] = torch.from_numpy(blurred * 20 - 10 + rng.normal(0, 0.3, shape).astype(np.float32))
    return result


def peak_kb() -> int:
    """Largest resident size of this process since :func:`forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status")


def forget_peak() -> None:
    """Set the largest resident size back to the present one (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def one(method: str, path: str, slices: int, output: Path) -> None:
    """Measure one method in this process."""
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(1)
    plan = setting.plans("small")
    settings = plan["configurations"]["3d_fullres"]
    if path == "3-D":
        settings["resampling_fn_probabilities_kwargs"]["force_separate_z"] = False
    manager = PlansManager(plan)
    configuration = manager.get_configuration("3d_fullres")
    labels = manager.get_label_manager(setting.model_folders.dataset_json(labels=setting.LABELS))
    size = (slices, 512, 512)
    properties = {
        "spacing": (setting.EXTENT_MM[slices] / slices, setting.IN_PLANE_MM, setting.IN_PLANE_MM),
        "shape_before_cropping": size,
        "shape_after_cropping_and_before_resampling": size,
        "bbox_used_for_cropping": [[0, n] for n in size],
    }
    given = scores((100, 273, 273))
    if method == "stock":
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        def run():
            return convert_predicted_logits_to_segmentation_with_correct_shape(
                given.numpy(), manager, configuration, labels, properties, num_threads_torch=1
            )
    else:
        from nnunet_flare.inference.export import labels_on_image_grid

        def run():
            return labels_on_image_grid(given, properties, manager, configuration, labels)

    forget_peak()
    before = peak_kb()
    cpu, wall = time.process_time(), time.perf_counter()
    result = np.asarray(run(), np.uint8)
    figures = {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "extra_mb": (peak_kb() - before) / 1024,
    }
    np.save(output.with_suffix(".npy"), result)
    output.write_text(json.dumps(figures))


def main() -> None:
    """Run the benchmark and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=160, choices=sorted(setting.EXTENT_MM))
    parser.add_argument("--paths", nargs="+", default=["separate-z"], choices=sorted(GRIDS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "PATH", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], args.one[1], args.slices, Path(args.one[2]))
        return
    import tempfile

    results = {}
    for path in args.paths:
        with tempfile.TemporaryDirectory() as folder:
            rows = {}
            for method in ("stock", "ours"):
                file = Path(folder) / f"{method}.json"
                command = [sys.executable, __file__, "--slices", str(args.slices), "--one", method, path, str(file)]
                subprocess.run(command, check=True)
                rows[method] = json.loads(file.read_text())
            a, b = (np.load(Path(folder) / f"{method}.npy") for method in ("stock", "ours"))
        dice = 2 * np.count_nonzero((a == b) & (a > 0)) / (np.count_nonzero(a) + np.count_nonzero(b))
        results[path] = {**rows, "equal_voxels": float((a == b).mean()), "foreground_dice": dice}
        print(f"{path}, 14 classes to 512x512x{args.slices}")
        for key in ("cpu_s", "wall_s", "extra_mb"):
            print(f"  {key:9} stock {rows['stock'][key]:9.1f}  ours {rows['ours'][key]:8.2f}", end="")
            print(f"  ratio {rows['stock'][key] / max(rows['ours'][key], 1e-9):6.1f}x")
        print(f"  equal voxels {results[path]['equal_voxels']:.6f}, foreground Dice {dice:.6f}")
    args.output.parent.mkdir(exist_ok=True)
    record = {"command": shown_command(), "hardware": setting.hardware(), "slices": args.slices, "results": results}
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
