"""kill -9 at seeded random moments of a tiny loop, again and again; every run must end as one that was never killed.

A third of the kills each goes to trainings, to labelling and to building; a few more to the other tasks. A kill is
aimed at a task and counts only when it hit: the task was at work when the processes died, and not done after that. So
that random moments fall into the work and not into the seconds in which Python starts, a ``sitecustomize.py`` notes
when a task changes its first file, and makes every change of a file take a little longer.

The state of a soak is a folder; one that is cut goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from nnunet_flare.files import read_json, write_json
from nnunet_flare.processes import still_running
from nnunet_flare.rounds.executors.child import start_child
from nnunet_flare.rounds.run.ledger import read_ledger
from nnunet_flare.rounds.run.manifest import Run, load_run
from nnunet_flare.rounds.run.tasks import graph, is_done

STAGES = {
    "training": ("train-r0-f0", "train-r0-f1", "train-r1-fall"),
    "prediction": ("label-r0-p0", "label-r0-p1"),
    "building": ("build-r0", "build-r1"),
}
"""What takes a third of the kills each, and the tasks that it is made of."""

ELSEWHERE = ("plan", "unlabelled", "select-r0", "report-r1")
ORDER = (
    "plan", "unlabelled", "build-r0", "train-r0-f0", "train-r0-f1", "label-r0-p0", "label-r0-p1", "select-r0",
    "build-r1", "train-r1-fall", "report-r1",
)  # fmt: skip
"""In which order the loop comes to its tasks."""

PER_LOOP = 6
"""Kills of each stage in one loop."""

WRITTEN = ("nnUNet_preprocessed", "nnUNet_results", "nnUNet_raw/Dataset022_FLAREPhantom/imagesUn")
"""The folders that the loop writes."""

VICTIMS = ("driver", "worker", "machine")
"""Who is killed: the driver, one process of the task, or all at once, as when the power fails."""

SLOWER_S = 0.03
LATEST = 0.8
"""Kills come within this share of a task's usual time; later ones would often come too late."""

WAIT_S = 400.0
TRIES = 12

SITE = f'''
import os, sys, time

folder, busy = os.environ["FLARE_SOAK_FOLDER"], False
CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

def slow(event, arguments):
    """Note the first change of a file that a task makes, and make each one take longer."""
    global busy
    if event not in CHANGES and not (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    task = os.environ.get("NNUNET_FLARE_TASK", "").rpartition(":")[2]
    if busy or not task or not any(str(path).startswith(folder) for path in arguments[:2]):
        return
    busy = True
    try:
        mark = os.path.join(folder, "began", task)
        if not os.path.exists(mark):
            os.close(os.open(mark, os.O_CREAT | os.O_WRONLY))
        time.sleep({SLOWER_S})
    finally:
        busy = False

sys.addaudithook(slow)
'''


@dataclass(frozen=True)
class Kill:
    """One kill that hit, ``seconds`` after the task had begun to write. ``equal``: how its loop ended, once it has."""

    number: int
    stage: str
    task: str
    victim: str
    seconds: float
    loop: int
    equal: bool | None = None


@dataclass(frozen=True)
class Soak:
    """A soak below ``folder``: ``command`` starts (or resumes) the loop whose run is ``run_dir``.

    ``kills`` are those of the three stages together, a multiple of three; ``others`` come on top of them. ``like`` is
    the finished run of the same settings that they are compared with; without it the loop first runs undisturbed.
    """

    folder: Path
    command: list[str]
    run_dir: Path
    environment: Mapping[str, str]
    kills: int
    others: int = 0
    seed: int = 0
    like: Path | None = None
    say: Callable[[str], None] = print

    @property
    def log(self) -> Path:
        return self.folder / "kills.json"

    def run(self) -> list[Kill]:
        """Kill until there are enough kills; returns all of them, each with its loop's end compared."""
        (self.folder / "began").mkdir(exist_ok=True)
        site = self.folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE)
        usual = self._undisturbed() if self.like is None else usual_of(load_run(self.like))
        if self.plan()[-1][0] > 0:
            self._preprocess()
        if not self.read():
            self._restore(0)
        for loop, task in self.plan()[len(self.read()) :]:
            done = self.read()
            if done and done[-1].loop != loop and done[-1].equal is None:
                self._finish(usual, loop)
            self._one(len(done), loop, task, usual)
        self._finish(usual, None)
        return self.read()

    def plan(self) -> list[tuple[int, str]]:
        """(loop, task) of every kill, within a loop in the order in which it comes to the tasks."""
        assert self.kills % len(STAGES) == 0, "no equal shares"
        rng = random.Random(self.seed)
        each = self.kills // len(STAGES)
        loops = math.ceil(each / PER_LOOP)
        chosen = {stage: [rng.choice(names) for _ in range(each)] for stage, names in STAGES.items()}
        chosen["other"] = [ELSEWHERE[k % len(ELSEWHERE)] for k in range(self.others)]
        plan = []
        for number in range(loops):
            tasks = [task for names in chosen.values() for task in names[number::loops]]
            plan += [(number, task) for task in sorted(tasks, key=ORDER.index)]
        return plan

    def read(self) -> list[Kill]:
        return [Kill(**kill) for kill in json.loads(self.log.read_text())] if self.log.is_file() else []

    def _note(self, kills: list[Kill]) -> None:
        write_json(self.log, [asdict(kill) for kill in kills])

    def _undisturbed(self) -> dict[str, Any]:
        """Run the loop once without a kill: what it decides, and how long each task works."""
        path = self.folder / "undisturbed.json"
        if not path.is_file():
            self._restore()
            driver = self._start()
            assert driver.wait(timeout=WAIT_S * 4) == 1, self._tail()  # 1: the scan that cannot be read
            run, seconds = load_run(self.run_dir), {}
            for task in graph(run).values():
                began = self.folder / "began" / task.name
                ended = run.paths.done(task.name).stat().st_mtime
                seconds[task.name] = max(0.05, ended - began.stat().st_mtime if began.is_file() else 0.0)
            write_json(path, {"ended": ended_as(run), "seconds": seconds})
        return read_json(path)

    def _restore(self, loop: int | None = None) -> None:
        """Put the folders back as they were before the loop ran; where it is not killed before that, preprocessed."""
        tasks = [task for number, task in self.plan() if number == loop]
        start = self.folder / "preprocessed"
        is_ahead = loop is not None and start.is_dir() and not {"plan", "unlabelled"} & set(tasks)
        for name in WRITTEN:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if is_ahead:
                shutil.copytree(start / name, self.folder / name, symlinks=True)
            elif name != WRITTEN[-1]:
                (self.folder / name).mkdir()

    def _preprocess(self) -> None:
        """Keep the folders as they are when the scans are preprocessed, so that most loops start there."""
        if (self.folder / "preprocessed").is_dir():
            return
        self._restore()
        driver = self._start()
        while not self._is_over("unlabelled"):
            assert driver.poll() is None, self._tail()
            time.sleep(0.05)
        driver.terminate()
        driver.wait(timeout=WAIT_S)
        scratch = self.folder / ".tmp-preprocessed"
        shutil.rmtree(scratch, ignore_errors=True)
        for name in WRITTEN:
            shutil.copytree(self.folder / name, scratch / name, symlinks=True)
        scratch.rename(self.folder / "preprocessed")

    def _start(self) -> subprocess.Popen:
        for mark in (self.folder / "began").iterdir():
            mark.unlink()
        with open(self.folder / "driver.log", "ab") as stream:
            return start_child(
                [sys.executable, "-m", "nnunet_flare.cli.pseudolabel", *self.command],
                environment={
                    **os.environ,
                    **self.environment,
                    "FLARE_SOAK_FOLDER": str(self.folder),
                    "PYTHONPATH": os.pathsep.join(
                        filter(None, [str(self.folder / "site"), os.environ.get("PYTHONPATH")])
                    ),
                },
                output=stream,
            )

    def _one(self, number: int, loop: int, wanted: str, usual: Mapping) -> None:
        """Kill once while ``wanted`` works, or another task of its stage where that is done; too late is no kill."""
        rng = random.Random(f"{self.seed} {number}")
        victim, share = rng.choice(VICTIMS), rng.random()
        stage = next((stage for stage, names in STAGES.items() if wanted in names), "other")
        for _ in range(TRIES):
            same = [name for name in (wanted, *STAGES.get(stage, ())) if not self._is_over(name)]
            if not same:
                self.say(f"{wanted} is done already: the loop ends and a new one starts")
                self._finish(usual, loop)
                continue
            task, driver = same[0], self._start()
            mark, ends = self.folder / "began" / same[0], time.monotonic() + WAIT_S
            while not mark.is_file() and driver.poll() is None and time.monotonic() < ends:
                time.sleep(0.01)
            moment = LATEST * share * usual["seconds"][task]
            if mark.is_file():
                time.sleep(max(0.0, mark.stat().st_mtime + moment - time.time()))
            hit = kill(driver, victim, task, rng)
            assert hit or mark.is_file() or self._is_over(task), f"{task} did not begin:\n{self._tail()}"
            if hit and not self._is_over(task):
                break
            share *= 0.7
        else:
            raise AssertionError(f"{wanted} was not hit in {TRIES} tries:\n{self._tail()}")
        self._note([*self.read(), Kill(number, stage, task, victim, round(moment, 2), loop)])
        self.say(f"kill {number + 1} of {self.kills + self.others}: {victim}, {task}, after {moment:.2f} s of its work")

    def _is_over(self, task: str) -> bool:
        if not (self.run_dir / "run.json").is_file():
            return False
        return load_run(self.run_dir).paths.done(task).is_file()

    def _finish(self, usual: Mapping, loop: int | None) -> None:
        """Let the loop end, compare it, note that, and put the folders back for the next one, number ``loop``."""
        driver = self._start()
        assert driver.wait(timeout=WAIT_S * 4) == 1, self._tail()
        run = load_run(self.run_dir)
        assert all(is_done(run, task) for task in graph(run).values()), self._tail()
        ended = ended_as(run)
        equal = ended == usual["ended"]
        self._note([replace(k, equal=equal) if k.equal is None else k for k in self.read()])
        self.say(f"the loop ended {'as' if equal else 'NOT as'} the undisturbed one")
        assert equal, (ended, usual["ended"])
        self._restore(loop)

    def _tail(self) -> str:
        return (self.folder / "driver.log").read_text(errors="replace")[-3000:]


def usual_of(run: Run) -> dict[str, Any]:
    """What a finished run came to, and how long its tasks worked at least: most of the time Python was starting."""
    seconds = {task.name: read_json(run.paths.done(task.name))["seconds"] / 4 for task in graph(run).values()}
    return {"ended": ended_as(run), "seconds": {**dict.fromkeys(ORDER, 1.0), **seconds}}


def ended_as(run: Run) -> dict[str, Any]:
    """What a run came to: per case its decision, score and the hash of its label; per training, of its weights."""
    import torch

    entries = read_ledger(run.paths)
    cases = {entry.case: [entry.decision, entry.score, entry.label_sha256] for entry in entries}
    assert len(cases) == len(entries), "a case is there twice"
    weights = {}
    for task in graph(run).values():
        if task.stage == "train" and task.round is not None:
            path = run.round(task.round).model / f"fold_{task.fold}" / "checkpoint_final.pth"
            state = torch.load(path, map_location="cpu", weights_only=False)["network_weights"]
            content = b"".join(state[name].numpy().tobytes() for name in sorted(state))
            weights[task.name] = hashlib.sha256(content).hexdigest()
    return {"cases": cases, "weights": weights}


def kill(driver: subprocess.Popen, victim: str, task: str, rng: random.Random) -> bool:
    """kill -9; whether a process of the task lived. Returns when all processes of the loop are gone.

    A driver that only loses its worker ends by itself, after the tasks that need nothing of it.
    """
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(driver.pid).children(recursive=True)
        started = [p for p in below if _of(p, task)]
        workers = [w for p in started for w in (p, *p.children(recursive=True))]
        if not workers:
            if driver.poll() is None:
                driver.kill()
            _all_gone(below)
            return False
        doomed = {"driver": [driver.pid], "worker": [rng.choice(workers).pid]}.get(victim)
        for pid in doomed or [driver.pid, *(p.pid for p in below)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        driver.wait(timeout=WAIT_S)
        _all_gone(below)
        return True
    return False


def _of(process: psutil.Process, task: str) -> bool:
    with suppress(psutil.Error):
        return process.cmdline()[-1:] == [task]
    return False


def _all_gone(processes: list[psutil.Process]) -> None:
    alive = still_running(processes, patience_s=WAIT_S)
    assert not alive, f"outlived their driver: {alive}"


def page(kills: list[Kill], *, seed: int, made_with: str) -> str:
    """The log as a page."""
    by_stage = {stage: [k for k in kills if k.stage == stage] for stage in (*STAGES, "other")}
    by_victim = {victim: [k for k in kills if k.victim == victim] for victim in VICTIMS}
    words = {
        "other": "planning, preprocessing, selection, report",
        "driver": "only the driver",
        "worker": "only one process of the task",
        "machine": "all processes at once",
    }
    rows = []
    for what, found in {**by_stage, **by_victim}.items():
        rows.append(f"| {words.get(what, what)} | {len(found)} | {sum(k.equal is True for k in found)} |")
    rows.insert(len(by_stage), "| | | |")
    lines = [
        "# Killed and resumed",
        "",
        f"Written by `make soak` ({made_with}; seed {seed}). A tiny loop on synthetic scans is killed with",
        "`kill -9` while one of its tasks works, resumed with the same command, killed again, and so on to its end.",
        "*Survived* means that the run ended with every case once, with the decisions, scores and label hashes of an",
        "undisturbed run, and with the same weights in every trained network.",
        "",
        "| killed | tries | survived |",
        "|---|---|---|",
        *rows,
        "",
        "## Every kill",
        "",
        "| kill | loop | killed process | task | seconds after it began to write | survived |",
        "|---|---|---|---|---|---|",
    ]
    for k in kills:
        survived = {True: "yes", False: "NO", None: "-"}[k.equal]
        lines.append(f"| {k.number + 1} | {k.loop + 1} | {k.victim} | {k.task} | {k.seconds:.2f} | {survived} |")
    return "\n".join(lines) + "\n"
