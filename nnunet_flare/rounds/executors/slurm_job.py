"""What one Slurm job runs: a task, and what must happen when Slurm wants the node back.

``python -m nnunet_flare.rounds.executors.slurm_job RUN_DIR TASK`` starts ``flare-pseudolabel task`` in a session of its
own and waits.
On USR1 (the walltime is near; sent to this process only) it ends the task's processes and puts the same job back into
the queue, so that the training goes on from its checkpoint. On TERM (scancel, preemption) it ends them and leaves the
rest to Slurm. A task that fails leaves its exit code and last lines where ``flare-pseudolabel status`` finds them.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from nnunet_flare.errors import FlareError
from nnunet_flare.files import last_lines, write_json
from nnunet_flare.rounds.executors.child import end_group, start_child
from nnunet_flare.rounds.run.manifest import Run, load_run_to_write
from nnunet_flare.rounds.run.tasks import Task, stand_in

log = logging.getLogger(__name__)


def run_job(run: Run, task: Task) -> int:
    """Run a task inside a Slurm job; returns the job's exit code."""
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            end_group(child.pid)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    path = run.paths.log(task.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as stream:
        child = start_child(task.command(run), environment=run.environment(), output=stream)
    if asked:  # a signal between the handler and the start of the child
        end_group(child.pid)
    code = child.wait()
    end_group(child.pid)
    if code == 0:
        return 0
    if signal.SIGTERM in asked or signal.SIGINT in asked:
        return 128 + signal.SIGTERM
    tail = last_lines(path)
    if asked:
        problem = _requeue()
        if problem is None:
            return 0
        tail = f"the walltime was reached, and the job could not be put back into the queue: {problem}"
    write_json(run.paths.failed(task.name), {"task": task.name, "exit_code": code, "last_lines": tail})
    log.error("%s: failed with exit code %d; see %s", task.name, code, path)
    return code if code > 0 else 128 - code


def _requeue() -> str | None:
    """Put this job back into the queue under its own number; returns why that failed, None when it did not."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "SLURM_JOB_ID is not set"
    log.info("job %s: the walltime is near; back into the queue", job)
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")


def main(argv: Sequence[str]) -> int:
    """Entry point: RUN_DIR and the task's name as it was when the jobs were submitted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    root, name = argv
    try:
        run = load_run_to_write(Path(root))
        task = stand_in(run, name)
        if task is None:
            log.info("%s: not needed, the run ended early", name)
            return 0
        return run_job(run, task)
    except FlareError as error:
        log.error("%s: %s", name, error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
