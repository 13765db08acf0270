"""Trying again: failures of a run are forgotten, so that their tasks and scans are done anew."""

from __future__ import annotations

import logging

from nnunet_flare.files import read_json
from nnunet_flare.rounds.run.labelled_case import LABELLED
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import is_marked
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.boxes import read_box
from nnunet_flare.rounds.stages.mending import forget_damaged
from nnunet_flare.rounds.stages.preprocess import failure, state_file

log = logging.getLogger(__name__)


def forget_failures(run: Run) -> None:
    """Make a run try again what failed: tasks, and scans that preprocessing set aside.

    A round that was judged already stays as it is; the scans that can be read now take part from the next round on.
    """
    with LockFile(run.paths.driver_lock, f"the run in {run.root}"):
        forget_damaged(run)
        failed = [c.case for c in read_list(run.paths.unlabelled) if failure(run.unlabelled_data, c.case) is not None]
        for case in failed:
            state_file(run.unlabelled_data, case).unlink()
            if run.paths.box(case).is_file() and "failed" in read_box(run, case):
                run.paths.box(case).unlink()
        if failed:
            log.info("%d scans that were set aside are tried again: %s", len(failed), ", ".join(failed[:5]))
            for task in graph(run).values():
                if task.stage in ("locate", "unlabelled"):
                    run.paths.done(task.name).unlink(missing_ok=True)
        for task in graph(run).values():
            if task.stage == "select" and not is_marked(run.paths.done(task.name)):
                for path in (run.paths.round(task.round or 0) / "cases").glob("*.json"):
                    if "failed" in read_json(path, LABELLED):
                        for shard in task.needs:  # any of them may label the case
                            run.paths.done(shard).unlink(missing_ok=True)
                        path.unlink()
