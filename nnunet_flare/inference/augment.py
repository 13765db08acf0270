"""Test-time augmentation: flips within a window, and a second look at the middle of the scan.

``crop-rotate`` is Fosun's for pseudo-labels (S1, 1.5): the whole scan and its central 90 % crop, each as it is and
turned by 180 degrees in the axial plane, averaged per voxel. Here logits are averaged, as nnU-Net averages its flips
(S1 averages the probabilities of its whole-volume network).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.places import place_of
from nnunet_flare.inference.windows import Consume, Forward

CROP_SHARE = 0.9
"""Share of every axis that the central crop keeps (S1)."""

HALF_TURN = ((), (1, 2))
"""The window as it is, and turned by 180 degrees in the axial plane: both in-plane axes reversed."""

Flips = Sequence[tuple[int, ...]]
"""Spatial axes (0 = z) that are reversed together; the empty one is the window as it is."""


def all_flips(axes: Sequence[int]) -> Flips:
    """Every combination of reversed axes, as stock nnU-Net mirrors."""
    return [some for n in range(len(axes) + 1) for some in itertools.combinations(axes, n)]


def flips_of(tta: str, mirroring_axes: Sequence[int] | None, *, two_d: bool) -> Flips:
    """The flips of a window that a setting asks for, the window as it is first.

    Args:
        tta: ``none``, ``mirror`` or ``crop-rotate``.
        mirroring_axes: that the model was trained with, in its own number of dimensions.
        two_d: whether the model is 2-D; its windows have a first axis of one slice.
    """
    if tta == "mirror":
        return all_flips([axis + two_d for axis in mirroring_axes or ()])
    return HALF_TURN if tta == "crop-rotate" else all_flips(())


def flipped(forward: Forward, flips: Flips) -> Forward:
    """``forward`` averaged over flips of the window; the first one must be the window as it is."""
    if len(flips) == 1:
        return forward

    def average(window: Array) -> Array:
        scores = forward(window)
        place = place_of(scores)
        total = place.copy(scores)
        for flip in flips[1:]:
            turned = forward(place_of(window).flip(window, [axis + 2 for axis in flip]))
            total += place.flip(place.take(turned), [axis + 1 for axis in flip])
        total /= len(flips)
        return total

    return average


def central_crop(shape: Sequence[int], share: float = CROP_SHARE) -> tuple[slice, ...]:
    """The central box with this share of every axis, one voxel at least."""
    kept = [max(1, round(n * share)) for n in shape]
    return tuple(slice((n - k) // 2, (n - k) // 2 + k) for n, k in zip(shape, kept, strict=True))


def filling(scores: Array) -> Consume:
    """A consumer that puts one portion of slices after the other into scores (K, z, y, x)."""
    done = 0

    def fill(block: Array) -> None:
        nonlocal done
        scores[:, done : done + block.shape[1]] = block
        done += block.shape[1]

    return fill


def average_with(crop_scores: Array, box: Sequence[slice], consume: Consume) -> Consume:
    """A consumer of the whole scan's scores that averages them with the crop's where there are such.

    Args:
        crop_scores: scores (K, z, y, x) of the crop.
        box: where the crop lies.
        consume: gets the averaged slices.
    """
    done = 0

    def averaged(block: Array) -> None:
        nonlocal done
        first, last = max(box[0].start, done), min(box[0].stop, done + block.shape[1])
        if last > first:
            here = block[:, first - done : last - done, box[1], box[2]]
            here += place_of(block).take(crop_scores[:, first - box[0].start : last - box[0].start])
            here /= 2
        done += block.shape[1]
        consume(block)

    return averaged
