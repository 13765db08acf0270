"""Models in zip files, of ``nnUNetv2_export_model_to_zip`` or packed by hand: unpacked once, into the cache.

A zip file comes from anywhere. Of each model only plans, dataset.json and the checkpoints that are asked for are taken,
of an exported model all of its files, to places that are made of checked names; a file with a name that leads
elsewhere, a link, or far more content than its bytes can hold is refused as a whole.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nnunet_flare.digests import file_digest
from nnunet_flare.errors import InputError
from nnunet_flare.inference.cache import cache_folder, cached, key_of
from nnunet_flare.inference.exported import COARSE, FIRST_STAGE, MANIFEST

log = logging.getLogger(__name__)

KIND = "models"
"""Of the cache's entries."""

LARGEST_BYTES, LARGEST_DOCUMENT = 64 * 2**30, 2**28
"""What all files that are taken, and one JSON file, may have unpacked."""

LARGEST_RATIO, SMALL = 100, 2**28
"""Weights hardly get smaller by packing; more than this times the zip file's bytes is none, above a size."""

CHUNK_BYTES = 1 << 22

DOCUMENTS = ("plans.json", "dataset.json")

FOLD = re.compile(r"fold_(\d+|all)")


Target = tuple[str, ...]
"""Where a member is unpacked to, below the entry's folder."""


@dataclass(frozen=True)
class ZippedModel:
    """A trained model in a zip file: the folder of its plans, and its name as ``dataset/Trainer__Plans__config``."""

    prefix: tuple[str, ...]
    dataset: str
    name: str

    @property
    def parts(self) -> tuple[str, str, str]:
        """Trainer, plans and configuration; empty where the folder is not named so."""
        found = self.name.split("__")
        return (found[0], found[1], found[2]) if len(found) == 3 else ("", "", "")

    def __str__(self) -> str:
        return f"{self.dataset}/{self.name}" if self.dataset else self.name


def unpacked_model(
    path: Path,
    *,
    checkpoint: str,
    dataset: str | None = None,
    trainer: str | None = None,
    plans: str | None = None,
    configuration: str | None = None,
    beside: Sequence[str] = (),
) -> Path:
    """The folder of a model of a zip file, unpacked before or now.

    Args:
        path: the zip file.
        checkpoint: file name of the checkpoints that are taken.
        dataset: id or name; like the three that follow, needed where the file holds several models.
        trainer: name.
        plans: name.
        configuration: name.
        beside: configurations of the same trainer and plans that are unpacked too, where they are there. The first
            stage of a cascade always is.

    Raises:
        InputError: when it is damaged or unsafe, or the model is not there or not the only one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_names(archive, path)
            there = _models(archive, path)
            wanted = {"-d": dataset, "-tr": trainer, "-p": plans, "-c": configuration}
            if exported := _exported_prefixes(archive):
                _refuse_trained(there, exported, path)
                return _unpacked_export(archive, exported, path, wanted)
            model = _chosen(there, path, wanted)
            stages = {*beside, *_previous(archive, model)}
            models = [
                other
                for other in there
                if other is model or (other.prefix[:-1] == model.prefix[:-1] and _is_beside(other, model, stages))
            ]
            members = [one for each in models for one in _members(archive, each, checkpoint)]
            if not any(target[0] == model.name and target[-1] == checkpoint for _, target in members):
                other = sorted({PurePosixPath(n).name for n in archive.namelist() if n.endswith(".pth")})
                raise InputError(f"{path}: no fold of {model} holds {checkpoint}; found {other or 'none'} (-chk)")
            _check_sizes([info for info, _ in members], path)
            folder = _unpacked(archive, members, path, key_of(file_digest(path), checkpoint, [str(m) for m in models]))
    except OSError as error:
        raise InputError(f"{path}: cannot be unpacked ({error})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{path}: cannot be unpacked ({error}); expected a trained model's folder or a whole zip file of it"
        ) from error
    return folder / model.name


def _exported_prefixes(archive: zipfile.ZipFile) -> list[tuple[str, ...]]:
    """The folders of exported models, without the coarse ones and the first stages in them."""
    paths = [PurePosixPath(name) for name in archive.namelist()]
    found = {path.parent.parts for path in paths if path.name == MANIFEST and "__MACOSX" not in path.parts}
    return sorted(
        prefix for prefix in found if prefix[-1:] not in {(COARSE,), (FIRST_STAGE,)} or prefix[:-1] not in found
    )


def _refuse_trained(models: Sequence[ZippedModel], exported: Sequence[tuple[str, ...]], path: Path) -> None:
    """Refuse a file that holds trained models beside exported ones: it does not say which is meant."""
    trained = [model for model in models if not any(model.prefix[: len(prefix)] == prefix for prefix in exported)]
    if trained:
        raise InputError(
            f"{path}: holds an exported model ({'/'.join(exported[0]) or '.'}) and a trained one ({trained[0]}); "
            "expected one of them: unpack it and give a folder"
        )


def _unpacked_export(
    archive: zipfile.ZipFile, prefixes: Sequence[tuple[str, ...]], path: Path, wanted: dict[str, str | None]
) -> Path:
    """The folder of the only exported model in a file; its checksums are compared when it is opened."""
    asked = [option for option, word in wanted.items() if word is not None]
    if asked:
        raise InputError(
            f"{path}: holds an exported model; leave out {' '.join(asked)}, which choose among trained ones"
        )
    if len(prefixes) > 1:
        raise InputError(
            f"{path}: holds {len(prefixes)} exported models, {', '.join('/'.join(p) or '.' for p in prefixes)}; "
            "expected one"
        )
    prefix = prefixes[0]
    name = prefix[-1] if prefix else path.stem
    members: list[tuple[zipfile.ZipInfo, Target]] = []
    for info in archive.infolist():
        parts = PurePosixPath(info.filename).parts
        if parts[: len(prefix)] == prefix and not info.is_dir() and "__MACOSX" not in parts:
            members.append((info, (name, *parts[len(prefix) :])))
    _check_sizes([info for info, _ in members], path)
    return _unpacked(archive, members, path, key_of(file_digest(path), MANIFEST, name)) / name


def _check_names(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse a file that holds a link, or names a place outside of itself or one place twice."""
    seen: set[str] = set()
    for info in archive.infolist():
        name = info.filename
        parts = PurePosixPath(name).parts
        odd = PureWindowsPath(name).drive or name.startswith(("/", "\\")) or "\\" in name or ".." in parts
        if odd or "\0" in name:
            raise InputError(f"{path}: holds {name!r}, which would be written outside the folder; not unpacked")
        kind = info.external_attr >> 16
        if kind and stat.S_IFMT(kind) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(f"{path}: holds {name!r}, which is a link or not a regular file; not unpacked")
        if str(PurePosixPath(name)) in seen and not info.is_dir():
            raise InputError(f"{path}: holds {name!r} twice; not unpacked")
        seen.add(str(PurePosixPath(name)))


def _models(archive: zipfile.ZipFile, path: Path) -> list[ZippedModel]:
    """Every folder with plans.json."""
    found = []
    for info in archive.infolist():
        *prefix, last = PurePosixPath(info.filename).parts or ("",)
        if last == "plans.json" and "__MACOSX" not in prefix:
            name = prefix[-1] if prefix else path.stem
            found.append(ZippedModel(tuple(prefix), prefix[-2] if len(prefix) > 1 else "", name))
    if not found:
        raise InputError(
            f"{path}: holds no plans.json; expected a model that nnUNetv2_export_model_to_zip packed, or a packed "
            "model's folder (Trainer__Plans__configuration)"
        )
    return sorted(found, key=str)


def _chosen(models: Sequence[ZippedModel], path: Path, wanted: dict[str, str | None]) -> ZippedModel:
    """The only model with the parts that are asked for."""

    def fits(model: ZippedModel) -> bool:
        names = dict(zip(("-tr", "-p", "-c"), model.parts, strict=True))
        name = wanted["-d"]
        is_dataset = (
            name is None
            or model.dataset == name
            or (name.isdigit() and model.dataset.startswith(f"Dataset{int(name):03d}_"))
        )
        return is_dataset and all(wanted[option] in (None, part) for option, part in names.items())

    found = [model for model in models if fits(model)]
    if len(found) == 1:
        return found[0]
    asked = " ".join(f"{option} {word}" for option, word in wanted.items() if word is not None)
    listed = ", ".join(map(str, models))
    if not found:
        raise InputError(f"{path}: holds no model of {asked}; it holds {listed}")
    raise InputError(f"{path}: holds several models, {listed}; choose one with -c, -tr, -p and -d")


def _is_beside(other: ZippedModel, model: ZippedModel, configurations: set[str]) -> bool:
    return other.parts[:2] == model.parts[:2] and other.parts[2] in configurations


def _previous(archive: zipfile.ZipFile, model: ZippedModel) -> list[str]:
    """The first stage that a model's plans name, where it is the second one of a cascade."""
    info = archive.getinfo("/".join((*model.prefix, "plans.json")))
    if info.file_size > LARGEST_DOCUMENT:
        return []
    try:
        stages: dict[str, Any] = json.loads(archive.read(info))["configurations"]
        name, seen = model.parts[2], set()
        while name in stages and name not in seen:
            seen.add(name)
            if stages[name].get("previous_stage"):
                return [str(stages[name]["previous_stage"])]
            name = stages[name].get("inherits_from", "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # said when the model is opened
    return []


def _members(archive: zipfile.ZipFile, model: ZippedModel, checkpoint: str) -> list[tuple[zipfile.ZipInfo, Target]]:
    """What is taken of a model."""
    found: list[tuple[zipfile.ZipInfo, Target]] = []
    for info in archive.infolist():
        *folder, name = PurePosixPath(info.filename).parts or ("",)
        inside = tuple(folder[len(model.prefix) :])
        if tuple(folder[: len(model.prefix)]) != model.prefix or info.is_dir():
            continue
        if not inside and name in DOCUMENTS:
            found.append((info, (model.name, name)))
        elif len(inside) == 1 and FOLD.fullmatch(inside[0]) and name == checkpoint:
            found.append((info, (model.name, inside[0], name)))
    return found


def _check_sizes(members: Sequence[zipfile.ZipInfo], path: Path) -> None:
    total, packed = sum(info.file_size for info in members), path.stat().st_size
    too_large = total > LARGEST_BYTES or any(
        info.file_size > LARGEST_DOCUMENT for info in members if info.filename.endswith(".json")
    )
    if too_large or total > max(SMALL, LARGEST_RATIO * packed):
        raise InputError(f"{path}: its {packed} bytes would unpack to {total}, which no model does; not unpacked")


def _unpacked(
    archive: zipfile.ZipFile, members: Sequence[tuple[zipfile.ZipInfo, Target]], path: Path, key: str
) -> Path:
    """A folder with the members, in the cache, or a temporary one where there is none."""

    def make(folder: Path) -> None:
        log.info("%s: unpacking %.0f MB", path, sum(info.file_size for info, _ in members) / 1e6)
        for info, target in members:
            place = folder.joinpath(*target)
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as packed, open(place, "xb") as stream:
                shutil.copyfileobj(packed, stream, CHUNK_BYTES)  # no more than file_size, its checksum compared

    folder = cached(cache_folder(KIND), key, make)
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="flare-model-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        make(folder)
    return folder
