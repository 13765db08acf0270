"""A judged run without any training: manifest, plans, ledger, and arrays of a few cases made of boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nnunet_flare.files import read_json, write_json
from nnunet_flare.organs import FLARE22
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.ledger import Entry, write_round
from nnunet_flare.rounds.run.manifest import Run, create_run
from nnunet_flare.rounds.run.settings import RunSettings
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, write_list
from nnunet_flare.rounds.stages.arrays import write_array, write_properties

SHAPE = (12, 20, 24)
SPACING_MM = (5.0, 2.0, 2.0)
PATCH = (8, 16, 16)
ORGANS = tuple(organ.name for organ in FLARE22)


def fake_run(
    folder: Path,
    *,
    cases: list[str],
    rounds: int = 2,
    pictured: int = 3,
    organs: tuple[str, ...] = ORGANS,
    seed: int = 0,
    members: int = 3,
    recipe: str = "demo",
) -> Run:
    """A run whose ``rounds`` rounds are all judged; of the first ``pictured`` cases there are arrays.

    One member alone has no agreement.
    """
    folders = {name: folder / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    changes = {"rounds": str(rounds)} | ({"selection.threshold": "0.6"} if recipe == "demo" else {})
    made = load_recipe(recipe, changes)
    settings = RunSettings(
        name="look",
        dataset="Dataset022_Boxes",
        plans_name="plans",
        unlabelled_dir=str(folder / "unlabelled"),
        recipe=made.model_dump(mode="json"),
        folders={name: str(path) for name, path in folders.items()},
        device="cpu",
        shards=1,
    )
    run = create_run(folder / "run", settings, made)
    labels = {"background": 0, **{name: number for number, name in enumerate(organs, start=1)}}
    write_json(run.raw / "dataset.json", {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"})
    configuration = {"spacing": list(SPACING_MM), "normalization_schemes": ["CTNormalization"]}
    intensities = {"0": {"mean": 40.0, "std": 80.0}}
    write_json(
        run.plans_file,
        {
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "foreground_intensity_properties_per_channel": intensities,
            "configurations": {"3d_fullres": configuration},
        },
    )
    write_array(run.base_data / "first_seg.b2nd", boxes(len(organs))[None], PATCH)
    grid = {"spacing": list(SPACING_MM), "shape_after_cropping_and_before_resampling": SHAPE}
    write_properties(run.base_data / "first.pkl", grid)
    write_list(run.paths.unlabelled, [UnlabelledCase(case, f"/scans/{case}", (), 1) for case in cases])
    rng = np.random.default_rng(seed)
    for number in range(rounds):
        write_round(run.paths, number, [_judged(run, number, case, organs, members, rng) for case in cases])
        for case in cases[:pictured]:
            _arrays(run, number, case, len(organs), members, rng)
        write_json(run.paths.done(f"select-r{number}"), {"task": f"select-r{number}", "seconds": 2.5})
    write_json(run.paths.evaluation(0) / "dice.json", {"mean": 0.8131, "organs": {}, "cases": {}})
    validation = run.round(0).model / "fold_0" / "validation" / "summary.json"
    write_json(validation, {"foreground_mean": {"Dice": 0.7342}})
    return run


def boxes(organs: int) -> np.ndarray:
    """Organ k as a small box, in rows of five."""
    labels = np.zeros(SHAPE, np.uint8)
    for organ in range(1, organs + 1):
        row, column = divmod(organ - 1, 5)
        labels[3:9, 2 + 6 * row : 7 + 6 * row, 2 + 4 * column : 5 + 4 * column] = organ
    return labels


def _judged(run: Run, number: int, case: str, organs: tuple[str, ...], members: int, rng: np.random.Generator) -> Entry:
    agreement = {organ: round(float(rng.uniform(0.3, 1)), 4) for organ in organs}
    mean = float(np.mean(list(agreement.values())))
    taken = mean >= 0.65
    known: dict[str, float | None] = dict(agreement) if members > 1 else dict.fromkeys(organs)
    document = {
        "case": case,
        "agreement": known,
        "present": dict.fromkeys(organs, True),
        "volume_mm3": {organ: float(rng.uniform(1000, 3000)) for organ in organs},
        "members": members,
        "odd": [],
        "label_sha256": "s",
    }
    path = run.paths.case(number, case)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))  # thousands of them: without waiting for the disk
    return Entry(
        round=number,
        case=case,
        role="pseudo",
        decision="taken" if taken else "refused",
        reason=f"mean-organ {mean:.3f} {'>=' if taken else '<'} 0.65",
        score=mean,
        mean_organ=mean,
        min_organ=min(agreement.values()),
        agreement=known,
        ignored={},
        model="m",
        recipe_hash="h",
        label_sha256="s",
    )


def _arrays(run: Run, number: int, case: str, organs: int, members: int, rng: np.random.Generator) -> None:
    fused = boxes(organs)
    labels = np.stack([np.roll(fused, shift % 2, axis=2) for shift in range(members)])
    scan = ((fused > 0) * 1.0 + rng.normal(0, 0.2, SHAPE)).astype(np.float32)
    write_array(run.unlabelled_data / f"{case}.b2nd", scan[None], PATCH)
    write_properties(run.unlabelled_data / f"{case}.pkl", {})
    write_array(run.paths.members(number, case), labels, PATCH)
    write_array(run.paths.training_label(number, case), fused.astype(np.int16)[None], PATCH)


def least_organ(run: Run, number: int, case: str) -> str:
    """The organ that the members agree on least."""
    agreement = read_json(run.paths.case(number, case))["agreement"]
    return str(min(agreement, key=lambda organ: agreement[organ]))
