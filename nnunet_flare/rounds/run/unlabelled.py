"""The unlabelled scans of a run: found, given safe ids, linked into ``imagesUn`` and listed once for all."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunet_flare.dicom.files import dicom_files
from nnunet_flare.dicom.series import read_scan
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import link_or_copy, name_problem, read_json, remove_leftovers, write_json
from nnunet_flare.images import SUFFIXES, Volume, write_volume
from nnunet_flare.images.readers import SITK, doubtful
from nnunet_flare.kept import is_kept
from nnunet_flare.listing import Listing, list_scans, told
from nnunet_flare.rounds.run.sources import stamp_of

log = logging.getLogger(__name__)

TABLE = "flare_unlabelled.json"
REMEDY = "restore it from a copy, or remove it and type the same flare-pseudolabel run command again"
LIST = {
    "cases": [{"case": str, "source": str, "images": [str], "size_bytes": int, "domain?": str}],
    "not_taken?": {str: str},
}
"""What ``unlabelled.json`` of a run looks like."""


@dataclass(frozen=True)
class UnlabelledCase:
    """An unlabelled scan: its id in the run, where it came from, the files nnU-Net reads, and its size on disk.

    ``domain`` is known where the recipe asks for it (:mod:`~nnunet_flare.rounds.run.domains`).
    """

    case: str
    source: str
    images: tuple[str, ...]
    size_bytes: int
    domain: str | None = None


def find_sources(folder: Path, channels: int) -> dict[str, list[Path]]:
    """The scans in a folder by safe, unique id: ``<case>_0000.<ext>`` and so on, ``<case>.<ext>``, or DICOM series.

    A folder of one DICOM series is a scan of one channel, named as the folder; ``folder`` may be one itself. What
    :func:`not_taken` names is not among them.

    Raises:
        InputError: when the folder is missing or holds no scan, or two files give one id.
    """
    found = _listing(folder, channels)
    if found.clashes:
        raise InputError(f"-u {folder}: {len(found.clashes)} case id(s) are given twice:{told(found.clashes)}")
    if not found.cases:
        raise InputError(
            f"-u {folder}: no image ({', '.join(SUFFIXES)}) and no folder of DICOM files in it; expected unlabelled "
            f"CTs{told(found.not_taken)}"
        )
    return {case: list(files) for case, files in found.cases.items()}


def not_taken(folder: Path, channels: int) -> dict[str, str]:
    """Why files of a folder that look like images are no scans of the run, by case or path."""
    return _listing(folder, channels).not_taken


def _listing(folder: Path, channels: int) -> Listing:
    if not folder.is_dir():
        raise InputError(f"-u {folder}: no such folder; expected a folder of CT scans")
    listed = list_scans(folder, channels, name=safe_id)
    too_long = [problem for case in listed.cases if (problem := name_problem(case, folder)) is not None]
    if too_long:
        raise InputError(f"-u {folder}: {len(too_long)} name(s) are too long: {'; '.join(too_long)}")
    return listed


def safe_id(name: str) -> str:
    """A case id that is safe in file names, commands and tables; bytes that are no text become two digits each."""
    name = re.sub("[\udc80-\udcff]", lambda byte: f"{ord(byte.group()) - 0xDC00:02x}", name)
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-") or "case"


def freeze(
    sources: Mapping[str, Sequence[Path]], *, raw: Path, preprocessed: Path, file_ending: str, reader: str = SITK
) -> list[UnlabelledCase]:
    """List the unlabelled scans of a run and link them into ``imagesUn``.

    Where nnUNet_raw cannot be written, the links lie in the preprocessed folder. Scans in another format than the
    dataset's are converted there. Nothing else of the raw dataset is touched.

    Raises:
        InputError: for an id that another run gave to another scan.
    """
    target = raw / "imagesUn"
    try:
        target.mkdir(exist_ok=True)
        writable = os.access(target, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        target = preprocessed / "imagesUn"
        target.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    table = preprocessed / TABLE
    shape, remedy = {"cases": {str: {"source": str}}}, "remove it; runs keep their own lists"
    known = read_json(table, shape, remedy=remedy)["cases"] if table.is_file() else {}
    cases = []
    for case, files in sources.items():
        source = os.path.realpath(files[0])  # unlike Path.resolve, no error for a link to itself
        if case in known and known[case]["source"] != source and Path(known[case]["source"]).exists():
            raise InputError(
                f"-u {files[0].parent}: the case id '{case}' is {source}, but an earlier run on this dataset has "
                f"{known[case]['source']} under that id. Rename one of the files"
            )
        images = [target / f"{case}_{channel:04d}{file_ending}" for channel in range(len(files))]
        stamps = [stamp_of(file) for file in files]
        before = known.get(case, {})
        noted = before.get("stamps") if before.get("source") in (source, None) else []
        for channel, (file, image) in enumerate(zip(files, images, strict=True)):
            is_same = None if noted is None else noted[channel : channel + 1] == [stamps[channel]]
            _provide(file, image, case, file_ending, reader, is_same=is_same)
        size = sum(size_of(file) for file in files)
        cases.append(UnlabelledCase(case, source, tuple(str(image) for image in images), size))
        known[case] = {"source": source, "images": [str(image) for image in images], "stamps": stamps}
    write_json(table, {"version": 1, "cases": dict(sorted(known.items()))})
    return cases


def size_of(file: Path) -> int:
    """Bytes of a file or of a DICOM series; 0 for a link to nothing, which is set aside later."""
    try:
        if file.is_dir():
            return sum(path.stat().st_size for path in dicom_files(file))
        return file.stat().st_size
    except OSError:
        return 0


def _provide(file: Path, image: Path, case: str, file_ending: str, reader: str, *, is_same: bool | None) -> None:
    """Make ``image`` the scan ``file``: a link, or a converted copy when the format differs.

    ``is_same``: whether ``file`` looks as it did when ``image`` was made; None where that was not noted.
    """
    if image.exists():
        if file.exists() and os.path.samefile(file, image):
            return
        is_current = image.stat().st_mtime >= file.stat().st_mtime if is_same is None else is_same
        if is_current and not image.is_symlink() and is_kept(image):
            return
    with suppress(FileNotFoundError):
        image.unlink()
    if file.name.lower().endswith(file_ending):
        try:
            os.symlink(os.path.realpath(file), image)
        except OSError:
            link_or_copy(file, image)
        return
    try:
        volume = read_scan(file, case, reader=reader)
        if volume.doubt:
            raise CaseError(case, f"{file}: {volume.doubt}; {doubtful(reader)}")
        write_volume(image, volume)
    except CaseError as error:
        log.warning("%s (it will be set aside)", error)


def write_list(path: Path, cases: Sequence[UnlabelledCase], left: Mapping[str, str] | None = None) -> None:
    """Keep the frozen list in the run's folder, and why other files are not in it."""
    entries = [{key: value for key, value in asdict(case).items() if value is not None} for case in cases]
    write_json(path, {"version": 1, "cases": entries, "not_taken": dict(left or {})})


def read_list(path: Path) -> list[UnlabelledCase]:
    """The frozen list of a run."""
    return [
        UnlabelledCase(entry["case"], entry["source"], tuple(entry["images"]), entry["size_bytes"], entry.get("domain"))
        for entry in read_json(path, LIST, remedy=REMEDY)["cases"]
    ]


def read_left(path: Path) -> dict[str, str]:
    """Why files of the folder are not in the frozen list of a run, by case or path."""
    left: dict[str, str] = read_json(path, LIST, remedy=REMEDY).get("not_taken", {}) if path.is_file() else {}
    return left


def read_scans(case: UnlabelledCase, reader: str = SITK) -> list[Volume]:
    """The channels of a scan, NIfTI as this reader reads it; where a link is broken or a conversion failed, its source.

    Raises:
        CaseError: when one cannot be read, or nibabel and SimpleITK disagree about it.
    """
    paths = [Path(image) for image in case.images]
    volumes = []
    for channel, image in enumerate(paths):
        if channel and not image.exists():  # the source that is noted is the first channel's
            raise CaseError(
                case.case,
                f"{image}: channel {channel} is missing: its file ({os.path.realpath(image)}) is gone or could not be "
                "converted (see the log of the start); restore it",
            )
        path = image if image.exists() else Path(case.source)
        volume = read_scan(path, case.case, reader=reader)
        if volume.doubt:
            raise CaseError(case.case, f"{path}: {volume.doubt}; {doubtful(reader)}")
        volumes.append(volume)
    return volumes


def shard(cases: Sequence[UnlabelledCase], part: int, parts: int) -> list[UnlabelledCase]:
    """Every ``parts``-th case of the list sorted by size, so that all parts have about the same work."""
    ordered = sorted(cases, key=lambda case: (-case.size_bytes, case.case))
    return ordered[part::parts]
