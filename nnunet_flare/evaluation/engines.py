"""Container engines and the challenge's limits as data, and the command line that they make together.

The official script starts ``docker container run --shm-size=28gb -m 28G --gpus=device=N --rm -v inputs -v outputs
IMAGE sh predict.sh`` for each scan; the laptop task allows 8 GB and no GPU.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_flare.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one container may use; None is the engine's own default. Sizes as engines write them: ``8g``, ``512m``."""

    memory: str
    cpus: float | None = None
    shm_size: str | None = None
    has_gpu: bool = False


WITH_GPU = Limits("28g", shm_size="28g", has_gpu=True)

TASKS: dict[int, Limits] = {1: WITH_GPU, 2: Limits("8g"), 3: WITH_GPU}
"""The limits of FLARE24 and later, by task: pan-cancer, organs on a laptop, adaptation to other modalities."""


@dataclass(frozen=True)
class Engine:
    """The words of one engine, with ``{names}`` for values; an empty option cannot be set with it.

    ``names_containers``: containers are started by a service or a monitor, under an id that is written to ``{id_file}``
    and a name by which ``remove`` ends them. Otherwise they are children of the command itself.

    ``sets_limits`` asks the engine, which answers ``sets_none`` where it would start containers without their limits
    and say so at most in a warning. An engine that has no such question ends with an error instead.
    """

    run: tuple[str, ...]
    memory: tuple[str, ...]
    cpus: tuple[str, ...]
    shm_size: tuple[str, ...]
    gpu: tuple[str, ...]
    inspect: tuple[str, ...]
    remove: tuple[str, ...]
    sets_limits: tuple[str, ...] = ()
    sets_none: str = ""
    names_containers: bool = True


ENGINES: dict[str, Engine] = {
    "docker": Engine(
        run=("run", "--rm", "--name", "{name}", "--cidfile", "{id_file}"),
        memory=("--memory", "{memory}"),
        cpus=("--cpus", "{cpus}"),
        shm_size=("--shm-size", "{shm_size}"),
        gpu=("--gpus", "device={gpu}"),
        inspect=("image", "inspect"),
        remove=("rm", "--force", "{name}"),
        sets_limits=("info", "--format", "{{.MemoryLimit}}"),
        sets_none="false",
    ),
    "podman": Engine(
        # Hosts with SELinux refuse mounted folders without the last option.
        run=("run", "--rm", "--name", "{name}", "--cidfile", "{id_file}", "--security-opt", "label=disable"),
        memory=("--memory", "{memory}"),
        cpus=("--cpus", "{cpus}"),
        shm_size=("--shm-size", "{shm_size}"),
        gpu=("--device", "nvidia.com/gpu={gpu}"),
        inspect=("image", "inspect"),
        remove=("rm", "--force", "{name}"),
        sets_limits=("info", "--format", "{{.Host.CgroupsVersion}} rootless={{.Host.Security.Rootless}}"),
        sets_none="v1 rootless=true",
    ),
    "apptainer": Engine(
        run=("exec", "--compat", "--workdir", "{work}", "--pwd", "/workspace"),
        memory=("--memory", "{memory}"),
        cpus=("--cpus", "{cpus}"),
        shm_size=(),
        gpu=("--nv", "--env", "CUDA_VISIBLE_DEVICES={gpu}"),
        inspect=("inspect",),
        remove=(),
        names_containers=False,
    ),
}
"""Engines by their program's name, in the order in which they are looked for."""


def choose_engine(asked: str | None) -> str:
    """The engine asked for, or the first whose program is found.

    Raises:
        InputError: when it is not installed.
    """
    for name in [asked] if asked else ENGINES:
        if shutil.which(name):
            return name
    missing = f"{asked} is not" if asked else f"none of {', '.join(ENGINES)} is"
    raise InputError(f"no container can be run: {missing} on the PATH; install one, or name one with --engine")


def limits_for(
    engine: str, task: int, *, memory: str | None = None, cpus: float | None = None, shm_size: str | None = None
) -> Limits:
    """A task's limits with others in their place where they are given.

    Raises:
        InputError: for one that is given and that the engine cannot set.
    """
    official = TASKS[task]
    if not ENGINES[engine].shm_size:
        if shm_size is not None:
            raise InputError(f"--shm-size {shm_size}: {engine} cannot set the size of /dev/shm; leave out --shm_size")
        if official.shm_size is not None:
            log.warning("%s cannot set the size of /dev/shm (%s in task %d)", engine, official.shm_size, task)
            official = replace(official, shm_size=None)
    return replace(official, memory=memory or official.memory, cpus=cpus, shm_size=shm_size or official.shm_size)


def check_image(engine: str, image: str) -> None:
    """Ask the engine for an image.

    Raises:
        InputError: with what the engine says, when it does not have the image or does not answer.
    """
    asked = subprocess.run([engine, *ENGINES[engine].inspect, image], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        said = asked.stderr.strip().splitlines()[-1:] or [f"exit code {asked.returncode}"]
        raise InputError(
            f"--container {image}: {engine} does not have this image ({said[0].strip()}); load or build it first, or "
            "choose another engine with --engine"
        )


def check_limits(engine: str) -> None:
    """Refuse an engine that would ignore the limits here: what it measured would say nothing of the challenge's.

    Raises:
        InputError: when the engine says so.
    """
    words = ENGINES[engine]
    if not words.sets_limits:
        return
    asked = subprocess.run([engine, *words.sets_limits], capture_output=True, text=True, check=False)
    if asked.returncode == 0 and asked.stdout.strip() == words.sets_none:
        raise InputError(
            f"{engine}: sets no limits of memory and cores here ({' '.join(words.sets_limits)}: {words.sets_none}); "
            "run it as root, or on a host with control groups of version 2"
        )


def command_line(engine: str, image: str, limits: Limits, folder: Path, *, name: str, gpu: int = 0) -> list[str]:
    """The command that runs ``sh predict.sh`` in one container, from its start to its end.

    Args:
        engine: one of :data:`ENGINES`.
        image: a name, or for apptainer a file.
        limits: what the container may use, as :func:`limits_for` gives it for the engine.
        folder: absolute; holds ``inputs``, ``outputs`` and ``work``, and gets ``container_id``.
        name: of the container.
        gpu: index of the GPU that the container sees where the limits have one.

    """
    words = ENGINES[engine]
    values = {
        "name": name,
        "id_file": str(folder / "container_id"),
        "work": str(folder / "work"),
        "memory": limits.memory,
        "cpus": f"{limits.cpus:g}" if limits.cpus is not None else "",
        "shm_size": limits.shm_size or "",
        "gpu": str(gpu),
    }
    parts: list[Sequence[str]] = [words.run, words.memory]
    parts += [words.cpus] if limits.cpus is not None else []
    parts += [words.shm_size] if limits.shm_size is not None else []
    parts += [words.gpu] if limits.has_gpu else []
    options = [word.format_map(values) for part in parts for word in part]
    mounts = [word for inner in ("inputs", "outputs") for word in ("--mount", _mount(folder / inner, inner))]
    return [engine, *options, *mounts, image, "sh", "predict.sh"]


def _mount(folder: Path, inner: str) -> str:
    """All engines read the value as a line of CSV, so a comma or quotation mark in a path needs quotation marks."""
    source = f"source={folder}"
    if "," in source or '"' in source:
        source = '"' + source.replace('"', '""') + '"'
    return f"type=bind,{source},target=/workspace/{inner}"
