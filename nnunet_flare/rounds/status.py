"""The state of a run as a table that a person can read, in 80 columns and without control characters."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_flare.files import read_json
from nnunet_flare.rounds.executors.executor import executor_of
from nnunet_flare.rounds.progress import TRAINING_HEADER, State, task_state, time_left, training
from nnunet_flare.rounds.run.home import other_home, words
from nnunet_flare.rounds.run.ledger import DECISIONS, Entry, read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import MARKER
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.run.tasks import Task, graph
from nnunet_flare.rounds.run.unlabelled import read_left, read_list
from nnunet_flare.rounds.stages.evaluate import held_out_dice
from nnunet_flare.tables import table
from nnunet_flare.wording import duration

WIDTH = 80
FAILED = {"task": str, "exit_code": int, "last_lines": str}
ROUND_HEADER = ("round", "train", "label", "select", "taken", "refused", "set aside", "agree", "Dice")


def status(run: Run) -> str:
    """Rounds, stages, cases taken, agreement per organ, time used and left."""
    tasks = graph(run)
    states = {name: task_state(run, task) for name, task in tasks.items()}
    entries = read_ledger(run.paths) if any(run.root.glob("rounds/r*/decisions.json")) else []
    rows = [_round_row(run, of, tasks, states, [e for e in entries if e.round == of.number]) for of in run.rounds]
    lines = [
        f"Run {run.settings.name} (recipe {run.recipe.name}, {run.recipe.hash}) on {run.settings.dataset}",
        f"{run.root}",
        *_home_rows(run),
        f"{_unlabelled(run)} unlabelled cases, {run.recipe.final_round} round(s) of labelling, "
        f"device {run.settings.device}",
        *_loop_rows(run),
        "",
        *table(rows, header=ROUND_HEADER, align="lrrrrrrrr"),
        "",
        *_agreement_rows(entries),
        *_training_rows(run, tasks, states),
        *_time_rows(run, tasks, states),
    ]
    left = read_left(run.paths.unlabelled)
    lines += [f"{len(left)} file(s) of -u were not used; the first: {min(left)}"] if left else []
    failed = [name for name, state in states.items() if state == "failed"]
    for name in failed:
        document = read_json(run.paths.failed(name), FAILED, remedy=f"flare-pseudolabel retry -o {run.root}")
        tail = [line for line in str(document["last_lines"]).splitlines() if line.strip()][-1:]
        lines.append(f"FAILED {name} (exit code {document['exit_code']}): {tail[0] if tail else 'no output'}")
        lines.append(f"       log: {run.paths.log(name)}")
    executor = executor_of(run)
    under_way = executor.status(run)
    lines += under_way
    if failed and not under_way:
        lines.append(f"Fix the cause, then: flare-pseudolabel retry -o {run.root}")
    elif "running" not in states.values() and not executor.owns(run) and set(states.values()) != {"done"}:
        lines.append(
            "No process is working on this run. To go on, type the same run command, or: "
            f"flare-pseudolabel retry -o {run.root}"
        )
    return "\n".join(lines)


def is_over(run: Run) -> bool | None:
    """Whether a run is at its end: True where everything is done, None where it stopped with a failure."""
    states = {task_state(run, task) for task in graph(run).values()}
    if states == {"done"}:
        return True
    return None if "failed" in states and not executor_of(run).owns(run) else False


def _unlabelled(run: Run) -> int:
    return len(read_list(run.paths.unlabelled)) if run.paths.unlabelled.is_file() else 0


def _round_row(
    run: Run, of: Round, tasks: Mapping[str, Task], states: Mapping[str, State], entries: Sequence[Entry]
) -> list[str]:
    def cell(stage: str) -> str:
        found = [states[t.name] for t in tasks.values() if t.stage == stage and t.round == of.number]
        if not found:
            return "-"
        for state in ("failed", "running", "stopped"):
            if state in found:
                return state
        done = found.count("done")
        return "done" if done == len(found) else "waiting" if done == 0 else f"{done}/{len(found)}"

    counts = {d: sum(e.decision == d for e in entries) for d in DECISIONS}
    means = [e.mean_organ for e in entries if e.mean_organ is not None]
    dice = held_out_dice(run, of.number)
    decided = [counts["taken"], counts["refused"], counts["odd"] + counts["failed"]] if entries else ["", "", ""]
    return [
        of.name,
        *(cell(stage) for stage in ("train", "label", "select")),
        *map(str, decided),
        f"{np.mean(means):.3f}" if means else "-",
        "-" if dice is None else f"{dice:.3f}",
    ]


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
    rows = []
    for organ in organs:
        cells = []
        for number in rounds:  # of which a loop's has its own organs only
            here = [e for e in entries if e.round == number and e.present.get(organ, True)]
            values = [value for e in here if (value := e.agreement.get(organ)) is not None]
            cells.append(f"{np.mean(values):.3f}" if values else "-")
        rows.append([organ, *cells])
    return [*table(rows, header=["mean agreement", *(f"r{number}" for number in rounds)], align="lrrrrrr"), ""]


def _training_rows(run: Run, tasks: Mapping[str, Task], states: Mapping[str, State]) -> list[str]:
    """Epochs, losses and moving Dice of the trainings that run."""
    rows = [
        training(run, task).row() for task in tasks.values() if task.stage == "train" and states[task.name] == "running"
    ]
    return [*table(rows, header=TRAINING_HEADER, align="lrrrrrl"), ""] if rows else []


def _time_rows(run: Run, tasks: Mapping[str, Task], states: Mapping[str, State]) -> list[str]:
    """Time used so far and what is left."""
    used: dict[str, float] = {}
    for task in tasks.values():
        if states[task.name] == "done":
            seconds = float(read_json(run.paths.done(task.name), MARKER)["seconds"])
            used[task.stage] = used.get(task.stage, 0.0) + seconds
    lines = [f"time used: {', '.join(f'{stage} {duration(s)}' for stage, s in used.items())}"] if used else []
    if any(state != "done" for state in states.values()):
        lines.append(time_left(run, tasks, states).words())
    return [textwrap.fill(line, WIDTH, subsequent_indent="           ") for line in lines]


def failed_cases(run: Run) -> dict[str, str]:
    """Unlabelled cases that were set aside, with the reason, from the last round that was judged."""
    entries = read_ledger(run.paths) if any(run.root.glob("rounds/r*/decisions.json")) else []
    last = max((entry.round for entry in entries), default=None)
    failed = {e.case: e.reason for e in entries if e.round == last and e.decision == "failed"}
    return read_left(run.paths.unlabelled) | failed
