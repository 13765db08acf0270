"""The label ids of a dataset.json and their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def label_names(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Name of every foreground label id of a dataset.json, ids ascending; a region is named by the id it is given."""
    foreground = [(name, ids) for name, ids in dataset_json["labels"].items() if name != "ignore" and ids != 0]
    if any(isinstance(ids, list) for _, ids in foreground):
        numbers = [int(number) for number in dataset_json["regions_class_order"]]
    else:
        numbers = [int(ids) for _, ids in foreground]
    return dict(sorted(zip(numbers, (name for name, _ in foreground), strict=True)))
