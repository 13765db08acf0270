"""``dataset.json`` of a prepared dataset: written anew by every call, but for what a person has changed in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_flare.files import read_json, write_json
from nnunet_flare.preparation.case_files import FILE_ENDING
from nnunet_flare.preparation.layouts import Layout
from nnunet_flare.preparation.prepared import PreparedDataset

READER = "NibabelIOWithReorient"
"""The scans come from many scanners in several orientations; this stock reader turns each by exact flips."""

COUNT = "numTraining"


def write_dataset_json(prepared: PreparedDataset, layout: Layout, labels: Mapping[str, int]) -> None:
    """Write the document; keys that hold something else, such as another modality, are kept, with a note.

    Raises:
        InputError: when the file that is there is no JSON object.
    """
    path = prepared.dataset / "dataset.json"
    ours: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        "labels": dict(labels),
        COUNT: len(prepared.cases["training"]),
        "file_ending": FILE_ENDING,
        "overwrite_image_reader_writer": READER,
        "name": layout.name,
        "description": f"MICCAI {layout.name} challenge, prepared by nnunet-flare",
    }
    there = (
        read_json(path, dict, remedy="restore it, or remove it and prepare writes it again") if path.is_file() else {}
    )
    changed = {key: value for key, value in there.items() if key != COUNT and ours.get(key) != value}
    write_json(path, {**ours, **changed})
    if changed:
        keys = ", ".join(changed)
        prepared.notes.append(
            f"{path}: {keys} changed by hand; your changes are kept. Remove the file and prepare writes it again"
        )
