"""Scans as they come into a folder: which of them are whole, and what became of each.

A folder is the queue: a PACS node, a copying script or a challenge's harness writes into it without a protocol, several
may do so at once, and what was done is seen from the output folder after a restart. A scan counts as arrived when
nothing of it has changed for some seconds, by this process's clock or by the time of its files; so a file that was
written elsewhere and renamed in is taken at once. What cannot be predicted is told and left alone until it changes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.inference.folder import PredictionReport
from nnunet_flare.inference.inputs import InputCase, Inputs

log = logging.getLogger(__name__)

WRITTEN, KEPT, SET_ASIDE = "written", "already there", "set aside"

POLLS = 5
"""How often the folder is looked at while a scan settles."""

SHORTEST_POLL_S, LONGEST_POLL_S = 0.1, 2.0

Key = tuple[bool, str]
"""A name, and whether it is a scan that can be taken."""

State = tuple[Any, ...]
"""What a scan's files are: names, sizes, times; equal as long as nobody touches them."""


@dataclass(frozen=True)
class Outcome:
    """What became of a scan: ``outcome`` is written, already there or set aside."""

    case: str
    outcome: str
    files: tuple[str, ...] = ()
    seconds: float | None = None
    reason: str | None = None

    def line(self) -> str:
        """For people."""
        seconds = "" if self.seconds is None else f" in {self.seconds:.1f} s"
        return f"{self.case}: {self.outcome}{seconds}: {self.reason or ', '.join(self.files)}"

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "files": list(self.files), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


class Arrivals:
    """Which scans of a folder have arrived and were not handed out yet, or changed since."""

    def __init__(
        self, find: Callable[[], Inputs], settle_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``find`` lists the folder; ``settle_s`` are the seconds for which nothing of a scan may have changed.

        ``inputs`` is what the folder held last.
        """
        self._find, self._settle_s, self._clock = find, settle_s, clock
        self.inputs = Inputs({}, {}, {}, ())
        self._seen: dict[Key, tuple[State, float]] = {}
        self._handed_out: dict[Key, State] = {}
        self._trouble: str | None = None

    def look(self) -> tuple[list[InputCase], list[InputCase], dict[str, str]]:
        """Scans that arrived, scans that changed since they were handed out, and why others are not taken."""
        try:
            self.inputs = inputs = self._find()
        except (InputError, OSError) as error:  # a network folder may be gone for a while
            if str(error) != self._trouble:
                log.warning("the folder cannot be searched for scans: %s", error)
            self._trouble = str(error)
            return [], [], {}
        self._trouble = None
        now = self._clock()
        states: dict[Key, State] = {(True, name): _state_of(case.files) for name, case in inputs.cases.items()}
        for name, reason in inputs.not_taken.items():
            states[False, name] = (reason, *_state_of((Path(name),)))
        for known in (self._seen, self._handed_out):
            for key in known.keys() - states.keys():
                del known[key]
        settled = [key for key, state in states.items() if self._has_settled(key, state, now)]
        settled.sort(key=lambda key: _newest(states[key]))
        fresh = [inputs.cases[name] for taken, name in settled if taken and (taken, name) not in self._handed_out]
        changed = [inputs.cases[name] for taken, name in settled if taken and (taken, name) in self._handed_out]
        for key in settled:
            self._handed_out[key] = states[key]
        return fresh, changed, {name: inputs.not_taken[name] for taken, name in settled if not taken}

    def _has_settled(self, key: Key, state: State, now: float) -> bool:
        if self._handed_out.get(key) == state:
            return False
        before, since = self._seen.get(key, (None, now))
        if before != state:
            since = now
        self._seen[key] = (state, since)
        return now - since >= self._settle_s or time.time() - _newest(state) >= self._settle_s


def watch(
    arrivals: Arrivals,
    predict: Callable[[Sequence[InputCase], bool], None],
    tell: Callable[[Outcome], None],
    stopped: Event,
    *,
    settle_s: float,
) -> None:
    """Predict what arrives until ``stopped`` is set.

    Args:
        arrivals: of the folder.
        predict: predicts scans and tells of each; also whether those that have outputs already are predicted anew.
        tell: of what is not taken.
        stopped: by whoever ends it.
        settle_s: as for the arrivals.
    """
    pause = min(max(settle_s / POLLS, SHORTEST_POLL_S), LONGEST_POLL_S)
    while not stopped.is_set():
        fresh, changed, refused = arrivals.look()
        for name, reason in sorted(refused.items()):
            tell(Outcome(name, SET_ASIDE, reason=reason))
        for cases, anew in ((fresh, False), (changed, True)):
            if cases and not stopped.is_set():
                predict(cases, anew)
        if not fresh and not changed:
            stopped.wait(pause)


class TellingReport(PredictionReport):
    """A report that tells each outcome when it is known, and keeps none of them: a server runs for months."""

    def __init__(self, tell: Callable[[Outcome], None], files: Callable[[str], Sequence[Path]]) -> None:
        super().__init__()
        self._tell, self._files = tell, files

    def add_written(self, case: str, seconds: float) -> None:
        self._tell(Outcome(case, WRITTEN, self._paths(case), round(seconds, 3)))

    def add_kept(self, case: str) -> None:
        self._tell(Outcome(case, KEPT, self._paths(case)))

    def add_failed(self, case: str, reason: str) -> None:
        self._tell(Outcome(case, SET_ASIDE, reason=reason))

    def _paths(self, case: str) -> tuple[str, ...]:
        return tuple(map(str, self._files(case)))


def is_outdated(case: InputCase, label_map: Path) -> bool:
    """Whether a scan's files were written or put here after its label map was: it came while nobody watched, or back.

    A copy may keep the time of an older file; when it came is then the time of its last change of any kind.
    """
    try:
        made = label_map.stat().st_mtime_ns
        found = [one(file) for file in _files_of(case.files) for one in (os.stat, os.lstat)]
    except OSError:
        return False
    return any(max(one.st_mtime_ns, one.st_ctime_ns) > made for one in found)


def _files_of(files: Sequence[Path]) -> list[Path]:
    """Each file, and the files of each DICOM folder."""
    return [file for path in files for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


def _state_of(files: Sequence[Path]) -> State:
    """Of each file, and of the files of each DICOM folder: name, size, time of change and number."""
    found: list[tuple[str, int, int, int]] = []
    for file in _files_of(files):
        try:
            one = os.stat(file)
        except OSError:  # just gone
            found.append((str(file), -1, 0, 0))
        else:
            found.append((str(file), one.st_size, one.st_mtime_ns, one.st_ino))
    return tuple(found)


def _newest(state: State) -> float:
    """When a file of a scan was written last, in seconds since 1970; now where that is not known."""
    times = [one[2] for one in state if isinstance(one, tuple) and one[1] >= 0]
    return max(times) / 1e9 if times else time.time()
