"""Digests of large content: any change is seen, wherever it is."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_flare import digests


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20, 33])
def test_every_changed_byte_and_length_is_seen(tmp_path, monkeypatch, size):
    monkeypatch.setattr(digests, "PIECE", 8)
    content = bytes(range(1, size + 1))
    path = tmp_path / "file"
    contents = [content, content + b"\0", *(content[:i] + b"\xff" + content[i + 1 :] for i in range(size))]
    found = set()
    for one in contents:
        path.write_bytes(one)
        assert digests.file_digest(path) == digests.digest_of([one])
        found.add(digests.file_digest(path))
    assert len(found) == len(contents)


def test_where_one_array_ends_and_the_next_begins_matters():
    values = np.arange(6, dtype=np.float32)
    whole, parts = digests.digest_of([values]), digests.digest_of([values[:2], values[2:]])
    assert len({whole, parts, digests.digest_of([values[:3], values[3:]]), digests.digest_of([values, b""])}) == 4
