"""A model that ``flare-export`` wrote: its folder's form, how it is checked, and how it is opened without PyTorch.

``exported.json`` says what the folder is, ``plans.json`` and ``dataset.json`` hold what prediction needs of them,
``fold_<k>/network.xml`` and ``.bin`` are networks in OpenVINO's form, ``coarse/`` is the coarse model and
``first_stage/`` a cascade's first stage in the same form where there is one, and ``checksums.json`` has the digest of
every file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nnunet_flare.digests import file_digest
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.inference.choices import PRECISIONS, ROI_RULES, TTA
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.inputs import DOCUMENTS
from nnunet_flare.inference.opened import Execution, Runtime
from nnunet_flare.inference.plain_plans import SHAPE, PlainConfiguration, PlainModel, PlainPlans, check_plain
from nnunet_flare.inference.runtimes import BF16_FLAGS, cpu_flags
from nnunet_flare.inference.settings import PredictionSettings

log = logging.getLogger(__name__)

KIND = "exported model of nnunet-flare"

FORMAT = 2
"""The newest form that is read. Counts up when an older version can no longer read what is written."""

FORMAT_ALONE = 1
"""The form that is written of all but cascades, so that older versions read it."""

MANIFEST, CHECKSUMS, COARSE, FIRST_STAGE = "exported.json", "checksums.json", "coarse", "first_stage"

NETWORK = "network.xml"

AGAIN = "copy the folder again, or write it again with flare-export"

OF_MANIFEST: dict[str, Any] = {
    "kind": {KIND},
    "format": int,
    "made_with": {str: str},
    "model": str,
    "configuration": str,
    "networks": [{"fold": (int, {"all"}), "mirroring_axes": (None, [int])}],
    "weights": {"half", "single"},
    "step_size": float,
    "tta": set(TTA),
    "precision": set(PRECISIONS),
    "roi": (None, {"rule": set(ROI_RULES), "margin_mm": float}),
    "postprocess": (None, {"name": str, "content": dict}),
}
"""What ``exported.json`` looks like."""


def is_exported(folder: Path) -> bool:
    """Whether a folder was written by ``flare-export``, whole or not."""
    return (Path(folder) / MANIFEST).is_file()


def refuse_without_manifest(folder: Path) -> None:
    """Refuse a folder that ``flare-export`` wrote and that lost what says so.

    Raises:
        InputError: naming the file that is missing.
    """
    if not is_exported(folder) and any(Path(folder).glob(f"fold_*/{NETWORK}")):
        raise InputError(f"{folder}: holds networks that flare-export wrote, but no {MANIFEST}; {AGAIN}")


@dataclass(frozen=True)
class Exported:
    """What an exported folder says about itself."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Exported:
        """Read ``exported.json``; no other file is looked at.

        Raises:
            InputError: when it is damaged, of another program, or newer than this one.
        """
        folder, path = Path(folder), Path(folder) / MANIFEST
        found = read_json(path, {"kind": {KIND}, "format": int}, remedy=AGAIN)
        if found["format"] > FORMAT:
            raise InputError(
                f"{folder}: was exported by a newer nnunet-flare (format {found['format']}, this one reads up to "
                f"{FORMAT}): pip install -U nnunet-flare"
            )
        manifest = read_json(path, OF_MANIFEST, remedy=AGAIN)
        if not manifest["networks"]:
            raise InputError(f"{path}: has no networks; {AGAIN}")
        if not 0 < manifest["step_size"] <= 1:
            raise InputError(f"{path}: step size {manifest['step_size']}, expected above 0 and at most 1; {AGAIN}")
        if manifest["roi"] is not None and not manifest["roi"]["margin_mm"] >= 0:
            raise InputError(f"{path}: roi margin {manifest['roi']['margin_mm']}, expected 0 mm or more; {AGAIN}")
        return cls(folder, manifest)

    @property
    def has_coarse(self) -> bool:
        """Whether a coarse model lies in it."""
        return self.manifest["roi"] is not None

    def check(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            InputError: naming what is missing or changed.
        """
        known = read_json(self.folder / CHECKSUMS, {str: str}, remedy=AGAIN)
        needed = {MANIFEST, "plans.json", "dataset.json"}
        for entry in self.manifest["networks"]:
            network = f"fold_{entry['fold']}/{NETWORK}"
            needed |= {network, network.replace(".xml", ".bin")}
        if self.has_coarse:
            needed.add(f"{COARSE}/{CHECKSUMS}")
        wrong = [f"{name} is not in {CHECKSUMS}" for name in sorted(needed - set(known))]
        for name, digest in known.items():
            if not _is_inside(name):
                wrong.append(f"{CHECKSUMS} names {name!r}, which is outside the folder")
                continue
            try:
                wrong += [] if file_digest(self.folder / name) == digest else [f"{name} was changed"]
            except OSError as error:
                wrong.append(f"{name}: {error.strerror}")
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise InputError(f"{self.folder}: the exported model is damaged ({wrong[0]}{more}); {AGAIN}")

    def settings(self, settings: PredictionSettings) -> PredictionSettings:
        """Settings for this model: on the CPU, with OpenVINO, in the model's precision unless another was asked for.

        Raises:
            InputError: for another device or backend.
        """
        if settings.backend == "torch" or settings.device not in ("auto", "cpu"):
            other = "--backend torch" if settings.backend == "torch" else f"-device {settings.device}"
            raise InputError(
                f"{self.folder}: is an exported model, which OpenVINO runs on the CPU; leave out {other}, or give the "
                "trained model's own folder"
            )
        precision = self.manifest["precision"] if settings.precision == "auto" else settings.precision
        if precision == "bf16" and not BF16_FLAGS & cpu_flags():
            log.warning("%s: was exported for bf16, which this CPU lacks; fp32 is used", self.folder)
            precision = "auto"
        if settings.precision == "fp32" and self.manifest["weights"] == "half":
            log.warning(
                "%s: its weights were stored in half precision; flare-export --precision fp32 keeps single precision",
                self.folder,
            )
        return replace(settings, device=str(CPU), backend="openvino", precision=precision)

    def models(self) -> list[ExportedModel]:
        """Its networks, one a fold.

        Raises:
            InputError: when plans.json or dataset.json hold what prediction cannot use.
        """
        plans = read_json(self.folder / "plans.json", SHAPE, remedy=AGAIN)
        dataset = read_json(self.folder / "dataset.json", DOCUMENTS["dataset.json"], remedy=AGAIN)
        name = self.manifest["configuration"]
        if name not in plans["configurations"]:
            raise InputError(f"{self.folder / 'plans.json'}: has no configuration {name}; {AGAIN}")
        configuration = PlainConfiguration(plans["configurations"][name])
        check_plain(plans, configuration, str(self.folder))
        return [
            ExportedModel(
                PlainPlans(plans),
                configuration,
                dataset,
                None if entry["mirroring_axes"] is None else tuple(entry["mirroring_axes"]),
                source=self,
                network=self.folder / f"fold_{entry['fold']}" / NETWORK,
            )
            for entry in self.manifest["networks"]
        ]


@dataclass(frozen=True, eq=False)
class ExportedModel(PlainModel):
    """One fold of an exported model, see :class:`nnunet_flare.inference.opened.Opened`."""

    source: Exported
    network: Path

    def __str__(self) -> str:
        return str(self.network.parent)

    @property
    def folder(self) -> Path:
        """The exported folder."""
        return self.source.folder

    @property
    def files(self) -> tuple[Path, ...]:
        """The digests of all that lies in the exported folder."""
        return (self.source.folder / CHECKSUMS,)

    def runtime(self, how: Execution) -> Runtime:
        """OpenVINO's; nothing else can run it."""
        from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

        try:
            runtime = OpenVinoRuntime(self.network, precision=how.precision, two_d=how.two_d)
        except (RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.network}: cannot be run by the OpenVINO that is installed here ({reason}); it was made with "
                f"version {self.source.manifest['made_with'].get('openvino', 'unknown')}: pip install -U openvino"
            ) from error
        window = (1, self.network_channels, *(how.patch[1:] if how.two_d else how.patch))
        if (runtime.window, runtime.scores) != (window, (1, self.labels.heads, *window[2:])):
            raise InputError(
                f"{self.network}: takes windows of {runtime.window} and gives {runtime.scores[1]} scores, but "
                f"plans.json and dataset.json say {window} and {self.labels.heads}; {AGAIN}"
            )
        return runtime


class StoredPostprocessing:
    """The post-processing that lies in an exported model; loaded when the first label map is there."""

    def __init__(self, stored: dict[str, Any], labels: dict[str, Any]) -> None:
        self._stored, self._labels = stored, labels

    @property
    def content(self) -> dict[str, Any]:
        """The pipeline's document."""
        return dict(self._stored["content"])

    @cached_property
    def _pipeline(self) -> Any:
        from nnunet_flare.postprocessing.pipeline import stored_pipeline

        return stored_pipeline(self._stored["name"], self._stored["content"], labels=self._labels)

    def __call__(self, labels: np.ndarray, spacing_mm: Sequence[float], *, direction: Sequence[float]) -> np.ndarray:
        cleaned: np.ndarray = self._pipeline.apply(labels, spacing_mm, direction=direction)
        return cleaned


def write_checksums(folder: Path) -> None:
    """Write the digests of all files of a folder and of the folders in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / CHECKSUMS, {path.relative_to(folder).as_posix(): file_digest(path) for path in files})


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
