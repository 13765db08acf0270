"""``flare-pseudolabel demo``: does self-training help on data whose truth is known? Minutes on two CPU cores.

The loop runs on synthetic abdomens whose labelled set is narrower than the unlabelled one. Then two more students are
trained with the same iterations and augmentation as the final model: one on the labelled cases alone (the supervised
control) and one on all pseudo-labels. The table says what was measured, whatever it says.
"""

from __future__ import annotations

import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.children import python_module
from nnunet_flare.errors import TaskError
from nnunet_flare.files import read_json, write_json, write_text
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.executors.child import run_child
from nnunet_flare.rounds.executors.local import run_local
from nnunet_flare.rounds.run.dataset import dataset_json
from nnunet_flare.rounds.run.ledger import Entry, read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.build import build_training
from nnunet_flare.rounds.stages.evaluate import DICE, predict_held_out, score_folder
from nnunet_flare.rounds.start import plan_run, start_run
from nnunet_flare.rounds.true_dice import RANKED, ranking
from nnunet_flare.tables import table
from nnunet_flare.wording import duration

log = logging.getLogger(__name__)

LABELLED, UNLABELLED, TEST = 6, 24, 12
SIZE = (32, 48, 64)
PARALLEL = 2
"""Trainings at a time, of one thread each: so small a network gains nothing from a second thread."""


@dataclass(frozen=True)
class Demo:
    """What the demo measured, as a text, and one test case to look at: its scan and label maps by what they are."""

    text: str
    scan: Path
    maps: dict[str, Path]


def run_demo(output: Path, *, seed: int) -> Demo:
    """Run the demo in a folder, or go on where it stopped; writes ``demo.txt`` and ``demo.json``.

    Raises:
        TaskError: when a step of the loop fails.
    """
    from nnunet_flare.phantom import write_phantom

    started = time.monotonic()
    data = output / "data"
    if not (output / "data.json").is_file():
        log.info("phantom: %d labelled, %d unlabelled and %d test cases", LABELLED, UNLABELLED, TEST)
        write_phantom(data, labelled=LABELLED, unlabelled=UNLABELLED, test=TEST, size=SIZE, seed=seed)
        write_json(output / "data.json", {"seed": seed})
    for variable, value in {"NNUNET_FLARE_THREADS": "1", "nnUNet_n_proc_DA": "1"}.items():
        os.environ.setdefault(variable, value)
    folders = {
        "nnUNet_raw": data / "nnUNet_raw",
        "nnUNet_preprocessed": output / "nnUNet_preprocessed",
        "nnUNet_results": output / "nnUNet_results",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("demo", {"seed": str(seed)})
    request = Request(
        dataset="22",
        unlabelled=data / "unlabelled",
        run_dir=output / "run",
        device="cpu",
        eval_images=data / "test" / "images",
        eval_labels=data / "test" / "labels",
    )
    run = start_run(plan_run(request, recipe, folders))
    run_local(run, cpu_tasks=PARALLEL)
    entries = read_decisions(run.paths, 0)
    with ThreadPoolExecutor(PARALLEL) as pool:
        control = pool.submit(_train_arm, run, "control", [])
        everything = pool.submit(_train_arm, run, "all", [entry for entry in entries if entry.label_sha256])
    arms = {
        f"ensemble of the {len(recipe.member_folds(0))} supervised members": _measured(run, 0),
        "supervised control (same iterations and augmentation)": _measure_arm(run, control.result()),
        "all pseudo-labels": _measure_arm(run, everything.result()),
        "selected half": _measured(run, run.final.number),
    }
    ranked = ranking(run, 0, data / "unlabelled_truth")
    spearman = {rule: _defined(ranked[rule].spearman) for rule in RANKED if rule in ranked}  # not all rank every recipe
    seconds = time.monotonic() - started
    text = _table(run, arms, spearman, seed, seconds)
    write_text(output / "demo.txt", text + "\n")
    write_json(output / "demo.json", {"seed": seed, "arms": arms, "spearman": spearman, "seconds": round(seconds, 1)})
    return _demo(run, text)


def _measured(run: Run, number: int) -> dict[str, float]:
    return _means(read_json(run.paths.evaluation(number) / "dice.json", DICE))


def _defined(value: float) -> float | None:
    """A correlation; None where it has none, since a rule (or the truth) gives all labels the same value."""
    return None if math.isnan(value) else value


def _means(result: dict[str, Any]) -> dict[str, float]:
    return {"mean": result["mean"], **result["organs"]}


def _train_arm(run: Run, arm: str, taken: list[Entry]) -> str:
    """Train one more student like the final model, on other pseudo-labels; returns its configuration."""
    name = f"{run.recipe.configuration}_{run.settings.name}_{arm}"
    if not (_arm_model(run, name) / "fold_all" / "checkpoint_final.pth").is_file():
        log.info("%s: started", name)
        build_training(run, name, run.final, taken)
        path = run.paths.log(f"train-{arm}")
        with open(path, "ab") as stream:
            command = python_module("nnunetv2.run.run_training", "22", name, "all", "-tr", run.recipe.trainer)
            command += ["-p", run.settings.plans_name, "-device", run.settings.device]
            code = run_child(command, environment=run.environment(), output=stream)
        if code != 0:
            raise TaskError(f"training {name} ended with exit code {code}; see {path}")
        log.info("%s: done", name)
    return name


def _arm_model(run: Run, name: str) -> Path:
    return run.results / f"{run.recipe.trainer}__{run.settings.plans_name}__{name}"


def _measure_arm(run: Run, name: str) -> dict[str, float]:
    folder = run.root / "evaluation" / name.rpartition("_")[2]
    cases = predict_held_out(run, _arm_model(run, name), [("all", "checkpoint_final.pth")], folder)
    labels, document = Path(str(run.settings.eval_labels)), dataset_json(run)
    score_folder(folder, labels, cases, document["file_ending"], document["labels"])
    return _means(read_json(folder / "dice.json", DICE))


def _table(
    run: Run, arms: dict[str, dict[str, float]], spearman: dict[str, float | None], seed: int, seconds: float
) -> str:
    taken = sum(entry.decision == "taken" for entry in read_decisions(run.paths, 0))
    settings = run.recipe.settings(run.final.planned, run=None)
    lines = [
        f"Mean Dice over 13 organs on {TEST} synthetic test cases (seed {seed}; {LABELLED} labelled, "
        f"{UNLABELLED} unlabelled, {taken} selected;",
        f"students {settings.num_epochs} x {settings.iterations_per_epoch} iterations, "
        f"augmentation {run.recipe.augmentation.in_round(run.final.planned).labelled})",
        "",
    ]
    lines += table([[name, f"{values['mean']:.3f}"] for name, values in arms.items()], align="lr")
    lines += ["", "Rank correlation (Spearman) of agreement and true Dice of the pseudo-labels"]
    rows = [[rule, "-" if value is None else f"{value:.2f}"] for rule, value in spearman.items()]
    lines += table(rows, align="lr")
    return "\n".join([*lines, "", f"time: {duration(seconds)}"])


def _demo(run: Run, text: str) -> Demo:
    ending = dataset_json(run)["file_ending"]
    images, labels = Path(str(run.settings.eval_images)), Path(str(run.settings.eval_labels))
    case = min(p.name[: -len(ending)] for p in labels.glob(f"*{ending}"))
    maps = {
        "truth": labels / f"{case}{ending}",
        "supervised control": run.root / "evaluation" / "control" / f"{case}{ending}",
        "self-training, selected half": run.paths.evaluation(run.final.number) / f"{case}{ending}",
    }
    return Demo(text, images / f"{case}_0000{ending}", maps)
