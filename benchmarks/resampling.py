"""Image resampling, order 3, separate z: stock nnU-Net against matrix products, one thread, CPU seconds.

    python benchmarks/resampling.py --slices 160

512 x 512 x slices to the small model's grid. The differences are in HU; both get the same normalised image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import prediction_setting as setting
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from shown_command import shown_command
from threadpoolctl import threadpool_limits

from nnunet_flare.inference.grids import new_shape, spline_matrix
from nnunet_flare.inference.resampling import resample_image

RESULTS = Path(__file__).parent / "results" / "resampling.json"

SPACINGS = {"separate-z": (4.0, 1.5, 1.5), "3-D": (2.0, 1.5, 1.5)}


def main() -> None:
    """Run the benchmark and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    volume, source = setting.scan(args.slices), setting.source_name()
    image = volume.array.astype(np.float32)
    results = {}
    for path, spacing in SPACINGS.items():
        plan = setting.model_folders.plans(spacing=spacing)
        if path == "3-D":
            plan["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"]["force_separate_z"] = False
        configuration = PlansManager(plan).get_configuration("3d_fullres")
        shape = new_shape(image.shape, volume.spacing_mm, spacing)
        seconds: dict[str, list[float]] = {"stock": [], "ours": []}
        with threadpool_limits(1):
            for _ in range(args.rounds):
                start = time.process_time()
                theirs = configuration.resampling_fn_data(image[None], shape, volume.spacing_mm, spacing)[0]
                seconds["stock"].append(time.process_time() - start)
                spline_matrix.cache_clear()
                start = time.process_time()
                ours = resample_image(image, shape, volume.spacing_mm, spacing, configuration)
                seconds["ours"].append(time.process_time() - start)
        difference = np.abs(ours - theirs)
        row = {
            **{name: statistics.median(values) for name, values in seconds.items()},
            "mean_hu": float(difference.mean()),
            "max_hu": float(difference.max()),
        }
        results[path] = row
        print(
            f"{path}: {image.shape} to {shape}: stock {row['stock']:.2f} s, ours {row['ours']:.2f} s, "
            f"ratio {row['stock'] / row['ours']:.1f}x; difference mean {row['mean_hu']:.2g}, max {row['max_hu']:.2g} HU"
        )
    args.output.parent.mkdir(exist_ok=True)
    record = {"command": shown_command(), "hardware": setting.hardware(), "scan": source, "results": results}
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
