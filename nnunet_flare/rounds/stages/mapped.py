"""Models of other labels as round 0's members (``--init_map``): their classes become the dataset's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_flare import plugin
from nnunet_flare.errors import InputError
from nnunet_flare.fusion.ids import IdMap, load_id_map
from nnunet_flare.labels import has_regions, organs_of
from nnunet_flare.recipes.recipe import Recipe

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from nnunet_flare.inference.arrays import Array
    from nnunet_flare.inference.core import MembersPrediction, Segmenter


def check_id_map(name: str, theirs: Any, ours: Mapping[str, Any], recipe: Recipe, *, where: str) -> None:
    """Refuse an id map that does not say what every class of a model is, or leaves organs of the dataset out.

    Args:
        name: of a shipped map, or its file.
        theirs: ``labels`` of the model's dataset.json.
        ours: ``labels`` of the dataset.
        recipe: must not learn from the model's logits or go on from its weights, which have its own classes.
        where: what to call the model in an error.

    Raises:
        InputError: naming what was found and what was expected.
    """
    id_map = load_id_map(name)
    if has_regions(ours):
        raise InputError(
            f"--init_map {name}: the dataset has regions ({dict(ours)}), expected labels with one id each; leave out "
            "--init_map"
        )
    ours = {organ: ids[0] for organ, ids in organs_of(ours).items()}
    if not isinstance(theirs, dict) or not all(type(value) is int for value in theirs.values()):
        raise InputError(f"{where}: its labels are {theirs}, expected one whole number each")
    unlisted = {organ: i for organ, i in theirs.items() if i > 0 and i not in id_map.ids}
    if unlisted and id_map.refuses_others:
        raise InputError(
            f"--init_map {name}: does not list {unlisted} of {where}; list them, or set others: background"
        )
    known = {id_map.ids[i] for i in theirs.values() if i in id_map.ids} - {0}
    strange = sorted(known - set(ours.values()))
    if strange:
        raise InputError(f"--init_map {name}: maps to {strange}, which are not labels of the dataset: {dict(ours)}")
    unknown = [organ for organ, i in ours.items() if i > 0 and i not in known]
    if unknown:
        raise InputError(
            f"--init_map {name}: {where} does not know {', '.join(unknown)}, so its pseudo-labels would teach that "
            "they are absent; give a model of all organs, or start from its weights with training.pretrained_weights"
        )
    trainer = recipe.final.trainer or recipe.trainer
    if plugin.learns_from(trainer) == plugin.TEACHER or recipe.final.start == "member":
        key = "final.start=member" if recipe.final.start == "member" else trainer
        raise InputError(f"--init_map {name}: {key} needs the model's own classes; expected a model of the same labels")


class MappedLabeller:
    """A model's prediction in the dataset's classes: label maps by the id map, the softmax of merged classes added."""

    def __init__(self, labeller: Segmenter, id_map: IdMap, label_manager: LabelManager) -> None:
        self._labeller = labeller
        self.id_map = id_map
        self.plans_manager = labeller.plans_manager
        self.configuration_manager = labeller.configuration_manager
        self.label_manager = label_manager

    def predict_members(self, data: np.ndarray, *, only: Sequence[int] | None = None) -> MembersPrediction:
        """Every member's label map and the mean of their softmax (classes of the dataset, z, y, x).

        Args:
            data: a preprocessed scan (C, z, y, x), float32.
            only: the dataset's classes that count; the others become background.
        """
        from nnunet_flare.inference.core import MembersPrediction
        from nnunet_flare.inference.memory import there_or_on_cpu
        from nnunet_flare.inference.places import place_of

        found = self._labeller.predict_members(data)
        target = [self._own(head, only) for head in range(len(found.mean_softmax))]

        def merged(theirs: Array) -> Array:
            mean = place_of(theirs).zeros((self.label_manager.num_segmentation_heads, *theirs.shape[1:]))
            for head, own in enumerate(target):
                mean[own] += theirs[head]
            return mean

        table = np.asarray(target, np.uint8)
        mean = there_or_on_cpu(found.mean_softmax, merged)
        return MembersPrediction([table[labels] for labels in found.labels], mean)

    def _own(self, head: int, only: Sequence[int] | None) -> int:
        own = self.id_map.ids.get(head, 0)
        return own if only is None or own in only else 0
