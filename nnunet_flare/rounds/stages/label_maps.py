"""Pseudo-label maps on the grid of their scans, with the voxels of ignored organs marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_flare.files import link_or_copy
from nnunet_flare.images import read_labels, write_labels
from nnunet_flare.rounds.run.configurations import read_plans
from nnunet_flare.rounds.run.dataset import foreground_ids, organ_ids
from nnunet_flare.rounds.run.ledger import Entry
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array, read_properties


def ignore_label(run: Run) -> int:
    """The value of *ignore*: one above the highest label, as nnU-Net wants it where the dataset has its own."""
    return max(foreground_ids(run)) + 1


def write_label_map(run: Run, number: int, entry: Entry, path: Path, ending: str) -> None:
    """The fused label map of a round: the same file, or where organs are ignored a copy with the *ignore* value."""
    source = run.paths.label(number, entry.case, ending)
    if not entry.ignored:
        link_or_copy(source, path)
        return
    volume = read_labels(source, entry.case)
    organs = organ_ids(run)
    ids = sorted({label for name in entry.ignored for label in organs[name]})
    uncertain = np.isin(read_array(run.paths.members(number, entry.case)), ids)
    ignored = _to_image_grid(run, number, entry.case, np.asarray(uncertain.any(axis=0)))
    labels = volume.array.copy()
    labels[ignored | np.isin(labels, ids)] = ignore_label(run)
    write_labels(path, labels, volume)


def _to_image_grid(run: Run, number: int, case: str, mask: np.ndarray) -> np.ndarray:
    """A mask of the network grid on the image's grid, by the interpolation that label maps take."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_flare.inference.export import labels_on_image_grid

    plans = PlansManager(read_plans(run.plans_file))
    scores = np.stack([~mask, mask]).astype(np.float32)
    two_classes = plans.get_label_manager({"labels": {"background": 0, "uncertain": 1}})
    properties = read_properties(run.paths.properties(number, case))
    manager = plans.get_configuration(run.recipe.configuration)
    return labels_on_image_grid(scores, properties, plans, manager, two_classes) > 0
