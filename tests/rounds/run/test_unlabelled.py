"""The unlabelled scans of a run."""

from __future__ import annotations

import numpy as np

from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, shard


def test_shards_cover_every_case_once_and_are_of_like_size():
    rng = np.random.default_rng(0)
    cases = [UnlabelledCase(f"c{i}", "", (), int(rng.integers(1, 1000))) for i in range(41)]
    parts = [shard(cases, part, 4) for part in range(4)]
    assert sorted(c.case for part in parts for c in part) == sorted(c.case for c in cases)
    sizes = [sum(c.size_bytes for c in part) for part in parts]
    assert max(sizes) - min(sizes) <= max(c.size_bytes for c in cases)
