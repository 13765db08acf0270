"""What a dataset.json says of labels (organs of one id, regions of several, the *ignore* label) and of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BACKGROUND = "background"
IGNORE = "ignore"
"""The label of voxels that nobody annotated: no organ, never predicted, and counted nowhere."""

Group = int | tuple[int, ...]
"""One label id, or several that count as one."""


def channel_names(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """A data set's image channels, under either name that nnU-Net has given them; empty where it has none."""
    names: dict[str, Any] = dataset.get("channel_names", dataset.get("modality", {}))
    return names


def ids_of(value: Any) -> tuple[int, ...]:
    """The label ids of one entry, as listed."""
    return tuple(int(label) for label in value) if isinstance(value, (list, tuple)) else (int(value),)


def has_regions(labels: Mapping[str, Any]) -> bool:
    """Whether nnU-Net trains regions that may overlap: where some entry has several ids."""
    return any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values())


def organs_of(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Label ids of every organ or region by name, in order of their ids; neither the background nor *ignore*."""
    return dict(sorted(_foreground(labels).items(), key=lambda item: item[1]))


def label_ids(labels: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id above 0 that stands for an organ or a part of a region, ascending; not *ignore*'s."""
    return tuple(sorted({label for ids in organs_of(labels).values() for label in ids} - {0}))


def allowed_ids(labels: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that a label map may hold, the background's and *ignore*'s included, ascending."""
    return tuple(sorted({label for value in labels.values() for label in ids_of(value)}))


def ignore_id(labels: Mapping[str, Any]) -> int | None:
    """The id of *ignore*, where the dataset has it."""
    return int(labels[IGNORE]) if IGNORE in labels else None


def sampled_groups(labels: Mapping[str, Any], organs: Mapping[str, Sequence[int]]) -> list[Group]:
    """What ``class_locations`` lists of a training case, as stock's preprocessing and loader name it.

    Args:
        labels: of dataset.json.
        organs: those that a patch may be centred on.

    Returns:
        The organs' ids, a tuple for a region; with an *ignore* label last everything that is annotated, -1 (outside the
        scan) and the background included: patches that are centred on nothing else lie there.
    """
    groups: list[Group] = [ids[0] if len(ids) == 1 else tuple(ids) for ids in organs.values()]
    return groups if ignore_id(labels) is None else [*groups, (-1, 0, *label_ids(labels))]


def drawn_ids(dataset_json: Mapping[str, Any]) -> dict[str, int]:
    """The id under which each organ or region is drawn into a label map, by name."""
    named = _foreground(dataset_json["labels"])
    if has_regions(dataset_json["labels"]):
        return dict(zip(named, map(int, dataset_json["regions_class_order"]), strict=True))
    return {name: ids[0] for name, ids in named.items()}


def label_names(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Name of every foreground label id of a dataset.json, ids ascending; a region is named by the id it is given."""
    return dict(sorted((label, name) for name, label in drawn_ids(dataset_json).items()))


def drawn_parts(dataset_json: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """The ids of a label map that are part of the organ or region of :func:`label_names`, by its id there.

    A region holds those of the regions in it, too: a kidney with its tumour, which is drawn over it.
    """
    parts = _foreground(dataset_json["labels"])
    return {label: tuple(dict.fromkeys(parts[name])) for name, label in drawn_ids(dataset_json).items()}


def _foreground(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The organs and regions in the order of dataset.json, which is that of a network's outputs for regions."""
    named = {name: ids_of(value) for name, value in labels.items() if name != IGNORE}
    return {name: ids for name, ids in named.items() if set(ids) != {0}}


def outputs_of(dataset_json: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a network's outputs stand for: organs or regions, and how these are drawn; *ignore* is none of them."""
    labels = {name: value for name, value in dataset_json["labels"].items() if name != IGNORE}
    return (list(labels.items()), dataset_json.get("regions_class_order")) if has_regions(labels) else (labels, None)


def label_problems(document: Mapping[str, Any]) -> list[str]:
    """What is wrong with ``labels`` and ``regions_class_order`` of a dataset.json: each with what was expected."""
    labels = document["labels"]
    if labels.get(BACKGROUND) != 0 or isinstance(labels.get(BACKGROUND), bool):
        return [f"labels: 'background' is {labels.get(BACKGROUND)!r}, expected 0"]
    for value in labels.values():
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in ids):
            return [f"labels: {dict(labels)}, expected whole numbers, or lists of them for regions"]
    known = allowed_ids(labels)
    if list(known) != list(range(len(known))):
        return [f"labels: ids {list(known)}, expected 0, 1, 2, ... without gaps"]
    if IGNORE in labels and (not isinstance(labels[IGNORE], int) or labels[IGNORE] in (0, *label_ids(labels))):
        return [f"labels: 'ignore' is {labels[IGNORE]!r}, expected one whole number above all others, {known[-1] + 1}"]
    if IGNORE in labels and labels[IGNORE] != known[-1]:
        return [
            f"labels: 'ignore' is {labels[IGNORE]}, expected the highest number, {known[-1]}; give it the last number"
        ]
    return _order_problems(document) if has_regions(labels) else []


def _order_problems(document: Mapping[str, Any]) -> list[str]:
    """Whether regions that are drawn one over the other, in their order, give a label map that says the same.

    The first label, else region, that is not told again; the others mostly have the same cause.
    """
    labels, order = document["labels"], document.get("regions_class_order")
    regions = list(_foreground(labels).items())
    names = [name for name, _ in regions]
    if order is None:
        return [f"regions_class_order is missing; expected one label id for each of the regions {names}"]
    if not isinstance(order, list) or not all(type(label) is int for label in order) or len(order) != len(regions):
        return [f"regions_class_order is {order!r}, expected one label id for each of {len(regions)} regions {names}"]
    for label in label_ids(labels):
        holding = [name for name, ids in regions if label in ids]
        drawn = [order[place] for place, (_, ids) in enumerate(regions) if label in ids][-1]
        told = [name for name, ids in regions if drawn in ids]
        if told != holding:
            said = f"only in {', '.join(told)}" if told else "in no region"
            return [
                f"regions_class_order {order}: a voxel of label {label} lies in {', '.join(holding)}, and would be "
                f"drawn as {drawn}, which is {said}. Regions are drawn in the order of 'labels'. List larger regions "
                "before those inside them, and give each a label that no later region holds"
            ]
    for (name, ids), number in zip(regions, order, strict=True):
        if number not in ids:
            return [
                f"regions_class_order {order}: draws {name} {list(ids)} as {number}, which then lies outside it; "
                "expected for each region one of its own labels"
            ]
    return []
