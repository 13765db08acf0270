"""Agreement of five members' label maps, 13 organs at 512 x 512 x 160, against pair-by-pair, organ-by-organ NumPy.

    python benchmarks/agreement.py [--repeats 5] [--reference_repeats 1]

The members are one real anatomy, waved and shifted by a few voxels. Both get the same arrays in memory; runs take turns
on one thread and medians are reported. Reading the five files is timed too, because agreement should cost less. Prints
a table and writes benchmarks/results/agreement.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
from label_maps import ROOT, SPACING_MM, anatomy, as_predicted, environment

from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, read_labels, write_volume
from nnunet_flare.selection.agreement import pairwise_dice

MEMBERS = 5
ORGANS = 13
TARGET_RATIO = 1 / 50
TOLERANCE = 1e-12


def organ_by_organ(maps: list[np.ndarray]) -> np.ndarray:
    """(pairs, organs) Dice from binary masks."""
    rows = []
    for a, b in combinations(maps, 2):
        row = []
        for organ in range(1, ORGANS + 1):
            one, other = a == organ, b == organ
            total = np.count_nonzero(one) + np.count_nonzero(other)
            row.append(1.0 if total == 0 else 2.0 * np.count_nonzero(one & other) / total)
        rows.append(row)
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference_repeats", type=int, default=1)
    args = parser.parse_args()
    truth, source = anatomy()
    maps = [np.roll(as_predicted(truth) if member else truth, member, axis=1) for member in range(MEMBERS)]
    times: dict[str, list[float]] = {"reference": [], "ours": [], "reading": []}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{member}.nii.gz" for member in range(MEMBERS)]
        for file, labels in zip(files, maps, strict=True):
            write_volume(file, Volume(labels, SPACING_MM))
        for turn in range(max(args.repeats, args.reference_repeats)):
            if turn < args.reference_repeats:
                start = time.perf_counter()
                expected = organ_by_organ(maps)
                times["reference"].append(time.perf_counter() - start)
            start = time.perf_counter()
            found = pairwise_dice(maps, ORGANS + 1)
            times["ours"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for file in files:
                read_labels(file)
            times["reading"].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    difference = float(np.abs(found.dice - expected).max())
    ratio = medians["ours"] / medians["reference"]
    met = ratio <= TARGET_RATIO and difference <= TOLERANCE and medians["ours"] < medians["reading"]
    print(f"agreement of {MEMBERS} label maps, {ORGANS} organs, 512 x 512 x 160 ({source})")
    for name, seconds in medians.items():
        print(f"{name:12} {seconds:8.3f} s")
    print(f"1/{1 / ratio:.0f} of the reference (target 1/{1 / TARGET_RATIO:.0f}), difference {difference:.1e}: {met}")
    write_json(
        ROOT / "benchmarks" / "results" / "agreement.json",
        {"source": source, "seconds": medians, "ratio": ratio, "difference": difference, "met": met}
        | environment("numpy"),
    )


if __name__ == "__main__":
    main()
