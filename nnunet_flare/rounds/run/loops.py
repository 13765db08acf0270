"""Which scans and organs a round is about: all organs of the unlabelled scans, or in a loop over some organs those.

In a loop (HKUST, FLARE23) every labelled or partial case counts with its annotated organs of the loop, and a partial
case that lacks some of them is labelled beside the unlabelled scans.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nnunet_flare.cases import Case
from nnunet_flare.rounds.run.dataset import base_table, foreground_ids, organ_ids, raw_cases, raw_files
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, read_list, size_of


class TrainingScan(UnlabelledCase):
    """The scan of a partial case, some organs of which a model labels; its arrays are those of the training data."""


def round_organs(run: Run, of: Round) -> dict[str, tuple[int, ...]]:
    """Names and label ids of the organs and regions that a round trains and labels."""
    own = set(round_labels(run, of))
    return {name: ids for name, ids in organ_ids(run).items() if own.issuperset(ids)}


def round_labels(run: Run, of: Round) -> tuple[int, ...]:
    """Every label id that a round trains and labels."""
    known = foreground_ids(run)
    return known if of.loop is None else tuple(of.loop.ids(known))


def annotated_of(case: Case, organs: Collection[int]) -> tuple[int, ...]:
    """Those of some organs that a labelled or partial case has annotated."""
    known = organs if case.role == "labelled" else case.annotated or ()
    return tuple(sorted(organ for organ in organs if organ in known))


def true_cases(run: Run) -> dict[str, Case]:
    """The labelled and partial cases of the dataset."""
    table = base_table(run)
    return {case: table[case] for case in raw_cases(run) if table[case].role in ("labelled", "partial")}


def round_scans(run: Run, of: Round) -> list[UnlabelledCase]:
    """The scans that a round labels: the unlabelled ones, in a loop also partial cases that lack some of its organs."""
    scans = read_list(run.paths.unlabelled)
    if of.loop is None:
        return scans
    return scans + training_scans(run, round_labels(run, of))


def arrays_of(run: Run, case: UnlabelledCase) -> Path:
    """The folder with the arrays of a scan that a round labels.

    One that an earlier run on the dataset had as an unlabelled scan, and that was annotated since, has others there.
    """
    return run.base_data if isinstance(case, TrainingScan) else run.unlabelled_data


def training_scans(run: Run, organs: Collection[int]) -> list[UnlabelledCase]:
    """The scans of partial cases that lack some of these organs."""
    lacking = [case for case, known in true_cases(run).items() if len(annotated_of(known, organs)) < len(organs)]
    files = raw_files(run) if lacking else {}
    return [
        TrainingScan(
            case,
            str(files[case]["images"][0]),
            tuple(str(image) for image in files[case]["images"]),
            sum(size_of(image) for image in files[case]["images"]),
        )
        for case in lacking
    ]
