"""The union of several loops' labels with the annotations and external teachers, case by case (HKUST, FLARE23).

Later loops win over earlier ones (tumour over organ), the annotation wins over all. Teachers are folders of label maps;
where they contradict the loops, ``fusion.on_disagree`` says what a voxel becomes, but an organ of a later loop stands
on the loop's word alone, for teachers know no tumours.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_flare.cases import Case
from nnunet_flare.errors import CaseError, InputError, TaskError
from nnunet_flare.fusion.ids import IdMap
from nnunet_flare.fusion.partial import OnDisagree, Source, merge, union
from nnunet_flare.listing import list_label_maps, told
from nnunet_flare.parallel import Workers, num_processes
from nnunet_flare.rounds.run.dataset import dataset_json, foreground_ids, raw_files
from nnunet_flare.rounds.run.ledger import Entry, read_decisions
from nnunet_flare.rounds.run.loops import annotated_of, training_scans, true_cases
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, read_list
from nnunet_flare.rounds.stages.arrays import label_hash
from nnunet_flare.rounds.stages.case_maps import CaseMaps, teacher_ids
from nnunet_flare.rounds.stages.replanned import LabelledScan, has_same_arrays, preprocess_scans

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergedCase:
    """One case of the union: organs that its labels speak about wholly or in the marked voxels, and ignored voxels."""

    taught: tuple[int, ...]
    positive: tuple[int, ...]
    ignored: int


@dataclass(frozen=True)
class MergedCases:
    """The cases that got a merged label map, and the ledger's entry of every case that was merged."""

    cases: dict[str, MergedCase]
    entries: list[Entry]


@dataclass(frozen=True)
class LoopLabels:
    """What a loop says about a case: the label map of its last round, its organs, and whether their absence counts."""

    path: Path
    ids: tuple[int, ...]
    is_open: bool


@dataclass(frozen=True)
class _Job:
    """Everything that is merged for one case."""

    case: str
    loops: tuple[LoopLabels, ...]
    teachers: tuple[tuple[Path, IdMap | None], ...]
    truth: Path | None
    annotated: tuple[int, ...]
    protect: tuple[int, ...]
    organs: tuple[int, ...]
    on_disagree: OnDisagree
    target: Path


@dataclass(frozen=True)
class _Outcome:
    ignored: int
    disagreeing: int
    is_constant: bool
    sha256: str


def teacher_maps(folder: Path) -> dict[str, Path]:
    """The label maps of a teacher's folder by case.

    Raises:
        InputError: for a folder with other images as well, or with two files of one case.
    """
    found = list_label_maps(folder)
    if found.not_taken:
        raise InputError(f"fusion.teachers: {folder}: files that cannot be taken:{told(found.not_taken)}")
    return {case: files[0] for case, files in found.cases.items()}


def make_union(run: Run, data: Path) -> MergedCases:
    """Merge every case and preprocess its label map into :func:`cases_folder` of ``data``, as far as not done before.

    Raises:
        TaskError: when nothing is left.
    """
    jobs, scans = _jobs(run)
    same = has_same_arrays(run.base, run.final_base)
    truth = set(true_cases(run))
    merged: dict[str, MergedCase] = {}
    entries: list[Entry] = []
    labelled: list[LabelledScan] = []
    with Workers(num_processes(max(1, len(jobs)))) as workers:
        for job, outcome in workers.each_case(_merge, jobs, description="merging"):
            if isinstance(outcome, CaseError):
                entries.append(_entry(run, job, truth, "failed", outcome.reason, None))
                continue
            if outcome.is_constant:
                entries.append(_entry(run, job, truth, "refused", "the merged map has one value only", outcome.sha256))
                continue
            parts = f"{len(job.loops)} loops, {len(job.teachers)} teachers"
            reason = f"union of {parts}; {outcome.disagreeing} voxels differ"
            entries.append(_entry(run, job, truth, "taken", reason, outcome.sha256))
            merged[job.case] = MergedCase(
                tuple(sorted(i for loop in job.loops if not loop.is_open for i in loop.ids)),
                tuple(sorted(i for loop in job.loops if loop.is_open for i in loop.ids)),
                outcome.ignored,
            )
            arrays = None if not same else run.base_data if job.case in truth else run.unlabelled_data
            images = scans[job.case].images
            labelled.append(LabelledScan(job.case, images, job.target, outcome.sha256, arrays))
    failed = preprocess_scans(run, run.final_base, data, labelled)
    if not set(merged) - set(failed) and jobs:
        raise TaskError(f"the union has no case left; the first: {entries[0].case}: {entries[0].reason}")
    by_case = {entry.case: entry for entry in entries}
    for case, reason in failed.items():
        del merged[case]
        by_case[case] = _entry(run, next(job for job in jobs if job.case == case), truth, "failed", reason, None)
    log.info("union: %d cases, %d set aside or dropped", len(merged), len(by_case) - len(merged))
    return MergedCases(merged, [by_case[case] for case in sorted(by_case)])


def _jobs(run: Run) -> tuple[list[_Job], dict[str, UnlabelledCase]]:
    """One job per unlabelled scan and per partial case that lacks an organ which some loop labelled."""
    organs = foreground_ids(run)
    ending = dataset_json(run)["file_ending"]
    loops = [(loop.ids(organs), loop.absence == "open") for loop in run.recipe.loops]
    covered = {i for ids, _ in loops for i in ids}
    scans = {scan.case: scan for scan in [*read_list(run.paths.unlabelled), *training_scans(run, covered)]}
    taken = [
        {entry.case for entry in read_decisions(run.paths, number) if entry.decision == "taken"}
        for number in run.recipe.last_rounds()
    ]
    truth, files = true_cases(run), raw_files(run)
    fusion = run.recipe.fusion
    folders = [teacher_maps(Path(folder)) for folder in fusion.teachers]
    id_maps = teacher_ids(fusion.id_maps, len(folders))
    for folder, maps in zip(fusion.teachers, folders, strict=True):
        log.info("teacher %s has label maps of %d of %d cases", folder, len(set(maps) & set(scans)), len(scans))
    jobs = []
    for case in scans:
        own = tuple(
            LoopLabels(run.paths.label(number, case, ending), ids, is_open)
            for (ids, is_open), number, cases in zip(loops, run.recipe.last_rounds(), taken, strict=True)
            if case in cases
        )
        if not own:
            continue  # every loop has set it aside; the annotation of a partial case stays as it is
        jobs.append(
            _Job(
                case,
                own,
                tuple((maps[case], id_map) for maps, id_map in zip(folders, id_maps, strict=True) if case in maps),
                files[case]["label"] if case in truth else None,
                annotated_of(truth.get(case, Case("unlabelled")), organs),
                tuple(i for ids, _ in loops[1:] for i in ids),
                organs,
                fusion.on_disagree,
                run.paths.label(run.final.number, case, ending),
            )
        )
    return jobs, scans


def _merge(job: _Job) -> _Outcome:
    """Merge one case and write its label map; a constant one is not written."""
    ignored = max(job.organs) + 1
    allowed = [0, *job.organs, ignored]  # the annotation may leave voxels open
    maps = CaseMaps.open(job.case, job.loops[0].path, allowed)
    own = np.zeros(maps.first.array.shape, dtype=np.uint8)
    for loop in job.loops:
        own = union([Source(own), Source(maps.read(loop.path))], loop.ids)
    sources = [Source(own, frozenset(i for loop in job.loops for i in loop.ids))]
    sources += [maps.source(path, id_map) for path, id_map in job.teachers]
    merged = merge(
        sources,
        truth=None if job.truth is None else maps.read(job.truth),
        annotated=job.annotated,
        on_disagree=job.on_disagree,
        ignore_label=ignored,
        protect=job.protect,
    )
    maps.write(job.target, merged)
    left_open = int((merged.labels == ignored).sum())
    return _Outcome(left_open, merged.disagreeing, merged.is_constant, label_hash(merged.labels))


def _entry(run: Run, job: _Job, truth: set[str], decision: str, reason: str, sha256: str | None) -> Entry:
    return Entry(
        round=run.final.number, case=job.case, role="partial" if job.case in truth else "pseudo", decision=decision,
        reason=reason, score=None, mean_organ=None, min_organ=None, agreement={}, ignored={},
        model=", ".join(run.round(number).model.name for number in run.recipe.last_rounds()),
        recipe_hash=run.recipe.hash, label_sha256=sha256,
    )  # fmt: skip
