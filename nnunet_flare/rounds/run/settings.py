"""What the user chose for a run, as its manifest keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunSettings:
    """Everything the user chose; a resumed run must have the same.

    ``folders`` are nnU-Net's three; ``final_plans_name`` the final model's plans where it has its own, and
    ``coarse_plans_name`` the coarse model's where the run trains one; ``init_model`` a model folder whose
    ``init_folds`` are round 0's members, and ``init_map`` the id map of its labels where they are others;
    ``trust_checkpoint``: given models and plans may name networks of the user's own; ``eval_images`` and
    ``eval_labels`` held-out cases; ``shards`` the parts that labelling is split into.
    """

    name: str
    dataset: str
    plans_name: str
    unlabelled_dir: str
    recipe: dict[str, Any]
    folders: dict[str, str]
    device: str
    shards: int
    final_plans_name: str | None = None
    coarse_plans_name: str | None = None
    init_model: str | None = None
    init_folds: tuple[str, ...] = ()
    init_map: str | None = None
    eval_images: str | None = None
    eval_labels: str | None = None
    trust_checkpoint: bool = False
