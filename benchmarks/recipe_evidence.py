"""The result files of ``recipes.py`` as tables, a picture and the page ``docs/recipes-evidence.md``.

    python benchmarks/recipe_evidence.py

Arms of a seed share its scans, so they are compared test case by test case; intervals come from a bootstrap over seeds
and cases (``recipe_statistics.py``). The page is made of the files, but for the time of all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from label_maps import ROOT
from recipe_picture import draw
from recipe_statistics import Interval, Results, bootstrap, control_of, dice, difference, read_results
from recipe_systems import CONTROL, ENSEMBLE, ORACLE, SINGLE, SYSTEMS, VARIANTS, System, find_systems

from nnunet_flare.files import write_text
from nnunet_flare.organs import FLARE22

RESULTS = ROOT / "benchmarks" / "results" / "recipes"
PAGE = ROOT / "docs" / "recipes-evidence.md"
PICTURE = PAGE.with_suffix(".png")

NOTHING = 0.01
"""Smaller differences of the mean Dice mean nothing with a dozen test scans (measured when the phantom was made)."""
GOOD_RANK = 0.9
"""Spearman's correlation that a rule of our own should reach."""
ENOUGH_ROOM = 0.05
"""Where true labels of all scans gain less than this, the trainings are too short to tell labels apart."""


def page(results: Results) -> str:
    """The page, Markdown."""
    parts = [HEAD, _setting(results), QUESTION_A, _arms(results, "stock", total=False), _findings(results, total=False)]
    parts += ["![](recipes-evidence.png)\n", QUESTION_B, _arms(results, "stock", total=True)]
    parts += [_findings(results, total=True)]
    if any(name in results for name in LONGER if not name.startswith(CONTROL)):
        parts += [QUESTION_C, _longer(results)]
    if any(system.name in results for system in VARIANTS if system.name in EXPLAINED):
        parts += [WHY, _explained(results), SO]
    if any(system.name in results for system in SYSTEMS if system.augmentation == "strong"):
        parts += [STRONG, _arms(results, "strong", total=False)]
    parts += ["## By organ\n", _organs(results), "## Pseudo-labels against the truth\n"]
    parts += [LOOPS, _pseudo_labels(results)] if "partial" in results else [_pseudo_labels(results)]
    parts += ["## How well a rule ranks pseudo-labels\n", RANKS, _rankings(results), TAIL]
    return "\n".join(parts)


HEAD = """# Evidence on the phantom

Which way of using unlabelled scans helps if everything else is the same? Every recipe runs on [synthetic
abdomens](phantom.md) with known true labels. The labelled scans come from a narrow domain (one scanner, portal phase,
healthy), the unlabelled and the test scans from a wide one. All arms have the same tiny network, the same optimiser,
the same augmentation for all scans, class weights in the cross-entropy, and equal numbers of labelled and
pseudo-labelled samples. The results say nothing about patients, and nothing about the papers' systems at full size.
"""

QUESTION_A = """## The papers' question: does a network learn more with unlabelled scans?

Every network has the same number of optimiser steps: the control, every teacher, every student. This is the papers'
protocol: they train each network until it gains no more. The cost of the teachers is left out.
"""

QUESTION_B = """## The whole cost: what is the best use of computing time?

The same arms, but the control has the steps of all networks of an arm together, teachers included: two times or four
times.
"""

QUESTION_C = """## Trained to the end

The control gains nothing more from the third and fourth thousand steps: it has four scans. A student has 28, and is far
from the end of what it can learn after 1200. Here the network that is kept has four times the steps in every arm; the
teachers and their labels are those of the first table. `--set final.num_epochs=N` asks for it.
"""

WHY = """## Why labels that are made online need a threshold

`adversarial` learns what the network itself draws, from an early time on, and nothing holds back a wrong mask. The mean
teacher holds back what it is not sure of. Mean Dice by seed, of arms that are run where they are named (`--systems`):
"""

SO = """So the recipe is at fault at this length, not the phantom: the paper begins after 50 epochs of 50 labelled
scans. Begin late, or take a recipe whose teacher is trained to the end first.
"""

EXPLAINED = {
    "adversarial": "adversarial",
    "adversarial_off": "the same without lessons on unlabelled scans (`training.adversarial.warmup=0.99`)",
    "adversarial_late": "the same, lessons begin after 450 steps and not after 150",
    "mean_teacher": "mean teacher",
    "mean_teacher_all": "the same without a threshold (`training.mean_teacher.threshold=0.0`)",
}
"""Arms, and what they are in the table that explains them."""

LONGER = ("supervised_x2", "supervised_x4", "unfiltered_x4", "uncertainty_x4")
"""Arms whose last network has more steps than the others'."""

STRONG = """## The same with strong augmentation

Strong augmentation of the labelled scans gives much of what self-training gives. Here all arms have it, the
control too.
"""

LOOPS = """The rounds of `partial` are its loops: large, hollow and small organs. Each is judged by its own organs.
"""

RANKS = """*Spearman* is the correlation of a rule's score with the true mean Dice of the pseudo-labels. *AUC* is the
chance that the rule scores a label above the median Dice higher than a label below it. *Spearman by organ* is the
correlation of the rule's value for an organ with the organ's true Dice, as the mean over the organs. Each cell has the
mean, and the lowest and highest seed.
"""

TOO_SHORT = (
    f"- **These trainings are too short to learn even the labelled scans well.** With less than {ENOUGH_ROOM} to gain, "
    "true labels of all scans hardly help either. These figures show which labels do harm, and what selection changes. "
    "They cannot show whether self-training improves a network that is trained to the end."
)

TAIL = """## Run it again

```sh
python benchmarks/recipes.py --jobs 2
python benchmarks/recipe_evidence.py
```

With `--quick`, which only shows that all arms run, it takes minutes. An arm and seed with a file in
`benchmarks/results/recipes/` is not run again. Each arm is a run of `flare-pseudolabel` with the `--set` values in
its file.
"""


def _documents(results: Results) -> list[dict[str, Any]]:
    return [document for arm in results.values() for document in arm.values()]


def _setting(results: Results) -> str:
    every = _documents(results)
    first = every[0]
    cases, machine, seeds = first["cases"], first["environment"], {found["seed"] for found in every}
    steps = sorted({step for found in results.get(CONTROL, {}).values() for step in found["steps"]})
    hours = sum(found["seconds"] for found in every) / 3600
    return (
        f"{cases['labelled']} labelled, {cases['unlabelled']} unlabelled and {cases['test']} test scans of "
        f"{' x '.join(map(str, first['size']))} voxels in each of {len(seeds)} seeds; {_listed(steps)} optimiser "
        "steps per network. Differences are computed per test case; the intervals (95 %) come from a bootstrap over "
        f"seeds and cases. Measured on {machine['machine']}, one thread per training, {machine['cores']} cores; "
        f"{hours:.1f} hours of tasks in all arms together.\n"
    )


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(str(value) for value in values)


def _shown(results: Results, augmentation: str, *, total: bool) -> list[System]:
    """The arms of a table. The longer controls are what others are compared with, and rows of the second table only."""
    found = [s for s in SYSTEMS if s.name in results and s.augmentation == augmentation]
    if total:
        return [s for s in found if s.arm not in (ORACLE, CONTROL) and (s.is_supervised or s.arm not in LONGER)]
    return [s for s in found if s.arm not in LONGER]


def _arms(results: Results, augmentation: str, *, total: bool) -> str:
    shown = _shown(results, augmentation, total=total)
    return _table(results, shown, lambda system: control_of(system, results, total=total), total=total)


def _longer(results: Results) -> str:
    """Networks of more steps: their table, and what students have over the best control of any length."""
    shown = [system for system in find_systems([CONTROL, *LONGER]) if system.name in results]
    best = max((s for s in shown if s.is_supervised), key=lambda system: dice(results, system.name).mean)
    lines = [
        f"- {system.title} minus the best control ({best.title}): {difference(results, system.name, best.name)}."
        for system in shown
        if not system.is_supervised
    ]
    return (
        _table(results, shown, lambda system: control_of(system, results, total=False)) + "\n" + "\n".join(lines) + "\n"
    )


def _explained(results: Results) -> str:
    """The mean Dice of every seed that a variant has, beside the arm that it varies and the control."""
    varied = [system.name for system in VARIANTS if system.name in EXPLAINED]
    seeds = sorted({seed for name in varied for seed in results.get(name, {})})
    lines = ["| | steps | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|---|" + "---|" * len(seeds)]
    for name, title in {CONTROL: "supervised only (control)", **EXPLAINED}.items():
        arm = results.get(name, {})
        steps = _listed(sorted({sum(found["steps"]) for found in arm.values()}))
        cells = (f"{arm[seed]['dice']['mean']:.3f}" if seed in arm else "" for seed in seeds)
        lines.append(f"| {title} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _table(
    results: Results, shown: Sequence[System], control_for: Callable[[System], str | None], *, total: bool = False
) -> str:
    """Mean Dice of some arms, and what each has over its control."""
    compared = "minus the control with the same steps in all" if total else "minus control"
    lines = [f"| | seeds | networks | mean Dice (95 % interval) | {compared} |", "|---|---|---|---|---|"]
    for system in (one for one in shown if one.name in results):
        arm, control = results[system.name], control_for(system)
        is_control = system.arm.startswith(CONTROL)
        gain = "" if is_control or control not in results else str(difference(results, system.name, control))
        networks = _listed(sorted({found["networks"] for found in arm.values()}))
        lines.append(f"| {system.title} | {len(arm)} | {networks} | {dice(results, system.name)} | {gain} |")
    return "\n".join(lines) + "\n"


def _findings(results: Results, *, total: bool) -> str:
    """What the figures say, in words that follow from them."""
    groups: dict[str, list[str]] = {"above": [], "below": [], "open": []}
    for system in _shown(results, "stock", total=total):
        control = control_of(system, results, total=total)
        if system.arm in (CONTROL, ORACLE, ENSEMBLE) or system.arm.startswith(f"{CONTROL}_x") or control not in results:
            continue
        gain = difference(results, system.name, control)
        clear = not np.isnan(gain.low) and abs(gain.mean) >= NOTHING and gain.low * gain.high > 0
        groups[("above" if gain.mean > 0 else "below") if clear else "open"].append(system.title)
    lines = [
        f"Differences below about {NOTHING} mean nothing; neither do those with 0 in their interval.",
        "",
    ]
    if not total and ORACLE in results and CONTROL in results:
        room = difference(results, ORACLE, CONTROL)
        lines.append(f"- Most that can be gained (oracle minus control): {room}.")
        if room.mean < ENOUGH_ROOM:
            lines.append(TOO_SHORT)
    words = {"above": "Above the control", "below": "Below the control", "open": "Not distinguishable from the control"}
    lines += [f"- {words[group]}: {'; '.join(names)}." for group, names in groups.items() if names]
    if not total:
        lines += [*_own_teachers(results), *_of_fewer_seeds(results), *_in_single_precision(results)]
    arms = [s for s in SYSTEMS if s.augmentation == "stock" and s.arm not in LONGER]
    missing = [s.title for s in arms if s.name not in results]
    lines += [f"- Not measured yet: {'; '.join(missing)}."] if missing and not total else []
    return "\n".join(lines) + "\n"


def _own_teachers(results: Results) -> list[str]:
    """What arms gain whose teacher is no control of this table, because their recipe has a loss of its own."""
    lines = []
    for system in _shown(results, "stock", total=False):
        arm = results[system.name].values()
        if system.teacher is None and all(found["rounds"] and found["rounds"][0]["test_dice"] for found in arm):
            own = float(np.mean([found["rounds"][0]["test_dice"] for found in arm]))
            lines.append(
                f"- {system.title}: its teacher is trained by its own recipe and has {own:.3f}; it gains "
                f"{dice(results, system.name).mean - own:.3f} over that."
            )
    return lines


def _of_fewer_seeds(results: Results) -> list[str]:
    """Arms whose mean is over fewer seeds than the control's."""
    every = len(results.get(CONTROL, {}))
    fewer = [system.title for system in _shown(results, "stock", total=False) if len(results[system.name]) < every]
    said = "has fewer seeds than the control; its difference is from the control of those seeds"
    return [f"- {title}: {said}." for title in fewer]


def _in_single_precision(results: Results) -> list[str]:
    """Which arms were trained on a CPU without bfloat16, all others in it, and what that does to the control."""
    single = [
        system.title
        for system in _shown(results, "stock", total=False)
        if not all(found["environment"].get("has_bf16", True) for found in results[system.name].values())
    ]
    if not single:
        return []
    line = f"- Computed in single precision, all others in bfloat16: {'; '.join(single)}."
    if SINGLE in results:
        seeds = len(results[SINGLE])
        line += (
            f" The control of {seeds} seed{'s' if seeds > 1 else ''} in single precision minus the same in bfloat16: "
        )
        line += f"{difference(results, SINGLE, CONTROL)}."
    return [line]


def _organs(results: Results) -> str:
    lines = ["| | " + " | ".join(organ.short for organ in FLARE22) + " |", "|---" * (len(FLARE22) + 1) + "|"]
    for system in _shown(results, "stock", total=False):
        arm = results[system.name].values()
        means = (np.mean([found["dice"]["organs"][organ.name] for found in arm]) for organ in FLARE22)
        lines.append(f"| {system.name} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def _pseudo_labels(results: Results) -> str:
    lines = [
        "| | round | taken | true Dice of all labels | true Dice of taken labels | test Dice of the labelling models |",
        "|---|---|---|---|---|---|",
    ]
    for system in _shown(results, "stock", total=False):
        arm = results[system.name]
        for number in range(max(len(found["rounds"]) for found in arm.values())):
            rounds = [found["rounds"][number] for found in arm.values()]

            def mean(key: str, rounds: Sequence[Mapping[str, Any]] = rounds) -> float:
                return float(np.mean([found[key] for found in rounds]))

            own = "" if rounds[0]["test_dice"] is None else f"{mean('test_dice'):.3f}"
            lines.append(
                f"| {system.name} | {number} | {mean('taken'):.1f} of {mean('pseudo_labels'):.0f} | "
                f"{mean('true_dice'):.3f} | {mean('true_dice_of_taken'):.3f} | {own} |"
            )
    return "\n".join(lines) + "\n"


def rankings(results: Results) -> list[tuple[str, str, Interval, Interval, Interval]]:
    """Rows (which labels, rule, Spearman, AUC, Spearman by organ); labels that arms share stand there once."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for system in SYSTEMS:
        arm = results.get(system.name, {})
        for number in range(max((len(document["rounds"]) for document in arm.values()), default=0)):
            shared = system.teacher if number == 0 else None
            labels = f"{system.name}, round {number}" if shared is None else f"labels of {shared}"
            rounds = [document["rounds"][number] for document in arm.values()]
            for rule in rounds[0]["ranking"]:
                found.setdefault((labels, rule), rounds)
    rows = []
    for (labels, rule), rounds in found.items():
        ranks = [each["ranking"][rule] for each in rounds]
        organs = [each["organ_ranking"].get(rule) for each in rounds]
        spearman, auc = (_over_seeds([rank[key] for rank in ranks]) for key in ("spearman", "auc"))
        rows.append((labels, rule, spearman, auc, _over_seeds(organs)))
    return rows


def _over_seeds(values: Sequence[float | None]) -> Interval:
    """Mean and single seeds; what is not known does not count."""
    return bootstrap([[value] for value in values if value is not None and not np.isnan(value)])


def _rankings(results: Results) -> str:
    lines = ["| labels of | rule | Spearman | AUC | Spearman by organ |", "|---|---|---|---|---|"]
    for labels, rule, *found in rankings(results):
        lines.append(f"| {labels} | {rule} | " + " | ".join(map(_with_range, found)) + " |")
    first = [(spearman, rule) for labels, rule, spearman, *_ in rankings(results) if labels == f"labels of {ENSEMBLE}"]
    if first:
        best, name = max(first, key=lambda row: row[0].mean)
        lines += ["", f"On the labels of {ENSEMBLE} `{name}` ranks best: {best.mean:.2f} (the aim was {GOOD_RANK})."]
    return "\n".join(lines) + "\n"


def _with_range(found: Interval) -> str:
    """A mean with the lowest and the highest seed: an interval would leave the range that a rank can have."""
    return f"{found.mean:.2f} ({min(found.values):.2f} to {max(found.values):.2f})" if found.values else "-"


def main(show: Callable[[str], None] = print) -> None:
    results = read_results(RESULTS)
    text = page(results)
    write_text(PAGE, text)
    arms = [(s.title, dice(results, s.name), s.arm in (CONTROL, ORACLE)) for s in _shown(results, "stock", total=False)]
    ranks = [(f"{rule} ({labels})", spearman) for labels, rule, spearman, *_ in rankings(results)]
    control = dice(results, CONTROL).mean if CONTROL in results else None
    draw(arms, ranks, PICTURE, control=control)
    show(text)


if __name__ == "__main__":
    main()
