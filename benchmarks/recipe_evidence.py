"""The result files of ``recipes.py`` as tables, a picture and the page ``docs/recipes-evidence.md``.

    python benchmarks/recipe_evidence.py

Every figure is the mean over seeds with its 95 % t-interval; a seed has scans and random streams of its own. Arms of a
seed share its scans, so they are compared pair by pair. The page is made of the files, but for the time of all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from label_maps import ROOT
from recipe_systems import SYSTEMS

from nnunet_flare.files import read_json, replacing, write_text
from nnunet_flare.organs import FLARE22

RESULTS = ROOT / "benchmarks" / "results" / "recipes"
PAGE = ROOT / "docs" / "recipes-evidence.md"
PICTURE = PAGE.with_suffix(".png")

CONFIDENCE = 0.95
NOTHING = 0.01
"""Smaller differences of the mean Dice mean nothing with a dozen test scans (measured when the phantom was made)."""
CONTROL, ORACLE = "supervised", "oracle"

Results = Mapping[str, Mapping[int, dict[str, Any]]]
"""Result files by arm and seed."""


@dataclass(frozen=True)
class Interval:
    """Mean of values and its t-interval, NaN ends for a single value."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and t-interval at :data:`CONFIDENCE`; values that are not known (NaN) are left out."""
    from scipy.stats import t

    known = np.array([value for value in values if not np.isnan(value)], dtype=float)
    if known.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), ())
    mean = float(known.mean())
    if known.size == 1:
        return Interval(mean, float("nan"), float("nan"), (mean,))
    half = float(t.ppf((1 + CONFIDENCE) / 2, known.size - 1) * known.std(ddof=1) / np.sqrt(known.size))
    return Interval(mean, mean - half, mean + half, tuple(known.tolist()))


def read_results(folder: Path = RESULTS) -> Results:
    """All result files, arms in the order of :data:`SYSTEMS`."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for system in SYSTEMS:
        for path in sorted(folder.glob(f"{system.name}_seed*.json")):
            document = read_json(path)
            found.setdefault(system.name, {})[int(document["seed"])] = document
    return found


def dice(results: Results, name: str) -> dict[int, float]:
    """Mean test Dice of an arm by seed."""
    return {seed: document["dice"]["mean"] for seed, document in results[name].items()}


def difference(results: Results, name: str, other: str = CONTROL) -> Interval:
    """An arm minus another, seed by seed."""
    a, b = dice(results, name), dice(results, other)
    return t_interval([a[seed] - b[seed] for seed in a if seed in b])


def beyond_teachers(results: Results, name: str) -> Interval:
    """An arm's final model minus the models that made its first pseudo-labels; no values without such models."""
    teachers = {seed: found["rounds"][0]["test_dice"] for seed, found in results[name].items() if found["rounds"]}
    final = dice(results, name)
    return t_interval([final[seed] - own for seed, own in teachers.items() if own is not None])


def ensembles(results: Results) -> dict[int, float]:
    """Mean test Dice of the three supervised members together, by seed."""
    shared = (arm for arm in results.values() if all(found[CHARGED] for found in arm.values()))
    return {seed: found["rounds"][0]["test_dice"] for arm in shared for seed, found in arm.items()}


CHARGED = "members_trained_once_for_all_arms_of_the_seed"


def rankings(results: Results) -> list[tuple[str, str, Interval, Interval]]:
    """Rows (which labels, rule, Spearman, AUC); the labels of the common ensemble stand there once."""
    rows = []
    is_told = False
    for name, arm in results.items():
        charged = all(found[CHARGED] for found in arm.values())
        if charged and is_told:
            continue
        is_told |= charged
        for number in range(max(len(found["rounds"]) for found in arm.values())):
            found = [document["rounds"][number]["ranking"] for document in arm.values()]
            labels = "three folds" if charged else f"{name}, round {number}"
            rows += [
                (labels, rule, *(t_interval([each[rule][key] for each in found]) for key in ("spearman", "auc")))
                for rule in found[0]
            ]
    return rows


def page(results: Results) -> str:
    """The page, Markdown."""
    parts = [HEAD, _setting(results), "## Dice on the test scans\n", _arms(results), "![](recipes-evidence.png)\n"]
    parts += [_findings(results), "## By organ\n", _organs(results)]
    parts += ["## Pseudo-labels against the truth\n", _pseudo_labels(results)]
    parts += ["## How well a rule ranks pseudo-labels\n", RANKS, _rankings(results), TAIL]
    return "\n".join(parts)


HEAD = """# Evidence on the phantom

Which way of using unlabelled scans helps, when everything else is the same? Every recipe runs on [synthetic
abdomens](phantom.md) whose truth is known: the labelled scans come from a narrow domain (one scanner, portal phase,
healthy), the unlabelled and the test scans from a wide one. All arms have the same tiny network, optimiser and
augmentation, the same optimiser steps in all their trainings together, and those that label scans the same number of
predictions of unlabelled scans. This says nothing about patients, and nothing about the papers' systems at their size.

Teachers have a price here: the control spends all steps on one network, an arm with three folds 600 of 1400 on its
teachers, three generations 350 on each network, and every student but one starts from scratch. The last column of the
first table leaves that price out, and compares with the models that made an arm's first labels; but a student may have
more steps than each of them.
"""

RANKS = """Spearman's correlation of a rule's score with the true mean Dice of the pseudo-labels, and the chance that
the rule scores a label above the median Dice higher than one below it (AUC). Mean, lowest and highest of the seeds.
"""

TAIL = """## Run it again

```sh
python benchmarks/recipes.py --jobs 2
python benchmarks/recipe_evidence.py
```

All arms and seeds took 49 minutes on two cores, other work beside them; `--quick`, which shows that all run, less
than 3. An arm and seed that has its file in `benchmarks/results/recipes/` is not run again. Each arm is a run of
`flare-pseudolabel` with the `--set` values that stand in its file.
"""


def _setting(results: Results) -> str:
    every = [document for arm in results.values() for document in arm.values()]
    steps = sorted({found["optimiser_steps"]["total"] for found in every})
    predictions = sorted({found["unlabelled_predictions"] for found in every if found["rounds"]})
    cases, machine = every[0]["cases"], every[0]["environment"]
    hours = sum(found["seconds"] for found in every) / 3600
    augmentation = sorted({found["augmentation"]["labelled"] for found in every})
    return (
        f"{cases['labelled']} labelled, {cases['unlabelled']} unlabelled and {cases['test']} test scans of "
        f"{' x '.join(map(str, every[0]['size']))} voxels in each of {len({f['seed'] for f in every})} seeds; "
        f"{_listed(steps)} optimiser steps and {_listed(predictions)} unlabelled predictions (one network, one scan) "
        "an arm; "
        f"augmentation {_listed(augmentation)} for labelled and pseudo-labelled scans alike. Where an arm starts from "
        "three folds, these are trained once per seed and charged to every such arm in full. Measured on "
        f"{machine['machine']}, one thread a training, {machine['cores']} cores shared with other work; "
        f"{hours:.1f} hours of tasks in all arms together.\n"
    )


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(str(value) for value in values)


def _arms(results: Results) -> str:
    lines = [
        "| | seeds | mean Dice (95 % interval) | minus control, seed by seed | minus its own first teachers |",
        "|---|---|---|---|---|",
    ]
    for name, arm in results.items():
        title = next(iter(arm.values()))["title"]
        gain = "" if name == CONTROL or CONTROL not in results else str(difference(results, name))
        taught = beyond_teachers(results, name)
        beyond = str(taught) if taught.values else ""
        lines.append(f"| {title} | {len(arm)} | {t_interval(list(dice(results, name).values()))} | {gain} | {beyond} |")
    together = ensembles(results)
    if together and CONTROL in results:
        control = dice(results, CONTROL)
        gain = t_interval([value - control[seed] for seed, value in together.items() if seed in control])
        title = "*three supervised folds together (the teachers of the arms above that start from folds)*"
        lines.append(f"| {title} | {len(together)} | {t_interval(list(together.values()))} | {gain} | |")
    return "\n".join(lines) + "\n"


def _findings(results: Results) -> str:
    """What the figures say, in words that follow from them."""
    if CONTROL not in results:
        return ""
    groups: dict[str, list[str]] = {"above": [], "below": [], "open": []}
    for name, arm in results.items():
        if name in (CONTROL, ORACLE):
            continue
        gain = difference(results, name)
        clear = not np.isnan(gain.low) and abs(gain.mean) >= NOTHING and gain.low * gain.high > 0
        groups[("above" if gain.mean > 0 else "below") if clear else "open"].append(next(iter(arm.values()))["title"])
    lines = [f"Differences below about {NOTHING} mean nothing, and so do those whose interval holds 0.", ""]
    if ORACLE in results:
        lines.append(f"- Room there is (oracle minus control): {difference(results, ORACLE)}.")
    words = {"above": "Above the control", "below": "Below the control", "open": "Not told apart from the control"}
    lines += [f"- {words[group]}: {'; '.join(names)}." for group, names in groups.items() if names]
    missing = [system.title for system in SYSTEMS if system.name not in results]
    lines += [f"- Not measured yet: {'; '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"


def _organs(results: Results) -> str:
    lines = ["| | " + " | ".join(organ.short for organ in FLARE22) + " |", "|---" * (len(FLARE22) + 1) + "|"]
    for name, arm in results.items():
        means = (np.mean([found["dice"]["organs"][organ.name] for found in arm.values()]) for organ in FLARE22)
        lines.append(f"| {name} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def _pseudo_labels(results: Results) -> str:
    lines = [
        "| | round | taken | true Dice of all | of those taken | test Dice of the models that label |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in results.items():
        for number in range(max(len(found["rounds"]) for found in arm.values())):
            rounds = [found["rounds"][number] for found in arm.values()]

            def mean(key: str, rounds: Sequence[Mapping[str, Any]] = rounds) -> float:
                return float(np.mean([found[key] for found in rounds]))

            own = "" if rounds[0]["test_dice"] is None else f"{mean('test_dice'):.3f}"

            lines.append(
                f"| {name} | {number} | {mean('taken'):.1f} of {mean('pseudo_labels'):.0f} | {mean('true_dice'):.3f} | "
                f"{mean('true_dice_of_taken'):.3f} | {own} |"
            )
    return "\n".join(lines) + "\n"


def _rankings(results: Results) -> str:
    lines = ["| labels of | rule | Spearman | AUC |", "|---|---|---|---|"]
    lines += [
        f"| {labels} | {rule} | {_with_range(spearman)} | {_with_range(auc)} |"
        for labels, rule, spearman, auc in rankings(results)
    ]
    return "\n".join(lines) + "\n"


def _with_range(found: Interval) -> str:
    """A mean with the lowest and the highest seed: an interval would leave the range that a rank can have."""
    return f"{found.mean:.2f} ({min(found.values):.2f} to {max(found.values):.2f})" if found.values else "-"


BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "0.45"
"""Of Okabe and Ito's colours: told apart by colour-blind readers and in grey."""


def draw(results: Results, path: Path) -> None:
    """The arms' mean Dice with intervals and single seeds; below, how well the rules rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [
        (next(iter(arm.values()))["title"], t_interval(list(dice(results, name).values())), _colour(name))
        for name, arm in results.items()
    ]
    ranked = [(f"{rule} ({labels})", spearman, BLUE) for labels, rule, spearman, _ in rankings(results)]
    figure = Figure(figsize=(9.5, 1.6 + 0.32 * (len(arms) + len(ranked))), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=(len(arms), len(ranked)))
    _dots(upper, arms, "mean Dice on the test scans (line: 95 % interval)", has_interval=True)
    _dots(lower, ranked, "Spearman of a rule's score and the true Dice", has_interval=False)
    if CONTROL in results:
        upper.axvline(np.mean(list(dice(results, CONTROL).values())), color=GREY, linewidth=0.8, linestyle=":")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _colour(name: str) -> str:
    return GREY if name in (CONTROL, ORACLE) else BLUE


def _dots(axis: Any, rows: Sequence[tuple[str, Interval, str]], label: str, *, has_interval: bool) -> None:
    for place, (_, interval, colour) in enumerate(rows):
        if has_interval and not np.isnan(interval.low):
            axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
        axis.plot(interval.values, [place] * len(interval.values), "o", color=VERMILION, markersize=3.5, zorder=3)
        axis.plot(interval.mean, place, "D", color=colour, markersize=6)
    axis.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(f"{label}; diamond: mean, dots: seeds", fontsize="small")
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)


def main(show: Callable[[str], None] = print) -> None:
    results = read_results()
    text = page(results)
    write_text(PAGE, text)
    draw(results, PICTURE)
    show(text)


if __name__ == "__main__":
    main()
