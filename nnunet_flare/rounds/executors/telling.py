"""What a driver says of the trainings that run: a line in the log after the first epoch and every few minutes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from nnunet_flare.errors import FlareError
from nnunet_flare.rounds.progress import task_state, time_left, training
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.wording import duration

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
TELL_SECONDS = 600.0


class Teller:
    """Looks at the running trainings now and then; ``words`` say in short how far they are, for a progress bar."""

    def __init__(self) -> None:
        self.words = ""
        self.part_done = 0.0
        self._looked = -LOOK_SECONDS
        self._told: dict[str, float] = {}

    def look(self, run: Run, names: Iterable[str], *, at_once: bool = False) -> bool:
        """Read what the tasks that run have logged, where it is time to, or ``at_once``; returns whether it did."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS and not at_once:
            return False
        self._looked = now
        running = list(names)
        try:
            self._read(run, running, now)
        except (FlareError, OSError, ValueError, LookupError) as error:  # no run ends for what is said of it
            log.debug("the progress of the trainings cannot be read: %s", error)
            self.words, self.part_done = ", ".join(running), 0.0
        return True

    def _read(self, run: Run, names: Iterable[str], now: float) -> None:
        tasks = graph(run)
        words, trains, told, self.part_done = [], False, False, 0.0
        for name in names:
            task = tasks.get(name)
            if task is None or task.stage != "train":
                words.append(name)
                continue
            found, trains = training(run, task), True
            words.append(f"{name} epoch {found.done}/{found.epochs}")
            self.part_done += min(1.0, found.done / found.epochs)
            if found.done and now - self._told.get(name, -TELL_SECONDS) >= TELL_SECONDS:
                self._told[name], told = now, True
                log.info("%s", found.line())
        states = {name: task_state(run, task) for name, task in tasks.items()}
        left = time_left(run, tasks, states) if trains else None
        if told and left is not None:
            log.info("%s", left.words())
        if left is not None and left.seconds and not left.unknown.get("train"):
            words.append(f"about {duration(left.seconds)} of computing time left")
        self.words = ", ".join(words)
