"""The options of ``flare-predict``: nnU-Net's, and its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_flare.cli import further_outputs
from nnunet_flare.cli.common import number, whole
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.inference.choices import BACKENDS, PRECISIONS, ROI_RULES, TTA, WINDOWS

PROGRAM = "flare-predict"


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
    text = "also write each fold's label map, OUT/members/<k>, with k from 0 in the order of the folds"
    out.add_argument("--save_members", action="store_true", help=text)
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
