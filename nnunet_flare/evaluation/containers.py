"""One container per scan, as the challenge runs them: measured, its label map checked and kept."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from nnunet_flare.errors import CaseError
from nnunet_flare.evaluation.engines import ENGINES, Limits, command_line
from nnunet_flare.evaluation.gpu import Gpu
from nnunet_flare.evaluation.sampling import INTERVAL_S, Recording, below, record
from nnunet_flare.files import replacing, scratch_folder
from nnunet_flare.images import geometry_difference, read_labels_alone, read_volume

KILLED = 137
"""The exit code of a container whose process was killed, as the kernel does when the memory is used up."""


@dataclass(frozen=True)
class Setup:
    """What all containers of a measurement share. ``gpu`` is the GPU ``gpu_index`` opened for questions, if any."""

    engine: str
    image: str
    limits: Limits
    gpu_index: int = 0
    gpu: Gpu | None = None
    interval_s: float = INTERVAL_S


@dataclass(frozen=True)
class Contained:
    """One container's measurement, the command that ran it, and in words what went wrong."""

    recording: Recording
    command: list[str]
    problem: str | None


def run_scan(case: str, scan: Path, setup: Setup, *, label_map: Path, log: Path) -> Contained:
    """Run one container on a copy of one scan, alone in its input folder.

    Args:
        case: what the label map is called, without ``.nii.gz``.
        scan: the scan's file, which keeps its name.
        setup: the image, its engine and limits.
        label_map: where the label map goes when the container succeeded and its grid is the scan's; one of an
            earlier measurement is removed first.
        log: where the container's output goes.
    """
    for folder in (label_map.parent, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    label_map.unlink(missing_ok=True)
    with scratch_folder(log.parent.resolve()) as folder:
        for inner in ("inputs", "outputs", "work"):
            (folder / inner).mkdir()
        (folder / "outputs").chmod(0o777)  # as the official script does: the container's user is none of ours
        shutil.copyfile(scan, folder / "inputs" / scan.name)
        name = f"flare-efficiency-{uuid.uuid4().hex[:12]}"
        command = command_line(setup.engine, setup.image, setup.limits, folder, name=name, gpu=setup.gpu_index)
        processes = Processes(folder / "container_id") if ENGINES[setup.engine].names_containers else below
        try:
            with open(log, "wb") as output:
                recording = record(
                    command, gpu=setup.gpu, interval_s=setup.interval_s, processes=processes, output=output
                )
        except BaseException:
            _remove(setup.engine, name)
            raise
        problem = _problem(case, scan, folder / "outputs", recording.exit_code, setup.limits)
        if problem is None:
            with replacing(label_map) as temporary:
                shutil.copyfile(folder / "outputs" / f"{case}.nii.gz", temporary)
    return Contained(recording, command, problem)


def _problem(case: str, scan: Path, outputs: Path, exit_code: int, limits: Limits) -> str | None:
    if exit_code != 0:
        killed = f" (killed; it may have needed more than its {limits.memory} of memory)" if exit_code == KILLED else ""
        return f"the container ended with exit code {exit_code}{killed}"
    path = outputs / f"{case}.nii.gz"
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in outputs.iterdir())) or "nothing"
        return f"the container wrote no {path.name} to /workspace/outputs (found: {found})"
    try:
        difference = geometry_difference(read_labels_alone(path, case), read_volume(scan, case))
    except CaseError as error:
        return f"the container's label map cannot be used: {error}"
    except OSError as error:
        return f"the container's {path.name} cannot be read: {error.strerror}"
    return None if difference is None else f"the container's label map is not on the grid of its scan: {difference}"


def _remove(engine: str, name: str) -> None:
    """End a container whose client was ended: it runs on otherwise, since a first process ignores requests to end."""
    words = [word.format(name=name) for word in ENGINES[engine].remove]
    if words:
        subprocess.run([engine, *words], capture_output=True, check=False)


class Processes:
    """The processes of a container whose id stands, or will stand, in a file; none before it starts.

    The engine's client is not their parent, so they are found by the id in the name of their control group. A
    container on another machine, or one without control groups, is never found.
    """

    def __init__(self, id_file: Path, proc: Path = Path("/proc")) -> None:
        self._id_file = id_file
        self._proc = proc
        self._first: psutil.Process | None = None

    def __call__(self, client: int) -> list[psutil.Process]:
        if self._first is None or not self._first.is_running():
            self._first = self._find()
        return [] if self._first is None else [self._first, *below(self._first.pid)]

    def _find(self) -> psutil.Process | None:
        try:
            container = self._id_file.read_text(encoding="ascii").strip()
        except OSError:
            return None
        found = []
        for pid in psutil.pids() if container else ():
            with suppress(OSError, psutil.Error):
                groups = (self._proc / str(pid) / "cgroup").read_text(encoding="utf-8", errors="replace")
                if container in groups and "conmon" not in groups:  # podman's monitor has a group of its own
                    found.append(psutil.Process(pid))
        return min(found, key=lambda process: (process.create_time(), process.pid), default=None)
