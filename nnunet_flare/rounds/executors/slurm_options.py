"""What Slurm is asked for, per stage: the words of ``--slurm`` and its YAML file, validated."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nnunet_flare.documents import load_yaml
from nnunet_flare.errors import InputError
from nnunet_flare.rounds.run.tasks import Stage, Task

STAGES: tuple[str, ...] = get_args(Stage)
EVERY = "all"
"""The YAML block that holds for every stage."""

OURS = (
    "--array", "--chdir", "--dependency", "--job-name", "--kill-on-invalid-dep", "--no-requeue", "--open-mode",
    "--output", "--parsable", "--requeue", "--signal", "--wait", "--wrap",
)  # fmt: skip
"""Options of sbatch that the executor sets itself."""


class Resources(BaseModel):
    """What one job gets; a key that is not given is left to Slurm (``gres``: as many GPUs as the task holds)."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    partition: str | None = None
    time: str | None = Field(None, pattern=r"^[0-9:-]+$")
    gres: str | None = None
    cpus: int | None = Field(None, ge=1, le=10_000)
    mem: str | None = Field(None, pattern=r"^[0-9]+[KMGTkmgt]?$")
    extra: tuple[str, ...] = ()

    @field_validator("extra", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @field_validator("extra")
    @classmethod
    def _allowed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            if not word.startswith("--"):
                raise ValueError(f"'{word}': expected long options of sbatch, such as --account=NAME")
            if word.partition("=")[0] in OURS:
                raise ValueError(f"{word}: is set by the executor")
        return value

    def arguments(self, gpus: int) -> list[str]:
        """Options of ``sbatch`` for a task that holds ``gpus`` GPUs."""
        gres = self.gres or (f"gpu:{gpus}" if gpus else None)
        given = {"partition": self.partition, "time": self.time, "gres": gres, "cpus-per-task": self.cpus}
        given["mem"] = self.mem
        return [*(f"--{key}={value}" for key, value in given.items() if value is not None), *self.extra]


def parse_options(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The words of ``--slurm``: a YAML file of blocks per stage, and ``key=value,key=value`` for every stage.

    Returns:
        Keys of :class:`Resources` by stage; the block ``all`` holds for every stage.

    Raises:
        InputError: with the place of a wrong key or value.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for word in words:
        if word.endswith((".yaml", ".yml")):
            for stage, block in _read(Path(word)).items():
                _validate(block, f"--slurm {word}, {stage}")
                blocks.setdefault(stage, {}).update(block)
        else:
            for part in word.split(","):
                key, equals, value = part.partition("=")
                if not equals or not key:
                    raise InputError(
                        f"--slurm {word}: '{part}' is not key=value; expected partition=, time=, gres=, cpus=, mem=, "
                        "extra=, or a .yaml file with a block per stage (needed for values with commas)"
                    )
                blocks.setdefault(EVERY, {})[key] = value
    for stage, block in blocks.items():
        _validate(block, f"--slurm, {stage}")
    return blocks


def resources(blocks: Mapping[str, Mapping[str, Any]], task: Task) -> Resources:
    """What a task gets: the block of its stage over the block for all. A CPU task takes no ``gres`` from the latter."""
    common = dict(blocks.get(EVERY, {}))
    if task.gpus == 0:
        common.pop("gres", None)
    return _validate({**common, **blocks.get(task.stage, {})}, f"--slurm, {task.stage}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    # Every value as text, and nothing else than text: YAML reads the time 4:00:00 as the number 14400.
    document = load_yaml(path, f"--slurm {path}", plain_text=True)
    allowed = (EVERY, *STAGES)
    if not isinstance(document, dict) or any(k not in allowed or not isinstance(v, dict) for k, v in document.items()):
        raise InputError(f"--slurm {path}: expected one block of keys per stage; stages are {', '.join(allowed)}")
    return document


def _validate(block: Mapping[str, Any], where: str) -> Resources:
    try:
        return Resources.model_validate(dict(block))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        keys = ", ".join(Resources.model_fields)
        raise InputError(f"{where}: {problems} (keys are {keys})") from error
