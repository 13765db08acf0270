"""The flare22 pipeline at 512 x 512 x 160 against the same operations with one-hot SciPy passes.

    python benchmarks/postprocess.py [--repeats 7] [--reference_repeats 3]

The reference is written as the published systems work, one binary mask of the whole volume an organ, but without their
waste: components are counted with one histogram each, and closing is done in the organ's box. Both get a label map of
13 organs with 40 stray blobs; the results must be equal. Runs take turns on one thread; medians are reported. Prints a
table and writes benchmarks/results/postprocess.json.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from label_maps import ROOT, SPACING_MM, anatomy, as_predicted, environment, with_strays
from scipy import ndimage

from nnunet_flare.files import write_json
from nnunet_flare.organs import FLARE22
from nnunet_flare.postprocessing.pipeline import BUILT_IN, load_pipeline

TARGET_RATIO = 1 / 12
TARGET_S = 0.7

FULL = np.ones((3, 3, 3), dtype=bool)
JUDGED_BY_VOLUME = (2, 3, 4, 7, 8, 9, 13)
CLOSED = (7, 8)
REFERENCES = (5, 6, 10)
JUDGED_BY_SHARE = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13)
LIVER, GALLBLADDER = 1, 9


def one_hot_scipy(labels: np.ndarray) -> np.ndarray:
    """flare22, organ by organ on binary masks."""
    labels = labels.copy()
    voxel_mm3 = float(np.prod(SPACING_MM))
    for organ in JUDGED_BY_VOLUME:
        mask = labels == organ
        minimum = FLARE22[organ - 1].min_volume_mm3
        if minimum is not None and np.count_nonzero(mask) * voxel_mm3 < 0.5 * minimum:
            labels[mask] = 0
    for organ in CLOSED:
        mask = np.pad(labels == organ, 5)
        box = ndimage.find_objects(mask.view(np.uint8))[0]
        wide = tuple(slice(max(0, axis.start - 5), axis.stop + 5) for axis in box)
        mask[wide] = ndimage.binary_closing(mask[wide], structure=np.ones((5, 5, 5)))
        labels[mask[5:-5, 5:-5, 5:-5]] = organ
    labels = _field(labels)
    for organ in JUDGED_BY_SHARE:
        numbered, count = ndimage.label(labels == organ, structure=FULL)
        if count > 1:
            sizes = np.bincount(numbered.ravel())
            small = sizes < 0.1 * sizes[1:].sum()
            small[0] = False
            labels[small[numbered]] = 0
    return _gallbladder(labels)


def _field(labels: np.ndarray) -> np.ndarray:
    present = [bool(np.isin(plane, REFERENCES).any()) for plane in labels]
    if not any(present):
        return labels
    gap = int(20 / SPACING_MM[0])
    top = max(place for place, here in enumerate(present) if here)
    ends = [z for z in range(top) if not present[z] and not present[max(0, z - gap)]]
    labels[: max(0, max(ends, default=0) - gap)] = 0
    labels[top + 1 :] = 0
    return labels


def _gallbladder(labels: np.ndarray) -> np.ndarray:
    numbered, count = ndimage.label(labels == GALLBLADDER, structure=FULL)
    for number in range(1, count + 1) if count > 1 else ():
        component = numbered == number
        for place in np.flatnonzero(component.any(axis=(1, 2))):
            contour = ndimage.binary_dilation(component[place]) & ~component[place]
            if set(np.unique(labels[place][contour])) == {LIVER}:
                labels[component] = LIVER
                break
    return labels


def seconds(function, labels: np.ndarray) -> tuple[float, np.ndarray]:  # type: ignore[no-untyped-def]
    """Wall time of one call and its result."""
    start = time.perf_counter()
    result = function(labels)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--reference_repeats", type=int, default=3)
    args = parser.parse_args()
    truth, source = anatomy()
    labels = with_strays(as_predicted(truth), 1)
    pipelines = {name: load_pipeline(name) for name in BUILT_IN}
    times: dict[str, list[float]] = {name: [] for name in ("reference", *pipelines)}
    results = {}
    for turn in range(max(args.repeats, args.reference_repeats)):
        if turn < args.reference_repeats:
            spent, results["reference"] = seconds(one_hot_scipy, labels)
            times["reference"].append(spent)
        for name, pipeline in pipelines.items():
            spent, results[name] = seconds(lambda array, p=pipeline: p.apply(array, SPACING_MM), labels)
            times[name].append(spent)
    medians = {name: statistics.median(values) for name, values in times.items()}
    equal = bool(np.array_equal(results["flare22"], results["reference"]))
    ratio = medians["flare22"] / medians["reference"]
    met = equal and ratio <= TARGET_RATIO and medians["flare22"] <= TARGET_S
    print(f"post-processing of 13 organs with stray blobs, 512 x 512 x 160 ({source})")
    print(f"{'pipeline':28} {'seconds':>8}")
    print(f"{'flare22, one-hot SciPy':28} {medians['reference']:8.3f}")
    for name in pipelines:
        print(f"{name:28} {medians[name]:8.3f}")
    print(
        f"flare22: 1/{1 / ratio:.1f} of the reference (target 1/{1 / TARGET_RATIO:.0f}), {medians['flare22']:.3f} s "
        f"(target {TARGET_S} s), results equal: {equal}, met: {'yes' if met else 'NO'}"
    )
    write_json(
        ROOT / "benchmarks/results/postprocess.json",
        {
            **environment("numpy", "scipy", "connected-components-3d"),
            "source": source,
            "median_s": medians,
            "ratio": ratio,
            "target_ratio": TARGET_RATIO,
            "target_s": TARGET_S,
            "equal": equal,
            "voxels_changed": int(np.count_nonzero(results["flare22"] != labels)),
            "met": met,
        },
    )


if __name__ == "__main__":
    main()
