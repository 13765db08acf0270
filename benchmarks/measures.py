"""DSC and NSD of 13 organs at 512 x 512 x 160 against DeepMind's surface-distance.

    python benchmarks/measures.py [--repeats 5] [--reference_repeats 1]

Both score the same two label maps, once clean (each organ in one piece), once with 40 stray blobs in each. DeepMind's
functions get each organ cropped to the box of both maps beforehand, which is kinder than the official script. Ours
counts all labelled slices and rounds nothing, and so does the reference. Runs take turns on one thread; medians are
reported. Prints a table and writes benchmarks/results/measures.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import numpy as np
from label_maps import ROOT, SPACING_MM, anatomy, as_predicted, environment, with_strays
from scipy import ndimage

from nnunet_flare.evaluation.measures import CaseScores, evaluate_case
from nnunet_flare.evaluation.structures import Structure, structures_of
from nnunet_flare.files import write_json
from nnunet_flare.images import Volume
from nnunet_flare.organs import FLARE22

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance

TARGETS = {"stray blobs": 1 / 10, "clean": 1.0}
"""Our time over DeepMind's, at most."""

LARGEST_DIFFERENCE = 1e-6

STRUCTURES = structures_of(FLARE22)


def ours(reference: np.ndarray, prediction: np.ndarray) -> CaseScores:
    """This package, unrounded."""
    return evaluate_case(Volume(reference, SPACING_MM), Volume(prediction, SPACING_MM), FLARE22, corrected=True)


def deepmind(reference: np.ndarray, prediction: np.ndarray) -> CaseScores:
    """DeepMind's functions organ by organ, each in the box of both maps."""
    dsc, nsd = {}, {}
    boxes = [ndimage.find_objects(array, max_label=13) for array in (reference, prediction)]
    for structure in STRUCTURES:
        own = [found[structure.id - 1] for found in boxes]
        z, y, x = (slice(min(b[a].start for b in own), max(b[a].stop for b in own)) for a in range(3))
        if structure.labelled_slices_only:
            z = own[0][0]
        dsc[structure.id], nsd[structure.id] = _of_masks(
            reference[z, y, x] == structure.id, prediction[z, y, x] == structure.id, structure
        )
    return CaseScores(dsc, nsd)


def _of_masks(truth: np.ndarray, found: np.ndarray, structure: Structure) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distances = surface_distance.compute_surface_distances(truth, found, SPACING_MM)
    nsd = surface_distance.compute_surface_dice_at_tolerance(distances, structure.nsd_tolerance_mm)
    return float(surface_distance.compute_dice_coefficient(truth, found)), float(nsd)


def largest_difference(one: CaseScores, other: CaseScores) -> float:
    """Of any organ's DSC or NSD."""
    pairs = [(getattr(one, m)[s.id], getattr(other, m)[s.id]) for m in ("dsc", "nsd") for s in STRUCTURES]
    return max(abs(a - b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference_repeats", type=int, default=1)
    args = parser.parse_args()
    reference, source = anatomy()
    prediction = as_predicted(reference)
    maps = {
        "clean": (reference, prediction),
        "stray blobs": (with_strays(reference, 1), with_strays(prediction, 2)),
    }
    rows = []
    for name, (truth, found) in maps.items():
        seconds: dict[str, list[float]] = {"ours": [], "DeepMind": []}
        scores = {}
        for turn in range(max(args.repeats, args.reference_repeats)):
            for label, function, repeats in (
                ("DeepMind", deepmind, args.reference_repeats),
                ("ours", ours, args.repeats),
            ):
                if turn < repeats:
                    start = time.perf_counter()
                    scores[label] = function(truth, found)
                    seconds[label].append(time.perf_counter() - start)
        medians = {label: statistics.median(values) for label, values in seconds.items()}
        difference = largest_difference(scores["ours"], scores["DeepMind"])
        rows.append(
            {
                "maps": name,
                "ours_s": medians["ours"],
                "deepmind_s": medians["DeepMind"],
                "ratio": medians["ours"] / medians["DeepMind"],
                "target_ratio": TARGETS[name],
                "largest_difference": difference,
                "mean_dsc": float(np.mean(list(scores["ours"].dsc.values()))),
                "mean_nsd": float(np.mean(list(scores["ours"].nsd.values()))),
                "met": medians["ours"] <= TARGETS[name] * medians["DeepMind"] and difference <= LARGEST_DIFFERENCE,
            }
        )
    print(f"DSC + NSD of 13 organs, 512 x 512 x 160 ({source})")
    print(f"{'maps':12} {'ours [s]':>9} {'DeepMind [s]':>13} {'ratio':>8} {'target':>7} {'difference':>11}  met")
    for row in rows:
        print(
            f"{row['maps']:12} {row['ours_s']:9.3f} {row['deepmind_s']:13.2f} 1/{1 / row['ratio']:<6.1f} "
            f"1/{1 / row['target_ratio']:<5.0f} {row['largest_difference']:11.1e}  {'yes' if row['met'] else 'NO'}"
        )
    packages = ("numpy", "scipy", "surface-distance")
    write_json(ROOT / "benchmarks/results/measures.json", {**environment(*packages), "source": source, "rows": rows})


if __name__ == "__main__":
    main()
