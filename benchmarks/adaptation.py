"""Does the recipe adaptation help? Labelled synthetic CTs, unlabelled and test scans in MR and PET.

    python benchmarks/adaptation.py [--arms NAME ...] [--seeds 1 2 3] [--quick] [-o WORK_DIR]

Four arms of one tiny network, one plan and one optimiser, every network with the same steps: CTs alone with nnU-Net's
augmentation, CTs alone with the augmentation that takes them towards other modalities, the recipe (three such teachers,
the better half of each modality by their agreement, one student), and the true labels of all scans. An arm and seed
that has its result file is skipped, and a killed one goes on where it stopped. Writes
benchmarks/results/adaptation/<arm>_seed<k>.json, and of them benchmarks/results/adaptation.json. ``--quick`` trains a
few steps to show that all arms run, and leaves its results in WORK_DIR.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from label_maps import ROOT, environment
from recipe_statistics import dice as dice_of
from recipe_statistics import difference
from recipe_systems import Budget, System
from recipes import THREADS, make_data, result, result_file, start, work

from nnunet_flare.errors import FlareError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.do_task import do_task
from nnunet_flare.rounds.run.tasks import graph

RESULTS = ROOT / "benchmarks" / "results" / "adaptation"
DOMAINS = ("mr", "pet")
FULL = Budget(labelled=4, unlabelled=16, test=8, size=(32, 48, 64), epoch_steps=50, times=3)
QUICK = Budget(labelled=3, unlabelled=4, test=2, size=(32, 48, 64), epoch_steps=1)
SEEDS = (1, 2, 3)

PLAN = {"planner": "nnUNetPlannerFlareModality"}
ONE_MODEL = {**PLAN, "members.count": "1", "selection": "{rule: all}"}
OTHER_CONTRASTS = {"augmentation": "{labelled: modality, pseudo: strong, partial: stock}"}

CONTROLS = ("source_only", "source_contrasts")
"""Arms that the others are compared with, test scan by test scan."""

ARMS: tuple[System, ...] = (
    System("source_only", "CTs alone", "demo", ONE_MODEL, labels="labelled"),
    System(
        "source_contrasts", "CTs alone, in other contrasts", "demo", {**ONE_MODEL, **OTHER_CONTRASTS}, labels="labelled"
    ),
    System(
        "adapted",
        "adaptation: one round, the better half of each modality",
        "adaptation",
        {**PLAN, **OTHER_CONTRASTS, "rounds": "1", "selection.top_fraction": "0.5"},
    ),
    System("oracle", "oracle: true labels of all", "demo", ONE_MODEL, labels="true"),
)

log = logging.getLogger("nnunet_flare.benchmark")


def run_arm(folder: Path, arm: System, seed: int, budget: Budget) -> dict[str, Any]:
    """Run one arm of one seed to its end and measure it."""
    run = start(folder, arm, seed, budget, None)
    if run.recipe.matches_histograms(0):  # of a supervised arm too, which labels no scan
        for name in ("plan", "unlabelled"):
            do_task(run, graph(run)[name])
    seconds = work(run, is_supervised=arm.is_supervised)
    return result(run, arm, seed, budget, folder / "unlabelled_truth", seconds)


def by_domain(document: dict[str, Any]) -> dict[str, float]:
    """Mean Dice of the test scans of each modality."""
    cases: dict[str, list[float]] = defaultdict(list)
    for case, organs in document["dice"]["cases"].items():
        domain = next(name for name in DOMAINS if f"_{name}_" in case)
        cases[domain].append(mean(value for value in organs.values() if value is not None))
    return {domain: mean(cases[domain]) for domain in DOMAINS}


def summary(results: Path) -> dict[str, Any]:
    """Dice of every arm, and its differences, with 95 % intervals; by modality the mean of its seeds, and each seed."""
    arms, every = [], {}
    for arm in ARMS:
        paths = results.glob(f"{arm.name}_seed*.json")
        every[arm.name] = {int(path.stem.rpartition("seed")[2]): read_json(path) for path in sorted(paths)}
    for arm in ARMS:
        documents = list(every[arm.name].values())
        if not documents:
            continue
        dice = [by_domain(document) for document in documents]
        arms.append(
            {
                "arm": arm.title,
                "seeds": len(documents),
                "dice": str(dice_of(every, arm.name)),
                **{f"minus_{name}": str(difference(every, arm.name, name)) for name in CONTROLS if name != arm.name},
                **{f"dice_{name}": round(mean(each[name] for each in dice), 3) for name in DOMAINS},
                **{f"dice_{name}_of_each_seed": [round(each[name], 3) for each in dice] for name in DOMAINS},
                "networks": documents[0]["networks"],
                "seconds": round(mean(document["seconds"] for document in documents)),
            }
        )
    return {
        "command": "python benchmarks/adaptation.py",
        "environment": environment("nnunet-flare", "nnunetv2", "torch"),
        "results": arms,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 1 2 3; with --quick 1")
    parser.add_argument("--quick", action="store_true", help="a few steps of every arm")
    parser.add_argument("-o", dest="work_dir", type=Path, default=Path(tempfile.gettempdir()) / "flare_adaptation")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    os.environ.update(THREADS)
    budget = QUICK if args.quick else FULL
    work_dir = args.work_dir / "quick" if args.quick else args.work_dir
    results = work_dir / "results" if args.quick else RESULTS
    failed = []
    for seed in args.seeds or ((1,) if args.quick else SEEDS):
        folder = work_dir / f"seed{seed}"
        make_data(folder, seed, budget, domain=DOMAINS)
        for arm in ARMS:
            if arm.name not in args.arms or result_file(results, arm, seed).is_file():
                continue
            try:
                found = run_arm(folder, arm, seed, budget)
            except FlareError as error:
                log.error("%s, seed %d: %s", arm.name, seed, error)
                failed.append(f"{arm.name}, seed {seed}")
                continue
            write_json(result_file(results, arm, seed), found)
            log.info("%s, seed %d: Dice %s in %.0f s", arm.name, seed, by_domain(found), found["seconds"])
    if results.is_dir():
        write_json(results.with_suffix(".json"), summary(results))
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
