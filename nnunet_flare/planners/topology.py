"""One network topology for a patch: strides, kernels, features and convolutions of a configuration change together.

The planners and the recipes' ``plan.*`` keys both go through :func:`override_configuration`, so that a configuration is
never left with a patch that its strides do not divide, or with as many kernels as it had stages before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_flare.errors import InputError

MIN_BOTTLENECK_EDGE = 4
"""Shortest edge of a feature map that is still pooled to: stock's ``UNet_featuremap_min_edge_length``."""
STOCK_MAX_FEATURES, STOCK_MAX_FEATURES_2D = 320, 512
"""Stock's cap of the features of a stage, in 3-D (``UNet_max_features_3d``) and in 2-D."""
MIN_STAGES = 3
"""With two stages stock's deep supervision has one output, whose weight it sets to zero: the loss would be NaN."""


@dataclass(frozen=True)
class Topology:
    """Strides and kernels per stage, first stage (stride 1) included, and the patch rounded up to what they divide."""

    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.strides)


def topology(spacing_mm: Sequence[float], patch_size: Sequence[int], *, max_stages: int | None = None) -> Topology:
    """Stock nnU-Net's pooling and kernels for a spacing and patch, cut off after ``max_stages`` stages.

    An axis is pooled while its voxels are at most twice the finest ones' size and its feature map keeps 4 voxels; a
    kernel is 1 along an axis until its spacing has come within a factor of two. Both arguments in one axis order.
    """
    _, strides, kernels, _, _ = get_pool_and_conv_props(
        list(spacing_mm), [int(edge) for edge in patch_size], MIN_BOTTLENECK_EDGE, 999999
    )
    strides, kernels = strides[:max_stages], kernels[:max_stages]
    divisors = [math.prod(stride[axis] for stride in strides) for axis in range(len(spacing_mm))]
    patch = tuple(math.ceil(edge / divisor) * divisor for edge, divisor in zip(patch_size, divisors, strict=True))
    return Topology(
        tuple(tuple(int(s) for s in stride) for stride in strides),
        tuple(tuple(int(k) for k in kernel) for kernel in kernels),
        patch,
    )


def override_configuration(
    configuration: Mapping[str, Any],
    *,
    spacing_mm: Sequence[float] | None = None,
    patch_size: Sequence[int] | None = None,
    base_features: int | None = None,
    max_features: int | None = None,
    stages: int | None = None,
    max_stages: int | None = None,
    convs_per_stage: int | Sequence[int] | None = None,
    batch_size: int | None = None,
    dropout: float | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A copy of a configuration with some of its plan changed and everything that hangs on it computed anew.

    What is not given stays: the batch, the number of convolutions, the stages' features, and, as an upper limit, the
    number of stages (a smaller patch has room for fewer). Spacing and patch are in the configuration's own axis
    order. An explicit ``patch_size`` is rounded up to what the strides divide, not capped at the median image.

    Args:
        configuration: one entry of the plans' ``configurations`` (inheritance resolved) of a plain or residual U-Net.
        spacing_mm: new target spacing; ``median_image_size_in_voxels`` is scaled with it.
        patch_size: new patch, in voxels.
        base_features: features of the first stage, doubled per stage up to ``max_features``.
        max_features: that cap; where only ``base_features`` is given, stock's 320, or 512 in 2-D.
        stages: resolution stages, the first included, at least 3.
        max_stages: in place of ``stages``: as many as the patch has room for, up to this.
        convs_per_stage: convolutions of each encoder and decoder stage, one number or one per stage; of a residual
            encoder its blocks (its decoder keeps its convolutions).
        batch_size: samples per iteration.
        dropout: probability of dropping a feature map after each convolution, 0 for none. Networks with and without
            dropout cannot exchange weights: it shifts the names in a checkpoint.
        architecture: another network, taken as it is, strides and all; the patch becomes a multiple of them.

    Raises:
        InputError: for a value out of range, or more stages than the patch has room for.
    """
    _check(spacing_mm=spacing_mm, patch_size=patch_size, base_features=base_features, max_features=max_features)
    _check(stages=stages, max_stages=max_stages, convs_per_stage=convs_per_stage, batch_size=batch_size)
    changed: dict[str, Any] = deepcopy(dict(configuration))
    dimensions = len(changed["spacing"])
    for key, vector in (("spacing_mm", spacing_mm), ("patch_size", patch_size)):
        if vector is not None and len(vector) != dimensions:
            raise InputError(f"plan.{key}: found {len(vector)} numbers {list(vector)}, expected {dimensions}")
    if batch_size is not None:
        changed["batch_size"] = int(batch_size)
    if spacing_mm is not None:
        changed["median_image_size_in_voxels"] = [
            float(edge * old / new)
            for edge, old, new in zip(
                changed["median_image_size_in_voxels"], changed["spacing"], spacing_mm, strict=True
            )
        ]
        changed["spacing"] = [float(edge) for edge in spacing_mm]
    if architecture is not None:
        _set_architecture(changed, architecture, changed["patch_size"] if patch_size is None else patch_size)
        return changed
    arch = changed["architecture"]["arch_kwargs"]
    if not (spacing_mm is None and patch_size is None and stages is None and max_stages is None):
        limit = stages or max_stages or arch["n_stages"]
        _set_topology(changed, changed["patch_size"] if patch_size is None else patch_size, limit, stages)
    _set_features(arch, base_features, max_features, dimensions)
    _set_convolutions(arch, convs_per_stage)
    if dropout is not None:
        _set_dropout(arch, dropout, dimensions)
    return changed


def _set_architecture(configuration: dict[str, Any], given: Mapping[str, Any], patch_size: Sequence[int]) -> None:
    strides = given["arch_kwargs"]["strides"]
    if len(strides[0]) != len(patch_size):
        raise InputError(
            f"plan.network: the network has {len(strides[0])} dimensions, the configuration {len(patch_size)}"
        )
    divisors = [math.prod(stride[axis] for stride in strides) for axis in range(len(patch_size))]
    configuration["architecture"] = deepcopy(dict(given))
    configuration["patch_size"] = [
        math.ceil(edge / divisor) * divisor for edge, divisor in zip(patch_size, divisors, strict=True)
    ]


def _set_topology(configuration: dict[str, Any], patch_size: Sequence[int], limit: int, stages: int | None) -> None:
    arch = configuration["architecture"]["arch_kwargs"]
    found = topology(configuration["spacing"], patch_size, max_stages=limit)
    if stages is not None and found.stages < stages:
        raise InputError(
            f"plan.stages: found {stages}, but a patch of {list(patch_size)} voxels at {configuration['spacing']} mm "
            f"allows {found.stages}; take fewer stages or a larger patch"
        )
    if found.stages < MIN_STAGES:
        raise InputError(
            f"plan.patch_size: a patch of {list(patch_size)} voxels at {configuration['spacing']} mm allows "
            f"{found.stages} resolution "
            f"stages, but training needs {MIN_STAGES}; take a larger patch or a finer spacing"
        )
    configuration["patch_size"] = list(found.patch_size)
    arch["strides"] = [list(stride) for stride in found.strides]
    arch["kernel_sizes"] = [list(kernel) for kernel in found.kernel_sizes]
    arch["n_stages"] = found.stages


def _set_features(arch: dict[str, Any], base: int | None, cap: int | None, dimensions: int) -> None:
    before, stages = list(arch["features_per_stage"]), arch["n_stages"]
    stocks = STOCK_MAX_FEATURES if dimensions == 3 else STOCK_MAX_FEATURES_2D
    if base is None and cap is None:
        # A cap shows in the features only where two stages have the same number.
        is_capped = len(before) > 1 and before[-1] < 2 * before[-2]
        cap = before[-1] if is_capped else max(before[-1], stocks)
        further = [min(cap, before[-1] * 2**stage) for stage in range(1, stages - len(before) + 1)]
        arch["features_per_stage"] = [*before[:stages], *further]
        return
    base, cap = before[0] if base is None else base, stocks if cap is None else cap
    arch["features_per_stage"] = [min(cap, base * 2**stage) for stage in range(stages)]


def _set_convolutions(arch: dict[str, Any], given: int | Sequence[int] | None) -> None:
    stages = arch["n_stages"]
    encoder = "n_conv_per_stage" if "n_conv_per_stage" in arch else "n_blocks_per_stage"
    if given is None:
        arch[encoder] = _fitted(arch[encoder], stages)
        arch["n_conv_per_stage_decoder"] = _fitted(arch["n_conv_per_stage_decoder"], stages - 1)
        return
    numbers = [int(given)] * stages if isinstance(given, int) else [int(number) for number in given]
    if len(numbers) != stages:
        raise InputError(f"plan.convs_per_stage: found {len(numbers)} numbers {numbers}, expected 1 or {stages}")
    arch[encoder] = numbers
    if encoder == "n_conv_per_stage":
        arch["n_conv_per_stage_decoder"] = numbers[:-1][::-1]
    else:
        arch["n_conv_per_stage_decoder"] = _fitted(arch["n_conv_per_stage_decoder"], stages - 1)


def _set_dropout(arch: dict[str, Any], probability: float, dimensions: int) -> None:
    if not 0 <= probability < 1:
        raise InputError(f"plan.dropout: found {probability!r}, expected a number from 0 to below 1")
    arch["dropout_op"] = f"torch.nn.modules.dropout.Dropout{dimensions}d" if probability > 0 else None
    arch["dropout_op_kwargs"] = {"p": float(probability), "inplace": True} if probability > 0 else None


def _fitted(numbers: Sequence[int], length: int) -> list[int]:
    """The first ``length`` numbers, the last one repeated where there are too few."""
    numbers = list(numbers) or [1]
    return [numbers[min(index, len(numbers) - 1)] for index in range(length)]


def _check(**given: Any) -> None:
    for key, value in given.items():
        numbers = [] if value is None else [value] if isinstance(value, (int, float)) else list(value)
        if key == "spacing_mm":
            if not all(0 < number < math.inf for number in numbers):
                raise InputError(f"plan.{key}: found {value!r}, expected numbers above 0")
            continue
        lowest = MIN_STAGES if key in ("stages", "max_stages") else 1
        if not all(number >= lowest and number % 1 == 0 for number in numbers):
            raise InputError(f"plan.{key}: found {value!r}, expected whole numbers, {lowest} or more")
