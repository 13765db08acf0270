"""``flare-export``: a trained model as one folder that ``flare-predict`` opens without PyTorch and nnU-Net."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_flare.cli.common import number, open_streams, run_command, seldom_collecting, setup_logging
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.cli.terminal import next_step
from nnunet_flare.errors import InputError
from nnunet_flare.inference.choices import DEFAULT_CHECKPOINT, ROI_RULES, TTA
from nnunet_flare.outputs import check_new, check_outputs

if TYPE_CHECKING:
    from nnunet_flare.inference.cascade import CascadeSegmenter
    from nnunet_flare.inference.core import Segmenter

PROGRAM = "flare-export"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = HyphenParser(
        prog=PROGRAM,
        description="Write a trained model as one folder for flare-predict -m. Prediction then needs neither PyTorch "
        "nor nnU-Net.",
        epilog="Exit code 0: the folder was written; 1: it could not be written; 2: wrong usage or input.",
    )
    p.add_argument("-m", dest="model", type=Path, required=True, metavar="MODEL", help="a trained model's folder")
    p.add_argument("-o", dest="output", type=Path, required=True, metavar="OUT", help="new folder to write")
    p.add_argument(
        "-f",
        dest="folds",
        nargs="+",
        metavar="FOLD",
        help="folds to average (0 1 2 ... or all); default: all numbered folds found, else all",
    )
    p.add_argument(
        "-chk",
        dest="checkpoint",
        default=DEFAULT_CHECKPOINT,
        help="checkpoint file name (default checkpoint_final.pth)",
    )
    p.add_argument(
        "--prev_stage",
        type=Path,
        metavar="MODEL_FOLDER",
        help="of 3d_cascade_fullres, the model that is run first; default: that trained beside it (3d_lowres)",
    )
    p.add_argument(
        "--trust-checkpoint",
        "--trust_checkpoint",
        action="store_true",
        help="load checkpoints that hold more than data, and networks of other packages; both can run any program",
    )
    p.add_argument(
        "--format",
        choices=("openvino", "onnx"),
        default="openvino",
        help="openvino (default); onnx: also write fold_<k>/network.onnx (extra: export)",
    )
    p.add_argument(
        "--license",
        type=Path,
        metavar="FILE",
        help="licence of the weights (default: the one in the model folder, if any)",
    )
    how = p.add_argument_group("defaults of flare-predict with this model")
    how.add_argument(
        "-step_size",
        "--step_size",
        type=number(0, 1, above=True),
        default=0.9,
        help="step between windows as a share of the patch (default 0.9)",
    )
    how.add_argument("--tta", choices=TTA, default="none", help="test-time augmentation (default none)")
    how.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="precision on the CPU (default auto); fp32 also stores the weights in single precision, otherwise half",
    )
    how.add_argument(
        "--postprocess",
        default="none",
        metavar="PIPELINE",
        help="post-processing: none (default), flare22 or another built-in pipeline, or a YAML file",
    )
    how.add_argument(
        "--roi",
        default="none",
        metavar="none|MODEL",
        help="coarse model that finds the organs' box, as in flare-predict --roi (default none)",
    )
    how.add_argument("--roi_rule", choices=ROI_RULES, help="how the box is found, as in flare-predict (default union)")
    how.add_argument(
        "--roi_margin", type=number(0, 10_000, "mm"), metavar="MM", help="margin around the box (default 20)"
    )
    p.add_argument("--verbose", action="store_true", help="show the details of errors")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    open_streams()
    args = parser().parse_args(argv)
    setup_logging(args.verbose)
    with seldom_collecting():
        return run_command(PROGRAM, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.roi == "none" and (args.roi_rule or args.roi_margin is not None):
        raise InputError("--roi_rule and --roi_margin go with --roi MODEL")
    check_new(args.output)
    if args.license is not None and not args.license.is_file():
        raise InputError(f"--license {args.license}: no such file")

    from nnunet_flare.inference.cascade import open_any
    from nnunet_flare.inference.coarse_to_fine import RoiSegmenter, open_coarse
    from nnunet_flare.inference.export_model import Export, check_exportable, export_model
    from nnunet_flare.inference.exported import is_exported
    from nnunet_flare.inference.inputs import model_dataset
    from nnunet_flare.inference.roi import MARGIN_MM
    from nnunet_flare.inference.settings import PredictionSettings

    if is_exported(args.model):
        raise InputError(f"{args.model}: is already an exported model; expected a trained model's folder")
    if args.model.is_file():
        raise InputError(f"{args.model}: is a file; expected a trained model's folder, unpack it first")
    postprocess = None
    if args.postprocess != "none":
        from nnunet_flare.postprocessing.pipeline import load_pipeline

        pipeline = load_pipeline(args.postprocess, labels=model_dataset(args.model)["labels"])
        postprocess = {"name": pipeline.name, "content": pipeline.content.model_dump(mode="json")}
    export = Export(
        args.step_size, args.tta, args.precision, postprocess, licence=args.license, onnx=args.format == "onnx"
    )
    settings = PredictionSettings(args.step_size, args.tta, backend="openvino", trust_checkpoint=args.trust_checkpoint)
    fine = open_any(args.model, settings, folds=args.folds, checkpoint=args.checkpoint, previous=args.prev_stage)
    check_exportable(fine, export)
    model: Segmenter | CascadeSegmenter | RoiSegmenter = fine
    if args.roi != "none":
        coarse = open_coarse(args.roi, fine)
        check_exportable(coarse, export)
        margin = MARGIN_MM if args.roi_margin is None else args.roi_margin
        model = RoiSegmenter(coarse, fine, rule=args.roi_rule or "union", margin_mm=margin)
    check_outputs([args.output], [])
    export_model(model, args.output, export)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: written, {size / 1e6:.1f} MB")
    next_step(f"flare-predict -m {args.output} -i SCANS -o OUT")
    return 0


if __name__ == "__main__":
    sys.exit(main())
