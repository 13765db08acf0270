"""Raw datasets: found by name or id, and checked as a whole before anything is trained on them.

:func:`check_dataset` opens every image and label file once and returns all problems together, because a dataset that
is mended one error a day is not mended.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_flare.cases import FILE_NAME, Case, read_table
from nnunet_flare.documents import load_json
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import name_problem
from nnunet_flare.images import (
    SUFFIXES,
    Volume,
    check_values,
    geometry_difference,
    read_labels,
    read_volume,
    rounding_difference,
)
from nnunet_flare.images.readers import SITK, doubtful, reader_of_dataset
from nnunet_flare.labels import allowed_ids, ignore_id, label_problems
from nnunet_flare.trusted_names import check_name

log = logging.getLogger(__name__)

REQUIRED_KEYS = ("channel_names", "labels", "numTraining", "file_ending")
READERS = 4
"""Files read at a time; decompression dominates, and a full-size scan takes half a gigabyte while it is checked."""


@dataclass(frozen=True)
class TrainingCase:
    """The files of one training case: one image per channel, and the label map."""

    images: tuple[Path, ...]
    label: Path


def resolve_dataset(name_or_id: str | int, raw: Path) -> Path:
    """The folder of a dataset in ``raw`` (``nnUNet_raw``), given as ``22``, ``Dataset022_Name`` or its path.

    Raises:
        InputError: when there is none, or more than one with that id.
    """
    wanted = str(name_or_id)
    if os.sep in wanted and (Path(wanted) / "dataset.json").is_file():
        return Path(wanted)
    if not raw.is_dir():
        raise InputError(f"{raw}: no such folder; nnUNet_raw must name the folder that holds the datasets")
    known = sorted(p.name for p in raw.iterdir() if re.fullmatch(r"Dataset\d{3}_.+", p.name) and p.is_dir())
    if wanted.isdigit():
        found = [name for name in known if int(name[7:10]) == int(wanted)]
    else:
        found = [name for name in known if name == wanted]
    if len(found) > 1:
        raise InputError(f"dataset {wanted}: {raw} holds {' and '.join(found)}; ids must be unique; rename one")
    if not found:
        there = ", ".join(known) or "no dataset"
        raise InputError(f"dataset {wanted}: not in {raw}, which holds {there}; expected an id or Dataset<id>_<Name>")
    return raw / found[0]


def check_dataset(dataset_folder: Path) -> list[str]:
    """Everything that is wrong with a raw dataset, one line each, with the file, what was found and what to do.

    Checked are dataset.json, that every image has its label map and the other way round, every voxel grid, the image
    values, the label ids, and ``flare_cases.json``. An empty list means that training can start.
    """
    problems: list[str] = []
    document = read_dataset_json(dataset_folder, problems)
    if document is None:
        return problems
    cases = _training_cases(dataset_folder, document, problems)
    if document["numTraining"] != len(cases):
        problems.append(
            f"{dataset_folder / 'dataset.json'}: numTraining is {document['numTraining']!r}, found {len(cases)} cases"
        )
    wrong_labels = label_problems(document)
    problems += [f"{dataset_folder / 'dataset.json'}: {line}" for line in wrong_labels]
    allowed = None if wrong_labels else set(allowed_ids(document["labels"]))
    table = _read_cases(dataset_folder, None if wrong_labels else document["labels"], cases, problems)
    reader = dataset_reader(dataset_folder, document)
    ignore = None if wrong_labels else ignore_id(document["labels"])
    return problems + check_cases(cases, allowed, table=table, reader=reader, ignore=ignore)


def dataset_reader(folder: Path, document: Mapping[str, Any]) -> str:
    """The reader that stock nnU-Net takes for a raw dataset, tried on the first of its images, as stock tries it."""
    cases = _training_cases(folder, document, []) if document else {}
    return reader_of_dataset(document, next((path for case in cases.values() for path in case.images[:1]), None))


def check_cases(
    cases: Mapping[str, TrainingCase],
    allowed: set[int] | None,
    *,
    table: Mapping[str, Case] | None = None,
    reader: str = SITK,
    ignore: int | None = None,
) -> list[str]:
    """Everything that is wrong with the files of cases; each is opened once.

    Args:
        cases: the files.
        allowed: ids that label maps may hold; None: any.
        table: roles and annotated organs of cases that are not plain labelled ones.
        reader: the dataset's, as which every file is read.
        ignore: id of voxels that nobody annotated, which every case may hold.
    """
    check = partial(_check_case, allowed=allowed, table=table or {}, reader=reader, ignore=ignore)
    problems: list[str] = []
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(check, cases.items())
        for lines in tqdm(found, desc="opening every file", total=len(cases), unit="case", disable=None):
            problems += lines
    return problems


def read_dataset_json(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """A data set's dataset.json; None where it cannot be used, and ``problems`` then says why."""
    path = folder / "dataset.json"
    if not path.is_file():
        problems.append(f"{path}: no such file; every nnU-Net dataset needs one")
        return None
    try:
        document = load_json(path)
    except InputError as error:
        problems.append(str(error))
        return None
    if not isinstance(document, dict):
        problems.append(f"{path}: expected an object, found {type(document).__name__}")
        return None
    before = len(problems)
    missing = [key for key in REQUIRED_KEYS if key not in document]
    if missing:
        problems.append(f"{path}: {', '.join(missing)} missing; required are {', '.join(REQUIRED_KEYS)}")
    for key in ("labels", "channel_names"):
        if key in document and (not isinstance(document[key], dict) or not document[key]):
            problems.append(f"{path}: {key} is {document[key]!r}, expected an object with at least one entry")
    ending = document.get("file_ending")
    if "file_ending" in document and ending not in SUFFIXES:
        problems.append(f"{path}: file_ending is {ending!r}, expected one of {', '.join(SUFFIXES)}")
    reader = document.get("overwrite_image_reader_writer", "None")
    if reader != "None":
        try:
            check_name("reader", reader, f"{path}: overwrite_image_reader_writer")
        except InputError as error:
            problems.append(str(error))
    if len(problems) > before:
        return None
    return document


def _training_cases(folder: Path, document: Mapping[str, Any], problems: list[str]) -> dict[str, TrainingCase]:
    """The cases as nnU-Net finds them: listed in dataset.json, else by the file names in imagesTr and labelsTr."""
    if "dataset" in document:
        return _listed_cases(folder, document, problems)
    ending, channels = document["file_ending"], len(document["channel_names"])
    images, labels = folder / "imagesTr", folder / "labelsTr"
    absent = [path for path in (images, labels) if not path.is_dir()]
    problems += [f"{path}: no such folder; expected images in imagesTr and label maps in labelsTr" for path in absent]
    if absent:
        return {}
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(ending))
    by_case: dict[str, list[Path]] = {}
    for path in sorted(p for p in images.iterdir() if p.name.endswith(ending)):
        match = pattern.fullmatch(path.name)
        if match is None or path.name.startswith("."):
            problems.append(
                f"{path}: expected <case>_0000{ending}; nnU-Net takes every file here for a scan; rename or remove it"
            )
        else:
            by_case.setdefault(match.group(1), []).append(path)
    label_names = {p.name[: -len(ending)] for p in labels.iterdir() if p.name.endswith(ending) and p.name[0] != "."}
    problems += [
        f"{labels / (case + ending)}: label map without images in imagesTr"
        for case in sorted(label_names - set(by_case))
    ]
    cases = {}
    for case, found in by_case.items():
        expected = [images / f"{case}_{channel:04d}{ending}" for channel in range(channels)]
        if found != expected:
            names, wanted = [p.name for p in found], [p.name for p in expected]
            problems.append(f"{case}: found the channels {names}, expected {wanted} as in dataset.json")
        cases[case] = TrainingCase(tuple(p for p in found if p in expected), labels / f"{case}{ending}")
    if not cases:
        problems.append(f"{images}: no image named <case>_0000{ending}")
    return cases


def _listed_cases(folder: Path, document: Mapping[str, Any], problems: list[str]) -> dict[str, TrainingCase]:
    """The cases of dataset.json's ``dataset``, whose files may lie anywhere, in one format."""
    listed, ending, channels = document["dataset"], document["file_ending"], len(document["channel_names"])
    cases = {}
    for case, entry in listed.items() if isinstance(listed, dict) else ():
        if not re.fullmatch(r"[^./\\\0][^/\\\0]*", case):
            problems.append(
                f"{folder / 'dataset.json'}: dataset: the case id {case!r} is not a plain file name; rename it"
            )
            continue
        try:
            images, label = [str(image) for image in entry["images"]], str(entry["label"])
        except (KeyError, TypeError):
            problems.append(f"{folder / 'dataset.json'}: dataset.{case}: expected 'images' (a list) and 'label'")
            continue
        expanded = [folder / os.path.expandvars(path) for path in (*images, label)]
        problems += [
            f"{case}: {path}: is not a {ending} file, but file_ending in dataset.json says so; convert it, "
            "or correct file_ending"
            for path in expanded
            if not path.name.endswith(ending)
        ]
        if len(images) != channels:
            problems.append(f"{case}: dataset.json lists {len(images)} image(s), expected {channels}, one per channel")
        cases[case] = TrainingCase(tuple(expanded[:-1]), expanded[-1])
    if not cases:
        problems.append(f"{folder / 'dataset.json'}: dataset: expected an object of cases, found {listed!r:.80}")
    return cases


def _read_cases(
    folder: Path, labels: Mapping[str, Any] | None, cases: Mapping[str, TrainingCase], problems: list[str]
) -> Mapping[str, Case]:
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    try:
        table = read_table(path, labels=labels)
    except InputError as error:
        problems.append(str(error))
        return {}
    strangers = sorted(set(table.cases) - set(cases))
    if strangers:
        problems.append(f"{path}: cases {strangers} are not in the dataset; remove them or add their files")
    return table.cases


def _check_case(
    item: tuple[str, TrainingCase],
    *,
    allowed: set[int] | None,
    table: Mapping[str, Case],
    reader: str,
    ignore: int | None,
) -> list[str]:
    case, files = item
    too_long = name_problem(case, files.label.parent)
    problems: list[str] = [] if too_long is None else [f"{files.label.parent}: {too_long}"]
    grids = [_read(problems, partial(_read_image, path, case, reader)) for path in files.images]
    ids = None if allowed is None else sorted(allowed)
    label = _read(problems, partial(read_labels, files.label, case, allowed=ids, reader=reader))
    first = next((grid for grid in grids if grid is not None), None)
    others = [*zip(files.images, grids, strict=True), (files.label, label)]
    for path, grid in others:
        if first is None or grid is None:
            continue
        if grid.doubt:
            problems.append(f"{case}: {path}: {grid.doubt}; {doubtful(reader)}")
        difference, rounding = geometry_difference(first, grid), rounding_difference(first, grid)
        if difference:
            problems.append(f"{case}: {path}: not on the grid of {files.images[0].name}: {difference}")
        elif rounding:
            log.warning("%s: %s: nearly the grid of %s: %s", case, path, files.images[0].name, rounding)
    entry = table.get(case, Case())
    if label is not None and entry.role == "partial":
        unannounced = set(np.unique(label.array).tolist()) - {0, ignore, *(entry.annotated or ())}
        if unannounced:
            problems.append(
                f"{case}: {files.label}: holds {sorted(unannounced)}, but {FILE_NAME} says that only "
                f"{list(entry.annotated or ())} are annotated"
            )
    return problems


def _read_image(path: Path, case: str, reader: str) -> Volume:
    volume = read_volume(path, case, reader=reader)
    check_values(volume, case, path)
    return volume


def _read(problems: list[str], read: Callable[[], Volume]) -> Volume | None:
    try:
        return read()
    except CaseError as error:
        problems.append(str(error))
        return None
