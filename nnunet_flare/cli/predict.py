"""``flare-predict``: label maps of scans with a trained model. nnU-Net's flags and manners, one process."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare.cli import further_outputs
from nnunet_flare.cli.common import open_streams, run_command, seldom_collecting, setup_logging
from nnunet_flare.cli.defaults import fill_in
from nnunet_flare.cli.further_outputs import SHOWN
from nnunet_flare.cli.predict_model import check_dataset, member_count, model_folder, open_model
from nnunet_flare.cli.predict_options import PROGRAM, parser
from nnunet_flare.cli.terminal import next_step
from nnunet_flare.errors import InputError

if TYPE_CHECKING:
    from nnunet_flare.inference.folder import Postprocess, PredictionReport
    from nnunet_flare.inference.forms import Form
    from nnunet_flare.inference.inputs import InputCase, Inputs
    from nnunet_flare.inference.profile import Profile

log = logging.getLogger(__name__)

INTERRUPTED = "finished label maps are kept; the same command with --continue_prediction goes on from there"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    open_streams()
    args = parser().parse_args(argv)
    setup_logging(args.verbose)
    with seldom_collecting():
        return run_command(PROGRAM, lambda: _run(args), interrupted=INTERRUPTED)


def _run(args: argparse.Namespace) -> int:
    from nnunet_flare.inference.folder import outputs_of, predict_cases
    from nnunet_flare.inference.inputs import Inputs, find_inputs, model_dataset, model_reader
    from nnunet_flare.inference.made_with import mark_of
    from nnunet_flare.inference.profile import Profile

    folder = model_folder(args)
    dataset = model_dataset(folder)
    stored = fill_in(args, folder, dataset)
    if args.disable_tta and args.tta != "none":
        raise InputError(f"--disable_tta and --tta {args.tta} contradict each other; give only one of them")
    if args.roi == "none" and (args.save_roi or args.roi_rule or args.roi_margin is not None):
        raise InputError("--save_roi, --roi_rule and --roi_margin go with --roi MODEL")
    if not 0 <= args.part_id < args.num_parts:
        raise InputError(f"-part_id {args.part_id}: expected a number from 0 to {args.num_parts - 1} (-num_parts)")
    if args.watch is None and (args.json_lines or args.settle is not None):
        raise InputError("--json_lines and --settle go with --watch")
    if args.watch is not None and args.num_parts > 1:
        raise InputError(
            "--watch takes all scans of a folder, so -num_parts does not go with it; give each of several servers its "
            "own folder"
        )
    profile = Profile(waits=args.profile)
    if args.dataset and args.model is None:
        check_dataset(args.dataset, dataset, folder)
    nothing = Inputs({}, {}, {}, ())
    inputs = nothing if args.watch is not None else find_inputs(args.input, dataset, output=args.output)
    cases = inputs.part(args.part_id, args.num_parts)
    postprocess: Postprocess | None = stored
    steps = None if stored is None else stored.content
    if args.postprocess != "none":
        from nnunet_flare.postprocessing.pipeline import load_pipeline

        pipeline = load_pipeline(args.postprocess, labels=dataset["labels"])
        postprocess, steps = pipeline.apply, pipeline.content.model_dump(mode="json")
    bar = _ProgressBar(disabled=args.disable_progress_bar or not sys.stderr.isatty())
    forms = further_outputs.forms_of(args, list(inputs.cases.values()), dataset, folder)
    crops = dataset["file_ending"] if args.save_roi else None
    members = member_count(args, folder) if args.save_members else 0
    _check_outputs(args, inputs, members, forms, crops)
    for name, reason in sorted(inputs.not_taken.items()):
        log.error("%s: set aside: %s", name, reason)
    predict = partial(
        predict_cases,
        output=args.output,
        save_members=members,
        postprocess=postprocess,
        forms=forms,
        crops=crops,
        profile=profile,
        reader=model_reader(folder),
        mark=partial(mark_of, postprocessing=steps),
    )
    if args.watch is not None:
        from nnunet_flare.cli.predict_watch import run_watch

        outputs = partial(outputs_of, output=args.output, members=members, forms=forms, crops=crops)
        code = run_watch(args, dataset, lambda: open_model(args, folder, profile), predict, outputs)
        if args.profile:
            print(profile.table())
        return code
    earlier = further_outputs.there(cases, args.output)
    report = predict(
        cases,
        open_segmenter=lambda: open_model(args, folder, profile),
        overwrite=not args.continue_prediction,
        progress=bar.case,
    )
    bar.close()
    further_outputs.tell_stale(earlier, [case for case in cases if case.name in report.written], args.output)
    _tell_outdated([case for case in cases if case.name in report.kept], args.output)
    report.failed.update(inputs.not_taken)
    _print(report, profile if args.profile else None)
    _print_outputs(report, cases, args.output, forms)
    return report.exit_code


def _check_outputs(
    args: argparse.Namespace, inputs: Inputs, members: int, forms: Sequence[Form], crops: str | None
) -> None:
    """No output of any case, of this part or another, may land on an input."""
    from nnunet_flare.inference.folder import outputs_of
    from nnunet_flare.outputs import check_outputs

    outputs = [
        path
        for case in inputs.cases.values()
        for path in outputs_of(case, args.output, members=members, forms=forms, crops=crops)
    ]
    read = [*inputs.images, *(file for case in inputs.cases.values() for file in case.files), Path(args.postprocess)]
    check_outputs(outputs, read)


def _tell_outdated(kept: Sequence[InputCase], output: Path) -> None:
    """Say which label maps are older than their scans."""
    from nnunet_flare.inference.folder import outputs_of
    from nnunet_flare.inference.watching import is_outdated

    outdated = [case.name for case in kept if is_outdated(case, outputs_of(case, output)[0])]
    if outdated:
        log.warning(
            "%s: %d label map(s) are older than their scans (%s); they are kept, and are wrong if the scans were "
            "replaced: remove them, or predict without --continue_prediction",
            output, len(outdated), ", ".join(outdated[:SHOWN]),
        )  # fmt: skip


class _ProgressBar:
    """A bar per case on the terminal: windows done."""

    def __init__(self, *, disabled: bool) -> None:
        self._disabled = disabled
        self._bar: Any = None

    def case(self, name: str, windows: int) -> Callable[[int], None]:
        if self._disabled:
            return lambda done: None
        from tqdm import tqdm

        self.close()
        self._bar = tqdm(total=windows, desc=name, unit="window", file=sys.stderr)
        return lambda done: self._bar.update(done) and None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _print(report: PredictionReport, profile: Profile | None) -> None:
    if profile is not None:
        print(profile.table())
    print(report.table())


def _print_outputs(report: PredictionReport, cases: Sequence[InputCase], output: Path, forms: Sequence[Form]) -> None:
    """Where everything is that is there now."""
    from nnunet_flare.inference.folder import outputs_of

    there = [case for case in cases if case.name in report.written or case.name in report.kept]
    kinds = [("label maps", [outputs_of(case, output)[0] for case in there])] if there else []
    kinds += [(form.what, list(dict.fromkeys(path for case in there for path in form.files(case)))) for form in forms]
    for what, paths in kinds:
        shown = ", ".join(map(str, paths[:SHOWN]))
        if paths:
            more = f" and {len(paths) - SHOWN} more in {paths[0].parent}" if len(paths) > SHOWN else ""
            print(f"{what}: {shown}{more}")
    if there:
        next_step(f"flare-evaluate -pred {output} -ref LABELS -o scores.csv", "if you have labels")


if __name__ == "__main__":
    sys.exit(main())
