"""Change of a label map between two rounds, against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_flare.selection.change import label_change

maps = arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3))


@given(maps, maps)
def test_it_is_the_share_of_differing_voxels_in_the_later_foreground(before, after):
    differing = sum(a != b for a, b in zip(before.ravel().tolist(), after.ravel().tolist(), strict=True))
    foreground = sum(value > 0 for value in after.ravel().tolist())
    change = label_change(before, after)
    assert np.isnan(change) if foreground == 0 else change == differing / foreground
    assert label_change(after, after) == 0 if foreground else np.isnan(label_change(after, after))


def test_a_swap_of_two_organs_is_a_change_and_another_grid_is_refused():
    one = np.array([[[1, 2, 0, 0]]], dtype=np.uint8)
    assert label_change(one, one[..., ::-1]) == 2.0
    with pytest.raises(ValueError, match="differ in shape"):
        label_change(one, one[..., 1:])
