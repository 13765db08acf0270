"""The unlabelled scans of a run: found, given safe ids, linked into ``imagesUn`` and listed once for all."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunet_flare.dicom import dicom_files, read_scan, series_folders
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import link_or_copy, read_json, write_json
from nnunet_flare.images import SUFFIXES, Volume, stem_of, suffix_of, write_volume
from nnunet_flare.readers import SITK, doubtful

log = logging.getLogger(__name__)

TABLE = "flare_unlabelled.json"


@dataclass(frozen=True)
class UnlabelledCase:
    """An unlabelled scan: its id in the run, where it came from, the files nnU-Net reads, and its size on disk."""

    case: str
    source: str
    images: tuple[str, ...]
    size_bytes: int


def find_sources(folder: Path, channels: int) -> dict[str, list[Path]]:
    """The scans in a folder by safe, unique id: ``<case>_0000.<ext>`` and so on, ``<case>.<ext>``, or DICOM series.

    A folder of one DICOM series is a scan of one channel, named as the folder; ``folder`` may be one itself.

    Raises:
        InputError: when the folder is missing or holds no scan, or two files give one id.
    """
    if not folder.is_dir():
        raise InputError(f"-u {folder}: no such folder; expected a folder of CT scans")
    found: dict[str, dict[int, Path]] = {}
    clashes: list[str] = []
    for path in _scans(folder):
        match = re.fullmatch(r"(.+)_(\d{4})", stem_of(path))
        numbered = suffix_of(path) is not None and match is not None and int(match.group(2)) < channels
        name, channel = (match.group(1), int(match.group(2))) if match and numbered else (stem_of(path), 0)
        files = found.setdefault(safe_id(name), {})
        if channel in files:
            clashes.append(f"{files[channel].name} and {path.name} both give the case '{safe_id(name)}'")
        files[channel] = path
    if clashes:
        raise InputError(f"-u {folder}: {'; '.join(clashes)}. Rename or remove one of each")
    if not found:
        raise InputError(
            f"-u {folder}: no image ({', '.join(SUFFIXES)}) and no folder of DICOM files in it; expected unlabelled CTs"
        )
    return {case: [files[c] for c in sorted(files)] for case, files in sorted(found.items())}


def _scans(folder: Path) -> list[Path]:
    """Whatever has an image file's name, and DICOM series folders."""
    named = {path for path in folder.iterdir() if not path.name.startswith(".") and suffix_of(path) is not None}
    return sorted(named | set(series_folders(folder)))


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
    table = preprocessed / TABLE
    known = read_json(table)["cases"] if table.is_file() else {}
    cases = []
    for case, files in sources.items():
        source = os.path.realpath(files[0])  # unlike Path.resolve, no error for a link to itself
        if case in known and known[case]["source"] != source and Path(known[case]["source"]).exists():
            raise InputError(
                f"-u {files[0].parent}: the case id '{case}' is {source}, but an earlier run on this dataset has "
                f"{known[case]['source']} under that id. Rename one of the files"
            )
        images = [target / f"{case}_{channel:04d}{file_ending}" for channel in range(len(files))]
        for file, image in zip(files, images, strict=True):
            _provide(file, image, case, file_ending, reader)
        size = sum(size_of(file) for file in files)
        cases.append(UnlabelledCase(case, source, tuple(str(image) for image in images), size))
        known[case] = {"source": source, "images": [str(image) for image in images]}
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


def _provide(file: Path, image: Path, case: str, file_ending: str, reader: str) -> None:
    """Make ``image`` the scan ``file``: a link, or a converted copy when the format differs."""
    if image.exists() and image.stat().st_mtime >= file.stat().st_mtime:
        return
    if file.name.lower().endswith(file_ending):
        with suppress(FileNotFoundError):
            image.unlink()
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


def write_list(path: Path, cases: Sequence[UnlabelledCase]) -> None:
    """Keep the frozen list in the run's folder."""
    write_json(path, {"version": 1, "cases": [asdict(case) for case in cases]})


def read_list(path: Path) -> list[UnlabelledCase]:
    """The frozen list of a run."""
    return [
        UnlabelledCase(entry["case"], entry["source"], tuple(entry["images"]), entry["size_bytes"])
        for entry in read_json(path)["cases"]
    ]


def read_scans(case: UnlabelledCase, reader: str = SITK) -> list[Volume]:
    """The channels of a scan, NIfTI as this reader reads it; where a link is broken or a conversion failed, its source.

    Raises:
        CaseError: when one cannot be read, or nibabel and SimpleITK disagree about it.
    """
    paths = [Path(image) for image in case.images]
    volumes = []
    for image in paths:
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
