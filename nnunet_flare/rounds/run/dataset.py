"""The labelled data set of a run: its dataset.json, cases, files and roles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nnunet_flare.cases import CaseTable, find_table
from nnunet_flare.files import read_json
from nnunet_flare.labels import label_ids, organs_of
from nnunet_flare.rounds.run.manifest import Run

DATASET = {"labels": {str: object}, "file_ending": str, "channel_names": dict, "dataset?": {str: dict}}
"""What dataset.json has at least."""


def dataset_json(run: Run) -> dict[str, Any]:
    """dataset.json as the planner copied it, else the raw one."""
    copied = run.preprocessed / "dataset.json"
    return read_dataset(copied if copied.is_file() else run.raw / "dataset.json")


def read_dataset(path: Path) -> dict[str, Any]:
    """A dataset.json, checked to have what the loop reads of it."""
    in_raw = "restore it from a copy; the one in nnUNet_preprocessed is a copy of the one in nnUNet_raw"
    document: dict[str, Any] = read_json(path, DATASET, remedy=in_raw)
    return document


def raw_cases(run: Run) -> list[str]:
    """Ids of the labelled and partial cases of the raw dataset (file names only; nothing is opened)."""
    document = read_dataset(run.raw / "dataset.json")
    if "dataset" in document:
        return sorted(document["dataset"])
    ending = document["file_ending"]
    return sorted(p.name[: -len(ending)] for p in (run.raw / "labelsTr").iterdir() if p.name.endswith(ending))


def raw_files(run: Run) -> dict[str, dict[str, Any]]:
    """Image and label files of the raw dataset by case."""
    document = dataset_json(run)
    ending = document["file_ending"]
    raw = read_dataset(run.raw / "dataset.json")
    if "dataset" in raw:
        entries = {}
        for case, entry in raw["dataset"].items():
            paths = [Path(os.path.expandvars(p)) for p in (*entry["images"], entry["label"])]
            paths = [p if p.is_absolute() else run.raw / p for p in paths]
            entries[case] = {"images": paths[:-1], "label": paths[-1]}
        return entries
    channels = len(document["channel_names"])
    return {
        case: {
            "images": [run.raw / "imagesTr" / f"{case}_{c:04d}{ending}" for c in range(channels)],
            "label": run.raw / "labelsTr" / f"{case}{ending}",
        }
        for case in sorted(p.name[: -len(ending)] for p in (run.raw / "labelsTr").glob(f"*{ending}"))
    }


def base_table(run: Run) -> CaseTable:
    """Roles of the labelled and partial cases."""
    return find_table(
        run.preprocessed, run.raw, run.recipe.configuration, is_round=False, labels=dataset_json(run)["labels"]
    )


def organ_ids(run: Run) -> dict[str, tuple[int, ...]]:
    """Label ids of the dataset's organs and regions by name; see :func:`nnunet_flare.labels.organs_of`."""
    return organs_of(dataset_json(run)["labels"])


def foreground_ids(run: Run) -> tuple[int, ...]:
    """Every label id of the dataset above 0, but for *ignore*'s."""
    return label_ids(dataset_json(run)["labels"])
