"""Which library inflates makes no difference: the same voxels, the same damage found, also without ISA-L."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, deflate, read_volume, write_volume

VOLUME = Volume(np.random.default_rng(0).integers(-1024, 1500, (9, 40, 50)).astype(np.int16), (2.0, 1.0, 1.0))


@pytest.fixture(params=["isal", "zlib"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "isal":
        pytest.importorskip("isal")
        assert deflate._fastest.__name__ == "isal.isal_zlib"
    else:
        monkeypatch.setattr(deflate, "_fastest", zlib)
    yield request.param


def outcome(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        volume = read_volume(path, "case")
    except CaseError as error:
        return next(word for word in ("damaged", "truncated", "begin") if word in error.reason)
    return "read" if np.array_equal(volume.array, VOLUME.array) else "changed"


def test_any_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, library: str) -> None:
    write_volume(tmp_path / "scan.nii.gz", VOLUME)
    whole = gzip.compress(gzip.decompress((tmp_path / "scan.nii.gz").read_bytes()), mtime=0)
    generator = np.random.default_rng(1)
    found = set()
    for place in (*generator.integers(10, len(whole), 60), len(whole) - 1, len(whole) - 5):
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.integers(8)
        found.add(outcome(tmp_path / "changed.nii.gz", bytes(changed)))
    assert "damaged" in found and "changed" not in found


@pytest.mark.parametrize("lost", [1, 8, 9, 1000])
def test_lost_bytes_at_the_end_are_found(tmp_path: Path, library: str, lost: int) -> None:
    write_volume(tmp_path / "scan.nii.gz", VOLUME)
    whole = (tmp_path / "scan.nii.gz").read_bytes()
    assert outcome(tmp_path / "cut.nii.gz", whole[:-lost]) == "truncated"
    assert outcome(tmp_path / "whole.nii.gz", whole) == "read"


def test_everyone_can_inflate_what_is_written(tmp_path: Path, library: str) -> None:
    write_volume(tmp_path / "scan.nii.gz", VOLUME)
    write_volume(tmp_path / "scan.nii", VOLUME)
    assert gzip.decompress((tmp_path / "scan.nii.gz").read_bytes()) == (tmp_path / "scan.nii").read_bytes()
