"""What augmentation a role can have: ``stock``, ``elastic``, ``weak``, ``jitter``, ``strong``, ``shift``, ``modality``.

``stock`` is nnU-Net's own chain, ``elastic`` the same with elastic deformation (``transforms.elastic``). ``weak``,
``jitter`` and ``strong`` are Fosun's (S1, seed-systems 1.4), converted to z-scored arrays with the plan's window and
standard deviation; what batchgeneratorsv2 has is used:

=====================  ===========================================  ==================================================
S1                     here                                         why
=====================  ===========================================  ==================================================
axial rot90, p .5      ``Rot90Transform``, k uniform in 0..3        by 0 or 180 degrees only where a patch that is not
                                                                    square would leave the loaded region
flip, p .5, one axis   ``MirrorTransform``, each allowed axis p .5  inference mirrors all allowed axes
resize .8-1.2, p .5    ``SpatialTransform`` scaling, labels nearest its factor is the inverse: > 1 makes objects smaller
organ shift, p .5      ``OrganShiftTransform``, +-200 HU / std      -
contrast .7-1.3        ``ContrastTransform``, range preserved       -
brightness x.8-1.2     ``MultiplicativeBrightnessTransform``        about the plan's mean instead of 0 HU
gamma .5-1.5           ``GammaTransform``                           -
noise std 0-.2         ``GaussianNoiseTransform``, 0-100 HU / std   S1's unit is its half window of 500 HU
blur sigma .5-1        ``GaussianBlurTransform``                    -
in- / out-painting     ``PaintingTransform``                        noise over the window's upper half, as in S1
clip to [-1, 1]        ``ClipToWindowTransform``                    the plan's window
=====================  ===========================================  ==================================================

``jitter`` is ``weak`` plus the colour and noise blocks, each with p .5 (S1's code, for labelled cases before there
are pseudo-labels). ``strong`` is ``jitter`` plus nnU-Net's own rotation (p .2) and the painting block. The chains of S1
crop after the geometry; so do nnU-Net's, from a larger initial patch. Where every volume has its own mean and standard
deviation, the window is that of the training cases together (``transforms.window``).

``shift`` is SZTU's (S4, 4.5 and 4.8): a random shift, and the organ shift without a gate of its own, which does nothing
to a scan without labels. They do not flip; whether this chain mirrors is up to the setting ``mirroring``.

``modality`` is ours: it takes CTs towards scans of other modalities. Three of four samples get another contrast, by one
of histogram matching to unlabelled scans, random convolutions and inversion, the last two brought to the scale that
preprocessing gives such scans; then come gamma, a bias field, noise or blur, and lower resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform

from nnunet_flare.trainers.transforms.bias_field import BiasFieldTransform
from nnunet_flare.trainers.transforms.histogram import HistogramMatchTransform
from nnunet_flare.trainers.transforms.invert import InvertTissueTransform
from nnunet_flare.trainers.transforms.organ_shift import OrganShiftTransform
from nnunet_flare.trainers.transforms.own_scale import OwnScaleTransform
from nnunet_flare.trainers.transforms.painting import PaintingTransform
from nnunet_flare.trainers.transforms.random_convolution import RandomConvolutionTransform
from nnunet_flare.trainers.transforms.shift import SHIFT, ShiftTransform
from nnunet_flare.trainers.transforms.shuffled import ShuffledTransforms
from nnunet_flare.trainers.transforms.window import ClipToWindowTransform, Window

P_BLOCK = 0.5
"""S1: probability of each geometric step, of the organ shift and of each block."""
RESIZE = (0.8, 1.2)
P_ROTATION = 0.2
"""Stock nnU-Net's probability of a rotation, which S1 does not have."""
CONTRAST = (0.7, 1.3)
BRIGHTNESS = (0.8, 1.2)
GAMMA = (0.5, 1.5)
NOISE_HU = 100.0
"""S1: standard deviation up to 0.2 of a half window of 500 HU."""
NOISE_WITHOUT_UNIT = 0.7
"""The same in standard deviations of a typical CT plan (140 HU), for a channel that is not CT."""
BLUR_SIGMA = (0.5, 1.0)


P_OTHER_CONTRAST = 0.75
"""``modality``: share of the samples that get another contrast; the rest stay CTs."""
OTHER_GAMMA = (0.5, 2.0)
P_LOW_RESOLUTION = 0.25
LOW_RESOLUTION = (0.5, 1.0)
"""Stock's probability and range."""


@dataclass(frozen=True)
class Geometry:
    """What nnU-Net's ``configure_rotation_dummyDA_mirroring_and_inital_patch_size`` decides for a configuration."""

    patch_size: tuple[int, ...]
    initial_patch_size: tuple[int, ...]
    rotation: tuple[float, float]
    mirror_axes: tuple[int, ...] | None
    dummy_2d: bool


def region_of(kind: str, geometry: Geometry) -> tuple[int, ...]:
    """The region of a scan, in voxels, that an augmentation needs for one patch; stock's where it rotates.

    Resizing reaches 1 / 0.8 of a patch and a quarter turn the other edge in the plane; a shift 15 % beyond either side.
    """
    if kind not in ("weak", "jitter", "shift"):
        return geometry.initial_patch_size
    reach = 1 + 2 * SHIFT if kind == "shift" else 1 / RESIZE[0]
    needed = [math.ceil(round(reach * edge, 6)) for edge in geometry.patch_size]
    if kind != "shift":
        needed[-2:] = [max(needed[-2:])] * 2
    margins = zip(needed, geometry.initial_patch_size, geometry.patch_size, strict=True)
    return tuple(_same_centre(min(edge, loaded), patch) for edge, loaded, patch in margins)


def _same_centre(edge: int, patch: int) -> int:
    """The edge, made one larger where a patch would not lie in its middle."""
    return edge + (edge - patch) % 2


def weak_transforms(
    geometry: Geometry, labels: Sequence[int], windows: Sequence[Window | None]
) -> list[BasicTransform]:
    """S1's weak augmentation: samples of ``initial_patch_size`` in, of ``patch_size`` out."""
    return [*_spatial(geometry, p_rotation=0.0), _organ_shift(labels, windows)]


def jitter_transforms(
    geometry: Geometry, labels: Sequence[int], windows: Sequence[Window | None]
) -> list[BasicTransform]:
    """S1's augmentation of labelled cases in the supervised training: the weak one, and the colour and noise blocks."""
    return [*weak_transforms(geometry, labels, windows), *_jitter(windows), ClipToWindowTransform(windows)]


def strong_transforms(
    geometry: Geometry, labels: Sequence[int], windows: Sequence[Window | None]
) -> list[BasicTransform]:
    """S1's strong augmentation: the weak one, rotation, and the colour, noise and painting blocks."""
    return [
        *_spatial(geometry, p_rotation=P_ROTATION),
        _organ_shift(labels, windows),
        *intensity_transforms(windows),
    ]


def intensity_transforms(windows: Sequence[Window | None]) -> list[BasicTransform]:
    """What of the strong augmentation moves nothing: the colour, noise and painting blocks."""
    return [
        *_jitter(windows),
        RandomTransform(PaintingTransform(windows), apply_probability=P_BLOCK),
        ClipToWindowTransform(windows),
    ]


def shift_transforms(
    geometry: Geometry, labels: Sequence[int], windows: Sequence[Window | None]
) -> list[BasicTransform]:
    """S4's augmentation: samples of ``initial_patch_size`` in, of ``patch_size`` out."""
    mirror: list[BasicTransform] = [MirrorTransform(geometry.mirror_axes)] if geometry.mirror_axes else []
    return [ShiftTransform(geometry.patch_size), *mirror, OrganShiftTransform(labels, windows)]


def modality_transforms(
    geometry: Geometry, windows: Sequence[Window | None], references: Sequence[torch.Tensor] = ()
) -> list[BasicTransform]:
    """Ours: samples of ``initial_patch_size`` in, of ``patch_size`` out, that may look like another modality's.

    Args:
        geometry: as for the others.
        windows: the window of each image channel.
        references: landmarks (``transforms.histogram``) of the scans to match; without any, none is matched.
    """
    other: list[BasicTransform] = [
        ComposeTransforms([contrast, OwnScaleTransform()])
        for contrast in (RandomConvolutionTransform(), InvertTissueTransform())
    ]
    if references:
        other.append(HistogramMatchTransform(references))
    gamma = GammaTransform(
        BGContrast(OTHER_GAMMA), p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=0
    )
    low_resolution = SimulateLowResolutionTransform(
        scale=LOW_RESOLUTION,
        synchronize_channels=False,
        synchronize_axes=True,
        ignore_axes=(0,) if geometry.dummy_2d else None,
        allowed_channels=None,
        p_per_channel=1,
    )
    return [
        *_spatial(geometry, p_rotation=P_ROTATION),
        RandomTransform(OneOfTransform(other), apply_probability=P_OTHER_CONTRAST),
        RandomTransform(gamma, apply_probability=P_BLOCK),
        RandomTransform(BiasFieldTransform(), apply_probability=P_BLOCK),
        RandomTransform(_noise(windows), apply_probability=P_BLOCK),
        RandomTransform(low_resolution, apply_probability=P_LOW_RESOLUTION),
    ]


def with_tail(
    transforms: Sequence[BasicTransform], tail: BasicTransform, use_mask_for_norm: Sequence[bool] | None
) -> BasicTransform:
    """Close a chain as stock does: masking for normalisation, then ``tail``, stock's validation transforms.

    Those turn -1 into background, add the previous stage's labels, convert regions and downsample the target.
    """
    mask: list[BasicTransform] = []
    if use_mask_for_norm is not None and any(use_mask_for_norm):
        channels = [channel for channel, use in enumerate(use_mask_for_norm) if use]
        mask = [MaskImageTransform(apply_to_channels=channels, channel_idx_in_seg=0, set_outside_to=0)]
    return ComposeTransforms([*transforms, *mask, tail])


def without_timing(transform: Any) -> None:
    """Make a chain a function of its random streams alone.

    Stock's blur measures on its first samples whether a convolution or a Fourier transform is faster; the two differ in
    the last digits, so that two equal trainings would part.
    """
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    for part in [*getattr(transform, "transforms", []), *getattr(transform, "list_of_transforms", [])]:
        without_timing(part)
    for chain in getattr(transform, "chains", {}).values():
        without_timing(chain)
    if hasattr(transform, "transform"):
        without_timing(transform.transform)


def _spatial(geometry: Geometry, *, p_rotation: float) -> list[BasicTransform]:
    dimensions = len(geometry.patch_size)
    in_plane = (dimensions - 2, dimensions - 1)
    fits_turned = all(geometry.initial_patch_size[a] >= geometry.patch_size[b] for a, b in (in_plane, in_plane[::-1]))
    turns = (0, 1, 2, 3) if fits_turned else (0, 2)
    rotate = Rot90Transform(num_axis_combinations=1, num_rot_per_combination=turns, allowed_axes=set(in_plane))
    spatial = SpatialTransform(
        geometry.patch_size[1:] if geometry.dummy_2d else geometry.patch_size,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=p_rotation,
        rotation=geometry.rotation,
        p_scaling=P_BLOCK,
        scaling=(1 / RESIZE[1], 1 / RESIZE[0]),
        p_synchronize_scaling_across_axes=1,
        mode_seg="nearest",
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    chain: list[BasicTransform] = [RandomTransform(rotate, apply_probability=P_BLOCK)]
    chain += [Convert3DTo2DTransform(), spatial, Convert2DTo3DTransform()] if geometry.dummy_2d else [spatial]
    if geometry.mirror_axes:
        chain.append(MirrorTransform(geometry.mirror_axes))
    return chain


def _organ_shift(labels: Sequence[int], windows: Sequence[Window | None]) -> BasicTransform:
    return RandomTransform(OrganShiftTransform(labels, windows), apply_probability=P_BLOCK)


def _jitter(windows: Sequence[Window | None]) -> list[BasicTransform]:
    return [
        RandomTransform(_colour(), apply_probability=P_BLOCK),
        RandomTransform(_noise(windows), apply_probability=P_BLOCK),
    ]


def _colour() -> BasicTransform:
    return ShuffledTransforms(
        [
            ContrastTransform(BGContrast(CONTRAST), preserve_range=True, synchronize_channels=False),
            MultiplicativeBrightnessTransform(BRIGHTNESS, synchronize_channels=False),
            GammaTransform(
                BGContrast(GAMMA), p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=0
            ),
        ]
    )


def _noise(windows: Sequence[Window | None]) -> BasicTransform:
    unit = next((window.hu for window in windows if window is not None), None)
    strongest = NOISE_WITHOUT_UNIT if unit is None else NOISE_HU / unit
    return OneOfTransform(
        [
            GaussianNoiseTransform(noise_variance=(0.0, strongest)),
            GaussianBlurTransform(BLUR_SIGMA, synchronize_axes=True, synchronize_channels=True, benchmark=True),
        ]
    )
