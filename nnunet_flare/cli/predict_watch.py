"""``flare-predict --watch``: one process that stays and predicts what comes."""

from __future__ import annotations

import argparse
import json
import logging
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from nnunet_flare.errors import InputError
from nnunet_flare.files import remove_leftovers
from nnunet_flare.outputs import refuse_inputs
from nnunet_flare.signals import handling

if TYPE_CHECKING:
    from nnunet_flare.inference.folder import PredictsScans
    from nnunet_flare.inference.inputs import InputCase
    from nnunet_flare.inference.watching import Outcome

log = logging.getLogger(__name__)

SETTLE_S = 5.0
"""For so long nothing of a scan changes once it is whole, unless the user knows better."""


def run_watch(
    args: argparse.Namespace,
    dataset: dict[str, Any],
    open_segmenter: Callable[[], PredictsScans],
    predict: Callable[..., Any],
    outputs: Callable[[InputCase], list[Path]],
) -> int:
    """Watch ``args.watch`` until SIGTERM; returns 0 then, after the scan that is under way.

    Args:
        args: of the command line.
        dataset: the model's dataset.json.
        open_segmenter: opens the model, once.
        predict: ``predict_cases`` with all that is the same for every scan.
        outputs: the files that are written of a scan.

    Raises:
        InputError: when the folder is missing, the output cannot be written or the model cannot be opened.
    """
    from nnunet_flare.inference.folder import check_writable
    from nnunet_flare.inference.inputs import find_inputs
    from nnunet_flare.inference.watching import SET_ASIDE, Arrivals, Outcome, TellingReport, is_outdated, watch

    if not args.watch.is_dir():
        raise InputError(f"--watch {args.watch}: no such folder")
    check_writable(args.output)
    remove_leftovers(args.output)
    stopped = Event()
    find = partial(find_inputs, [args.watch], dataset, output=args.output, may_be_empty=True)
    settle_s = SETTLE_S if args.settle is None else args.settle
    arrivals = Arrivals(find, settle_s)

    def tell(outcome: Outcome) -> None:
        print(json.dumps(outcome.document()) if args.json_lines else outcome.line(), flush=True)

    def predict_arrived(cases: Sequence[InputCase], anew: bool) -> None:
        taken = {}
        for case in cases:
            try:
                refuse_inputs(outputs(case), [*arrivals.inputs.images, *case.files, Path(args.postprocess)])
            except InputError as error:
                tell(Outcome(case.name, SET_ASIDE, reason=str(error)))
            else:
                taken[case.name] = case
        report = TellingReport(tell, lambda name: outputs(taken[name]))
        outdated = [case for case in taken.values() if anew or is_outdated(case, outputs(case)[0])]
        others = [case for case in taken.values() if case not in outdated]
        for some, overwrite in ((others, False), (outdated, True)):
            predict(
                some,
                open_segmenter=lambda: segmenter,
                overwrite=overwrite,
                keep_others=True,  # a server with a newer model goes on, and does not begin again
                report=report,
                stopped=stopped.is_set,
            )

    with handling(lambda *_: stopped.set(), signal.SIGTERM):
        segmenter = open_segmenter()
        _ = segmenter.origin  # of the files that were opened: they may be replaced while the server runs
        segmenter.load()
        log.info("watching %s; SIGTERM stops after the current scan", args.watch)
        watch(arrivals, predict_arrived, tell, stopped, settle_s=settle_s)
    log.info("stopped on request")
    return 0
