"""Probabilities as ``nnUNetv2_predict --save_probabilities`` writes them, for ``nnUNetv2_ensemble``.

``<case>.npz`` holds ``probabilities`` (K, Z, Y, X), float32, in the axis order of the model's reader; ``<case>.pkl``
what the reader needs to write a label map of them; ``plans.json`` and ``dataset.json`` lie beside them. 14 classes of a
scan of 512 x 512 x 600 are 9 GB, in memory twice with stock. Here they are made slice by slice, wait in a file without
a name beside the output, whose room is taken before the first slice, and are packed from there.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import replacing, write_text
from nnunet_flare.images import Volume
from nnunet_flare.images.geometry import TO_OTHER_WORLD
from nnunet_flare.images.orientation import turn_volume
from nnunet_flare.images.readers import SITK_RAS, library
from nnunet_flare.inference.arrays import HOST, sigmoid
from nnunet_flare.inference.forms import Finished, Form, View
from nnunet_flare.inference.inputs import InputCase, model_reader

ARRAY, PICKLE = ".npz", ".pkl"

DOCUMENTS = ("plans.json", "dataset.json")
"""Of the model; ``nnUNetv2_ensemble`` reads them beside the probabilities."""

MEMBER = "probabilities"

CHUNK_BYTES = 1 << 22

FAST = 1
"""Level of compression: 6, zlib's default, takes three times as long for a few percent less."""


class Probabilities:
    """Receives the scores of one case and keeps their probabilities in a file without a name."""

    apart = False

    def __init__(self, case: str, folder: Path) -> None:
        self._case, self._folder = case, folder
        self._file: IO[bytes] | None = None

    def begin(self, view: View) -> None:
        """Take the room for a scan.

        Raises:
            CaseError: when the disk has not that much.
        """
        self.close()
        self.view = view
        whole = view.grid.array.shape
        self.shape = (view.heads, *(whole[axis] for axis in view.turn.axes))
        size = int(np.prod(self.shape, dtype=np.int64)) * 4
        self._file = TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed when it is saved, or forgotten)
        try:
            _take_room(self._file, size, self._folder)
        except OSError as error:
            reason = f"its probabilities need {size / 1e9:.1f} GB in {self._folder} while they are written"
            raise CaseError(self._case, f"{reason} ({error.strerror})") from error
        if not view.has_regions:  # what lies outside is background, as stock fills it
            part = self._mapped()[0]
            for plane in part:
                plane[...] = 1

    def take(self, targets: np.ndarray, scores: np.ndarray) -> None:
        """Keep the probabilities of some slices, all with the same scores (1, K, rows, columns)."""
        view = self.view
        values = sigmoid(scores[0]) if view.has_regions else HOST.softmax(scores[0])
        back = [1 + axis for axis in np.argsort(view.backward)]
        part = self._mapped()[self._region()].transpose([0, *back])
        inside = tuple(slice(low, high) for low, high in view.box[1:])
        for target in targets:
            place = (slice(None), view.box[0][0] + int(target), *inside)
            part[place] = values
        del part  # what is mapped counts as the process's memory

    def save(self, path: Path, reader: str) -> None:
        """Write both files, by rename, the pickle first."""
        assert self._file is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path.with_name(path.name.removesuffix(ARRAY) + PICKLE)) as temporary:
            temporary.write_bytes(pickle.dumps({**self.view.properties, **_reader_stuff(self.view, reader)}))
        with (
            replacing(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=FAST) as archive,
            archive.open(f"{MEMBER}.npy", "w", force_zip64=True) as stream,
        ):
            npy.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": self.shape})
            for chunk in _chunks(self._file):
                stream.write(chunk)
        self.close()

    def close(self) -> None:
        """Give the room back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _mapped(self) -> np.memmap[Any, np.dtype[np.float32]]:
        """The array (K, Z, Y, X) in the reader's axis order; mapped anew, as a map only grows."""
        assert self._file is not None
        return np.memmap(self._file, np.float32, "r+", shape=self.shape)

    def _region(self) -> tuple[slice, ...]:
        """Where the part with scores lies, all heads of it, in the reader's axis order."""
        whole, turn = self.view.grid.array.shape, self.view.turn
        region = [slice(None)]
        for axis, flipped in zip(turn.axes, turn.flipped, strict=True):
            low, high = self.view.placed[axis]
            region.append(slice(whole[axis] - high, whole[axis] - low) if flipped else slice(low, high))
        return tuple(region)


def probabilities_form(output: Path, model: Path) -> Form:
    """Writes ``output/<case>.npz`` and ``.pkl``, and the model's documents beside them.

    Raises:
        InputError: when the folder has such documents of something else.
    """
    texts = {name: (model / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    for name, text in texts.items():
        there = output / name
        if there.exists() and there.read_bytes() != text.encode():
            raise InputError(
                f"--save_probabilities: {there} already exists and belongs to another model; choose another -o"
            )
    reader = model_reader(model)

    def files(case: InputCase) -> tuple[Path, ...]:
        return output / f"{case.name}{ARRAY}", output / f"{case.name}{PICKLE}"

    def write(done: Finished, received: Probabilities) -> None:
        for name, text in texts.items():
            if not (output / name).exists():
                write_text(output / name, text)
        received.save(files(done.case)[0], reader)

    return Form(
        "npz",
        "probabilities",
        files,
        write,
        lambda case: _is_whole(*files(case)),
        receiver=lambda case: Probabilities(case.name, output),
    )


def _take_room(file: IO[bytes], size: int, folder: Path) -> None:
    """Make a new file ``size`` bytes large with all its room on the disk.

    macOS and Windows cannot reserve it: there it is only asked for.

    Raises:
        OSError: when the disk has not that much.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        file.truncate(size)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _reader_stuff(view: View, reader: str) -> dict[str, Any]:
    """What the reader would have noted of the scan, with which it writes label maps."""
    grid = view.grid if view.turn.is_identity else turn_volume(view.grid, view.turn)
    if library(reader) == "nibabel":
        affines = {"original_affine": _affine(view.grid)}
        if not reader.endswith("IO"):
            affines["reoriented_affine"] = _affine(grid)
        return {"nibabel_stuff": affines}
    stuff: dict[str, Any] = {
        "spacing": tuple(grid.spacing_mm[::-1]),
        "origin": tuple(grid.origin),
        "direction": tuple(grid.direction),
    }
    if reader == SITK_RAS:
        import SimpleITK as sitk

        code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(view.grid.direction)
        stuff["original_orientation"] = code
    return {"sitk_stuff": stuff}


def _affine(grid: Volume) -> np.ndarray:
    return TO_OTHER_WORLD @ grid.matrix


def _is_whole(array: Path, notes: Path) -> bool:
    """Whether both files were written to their end; what is packed is not unpacked again."""
    try:
        with zipfile.ZipFile(array) as archive, archive.open(f"{MEMBER}.npy") as stream:
            version = npy.read_magic(stream)
            shape, _, dtype = npy.read_array_header_1_0(stream)
        start = len(notes.read_bytes()[:1])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return version == (1, 0) and len(shape) == 4 and dtype == np.float32 and start == 1
