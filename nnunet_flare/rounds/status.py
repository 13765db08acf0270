"""The state of a run as a table that a person can read, in 80 columns and without control characters."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence

import numpy as np

from nnunet_flare.files import read_json
from nnunet_flare.rounds.executors.executor import executor_of
from nnunet_flare.rounds.run.home import other_home, words
from nnunet_flare.rounds.run.ledger import Entry, read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import MARKER, is_marked
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.run.tasks import Task, graph
from nnunet_flare.rounds.run.unlabelled import read_left, read_list
from nnunet_flare.rounds.stages.evaluate import held_out_dice
from nnunet_flare.wording import duration

WIDTH = 80
FAILED = {"task": str, "exit_code": int, "last_lines": str}


def status(run: Run) -> str:
    """Rounds, stages, cases taken, agreement per organ, time used and left."""
    tasks = graph(run)
    states = {name: _state(run, task) for name, task in tasks.items()}
    entries = read_ledger(run.paths) if any(run.root.glob("rounds/r*/decisions.json")) else []
    lines = [
        f"Run {run.settings.name} (recipe {run.recipe.name}, {run.recipe.hash}) on {run.settings.dataset}",
        f"{run.root}",
        *_home_rows(run),
        f"{_unlabelled(run)} unlabelled cases, {run.recipe.final_round} round(s) of labelling, "
        f"device {run.settings.device}",
        *_loop_rows(run),
        "",
        f"{'round':<7}{'train':>9}{'label':>9}{'select':>9}{'taken':>7}{'refused':>9}{'aside':>7}{'agree':>7}{'Dice':>7}",
    ]
    for of in run.rounds:
        lines.append(_round_row(run, of, tasks, states, [e for e in entries if e.round == of.number]))
    lines += ["", *_agreement_rows(entries)]
    lines += _time_rows(run, tasks, states)
    left = read_left(run.paths.unlabelled)
    lines += [f"{len(left)} file(s) of -u were not taken; the first: {min(left)}"] if left else []
    failed = [name for name, state in states.items() if state == "failed"]
    for name in failed:
        document = read_json(run.paths.failed(name), FAILED, remedy=f"flare-pseudolabel retry -o {run.root}")
        tail = [line for line in str(document["last_lines"]).splitlines() if line.strip()][-1:]
        lines.append(f"FAILED {name} (exit code {document['exit_code']}): {tail[0] if tail else 'no output'}")
        lines.append(f"       log: {run.paths.log(name)}")
    under_way = executor_of(run).status(run)
    lines += under_way
    if failed and not under_way:
        lines.append(f"Mend the cause, then: flare-pseudolabel retry -o {run.root}")
    return "\n".join(lines)


def _unlabelled(run: Run) -> int:
    return len(read_list(run.paths.unlabelled)) if run.paths.unlabelled.is_file() else 0


def _state(run: Run, task: Task) -> str:
    if is_marked(run.paths.done(task.name)):
        return "done"
    if run.paths.failed(task.name).is_file():
        return "failed"
    if run.paths.task_lock(task.name).is_file():
        return "running"
    return "waiting"


def _round_row(run: Run, of: Round, tasks: dict[str, Task], states: dict[str, str], entries: Sequence[Entry]) -> str:
    def cell(stage: str) -> str:
        found = [states[t.name] for t in tasks.values() if t.stage == stage and t.round == of.number]
        if not found:
            return "-"
        for state in ("failed", "running"):
            if state in found:
                return state
        done = found.count("done")
        return "done" if done == len(found) else "waiting" if done == 0 else f"{done}/{len(found)}"

    counts = {d: sum(e.decision == d for e in entries) for d in ("taken", "refused", "odd", "failed")}
    means = [e.mean_organ for e in entries if e.mean_organ is not None]
    dice = held_out_dice(run, of.number)
    return (
        f"{of.name:<7}{cell('train'):>9}{cell('label'):>9}{cell('select'):>9}"
        + (f"{counts['taken']:>7}{counts['refused']:>9}{counts['odd'] + counts['failed']:>7}" if entries else " " * 23)
        + (f"{np.mean(means):>7.3f}" if means else f"{'-':>7}")
        + (f"{dice:>7.3f}" if dice is not None else f"{'-':>7}")
    ).rstrip()


def _home_rows(run: Run) -> list[str]:
    """That this folder is a copy, where it is one."""
    home = other_home(run.root, run.settings)
    return (
        []
        if home is None
        else [textwrap.fill(f"COPY: {words(run.root, run.settings, home)}", WIDTH, break_long_words=False)]
    )


def _loop_rows(run: Run) -> list[str]:
    """Which rounds belong to which loop."""
    rounds = run.recipe.rounds
    loops = [
        f"{loop.name} r{index * rounds} to r{(index + 1) * rounds - 1}" for index, loop in enumerate(run.recipe.loops)
    ]
    return [textwrap.fill(f"loops: {', '.join(loops)}, then their union", WIDTH)] if loops else []


def _agreement_rows(entries: Sequence[Entry]) -> list[str]:
    """Mean agreement per organ, one column per round (the last six)."""
    rounds = sorted({entry.round for entry in entries if entry.agreement})[-6:]
    if not rounds:
        return []
    organs = dict.fromkeys(organ for entry in entries for organ in entry.agreement)
    lines = [f"{'mean agreement':<28}" + "".join(f"{f'r{number}':>8}" for number in rounds)]
    for organ in organs:
        cells = []
        for number in rounds:  # of which a loop's has its own organs only
            here = [e for e in entries if e.round == number and e.present.get(organ, True)]
            values = [value for e in here if (value := e.agreement.get(organ)) is not None]
            cells.append(f"{np.mean(values):>8.3f}" if values else f"{'-':>8}")
        lines.append(f"  {organ[:26]:<26}" + "".join(cells))
    return [*lines, ""]


def _time_rows(run: Run, tasks: dict[str, Task], states: dict[str, str]) -> list[str]:
    """Time used so far and, from finished tasks of the same stage, an estimate of what is left."""
    used: dict[str, list[float]] = {}
    for task in tasks.values():
        if states[task.name] == "done":
            used.setdefault(task.stage, []).append(float(read_json(run.paths.done(task.name), MARKER)["seconds"]))
    total = sum(sum(values) for values in used.values())
    if not total:
        return []
    parts = ", ".join(f"{stage} {duration(sum(v))}" for stage, v in used.items())
    lines = [textwrap.fill(f"time used: {parts}", WIDTH, subsequent_indent="           ")]
    left, unknown = 0.0, []
    for task in tasks.values():
        if states[task.name] == "done":
            continue
        if task.stage in used:
            left += float(np.mean(used[task.stage])) * _relative_length(run, task, tasks, states)
        elif task.stage not in unknown:
            unknown.append(task.stage)
    if left or unknown:
        note = f" (without {', '.join(unknown)}: not measured yet)" if unknown else ""
        finish = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
        text = f"time left: about {duration(left)} of computing, one task at a time until {finish}{note}"
        lines.append(textwrap.fill(text, WIDTH, subsequent_indent="           "))
    return lines


def _relative_length(run: Run, task: Task, tasks: dict[str, Task], states: dict[str, str]) -> float:
    """Epochs of a training against the mean of those that are done; 1 for other tasks."""
    if task.stage != "train" or task.round is None:
        return 1.0
    done = [
        run.recipe.num_epochs(run.round(t.round).planned)
        for t in tasks.values()
        if t.stage == "train" and t.round is not None and states[t.name] == "done"
    ]
    return run.recipe.num_epochs(run.round(task.round).planned) / (sum(done) / len(done))


def failed_cases(run: Run) -> dict[str, str]:
    """Unlabelled cases that were set aside, with the reason, from the last round that was judged."""
    entries = read_ledger(run.paths) if any(run.root.glob("rounds/r*/decisions.json")) else []
    last = max((entry.round for entry in entries), default=None)
    failed = {e.case: e.reason for e in entries if e.round == last and e.decision == "failed"}
    return read_left(run.paths.unlabelled) | failed
