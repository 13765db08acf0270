"""What a run will write, and whether the disk can hold it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_flare.errors import FlareError
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import size_of
from nnunet_flare.rounds.stages.replanned import has_same_arrays

STOCK_CHECKPOINT_BYTES = 250_000_000
"""A checkpoint of nnU-Net's usual 31 M parameter network with its optimiser's state."""


def disk_needed(run: Run, sources: Mapping[str, Sequence[Path]]) -> dict[str, int]:
    """Estimate of the bytes that the run will write, by what they are.

    A preprocessed array takes about twice its compressed scan (float32 against int16); the labels of a round about 2 %
    of that per member map, for the members, the training label and the map on the image's grid. A final model with
    plans of its own takes every scan once more.
    """
    recipe = run.recipe
    arrays = 2 * sum(size_of(path) for paths in sources.values() for path in paths)
    maps = sum(len(recipe.member_folds(r)) * len(recipe.member_checkpoints(r)) + 2 for r in range(recipe.final_round))
    first = 0 if run.settings.init_model is None else 1
    trainings = sum(len(recipe.member_folds(number)) for number in range(first, recipe.final_round + 1))
    trainings += (recipe.final.finetune is not None) + (run.coarse_base is not None)
    kept = 2 + len(recipe.members.at)
    return {
        "unlabelled arrays": arrays,
        **({"arrays for the final model": arrays} if prepares_again(run) else {}),
        "labels of all rounds": int(0.02 * arrays * maps),
        "checkpoints": trainings * kept * _checkpoint_bytes(run),
    }


def prepares_again(run: Run) -> bool:
    """Whether the final model's plans preprocess the scans once more; as far as is known before they are planned."""
    if run.final_base == run.base:
        return False
    planned = run.base.plans_file.is_file() and run.final_base.plans_file.is_file()
    return not (planned and has_same_arrays(run.base, run.final_base))


def _checkpoint_bytes(run: Run) -> int:
    """Size of a checkpoint: of an earlier training with these plans, else of stock nnU-Net's usual network."""
    found = [path.stat().st_size for path in run.results.glob(f"*{run.settings.plans_name}__*/fold_*/checkpoint_*.pth")]
    return max(found, default=STOCK_CHECKPOINT_BYTES)


def check_disk(run: Run, sources: Mapping[str, Sequence[Path]]) -> None:
    """Raise when the preprocessed scans, or labels and checkpoints, will not fit where they go."""
    needed = disk_needed(run, sources)
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, size in (
        (run.preprocessed, needed["unlabelled arrays"] + needed.get("arrays for the final model", 0)),
        (run.results, needed["labels of all rounds"] + needed["checkpoints"]),
    ):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        device = place.stat().st_dev
        wanted[device] = (place, wanted.get(device, (place, 0))[1] + size)
    for place, size in wanted.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise FlareError(
                f"{place}: the run needs about {size / 1e9:.1f} GB there, and {free / 1e9:.1f} GB are "
                "free. Make room, or set nnUNet_preprocessed and nnUNet_results to larger disks"
            )
