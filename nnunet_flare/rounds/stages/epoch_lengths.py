"""Epochs that are passes over the data (``training.epoch: pass``), in nnU-Net's iterations.

Fosun Aitrox (S1) counts its training in passes: over the labelled cases first, then over a list in which every pseudo
case stands once beside one labelled case. Here a pass has as many samples, which are drawn at random as in nnU-Net.
"""

from __future__ import annotations

import math

from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.stages.plan import folds_of_split

STOCK_ITERATIONS = 250
"""Iterations of an epoch of stock nnU-Net."""


def samples_of_pass(true_cases: int, pseudo_cases: int, labelled_to_pseudo: tuple[float, float] | None) -> int:
    """Samples in which every case is drawn once on average, by the ratio at which the two kinds are drawn.

    Args:
        true_cases: labelled and partial cases.
        pseudo_cases: pseudo-labelled cases.
        labelled_to_pseudo: the shares of the two; None where all cases are alike. With shares a pass is one over the
            pseudo cases, the labelled ones coming round as often as that takes.
    """
    if labelled_to_pseudo is None or not true_cases or not pseudo_cases or not labelled_to_pseudo[1]:
        return true_cases + (pseudo_cases if labelled_to_pseudo is None or not true_cases else 0)
    return math.ceil(round(pseudo_cases * sum(labelled_to_pseudo) / labelled_to_pseudo[1], 6))


def pass_of_round(run: Run, of: Round, true_cases: int, pseudo_cases: int) -> int:
    """Samples of a pass over a round's cases; of several folds each leaves out one part of them."""
    settings = run.recipe.settings(of.planned, run=None)
    folds = run.recipe.member_folds(of.planned)
    parts = 1 if folds == ["all"] else folds_of_split(run)
    return samples_of_pass(
        training_share(true_cases, parts),
        training_share(pseudo_cases, parts if settings.pseudo_folds == "split" else 1),
        settings.labelled_to_pseudo,
    )


def iterations_of_pass(samples: int, batch_size: int) -> int:
    """Batches that hold these samples, at least one."""
    return max(1, math.ceil(samples / batch_size))


def training_share(cases: int, parts: int) -> int:
    """How many of some cases a fold trains on that leaves out one of ``parts`` parts; of one part all."""
    return cases if parts < 2 else cases - cases // parts


def stock_epochs(epochs: int, iterations: int) -> float:
    """Epochs of stock nnU-Net with as many iterations."""
    return epochs * iterations / STOCK_ITERATIONS
