"""Predicting many scans: the next one is read while the network runs, the last one is written meanwhile.

Two threads and no processes: reading, resampling and compressing release the interpreter's lock, nothing is pickled,
and nothing needs shared memory, of which containers have little. A case that cannot be predicted is set aside with
one line and the others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnunet_flare.ahead import each_ahead
from nnunet_flare.errors import CaseError, DeviceError, FlareError, InputError
from nnunet_flare.files import name_problem
from nnunet_flare.images import Volume, write_labels
from nnunet_flare.images.readers import SITK
from nnunet_flare.inference.devices import lost_gpu
from nnunet_flare.inference.forms import Finished, Form, Receiver, problem_of
from nnunet_flare.inference.inputs import InputCase, check_channel_count
from nnunet_flare.inference.made_with import Mark, mark_in
from nnunet_flare.inference.profile import Profile
from nnunet_flare.kept import is_kept

log = logging.getLogger(__name__)

MEMBERS, ROI = "members", "roi"
"""Folders in the output folder: the members' label maps, a folder each, and the cropped scans."""

READERS = 4
"""Threads that look through what is there already."""


class Postprocess(Protocol):
    """A label map (Z, Y, X) to a cleaned one, as ``postprocessing.pipeline.Pipeline.apply``."""

    def __call__(
        self, labels: np.ndarray, spacing_mm: Sequence[float], *, direction: Sequence[float]
    ) -> np.ndarray: ...


class PredictsScans(Protocol):
    """``core.Segmenter`` or ``coarse_to_fine.RoiSegmenter``, each with its own kind of scan."""

    @property
    def channels(self) -> int: ...

    @property
    def origin(self) -> list[Any]: ...

    def load(self) -> None: ...

    def prepare(self, volumes: Sequence[Volume], case: str = ...) -> Any: ...

    def windows(self, scan: Any) -> int: ...

    def segment(
        self,
        scan: Any,
        *,
        members: bool = ...,
        progress: Callable[[int], None] | None = ...,
        receivers: Sequence[Receiver] = ...,
    ) -> tuple[np.ndarray, list[np.ndarray]]: ...


Progress = Callable[[str, int], Callable[[int], None]]
"""Case name and number of windows to a function that is told the windows done."""


@dataclass
class PredictionReport:
    """What became of the cases: seconds of those written, reasons of those set aside, those that were there already."""

    written: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add_written(self, case: str, seconds: float) -> None:
        """Note a case that was written."""
        self.written[case] = seconds

    def add_kept(self, case: str) -> None:
        """Note a case that was there already."""
        self.kept.append(case)

    def add_failed(self, case: str, reason: str) -> None:
        """Note a case that was set aside."""
        self.failed[case] = reason
        log.error("%s: set aside: %s", case, reason)

    @property
    def exit_code(self) -> int:
        """0 when every case is there, else 1."""
        return 1 if self.failed else 0

    def table(self) -> str:
        """The summary, one line per case that was set aside."""
        lines = [f"{len(self.written)} written, {len(self.kept)} already there, {len(self.failed)} set aside"]
        lines += [f"  {name}: {reason}" for name, reason in sorted(self.failed.items())]
        return "\n".join(lines)


def predict_cases(
    cases: Sequence[InputCase],
    output: Path,
    open_segmenter: Callable[[], PredictsScans],
    *,
    overwrite: bool = True,
    save_members: int = 0,
    postprocess: Postprocess | None = None,
    forms: Sequence[Form] = (),
    crops: str | None = None,
    profile: Profile | None = None,
    progress: Progress | None = None,
    reader: str = SITK,
    mark: Callable[[Any], str] | None = None,
    keep_others: bool = False,
    report: PredictionReport | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> PredictionReport:
    """Predict cases into ``output/<case><suffix>``; members' label maps go to ``output/members/<k>/``.

    Args:
        cases: what to predict.
        output: the folder; made where it is missing.
        open_segmenter: opens the model; called while the first case is already being read. Its networks are built
            while that case is being prepared.
        overwrite: predict cases anew whose label map exists; else those whose outputs are not all there and whole.
        save_members: the number of members (folds) whose label maps are written, too.
        postprocess: applied to each label map before it is written, not to the members'.
        forms: of each label map, written before the label map itself.
        crops: file ending of the crops that the segmenter writes to ``output/roi``, where it does.
        profile: gets the time of every stage.
        progress: makes a progress display per case.
        reader: of the model's plans, as which NIfTI files are read.
        mark: of label maps by the segmenter, see :mod:`nnunet_flare.inference.made_with`.
        keep_others: whether label maps that have another mark are kept, too, where ``overwrite`` is not set.
        report: is told of every case, and returned; a new one without it.
        stopped: asked before each case whether to leave it and those that follow.

    Raises:
        InputError: when the output folder cannot be written or the model cannot be opened.
        DeviceError: when a case made the GPU unusable for those after it; the case is set aside.
    """
    profile = profile or Profile()
    report = PredictionReport() if report is None else report
    check_writable(output)
    todo = []
    for case in cases:
        problem = name_problem(case.name, output, [f"{{}}{case.suffix}"], renamed=False)
        problems = [problem, *(problem_of(case, form) for form in forms)]
        problem = next((one for one in problems if one is not None), None)
        if problem is not None:
            report.add_failed(case.name, problem)
        else:
            todo.append(case)
    further = frozenset(_further_outputs(save_members, forms, crops))
    opened: PredictsScans | None = None
    if not overwrite:
        is_there = partial(_is_there, output=output, members=save_members, forms=forms, crops=crops, reader=reader)
        kept = _marks_of_whole(todo, is_there, output)
        for name in _without_outputs(kept, further):
            del kept[name]
        if mark is not None and not keep_others and any(kept.values()):
            opened = open_segmenter()
            for name in _by_others(kept, mark(opened)):
                del kept[name]
        for case in (case for case in todo if case.name in kept):
            report.add_kept(case.name)
        todo = [case for case in todo if case.name not in kept]
    if not todo:
        return report
    model: Future[PredictsScans] = Future()
    loader = ThreadPoolExecutor(1, "flare-load")
    writer = ThreadPoolExecutor(1, "flare-write")
    try:
        keep_image = any(form.wants_image for form in forms)
        load = partial(_load, model=model, reader=reader, profile=profile, keep_image=keep_image)
        ahead = each_ahead(todo, load, loader)
        segmenter = opened or open_segmenter()
        own = "" if mark is None else str(Mark(mark(segmenter), further))
        model.set_result(segmenter)
        segmenter.load()  # while the first case is being prepared
        pending: tuple[InputCase, float, Future[None]] | None = None
        lost = None
        for case, loading in ahead:
            if stopped():
                break
            start = time.perf_counter()
            with _set_aside(case, report) as outcome:
                scan, image = loading.result()
                for odd in scan.oddities:
                    log.warning("%s: %s", case.name, odd)
                done = None if progress is None else progress(case.name, segmenter.windows(scan))
                received = [None if form.receiver is None else form.receiver(case) for form in forms]
                receivers: dict[str, Any] = {"receivers": [one for one in received if one is not None]}
                wanted = save_members > 0 or any(form.wants_members for form in forms)
                labels, members = segmenter.segment(
                    scan, members=wanted, progress=done, **(receivers if receivers["receivers"] else {})
                )
                finished = Finished(case, labels, scan.grid, members, image)
                if pending is not None:
                    _finish(pending, report)
                to_write = list(zip(forms, received, strict=True))
                writing = writer.submit(_write, finished, output, save_members > 0, postprocess, to_write, profile, own)
                pending = (case, start, writing)
            if outcome.has_failed and (lost := lost_gpu()) is not None:
                break
        if pending is not None:
            _finish(pending, report)
        if lost is not None:
            raise DeviceError(
                f"{case.name}: set aside; the GPU cannot be used any more ({lost}), and the scans that follow were not "
                "predicted. The same command with --continue_prediction goes on; with -device cpu it needs no GPU"
            )
    except BaseException as error:
        if not model.done():
            model.set_exception(error)
        raise
    finally:
        loader.shutdown(cancel_futures=True)
        writer.shutdown()
    return report


def outputs_of(
    case: InputCase, output: Path, *, members: int = 0, forms: Sequence[Form] = (), crops: str | None = None
) -> list[Path]:
    """Every file that is written of a case, with the label maps of so many members."""
    found = _plain_outputs(case, output, members=members, crops=crops)
    return found + [path for form in forms for path in form.files(case)]


def _plain_outputs(case: InputCase, output: Path, *, members: int, crops: str | None) -> list[Path]:
    found = [_target(output, case)]
    found += [_target(output / MEMBERS / str(number), case) for number in range(members)]
    if crops is not None:
        found += [output / ROI / f"{case.name}_{channel:04d}{crops}" for channel in range(len(case.files))]
    return found


def _is_there(
    case: InputCase, *, output: Path, members: int, forms: Sequence[Form], crops: str | None, reader: str
) -> bool:
    """Whether all outputs of a case are there and whole, its label maps on the grid of its scan."""
    damaged = [
        path
        for path in _plain_outputs(case, output, members=members, crops=crops)
        if not is_kept(path, None if path.parent == output / ROI else case.files[0], reader=reader)
    ]
    for form in forms:
        if not damaged and not form.is_whole(case):
            damaged = list(form.files(case))
            if form.of_folder:  # what others have in it is no damage
                return False
    for path in damaged:
        if path.exists():
            log.warning("%s: %s is damaged or belongs to another scan; it is predicted again", case.name, path)
    return not damaged


def _further_outputs(members: int, forms: Sequence[Form], crops: str | None) -> Iterator[str]:
    """The names, for a label map's mark, of what is written of every case besides it."""
    if members:
        yield f"members={members}"
    if crops is not None:
        yield ROI
    yield from (form.name for form in forms)


def _marks_of_whole(
    cases: Sequence[InputCase], is_there: Callable[[InputCase], bool], output: Path
) -> dict[str, Mark | None]:
    """The mark of the label map of each case whose outputs are all there and whole."""
    with ThreadPoolExecutor(READERS, "flare-kept") as pool:
        whole = [case for case, there in zip(cases, pool.map(is_there, cases), strict=True) if there]
        marks = pool.map(lambda case: mark_in(_target(output, case)), whole)
        return {case.name: mark for case, mark in zip(whole, marks, strict=True)}


def _without_outputs(marks: Mapping[str, Mark | None], further: frozenset[str]) -> list[str]:
    """The cases beside whose label map lie further outputs of an earlier prediction, which is said."""
    found = [case for case, mark in marks.items() if mark is not None and not further <= mark.outputs]
    for case in found:
        log.warning("%s: what lies beside its label map is of another prediction; it is predicted again", case)
    return found


def _by_others(marks: Mapping[str, Mark | None], own: str) -> list[str]:
    """The cases whose label map has another mark than ours, which is said; those without any are not among them."""
    others = [case for case, mark in marks.items() if mark is not None and mark.made_with != own]
    for case in others:
        log.warning("%s: its label map was made with another model or other options; it is predicted again", case)
    return others


def check_writable(folder: Path) -> None:
    """Make a folder and refuse one that cannot be written.

    Raises:
        InputError: with the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".flare-write-test"
        probe.touch()
        probe.unlink(missing_ok=True)  # another part may do the same
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another -o") from error


def _load(
    case: InputCase, *, model: Future[PredictsScans], reader: str, profile: Profile, keep_image: bool
) -> tuple[Any, Volume | None]:
    with profile.stage("read"):
        volumes = case.read(reader)
    segmenter = model.result()
    check_channel_count(case, segmenter.channels)
    return segmenter.prepare(volumes, case.name), volumes[0] if keep_image else None


def _write(
    finished: Finished,
    output: Path,
    save_members: bool,
    postprocess: Postprocess | None,
    forms: Sequence[tuple[Form, Any]],
    profile: Profile,
    mark: str,
) -> None:
    case, grid = finished.case, finished.grid
    if postprocess is not None:
        with profile.stage("post-process"):
            labels = postprocess(finished.labels, grid.spacing_mm, direction=grid.direction)
            finished = replace(finished, labels=labels)
    with profile.stage("write"):
        if save_members:
            for number, member in enumerate(finished.members):
                write_labels(_target(output / MEMBERS / str(number), case), member, grid)
        for form, receiver in forms:
            form.write(finished, receiver)
        write_labels(_target(output, case), finished.labels, grid, description=mark)


def _target(output: Path, case: InputCase) -> Path:
    return output / f"{case.name}{case.suffix}"


def _finish(pending: tuple[InputCase, float, Future[None]], report: PredictionReport) -> None:
    case, start, writing = pending
    with _set_aside(case, report):
        writing.result()
        report.add_written(case.name, time.perf_counter() - start)


class _set_aside:
    """Turns the failure of one case into a line of the report. Errors of the input as a whole go on."""

    def __init__(self, case: InputCase, report: PredictionReport) -> None:
        self._case, self._report = case, report
        self.has_failed = False

    def __enter__(self) -> _set_aside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if error is None or isinstance(error, InputError) or not isinstance(error, Exception):
            return False
        reason = error.reason if isinstance(error, CaseError) else _describe(error)
        self._report.add_failed(self._case.name, reason)
        self.has_failed = True
        log.debug("%s", self._case.name, exc_info=error)
        return True


def _describe(error: Exception) -> str:
    if isinstance(error, FlareError):
        return str(error)
    if isinstance(error, OSError):
        return f"cannot be read or written ({error.strerror or error})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''} (details with --verbose)"
