"""flare-evaluate efficiency: time, memory and processor use of a command, or of one container per scan."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_flare import tables
from nnunet_flare.cli.common import number, setup_logging, whole
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.engines import ENGINES, check_image, check_limits, choose_engine, limits_for

if TYPE_CHECKING:
    from nnunet_flare.evaluation.containers import Setup
    from nnunet_flare.listing import Listing

PROGRAM = "flare-evaluate"

ENDING = ".nii.gz"
"""What the challenge gives to containers, and what they leave."""

OF_CONTAINERS = ("i", "engine", "task", "memory", "cpus", "shm_size")
"""Options that say nothing of a plain command."""


def efficiency(words: list[str]) -> int:
    """The body of the command; returns the exit code: 0 all measured, 1 a command, container or label map failed."""
    split = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:split])
    command = words[split + 1 :]
    setup_logging()
    if args.container is not None:
        if command or args.name is not None:
            raise InputError(
                "--container runs the image's own predict.sh once per scan; leave out --name and -- COMMAND"
            )
        return _measure_containers(args)
    given = [name for name in OF_CONTAINERS if getattr(args, name) is not None]
    if given:
        option = "-i" if given[0] == "i" else "--" + given[0].replace("_", "-")
        raise InputError(f"{option} needs --container IMAGE")
    if not command:
        raise InputError(
            "no command given; write it after two hyphens: flare-evaluate efficiency -o OUT.csv -- COMMAND ..."
        )
    return _measure(args, command)


def _parser() -> argparse.ArgumentParser:
    parser = HyphenParser(
        prog=f"{PROGRAM} efficiency",
        usage=f"{PROGRAM} efficiency -o OUT.csv [--name NAME] [--gpu N]\n"
        "           [--interval S] -- COMMAND ...\n"
        f"       {PROGRAM} efficiency -o OUT.csv --container IMAGE -i CASES\n"
        "           [--engine ENGINE] [--task N] [--memory SIZE] [--cpus N]\n"
        "           [--shm_size SIZE] [--gpu N] [--interval S]",
        description="Run a command, or one container per scan. Record wall time, GPU memory, processor use and RAM "
        "of its process tree and of the machine. OUT.csv gets one row (a row of the same name is replaced), "
        "OUT_NAME.json the samples and OUT_NAME.png the curves. The first columns are the official ones. After them "
        "come true integrals, the challenges' tolerances and the figures of the process tree. Without a GPU its "
        "columns stay empty.",
    )
    parser.add_argument("-o", type=Path, required=True, metavar="OUT.csv", help="table of efficiency figures")
    parser.add_argument(
        "--name", help="name of the row, for example the case's file name (default: the command's name)"
    )
    parser.add_argument(
        "--gpu",
        type=whole(0, 1023),
        metavar="N",
        help="index of the GPU to watch; a container sees this one (default 0, if there is one)",
    )
    parser.add_argument(
        "--interval",
        type=number(0.01, 60, "seconds"),
        default=0.1,
        metavar="S",
        help="seconds between samples (default 0.1)",
    )
    group = parser.add_argument_group(
        "containers",
        "Each scan is copied into a folder of its own, mounted as /workspace/inputs. sh predict.sh writes to "
        "/workspace/outputs. Rows are named after the scans. Label maps go to OUT_maps, the output of a container "
        "to OUT_NAME.log. The columns Tree_... are those of the container.",
    )
    group.add_argument(
        "--container", metavar="IMAGE", help="image that the engine has loaded; for apptainer a .sif file"
    )
    group.add_argument("-i", type=Path, metavar="CASES", help=f"folder of scans, <case>_0000{ENDING}, or one scan")
    group.add_argument(
        "--engine", choices=tuple(ENGINES), help="program that runs the image (default: the first of these on the PATH)"
    )
    group.add_argument(
        "--task",
        type=whole(1, 3),
        metavar="N",
        help="FLARE task whose limits apply: 2 (default): 8 GB, no GPU; 1 or 3: 28 GB, 28 GB of /dev/shm, a GPU",
    )
    group.add_argument(
        "--memory", type=_size, metavar="SIZE", help="memory limit, for example 8g or 512m (default: the task's)"
    )
    group.add_argument(
        "--cpus", type=number(0, 4096, "cores", above=True), metavar="N", help="CPU cores (default: all)"
    )
    group.add_argument("--shm_size", type=_size, metavar="SIZE", help="size of /dev/shm (default: the task's)")
    return parser


def _size(text: str) -> str:
    match = re.fullmatch(r"([1-9]\d*)([kmg])b?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected a whole number and k, m or g, for example 8g")
    return "".join(match.groups())


def _curves(table: Path, name: str) -> Path:
    """Where a row's samples and curves go, without their endings; different names never share them."""
    return table.with_name(f"{table.stem}_{name.replace('%', '%25').replace('/', '%2F')}")


def _maps(table: Path) -> Path:
    """The folder of the containers' label maps."""
    return table.with_name(f"{table.stem}_maps")


def _files(table: Path, name: str, *endings: str) -> list[Path]:
    stem = _curves(table, name)
    return [stem.with_name(stem.name + ending) for ending in (".json", ".png", *endings)]


def _measure(args: argparse.Namespace, command: list[str]) -> int:
    from nnunet_flare.evaluation.efficiency import add_row, check_curves, check_table, figures, write_curves
    from nnunet_flare.evaluation.gpu import open_gpu
    from nnunet_flare.evaluation.sampling import record
    from nnunet_flare.outputs import check_outputs
    from nnunet_flare.signals import handling

    name = args.name or Path(command[0]).name
    check_outputs([args.o, *_files(args.o, name)], [Path(word) for word in command if Path(word).is_file()])
    check_table(args.o)
    check_curves(_curves(args.o, name), name)
    gpu = open_gpu(args.gpu or 0)
    if gpu is None and args.gpu is not None:
        raise InputError(
            f"--gpu {args.gpu}: there is no such NVIDIA GPU here, or neither nvidia-smi nor nvidia-ml-py can ask it; "
            "leave --gpu out where there is none"
        )
    with handling(signal.default_int_handler, signal.SIGTERM):  # so that the command ends with us
        recording = record(command, gpu=gpu, interval_s=args.interval)
    row = figures(name, recording)
    add_row(args.o, row)
    write_curves(recording, _curves(args.o, name), name=name, command=command)
    print("\n".join(tables.table([[column, "-" if value is None else str(value)] for column, value in row.items()])))
    if recording.exit_code != 0:
        sys.stderr.write(f"{PROGRAM}: the command ended with exit code {recording.exit_code}; the row says so\n")
        return 1
    return 0


def _measure_containers(args: argparse.Namespace) -> int:
    from nnunet_flare.evaluation.containers import run_scan
    from nnunet_flare.evaluation.efficiency import add_row, check_curves, check_table, figures, write_curves
    from nnunet_flare.files import last_lines
    from nnunet_flare.outputs import check_outputs
    from nnunet_flare.signals import handling

    listing = _scans(args)
    scans = {case: files[0] for case, files in listing.cases.items()}
    maps = {case: _maps(args.o) / f"{case}{ENDING}" for case in scans}
    outputs = [path for scan in scans.values() for path in _files(args.o, scan.name, ".log")]
    check_outputs([args.o, *maps.values(), *outputs], scans.values())
    check_table(args.o)
    for scan in scans.values():
        check_curves(_curves(args.o, scan.name), scan.name)
    setup = _setup(args)
    failed = 0
    for case, scan in scans.items():
        log = _files(args.o, scan.name, ".log")[-1]
        with handling(signal.default_int_handler, signal.SIGTERM):
            done = run_scan(case, scan, setup, label_map=maps[case], log=log)
        row = figures(scan.name, done.recording)
        add_row(args.o, row)
        write_curves(done.recording, _curves(args.o, scan.name), name=scan.name, command=done.command)
        told = {"Time": "s", "MaxGPU_Mem": "MiB of GPU", "Tree_RAM": "MiB", "Tree_CPU_Seconds": "s of processor"}
        print(f"{scan.name}: " + ", ".join(f"{row[key]} {unit}" for key, unit in told.items() if row[key] is not None))
        if done.recording.cpu_seconds is None:
            sys.stderr.write(f"{PROGRAM}: {case}: none of its processes was seen; the columns Tree_... stay empty\n")
        if done.problem is not None:
            failed += 1
            lines = "".join(f"\n  {line}" for line in last_lines(log).splitlines()) or " (it printed nothing)"
            sys.stderr.write(f"{PROGRAM}: {case}: {done.problem}; its last lines:{lines}\n")
    for path, reason in sorted(listing.not_taken.items()):
        sys.stderr.write(f"{PROGRAM}: not measured: {path}: {reason}\n")
    return 1 if failed or listing.not_taken else 0


def _scans(args: argparse.Namespace) -> Listing:
    """The scans that containers are given.

    Raises:
        InputError: when there is none.
    """
    from nnunet_flare.listing import CHANNEL, Listing, list_scans, told

    if args.i is None:
        raise InputError(f"--container needs -i, a folder of <case>_0000{ENDING} files")
    if args.i.is_file() and args.i.name.endswith(ENDING):
        stem = args.i.name[: -len(ENDING)]
        channel = CHANNEL.fullmatch(stem)
        case = channel.group(1) if channel and channel.group(2) == "0000" else stem
        return Listing({case: (args.i,)}, {}, {}, {})
    if not args.i.is_dir():
        raise InputError(f"-i {args.i}: no such folder, and no {ENDING} file")
    found = list_scans(args.i, 1, besides=[args.o.parent, _maps(args.o)])
    others = {
        str(files[0]): f"is not a {ENDING} file"
        for files in found.cases.values()
        if files[0].suffixes[-2:] != [".nii", ".gz"]
    }
    cases = {case: files for case, files in found.cases.items() if str(files[0]) not in others}
    listing = replace(found, cases=cases, left={**found.left, **others})
    if not cases:
        raise InputError(f"-i {args.i}: no scans named <case>_0000{ENDING}{told(listing.not_taken)}")
    return listing


def _setup(args: argparse.Namespace) -> Setup:
    """The engine with the image, and the limits.

    Raises:
        InputError: when engine, image or the task's GPU is missing, or a GPU is named for a task without one.
    """
    from nnunet_flare.evaluation.containers import Setup
    from nnunet_flare.evaluation.gpu import open_gpu

    engine = choose_engine(args.engine)
    task = args.task or 2
    limits = limits_for(engine, task, memory=args.memory, cpus=args.cpus, shm_size=args.shm_size)
    if args.gpu is not None and not limits.has_gpu:
        raise InputError(
            f"--gpu {args.gpu}: containers of --task {task} get no GPU; leave it out, or give --task 1 or 3"
        )
    index = args.gpu or 0
    gpu = open_gpu(index) if limits.has_gpu else None
    if limits.has_gpu and gpu is None:
        raise InputError(
            f"--task {task}: its containers need a GPU, and there is no NVIDIA GPU {index} here; choose another "
            "with --gpu, or --task 2 for the CPU"
        )
    check_image(engine, args.container)
    check_limits(engine)
    return Setup(engine, args.container, limits, index, gpu, args.interval)
