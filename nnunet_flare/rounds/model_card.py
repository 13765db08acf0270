"""The card of a run's final model: what it was trained on, by which recipe, what was decided, how good it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nnunet_flare.documents import flat
from nnunet_flare.files import read_json
from nnunet_flare.recipes.load import load_recipe, shipped_recipes
from nnunet_flare.rounds.run.dataset import dataset_json, organ_ids, raw_cases, read_dataset
from nnunet_flare.rounds.run.ledger import DECISIONS, Entry, read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.evaluate import DICE

OF_DATASET = ("name", "description", "reference", "release", "licence", "license")
"""What nnU-Net's dataset.json may say about the data."""

WITHOUT_COARSE = (
    "It was trained on unlabelled scans that a coarse model had cropped to the organs. The coarse model is not in this "
    "file, so the command predicts whole scans."
)

OF_THE_MACHINE = ("roi.model", "fusion.teachers", "fusion.id_maps")
"""Keys of recipes that name files of the machine where the run was."""


def model_card(run: Run, *, trainer: str, licence: str) -> str:
    """Markdown; no path of this machine and no name of a case stands in it.

    Args:
        run: a run whose final training is done.
        trainer: name of the trainer under which the model is passed on.
        licence: of the weights, in words.
    """
    final = run.rounds[-1]
    return "\n".join(
        [
            f"# {run.settings.dataset}, recipe {run.recipe.name}",
            "",
            "A segmentation model of [nnU-Net v2](https://github.com/MIC-DKFZ/nnUNet), trained with nnunet-flare on "
            "labelled scans and on pseudo-labels of unlabelled ones.",
            "",
            "```",
            f"nnUNetv2_predict -i SCANS -o OUT -d {run.settings.dataset} -c {final.configuration} -tr {trainer} "
            f"-p {final.base.plans_name} -f all",
            "```",
            "",
            *([] if run.recipe.roi is None else [WITHOUT_COARSE, ""]),
            *_data(run),
            *_recipe(run),
            *_ledger(run, read_ledger(run.paths)),
            *_scores(run, final.number),
            "## Licence of the weights",
            "",
            licence,
            "",
            "## Made with",
            "",
            *_made_with(run),
            "",
            "Not a medical device. Check its results before you use them.",
            "",
        ]
    )


def _data(run: Run) -> Iterator[str]:
    raw = read_dataset(run.raw / "dataset.json") if (run.raw / "dataset.json").is_file() else dataset_json(run)
    yield "## Data"
    yield ""
    for key in OF_DATASET:
        if isinstance(raw.get(key), str) and raw[key]:
            yield f"- {key}: {raw[key]}"
    yield f"- {len(raw_cases(run))} labelled cases, {len(read_list(run.paths.unlabelled))} unlabelled scans"
    yield f"- input: {', '.join(map(str, raw['channel_names'].values()))}"
    labels = [f"{' and '.join(map(str, ids))} {name}" for name, ids in organ_ids(run).items()]
    yield f"- labels: {', '.join(labels)}"
    yield ""


def _recipe(run: Run) -> Iterator[str]:
    recipe = run.recipe
    yield "## Recipe"
    yield ""
    yield f"`{recipe.name}`: {recipe.summary}. Paper: {recipe.paper}."
    yield ""
    if recipe.name not in shipped_recipes():
        return
    mine, shipped = (flat(each.model_dump(mode="json")) for each in (recipe, load_recipe(recipe.name)))
    changed = [key for key in sorted(mine.keys() | shipped.keys()) if mine.get(key) != shipped.get(key)]
    if changed:
        yield from ("Settings that differ from the recipe as shipped:", "")
        for key in changed:
            value = "given" if key in OF_THE_MACHINE and mine.get(key) else mine.get(key)
            yield f"- `{key}`: {value} (shipped: {shipped.get(key)})"
        yield ""


def _ledger(run: Run, entries: Sequence[Entry]) -> Iterator[str]:
    if not entries:
        return
    yield from (
        "## Pseudo-labels",
        "",
        "| round | taken | refused | odd | failed | mean agreement |",
        "|---|---|---|---|---|---|",
    )
    for number in sorted({entry.round for entry in entries}):
        here = [entry for entry in entries if entry.round == number]
        counts = [sum(e.decision == decision for e in here) for decision in DECISIONS]
        means = [entry.mean_organ for entry in here if entry.mean_organ is not None]
        cells = [run.round(number).name, *map(str, counts), f"{np.mean(means):.3f}" if means else "–"]
        yield f"| {' | '.join(cells)} |"
    yield from (
        "",
        "Agreement is the mean Dice between the members that labelled a scan; it is not a measure of accuracy.",
        "",
    )


def _scores(run: Run, number: int) -> Iterator[str]:
    yield from ("## Scores", "")
    path = run.paths.evaluation(number) / "dice.json"
    if not path.is_file():
        yield from ("Not measured: the run had no held-out cases (`--eval`).", "")
        return
    found: dict[str, Any] = read_json(path, DICE, remedy=f"flare-pseudolabel retry -o {run.root} measures again")
    yield f"Dice on {len(found['cases'])} held-out cases: mean {found['mean']:.3f}."
    yield from ("", "| organ | Dice |", "|---|---|")
    yield from (f"| {organ} | {float(value):.3f} |" for organ, value in found["organs"].items())
    yield ""


def _made_with(run: Run) -> Iterator[str]:
    document = read_json(run.paths.manifest)
    packages = document.get("made_with", {}).get("packages", {}) if isinstance(document, dict) else {}
    yield ", ".join(f"{name} {version}" for name, version in packages.items()) or "Versions were not recorded."
