"""Planning and preprocessing ahead of a run, on a machine without a GPU: ``flare-pseudolabel preprocess``.

Both belong to the dataset and its plans, not to a run, so any later run with the same recipe finds them done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from nnunet_flare.errors import InputError
from nnunet_flare.recipes.recipe import Recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.run.unlabelled import read_left, read_list
from nnunet_flare.rounds.stages.locate import locate_shard
from nnunet_flare.rounds.stages.plan import plan_and_preprocess
from nnunet_flare.rounds.stages.preprocess import failure, preprocess_unlabelled
from nnunet_flare.rounds.start import freeze_unlabelled, plan_run


@dataclass(frozen=True)
class Preprocessed:
    """The folder of unlabelled arrays, how many scans are in it, and why others are not."""

    folder: Path
    ready: int
    failed: dict[str, str]


def preprocess_ahead(
    dataset: str,
    unlabelled: Path,
    recipe: Recipe,
    name: str | None,
    folders: Mapping[str, Path],
    *,
    trust_checkpoint: bool = False,
) -> Preprocessed:
    """Do what the tasks ``plan`` and ``unlabelled`` of a run would do; a second call does what is missing.

    Args:
        dataset: id or name.
        unlabelled: folder of scans.
        recipe: whose planner and plan changes hold.
        name: of the later run, which names its plans where the recipe changes them; None: the recipe's.
        folders: nnU-Net's variables and what they are.
        trust_checkpoint: whether a given coarse model may be what ``--trust_checkpoint`` admits.

    Raises:
        FlareError: as a run is refused, and where the unlabelled scans need a coarse model that the run will train.
    """
    if recipe.roi is not None and recipe.roi.model is None:
        raise InputError(
            f"recipe {recipe.name}: the run first trains a coarse model that crops the unlabelled scans, so "
            "only the run can preprocess them. Start the run, or give a trained coarse model with --set "
            "roi.model=FOLDER"
        )
    with TemporaryDirectory() as scratch:
        request = Request(
            dataset,
            unlabelled,
            run_dir=Path(scratch),
            name=name,
            device="cpu",
            trust_checkpoint=trust_checkpoint,
        )
        plan = plan_run(request, recipe, folders)
        freeze_unlabelled(plan)
        run = plan.run
        plan_and_preprocess(run)
        if recipe.roi is not None:
            locate_shard(run, 0, 1)
        preprocess_unlabelled(run)
        left = read_left(run.paths.unlabelled)
        reasons = {case.case: failure(run.unlabelled_data, case.case) for case in read_list(run.paths.unlabelled)}
    failed = {case: reason for case, reason in reasons.items() if reason is not None}
    return Preprocessed(run.unlabelled_data, len(reasons) - len(failed), left | failed)
