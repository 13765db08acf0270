"""``flare-predict``: label maps of scans with a trained model. nnU-Net's flags and manners, one process."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare.cli import further_outputs
from nnunet_flare.cli.common import (
    nnunet_folder,
    number,
    open_streams,
    run_command,
    seldom_collecting,
    setup_logging,
    whole,
)
from nnunet_flare.cli.defaults import fill_in
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.cli.terminal import next_step
from nnunet_flare.errors import InputError
from nnunet_flare.inference.choices import BACKENDS, PRECISIONS, ROI_RULES, TTA, WINDOWS

if TYPE_CHECKING:
    from nnunet_flare.images import Volume
    from nnunet_flare.inference.cascade import CascadeSegmenter
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.folder import Postprocess, PredictionReport, PredictsScans
    from nnunet_flare.inference.forms import Form
    from nnunet_flare.inference.inputs import InputCase, Inputs
    from nnunet_flare.inference.profile import Profile

log = logging.getLogger(__name__)

PROGRAM = "flare-predict"

INTERRUPTED = "finished label maps are kept; the same command with --continue_prediction goes on from there"

SHOWN_PATHS = 3
"""Paths of one kind of output that are printed at the end."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = HyphenParser(
        prog=PROGRAM,
        description="Predict scans with a trained nnU-Net model, in one process and little memory.",
        epilog="Exit code 0: all cases written; 1: some cases were set aside, as listed; 2: wrong usage or input.",
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-i",
        dest="input",
        nargs="+",
        type=Path,
        metavar="IN",
        help="folder of images with nnU-Net's names (<case>_0000.nii.gz) or of DICOM series, or image files",
    )
    source.add_argument(
        "--watch",
        type=Path,
        metavar="IN",
        help="keep running: predict every scan that arrives in this folder, until SIGTERM; the model is loaded once",
    )
    p.add_argument("-o", dest="output", type=Path, required=True, metavar="OUT", help="output folder")
    model = p.add_argument_group("model: -m, or -d with -c")
    text = "folder of a trained model, folder that flare-export wrote, or zip file of nnUNetv2_export_model_to_zip "
    text += "(choose among its models with -c -tr -p -d)"
    model.add_argument("-m", dest="model", type=Path, metavar="MODEL", help=text)
    model.add_argument("-d", dest="dataset", help="dataset id or name in nnUNet_results")
    model.add_argument("-c", dest="configuration", help="configuration, for example 3d_fullres")
    model.add_argument("-tr", dest="trainer", help="trainer name; needed if several were trained")
    model.add_argument("-p", dest="plans", help="plans name; needed if several were trained")
    model.add_argument(
        "-f",
        dest="folds",
        nargs="+",
        metavar="FOLD",
        help="folds to average (0 1 2 ... or all); default: all numbered folds found, else all",
    )
    model.add_argument(
        "-chk",
        dest="checkpoint",
        default="checkpoint_final.pth",
        help="checkpoint file name (default checkpoint_final.pth)",
    )
    model.add_argument(
        "--prev_stage",
        type=Path,
        metavar="MODEL_FOLDER",
        help="first-stage model of 3d_cascade_fullres (default: 3d_lowres in the same dataset folder)",
    )
    model.add_argument(
        "--trust-checkpoint",
        "--trust_checkpoint",
        action="store_true",
        help="load checkpoints that hold more than weights and numbers, and build networks and layers from outside "
        "nnU-Net, its architectures and this package; both can run any program",
    )
    how = p.add_argument_group("how to predict")
    how.add_argument(
        "-step_size",
        "--step_size",
        type=number(0, 1, above=True),
        help="step between windows as a share of the patch (default 0.9, or as exported)",
    )
    how.add_argument("--tta", choices=TTA, help="test-time augmentation (default none, or as exported)")
    how.add_argument(
        "--windows",
        choices=WINDOWS,
        default="all",
        help="all (default); skip-empty: skip windows away from any organ; huang: the FLARE22 winner's rule",
    )
    how.add_argument(
        "--roi",
        metavar="none|MODEL",
        help="coarse model that finds the organs' box, to crop the scan to: its folder, or a configuration trained on "
        "the same dataset (3d_lowres); default: none, or the one exported with the model",
    )
    how.add_argument(
        "--roi_rule",
        choices=ROI_RULES,
        help="what counts for the box: union (default): everything found; fosun: no specks, and one outlying "
        "organ left out above and below; sztu: the largest piece of each organ",
    )
    how.add_argument(
        "--roi_margin", type=number(0, 10_000, "mm"), metavar="MM", help="margin around the box (default 20)"
    )
    how.add_argument(
        "--max_memory",
        type=number(0, 1_000_000, "GB", above=True),
        metavar="GB",
        help="set aside cases that would need more memory than this",
    )
    text = "GPU memory to keep within, as the card counts it (CUDA's context included)"
    how.add_argument(
        "--gpu_memory", "--gpu_memory_gb", type=number(0, 10_000, "GB", above=True), metavar="GB", help=text
    )
    how.add_argument("--disable_tta", action="store_true", help="accepted as in nnU-Net; this is the default here")
    how.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto (default): fp16 on CUDA (autocast; fp32 where it overflows), bf16 on CPUs that have it, else fp32; "
        "fp32 does not use TF32",
    )
    how.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="auto (default): OpenVINO on the CPU if installed, else PyTorch",
    )
    how.add_argument(
        "-device",
        "--device",
        default="auto",
        help="auto (default: CUDA if PyTorch finds it, else CPU), cuda, cpu or mps",
    )
    out = p.add_argument_group("cases and output")
    out.add_argument(
        "-num_parts",
        "--num_parts",
        type=whole(1, 1_000_000),
        default=1,
        help="number of parts to split the cases into (default 1)",
    )
    out.add_argument(
        "-part_id", "--part_id", type=whole(0, 1_000_000), default=0, help="part to predict, from 0 (default 0)"
    )
    out.add_argument(
        "--continue_prediction", "--c", action="store_true", help="skip cases that have a label map already"
    )
    out.add_argument(
        "--postprocess",
        metavar="PIPELINE",
        help="none, flare22 or another pipeline of flare-postprocess, or a YAML file (default: none, or as exported)",
    )
    out.add_argument("--save_members", action="store_true", help="also write each fold's label map, OUT/members/<k>")
    out.add_argument(
        "--save_roi", action="store_true", help="also write the cropped scans as input for nnU-Net, OUT/roi/<case>_0000"
    )
    further_outputs.add_options(p)
    out.add_argument(
        "--settle",
        type=number(0, 86_400, "s"),
        metavar="S",
        help="with --watch: a scan is complete when it has not changed for S seconds (default 5)",
    )
    out.add_argument("--json_lines", action="store_true", help="with --watch: print each outcome as one line of JSON")
    out.add_argument("--profile", action="store_true", help="print the time of each stage")
    out.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    out.add_argument("--verbose", action="store_true", help="show the details of errors")
    return p


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
    from nnunet_flare.inference.profile import Profile

    folder = _model_folder(args)
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
        _check_dataset(args.dataset, dataset, folder)
    nothing = Inputs({}, {}, {}, ())
    inputs = nothing if args.watch is not None else find_inputs(args.input, dataset, output=args.output)
    cases = inputs.part(args.part_id, args.num_parts)
    postprocess: Postprocess | None = stored
    if args.postprocess != "none":
        from nnunet_flare.postprocessing.pipeline import load_pipeline

        postprocess = load_pipeline(args.postprocess, labels=dataset["labels"]).apply
    bar = _ProgressBar(disabled=args.disable_progress_bar or not sys.stderr.isatty())
    forms = further_outputs.forms_of(args, list(inputs.cases.values()), dataset, folder)
    crops = dataset["file_ending"] if args.save_roi else None
    _check_outputs(args, inputs, forms, crops)
    for name, reason in sorted(inputs.not_taken.items()):
        log.error("%s: set aside: %s", name, reason)
    predict = partial(
        predict_cases,
        output=args.output,
        save_members=args.save_members,
        postprocess=postprocess,
        forms=forms,
        crops=crops,
        profile=profile,
        reader=model_reader(folder),
    )
    if args.watch is not None:
        from nnunet_flare.cli.predict_watch import run_watch

        outputs = partial(outputs_of, output=args.output, members=args.save_members, forms=forms, crops=crops)
        code = run_watch(args, dataset, lambda: _open(args, folder, profile), predict, outputs)
        if args.profile:
            print(profile.table())
        return code
    report = predict(
        cases,
        open_segmenter=lambda: _open(args, folder, profile),
        overwrite=not args.continue_prediction,
        progress=bar.case,
    )
    bar.close()
    report.failed.update(inputs.not_taken)
    _print(report, profile if args.profile else None)
    _print_outputs(report, cases, args.output, forms)
    return report.exit_code


def _check_outputs(args: argparse.Namespace, inputs: Inputs, forms: Sequence[Form], crops: str | None) -> None:
    """No output of any case, of this part or another, may land on an input."""
    from nnunet_flare.inference.folder import outputs_of
    from nnunet_flare.outputs import check_outputs

    outputs = [
        path
        for case in inputs.cases.values()
        for path in outputs_of(case, args.output, members=args.save_members, forms=forms, crops=crops)
    ]
    read = [*inputs.images, *(file for case in inputs.cases.values() for file in case.files), Path(args.postprocess)]
    check_outputs(outputs, read)


def _open(args: argparse.Namespace, folder: Path, profile: Profile) -> PredictsScans:
    with profile.stage("imports"):
        from nnunet_flare.inference.cascade import open_any
        from nnunet_flare.inference.exported import is_exported
        from nnunet_flare.inference.settings import PredictionSettings

        if not is_exported(folder):
            _limit_torch_threads()
    settings = PredictionSettings(
        step_size=args.step_size,
        tta=args.tta,
        device=args.device,
        precision=args.precision,
        backend=args.backend,
        windows=args.windows,
        max_memory_gb=args.max_memory,
        gpu_memory_gb=args.gpu_memory,
        trust_checkpoint=args.trust_checkpoint,
    )
    with profile.stage("model"):
        segmenter = open_any(
            folder,
            settings,
            folds=args.folds,
            checkpoint=args.checkpoint,
            profile=profile,
            previous=args.prev_stage,
        )
        if args.uncertainty == "disagreement" and len(segmenter.models) < 2:
            raise InputError(
                f"--uncertainty disagreement: {folder} is used with one fold, so there is no disagreement; use "
                "entropy, or more folds"
            )
        return segmenter if args.roi == "none" else _with_roi(args, segmenter)


def _limit_torch_threads() -> None:
    """More threads than a container may use wait for each other."""
    with suppress(ImportError):  # what is missing is said when the model is opened
        import torch

        from nnunet_flare.inference.cpus import thread_count

        torch.set_num_threads(thread_count())


def _with_roi(args: argparse.Namespace, fine: Segmenter | CascadeSegmenter) -> PredictsScans:
    """The fine model behind a coarse one."""
    from nnunet_flare.images import write_volume
    from nnunet_flare.inference.coarse_to_fine import RoiSegmenter, open_coarse
    from nnunet_flare.inference.folder import ROI
    from nnunet_flare.inference.roi import MARGIN_MM

    ending = fine.models[0].dataset_json["file_ending"]

    def save(case: str, crops: Sequence[Volume]) -> None:
        for channel, crop in enumerate(crops):
            write_volume(args.output / ROI / f"{case}_{channel:04d}{ending}", crop)

    return RoiSegmenter(
        open_coarse(args.roi, fine),
        fine,
        rule=args.roi_rule or "union",
        margin_mm=MARGIN_MM if args.roi_margin is None else args.roi_margin,
        on_crop=save if args.save_roi else None,
    )


def _model_folder(args: argparse.Namespace) -> Path:
    """The folder that ``-m``, or ``-d -c -tr -p``, names; of a zip file, where it was unpacked to."""
    if args.model is not None and args.model.is_file():
        from nnunet_flare.inference.zipped import unpacked_model

        return unpacked_model(
            args.model,
            checkpoint=args.checkpoint,
            dataset=args.dataset,
            trainer=args.trainer,
            plans=args.plans,
            configuration=args.configuration,
            beside=[] if args.roi is None else [args.roi],
        )
    if (args.model is None) == (args.dataset is None):
        raise InputError("give the model either as -m MODEL_FOLDER or as -d DATASET -c CONFIGURATION")
    if args.model is not None:
        if any((args.configuration, args.trainer, args.plans)):
            raise InputError("-c, -tr and -p go with -d; -m names the whole folder")
        return args.model
    if not args.configuration:
        raise InputError("-d needs -c, for example -c 3d_fullres")
    dataset = _dataset_folder(nnunet_folder("nnUNet_results"), args.dataset)
    pattern = f"{args.trainer or '*'}__{args.plans or '*'}__{args.configuration}"
    found = sorted(path for path in dataset.glob(pattern) if path.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        there = sorted(path.name for path in dataset.glob("*__*__*"))
        raise InputError(f"{dataset}: no model {pattern}; it holds {there or 'none'}")
    raise InputError(f"{dataset}: several models fit, {[path.name for path in found]}; choose with -tr and -p")


def _dataset_folder(root: Path, name: str) -> Path:
    """``22``, ``022`` or ``Dataset022_Name`` in one of nnU-Net's folders."""
    if (root / name).is_dir():
        return root / name
    found = sorted(root.glob(f"Dataset{int(name):03d}_*")) if name.isdigit() else []
    if len(found) == 1:
        return found[0]
    there = sorted(path.name for path in root.glob("Dataset*"))
    raise InputError(f"{root}: no dataset {name}; it holds {there or 'none'}")


def _check_dataset(name: str, trained: dict[str, Any], folder: Path) -> None:
    """Refuse a model that was trained with other labels or channels than its dataset now has."""
    root = os.environ.get("nnUNet_raw")  # noqa: SIM112
    if not root or not Path(root).is_dir():
        return
    from nnunet_flare.inference.inputs import model_dataset

    try:
        raw = _dataset_folder(Path(root), name)
    except InputError:  # the raw dataset is not needed for prediction
        return
    if not (raw / "dataset.json").is_file():
        return
    now = model_dataset(raw)
    for key in ("labels", "channel_names"):
        if now.get(key) != trained.get(key):
            raise InputError(
                f"{folder} was trained with {key} {trained.get(key)}, {raw / 'dataset.json'} says {now.get(key)}; "
                "use -m to predict with the model as it is"
            )


class _ProgressBar:
    """A bar per case on the terminal: windows done."""

    def __init__(self, *, disabled: bool) -> None:
        self._disabled = disabled
        self._bar: Any = None

    def case(self, name: str, windows: int) -> Callable[[int], None]:
        from tqdm import tqdm

        self.close()
        self._bar = tqdm(total=windows, desc=name, unit="window", disable=self._disabled, file=sys.stderr)
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
        shown = ", ".join(map(str, paths[:SHOWN_PATHS]))
        if paths:
            more = f" and {len(paths) - SHOWN_PATHS} more in {paths[0].parent}" if len(paths) > SHOWN_PATHS else ""
            print(f"{what}: {shown}{more}")
    if there:
        next_step(f"flare-evaluate -pred {output} -ref LABELS -o scores.csv", "if you have labels")


if __name__ == "__main__":
    sys.exit(main())
