"""The sliding window's sums: what they cover, and that the threads which share them change nothing."""

from __future__ import annotations

import tracemalloc
from itertools import product

import numpy as np
import pytest
from pretend_gpu import CARD, gpu

from nnunet_flare.inference import workers
from nnunet_flare.inference.arrays import HOST, BFloat16, to_host
from nnunet_flare.inference.attempts import NotFiniteError, Watch
from nnunet_flare.inference.augment import all_flips, flipped
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.places import place_at
from nnunet_flare.inference.runtimes import averaged, stacked
from nnunet_flare.inference.slabs import window_at
from nnunet_flare.inference.windows import gaussian_weights, padding, place_of_scan, slide, window_starts

HEADS, PATCH = 3, (8, 12, 10)


def network(window: np.ndarray) -> np.ndarray:
    """Scores that differ from voxel to voxel, and from window to window."""
    rng = np.random.default_rng(int(abs(window).sum() * 1000))
    return rng.normal(size=(HEADS, *window.shape[2:])).astype(np.float32)


def scores_of(data: np.ndarray) -> np.ndarray:
    blocks: list[np.ndarray] = []
    slide(
        data,
        network,
        lambda block: blocks.append(block.copy()),
        heads=HEADS,
        patch=PATCH,
        step_size=0.5,
        device=CPU,
    )
    return np.concatenate(blocks, axis=1)


def rows_of(data: np.ndarray) -> tuple[np.ndarray, list[slice]]:
    """The same scores, handed on by rows, and which rows came."""
    scores, came = np.full((HEADS, *data.shape[1:]), np.nan, np.float32), []

    def consume(block: np.ndarray, rows: slice) -> None:
        scores[:, :, rows] = block
        came.append(rows)

    slide(data, network, consume, heads=HEADS, patch=PATCH, step_size=0.5, device=CPU, by_rows=True)
    return scores, came


def scan(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)


def padded_volume(data: np.ndarray, patch: tuple[int, ...]) -> tuple[np.ndarray, tuple[slice, ...]]:
    """A scan in zeros, as large as a window at least, and where it lies in there."""
    return np.pad(data, [(0, 0), *padding(data.shape[1:], patch)]), place_of_scan(data.shape[1:], patch)


def summed_over_the_whole_volume(data: np.ndarray) -> np.ndarray:
    """What stock does: all windows of the padded scan added up in one volume, the padding cut off at the end."""
    padded, kept = padded_volume(data, PATCH)
    sums, total = np.zeros((HEADS, *padded.shape[1:])), np.zeros(padded.shape[1:])
    for corner in product(*window_starts(padded.shape[1:], PATCH, 0.5)):
        part = tuple(slice(low, low + width) for low, width in zip(corner, PATCH, strict=True))
        sums[(slice(None), *part)] += network(padded[(slice(None), *part)][None]) * gaussian_weights(PATCH)
        total[part] += gaussian_weights(PATCH)
    return (sums / total)[(slice(None), *kept)]


@pytest.mark.parametrize("shape", [(20, 30, 25), (21, 12, 10), (8, 30, 25), (9, 7, 25), (5, 30, 3), (3, 5, 7)])
def test_slab_by_slab_gives_what_sums_over_the_whole_volume_give_to_the_last_slice(shape):
    data = scan(*shape)
    np.testing.assert_allclose(scores_of(data), summed_over_the_whole_volume(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 30, 25), (5, 30, 25), (20, 7, 25), (5, 30, 3), (3, 5, 7)])
def test_a_scan_smaller_than_a_window_gets_the_scores_of_the_padded_one(shape):
    data = scan(*shape)
    padded, kept = padded_volume(data, PATCH)
    inside = (slice(None), *kept)
    np.testing.assert_array_equal(scores_of(data), scores_of(padded)[inside])


def test_a_small_scan_is_padded_on_both_sides_the_odd_voxel_at_the_end():
    assert padding((5, 30, 3), PATCH) == [(1, 2), (0, 0), (3, 4)]


@pytest.mark.parametrize("shape", [(20, 30, 25), (5, 30, 3), (3, 5, 7)])
def test_every_window_is_cut_as_from_the_padded_scan_on_any_device(shape):
    data = scan(*shape)
    padded, kept = padded_volume(data, PATCH)
    for corner in product(*window_starts(padded.shape[1:], PATCH, 0.5)):
        part = tuple(slice(low, low + width) for low, width in zip(corner, PATCH, strict=True))
        expected = padded[(slice(None), *part)]
        np.testing.assert_array_equal(window_at(data, corner, PATCH, kept), expected)
        with gpu():
            there = window_at(place_at(CARD).take(data), corner, PATCH, kept)
            assert there.device == CARD
            np.testing.assert_array_equal(to_host(there), expected)


@pytest.mark.parametrize(("shape", "by_rows"), [((8, 120, 60), True), ((40, 60, 60), False)])
def test_sums_move_on_in_their_own_memory(shape, by_rows):
    """Beside the sums nothing of their size is held, neither while they are added up nor while they move on."""
    patch = (8, 48, 40)
    scores = np.ones((30, *patch), np.float32)
    sums = 4 * 30 * patch[0] * (patch[1] + 1 if by_rows else shape[1]) * shape[2]
    data = scan(*shape)
    common = {"heads": 30, "patch": patch, "step_size": 0.7, "device": CPU, "by_rows": by_rows}
    gaussian_weights(patch)  # are kept
    tracemalloc.start()
    slide(data, lambda window: scores, lambda *block: None, **common)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sums < peak < 1.2 * sums


def test_nothing_is_summed_up_of_what_a_scan_is_padded_with(monkeypatch):
    made: list[tuple[int, ...]] = []
    zeros = HOST.zeros
    monkeypatch.setattr(type(HOST), "zeros", lambda self, shape: made.append(tuple(shape)) or zeros(shape))
    scores_of(scan(5, 30, 3))
    assert made == [(HEADS, 5, 30, 3), (5, 30, 3)]


@pytest.mark.parametrize("shape", [(8, 30, 25), (5, 31, 25), (3, 45, 7), (8, 13, 10)])
def test_rows_of_a_scan_of_one_slab_get_the_scores_of_whole_slices_from_smaller_sums(shape, monkeypatch):
    data, made = scan(*shape), []
    expected, zeros = scores_of(data), HOST.zeros
    monkeypatch.setattr(type(HOST), "zeros", lambda self, shape: made.append(tuple(shape)) or zeros(shape))
    scores, came = rows_of(data)
    np.testing.assert_array_equal(scores, expected)
    assert made[0] == (HEADS, shape[0], PATCH[1] + 1, shape[2])
    assert [rows.start for rows in came[1:]] == [rows.stop - 1 for rows in came[:-1]]


def test_a_scan_of_several_slabs_or_one_row_of_windows_comes_by_whole_slices():
    for shape in ((20, 30, 25), (8, 12, 25)):
        blocks: list[np.ndarray] = []
        slide(
            scan(*shape),
            network,
            lambda block, blocks=blocks: blocks.append(block.copy()),
            heads=HEADS,
            patch=PATCH,
            step_size=0.5,
            device=CPU,
            by_rows=True,
        )
        np.testing.assert_array_equal(np.concatenate(blocks, axis=1), scores_of(scan(*shape)))


def half(scores: np.ndarray) -> BFloat16:
    """Scores cut to bfloat16."""
    return BFloat16((scores.view(np.uint32) >> 16).astype(np.uint16))


def test_scores_in_bfloat16_are_added_up_as_the_same_values_in_single_precision():
    def summed(forward) -> np.ndarray:
        blocks: list[np.ndarray] = []
        common = {"heads": HEADS, "patch": PATCH, "step_size": 0.5, "device": CPU}
        slide(scan(20, 30, 25), forward, lambda block: blocks.append(block.copy()), **common)
        return np.concatenate(blocks, axis=1)

    in_halves, in_single = summed(lambda window: half(network(window))), summed(lambda w: half(network(w)).single())
    np.testing.assert_array_equal(in_halves, in_single)
    assert np.abs(in_single).max() > 0.1


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_scores_in_bfloat16_that_are_not_finite_are_noticed(value):
    scores = np.linspace(-3e38, 3e38, 24, dtype=np.float32).reshape(2, 3, 2, 2)
    assert Watch().watched(lambda window: half(scores))(scores).shape == scores.shape
    scores[1, 2, 0, 1] = value
    with pytest.raises(NotFiniteError):
        Watch().watched(lambda window: half(scores))(scores)


@pytest.mark.parametrize("combine", [averaged, stacked])
def test_means_of_scores_in_bfloat16_are_made_in_single_precision(combine):
    window = scan(*PATCH)[None]
    forwards = [network, lambda w: network(w * 2)]
    halves = [lambda w, f=f: half(f(w)) for f in forwards]
    singles = [lambda w, f=f: half(f(w)).single() for f in forwards]
    np.testing.assert_array_equal(combine(halves)(window), combine(singles)(window))
    flips = all_flips((0, 2))
    np.testing.assert_array_equal(flipped(halves[0], flips)(window), flipped(singles[0], flips)(window))


def test_threads_that_share_the_sums_make_no_difference(monkeypatch):
    monkeypatch.setattr(workers, "WORTH_A_THREAD", 1)

    def with_threads(count: int) -> np.ndarray:
        monkeypatch.setattr(workers, "thread_count", lambda: count)
        return scores_of(scan(20, 30, 25))

    np.testing.assert_array_equal(with_threads(1), with_threads(3))


@pytest.mark.parametrize(("count", "values"), [(96, 1 << 24), (5, 1 << 24), (96, 10), (1, 1 << 24), (0, 0)])
def test_parts_cover_everything_once(monkeypatch, count, values):
    monkeypatch.setattr(workers, "thread_count", lambda: 4)
    parts = workers.split(count, values)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(count))
    assert len(parts) == (1 if values < workers.WORTH_A_THREAD else max(1, min(4, count)))
