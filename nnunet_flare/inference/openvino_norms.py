"""Instance normalisation of a converted network, made as exact as PyTorch's.

OpenVINO's own operation adds up a window's voxels one after the other in single precision, which loses three digits of
a million voxels' mean: enough to change one label in 20,000, and foreground Dice with PyTorch by up to .003 where
organs are small. Here the means are averages of averages of small blocks instead, in the same time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_BLOCK_EDGE = 8
"""Longest edge, in voxels, of the blocks that are averaged at once."""


def average_in_blocks(model: Any) -> int:
    """Exchange the instance normalisations of an OpenVINO model of fixed shape, in place; returns how many."""
    exchanged = 0
    for node in model.get_ops():
        if node.get_type_name() != "MVN" or not _over_all_voxels(node):
            continue
        exact = _normalised(node.input_value(0), float(node.get_attributes()["eps"]))
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(exact)
        exchanged += 1
    model.validate_nodes_and_infer_types()
    return exchanged


def block_edges(shape: Sequence[int]) -> list[int]:
    """Edges of equal blocks that fill a grid of this shape: at most 8 voxels, unless no axis can be divided."""
    edges = [max(d for d in range(1, min(n, MAX_BLOCK_EDGE) + 1) if n % d == 0) for n in shape]
    return edges if math.prod(edges) > 1 else list(shape)


def _over_all_voxels(node: Any) -> bool:
    """Whether an operation normalises each channel of each sample by its variance, as instance normalisation does."""
    attributes, axes = node.get_attributes(), node.input_value(1).get_node()
    return (
        attributes["normalize_variance"]
        and attributes["eps_mode"].upper() == "INSIDE_SQRT"
        and axes.get_type_name() == "Constant"
        and sorted(axes.get_data().ravel().tolist()) == list(range(2, len(node.get_output_shape(0))))
    )


def _normalised(features: Any, eps: float) -> Any:
    """Features (N, C, ...) minus their mean, by their standard deviation."""
    from openvino import opset13 as op

    deviation = op.subtract(features, _mean(features)).output(0)
    variance = _mean(op.multiply(deviation, deviation).output(0))
    root = op.sqrt(op.add(variance, op.constant(np.float32(eps))))
    return op.multiply(deviation, op.divide(op.constant(np.float32(1)), root)).output(0)


def _mean(features: Any) -> Any:
    """The mean over all voxels (N, C, 1, ...), block by block of block by block."""
    from openvino import opset13 as op

    shape = [int(n) for n in features.get_shape()][2:]
    none = [0] * len(shape)
    while math.prod(shape) > 1:
        edges = block_edges(shape)
        features = op.avg_pool(features, edges, none, none, edges, True, "floor", "explicit").output(0)
        shape = [n // edge for n, edge in zip(shape, edges, strict=True)]
    return features
