"""The settings, folders and command of the tiny run that many tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.rounds.run.manifest import Run, load_run

TINY = [
    "members.count=2",
    "plan.patch_size=[16, 32, 32]",
    "plan.base_features=4",
    "plan.stages=3",
    "training.num_epochs=1",
    "training.iterations_per_epoch=2",
    "training.validation_iterations=1",
    "training.warmup_iterations=0",
    "predict.precision=fp32",
]


@dataclass(frozen=True)
class TinyLoop:
    """A finished run and what it was made from."""

    folder: Path
    exit_code: int

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}

    @property
    def unlabelled(self) -> Path:
        return self.folder / "unlabelled"

    @property
    def run_dir(self) -> Path:
        return self.folder / "nnUNet_results" / "Dataset022_FLAREPhantom" / "flare_tiny"

    def command(self, *more: str) -> list[str]:
        start = ["run", "-d", "22", "-u", str(self.unlabelled), "--recipe", "demo", "--name", "tiny", "-device", "cpu"]
        evaluation = ["--eval", str(self.folder / "test" / "images"), str(self.folder / "test" / "labels")]
        return [*start, *evaluation, *more, "--set", *TINY]

    def run(self) -> Run:
        return load_run(self.run_dir)
