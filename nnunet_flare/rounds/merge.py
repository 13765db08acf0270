"""Merging folders of label maps, case by case: pseudo-labels, external teachers and partial ground truth."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_flare.cases import CaseTable, read_table
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import write_csv
from nnunet_flare.fusion.ids import IdMap
from nnunet_flare.fusion.partial import OnDisagree, Source, merge
from nnunet_flare.images import stem_of, suffix_of
from nnunet_flare.listing import list_label_maps, told
from nnunet_flare.outputs import check_outputs
from nnunet_flare.parallel import Workers
from nnunet_flare.rounds.stages.case_maps import NO_MAP, CaseMaps, teacher_ids

log = logging.getLogger(__name__)

TABLE = "merge.csv"

SHOWN = 5
"""Label maps that are named in a message."""


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, as given on the command line; see ``flare-pseudolabel merge``."""

    output: Path
    base: Path
    label_ids: Sequence[int]
    partial: Path | None = None
    annotated: Sequence[str] = ()
    teachers: Sequence[Path] = ()
    id_maps: Sequence[str] = ()
    union_of: Sequence[int] = ()
    on_disagree: OnDisagree | None = None
    protect: Sequence[int] = ()

    @property
    def ignore_label(self) -> int:
        """One above the highest label."""
        return max(self.label_ids) + 1


@dataclass(frozen=True)
class Outcome:
    """What became of one case: voxels that the sources disagree on, that the truth decided, that are ignored."""

    disagreeing: int
    from_truth: int
    ignored: int
    is_constant: bool


@dataclass(frozen=True)
class MergeResult:
    """Cases by what became of them; a case that failed has its reason."""

    outcomes: Mapping[str, Outcome]
    failed: Mapping[str, str]

    @property
    def constant(self) -> list[str]:
        """Cases that are dropped because their merged map has one value only."""
        return sorted(case for case, outcome in self.outcomes.items() if outcome.is_constant)

    @property
    def has_ignore(self) -> bool:
        """Whether a written map holds the ignore label."""
        return any(outcome.ignored and not outcome.is_constant for outcome in self.outcomes.values())


@dataclass(frozen=True)
class _Job:
    """The files of one case; the teachers' in the order they were given."""

    case: str
    base: Path
    teachers: tuple[Path | None, ...]
    truth: Path | None


def merge_folders(request: MergeRequest, *, processes: int | None = None) -> MergeResult:
    """Merge every case of the base folder and write its label map and ``merge.csv`` to the output folder.

    Raises:
        InputError: for options that do not fit each other, missing folders or unknown ids; nothing is written then.
    """
    id_maps = _checked(request)
    table = _annotations(request)
    folders = [request.base, *request.teachers, *([] if request.partial is None else [request.partial])]
    listings = [list_label_maps(folder, besides=[request.output, *folders]) for folder in folders]
    left = {name: reason for listing in listings for name, reason in listing.not_taken.items()}
    base, *others = ({c: f[0] for c, f in listing.cases.items() if c not in left} for listing in listings)
    teachers, truths = others[: len(request.teachers)], (others[-1] if request.partial is not None else {})
    if not base:
        raise InputError(f"merge: no label map in {request.base}{told(left)}")
    jobs = [
        _Job(case, path, tuple(found.get(case) for found in teachers), truths.get(case)) for case, path in base.items()
    ]
    read = [path for maps in (base, *teachers, truths) for path in maps.values()]
    read += [Path(word) for word in (*request.annotated, *request.id_maps)]
    check_outputs([request.output / TABLE, *(request.output / _output_name(path) for path in base.values())], read)
    failed = left | {case: f"no label map in {request.base}" for case in truths if case not in base}
    outcomes: dict[str, Outcome] = {}
    request.output.mkdir(parents=True, exist_ok=True)
    with Workers(processes) as workers:
        work = partial(_merge_case, request, id_maps, table)
        for job, outcome in workers.each_case(work, jobs, description="merging"):
            if isinstance(outcome, CaseError):
                failed[job.case] = outcome.reason
            else:
                outcomes[job.case] = outcome
    result = MergeResult(dict(sorted(outcomes.items())), dict(sorted(failed.items())))
    _write_table(request.output / TABLE, result)
    _say_what_else_is_there(request.output, {_output_name(path) for path in base.values()})
    return result


def _say_what_else_is_there(folder: Path, names: Collection[str]) -> None:
    """Name label maps that this merge did not make, such as those of cases that an earlier one had."""
    listing = list_label_maps(folder)
    others = sorted(path.name for files in listing.cases.values() for path in files if path.name not in names)
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        log.warning(
            "%s: %s%s: not of this merge, and not in %s; remove what is of an earlier one",
            folder, ", ".join(others[:SHOWN]), more, TABLE,
        )  # fmt: skip


def _checked(request: MergeRequest) -> list[IdMap | None]:
    """Refuse options that would be without effect, and return each teacher's id map."""
    problems = []
    if (request.partial is None) != (not request.annotated):
        problems.append("--partial and --annotated belong together")
    if request.partial is None and not request.teachers:
        problems.append("nothing to merge; give --partial DIR, --teacher DIR, or both")
    if not request.teachers:
        for option, value in (
            ("--on_disagree", request.on_disagree),
            ("--protect", request.protect),
            ("--union", request.union_of),
            ("--id_map", request.id_maps),
        ):
            if value:
                problems.append(f"{option} needs --teacher")
    if request.union_of and request.on_disagree:
        problems.append("give only one of --union and --on_disagree; a union has no disagreement")
    for option, ids in (("--union", request.union_of), ("--protect", request.protect)):
        unknown = sorted(set(ids) - (set(request.label_ids) - {0}))
        if unknown:
            problems.append(f"{option} {unknown}: not in the label set {sorted(request.label_ids)}")
    folders = [request.base, *request.teachers, *([] if request.partial is None else [request.partial])]
    problems += [f"{folder}: no such folder" for folder in folders if not folder.is_dir()]
    if request.output.resolve() in {folder.resolve() for folder in folders}:
        problems.append(f"-o {request.output}: is one of the folders to merge; give another folder")
    if request.ignore_label > 255:
        problems.append("label ids above 254 are not supported")
    words = list(request.id_maps) or [NO_MAP]
    if len(words) not in (1, max(1, len(request.teachers))):
        problems.append(f"--id_map: {len(words)} maps for {len(request.teachers)} teachers; give one, or one for each")
    if problems:
        raise InputError(f"merge: {'; '.join(problems)}")
    maps = teacher_ids(request.id_maps, len(request.teachers))
    for found in maps:
        absent = [] if found is None else sorted(found.knows - set(request.label_ids))
        if found is not None and absent:
            raise InputError(f"merge: id map {found.name}: maps to {absent}, not in {sorted(request.label_ids)}")
    return maps


def _annotations(request: MergeRequest) -> CaseTable | tuple[int, ...]:
    """The annotated ids of every partial case: a case table, or one list for all."""
    words = list(request.annotated)
    if len(words) == 1 and words[0].endswith(".json"):
        named = {str(number): number for number in request.label_ids}
        return read_table(Path(words[0]), labels=named)
    known = set(request.label_ids) - {0}
    wrong = [word for word in words if not word.isdigit() or int(word) not in known]
    if wrong:
        raise InputError(f"merge: --annotated {' '.join(wrong)}: expected ids of {sorted(known)} or one case table")
    return tuple(int(word) for word in words)


def _output_name(path: Path) -> str:
    return f"{stem_of(path)}{suffix_of(path)}"


def _merge_case(
    request: MergeRequest, id_maps: Sequence[IdMap | None], table: CaseTable | tuple[int, ...], job: _Job
) -> Outcome:
    target = request.output / _output_name(job.base)
    target.unlink(missing_ok=True)  # of an earlier merge with other sources: this case may be dropped or fail now
    maps = CaseMaps.open(job.case, job.base, request.label_ids)
    sources = [Source(maps.first.array)]
    for folder, path, id_map in zip(request.teachers, job.teachers, id_maps, strict=True):
        if path is None:
            raise CaseError(job.case, f"no label map in {folder}")
        sources.append(maps.source(path, id_map))
    truth = None
    annotated: tuple[int, ...] = ()
    if job.truth is not None:
        annotated = _annotated(request, table, job.case)
        truth = maps.read(job.truth)
        unexpected = sorted(set(truth[truth > 0].tolist()) - set(annotated))
        if unexpected:
            raise CaseError(
                job.case, f"{job.truth}: holds the ids {unexpected}, but only {list(annotated)} are annotated"
            )
    merged = merge(
        sources,
        truth=truth,
        annotated=annotated,
        union_of=request.union_of,
        on_disagree=request.on_disagree or "ignore",
        ignore_label=request.ignore_label,
        protect=request.protect,
    )
    maps.write(target, merged)
    ignored = int((merged.labels == request.ignore_label).sum())
    return Outcome(merged.disagreeing, merged.from_truth, ignored, merged.is_constant)


def _annotated(request: MergeRequest, table: CaseTable | tuple[int, ...], case: str) -> tuple[int, ...]:
    if isinstance(table, tuple):
        return table
    entry = table[case]
    if entry.role == "partial":
        return entry.annotated or ()
    if entry.role == "labelled":
        return tuple(number for number in request.label_ids if number > 0)
    raise CaseError(case, f"{table.source}: its role is {entry.role}, expected partial or labelled for a ground truth")


def _write_table(path: Path, result: MergeResult) -> None:
    rows: list[Sequence[Any]] = [["case", "result", "disagreeing", "from_truth", "ignored", "reason"]]
    for case, o in result.outcomes.items():
        word, why = ("dropped", "one value only") if o.is_constant else ("written", "")
        rows.append([case, word, o.disagreeing, o.from_truth, o.ignored, why])
    rows += [[case, "failed", "", "", "", reason] for case, reason in result.failed.items()]
    write_csv(path, rows)
