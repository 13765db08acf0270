"""The unlabelled scans of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, write_volume
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, read_scans, shard


def test_shards_cover_every_case_once_and_are_of_like_size():
    rng = np.random.default_rng(0)
    cases = [UnlabelledCase(f"c{i}", "", (), int(rng.integers(1, 1000))) for i in range(41)]
    parts = [shard(cases, part, 4) for part in range(4)]
    assert sorted(c.case for part in parts for c in part) == sorted(c.case for c in cases)
    sizes = [sum(c.size_bytes for c in part) for part in parts]
    assert max(sizes) - min(sizes) <= max(c.size_bytes for c in cases)


def test_a_second_channel_that_is_gone_is_not_taken_for_the_first(tmp_path: Path):
    images = [tmp_path / f"scan_{channel:04d}.nii.gz" for channel in range(2)]
    write_volume(images[0], Volume(np.ones((4, 5, 6), np.float32), (2.0, 1.0, 1.0)))
    images[1].symlink_to(tmp_path / "moved.nii.gz")
    case = UnlabelledCase("scan", str(images[0]), tuple(map(str, images)), 1)
    with pytest.raises(CaseError, match=r"scan_0001.nii.gz: channel 1 is missing: its file \(.*moved.nii.gz\)"):
        read_scans(case)
