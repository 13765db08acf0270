"""The widest step of a converted network, done in slabs, so that less of it is in memory at once.

Where the decoder of a U-Net comes to full resolution, its features are enlarged, joined to the encoder's and convolved.
The enlarged, the joined and the convolved features together are most of what a window takes. None of these steps looks
further than its kernel, so that slabs along the first axis, each with the margin that kernels need, give the same
values bit by bit, and only one slab is ever enlarged and joined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SLABS = 8
"""Into how many slabs a step is divided: with more of them their margins and the many small steps cost time."""

WORTH_SLABS = 1 << 24
"""Joined values of which slabs save memory that is worth their time."""

CONVOLUTIONS = ("Convolution", "GroupConvolution")


def join_in_slabs(model: Any) -> bool:
    """Divide the step of a converted 3-D network of fixed shape that joins the most values; returns whether it was.

    ``model`` is changed in place. A network that is built in another way stays as it is.
    """
    joins = [
        op for op in model.get_ordered_ops() if op.get_type_name() == "Concat" and len(op.get_output_shape(0)) == 5
    ]
    widest = max(joins, key=lambda op: math.prod(op.get_output_shape(0)), default=None)
    if widest is None or math.prod(widest.get_output_shape(0)) < WORTH_SLABS:
        return False
    step = _Step.of(widest)
    if step is None:
        return False
    whole = step.divided()
    for target in list(step.end.get_target_inputs()):
        target.replace_source_output(whole)
    model.validate_nodes_and_infer_types()
    return True


@dataclass(frozen=True)
class _Step:
    """What is divided.

    Attributes:
        join: the concatenation of features (1, C, z, y, x).
        enlarged: which of its two inputs is the enlarged one.
        enlarge: the transposed convolution that makes it, each voxel of it of one voxel alone.
        shift: what is added to that per channel, or None.
        convolutions: what follows, one after the other: convolutions that keep the first axis, and sums per channel.
    """

    join: Any
    enlarged: int
    enlarge: Any
    shift: np.ndarray | None
    convolutions: list[Any]

    @classmethod
    def of(cls, join: Any) -> _Step | None:
        """Of a concatenation; None where what is around it is built in another way."""
        if join.get_attributes()["axis"] != 1 or join.get_input_size() != 2:
            return None
        for enlarged in range(2):
            node, shift = join.input_value(enlarged).get_node(), None
            if node.get_type_name() == "Add":
                if not _adds_constant(node) or _only_target(node.output(0)) is None:
                    continue
                node, shift = node.input_value(0).get_node(), _constant(node.input_value(1))
            if _enlarges_voxel_by_voxel(node) and _only_target(node.output(0)) is not None:
                following = _convolutions_after(join)
                return cls(join, enlarged, node, shift, following) if following else None
        return None

    @property
    def end(self) -> Any:
        """What the last of its convolutions gives."""
        return self.convolutions[-1].output(0)

    @property
    def margin(self) -> int:
        """Slices beyond a slab that its values depend on."""
        return sum(_padding(node)[0] for node in self.convolutions if node.get_type_name() in CONVOLUTIONS)

    def divided(self) -> Any:
        """The same values, made slab by slab."""
        from openvino import opset13 as op

        depth = int(self.join.get_output_shape(0)[2])
        thick = max(math.ceil(depth / SLABS), self.margin, 1)
        starts = [0, *(z for z in range(thick, depth, thick) if depth - z >= self.margin)]
        slabs = [self._slab(z, end, depth) for z, end in zip(starts, [*starts[1:], depth], strict=True)]
        return op.concat(slabs, 2).output(0)

    def _slab(self, first: int, end: int, depth: int) -> Any:
        """The values from one slice up to another."""
        from openvino import opset13 as op

        low, high = max(0, first - self.margin), min(depth, end + self.margin)
        kept = self.join.input_value(1 - self.enlarged)
        parts = [_part(kept, low, high), _part(kept, low, high)]
        parts[self.enlarged] = self._enlarged(low, high)
        values = op.concat(parts, 1).output(0)
        for node in self.convolutions:
            if node.get_type_name() == "Add":
                values = op.add(values, op.constant(_constant(node.input_value(1)))).output(0)
                continue
            convolve = op.group_convolution if node.get_type_name() == "GroupConvolution" else op.convolution
            attributes, padding = node.get_attributes(), _padding(node)
            before, after = ([part if is_edge else 0, *padding[1:]] for part, is_edge in
                             ((padding[0], first == 0), (padding[0], end == depth)))  # fmt: skip
            strides, dilations = attributes["strides"], attributes["dilations"]
            values = convolve(values, node.input_value(1), strides, before, after, dilations).output(0)
        return values

    def _enlarged(self, low: int, high: int) -> Any:
        """Slices of the enlarged features, of no more slices of the small ones than they need."""
        from openvino import opset13 as op

        strides = list(self.enlarge.get_attributes()["strides"])
        first, end = low // strides[0], math.ceil(high / strides[0])
        values = op.convolution_backprop_data(
            _part(self.enlarge.input_value(0), first, end),
            self.enlarge.input_value(1),
            strides,
            pads_begin=[low - first * strides[0], 0, 0],
            pads_end=[end * strides[0] - high, 0, 0],
            dilations=[1, 1, 1],
        ).output(0)
        return values if self.shift is None else op.add(values, op.constant(self.shift)).output(0)


def _part(values: Any, low: int, high: int) -> Any:
    """Some slices (axis 2) of features."""
    from openvino import opset13 as op

    bounds = [op.constant(np.array([number], np.int64)) for number in (low, high, 1, 2)]
    return op.slice(values, *bounds).output(0)


def _constant(output: Any) -> np.ndarray | None:
    """A constant in single precision, copied so that every slab has its own; None for what is computed."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return np.array(node.get_data(), np.float32) if node.get_type_name() == "Constant" else None


def _only_target(output: Any) -> Any:
    """The one operation that takes a value, or None where several do."""
    targets = list(output.get_target_inputs())
    return targets[0].get_node() if len(targets) == 1 else None


def _enlarges_voxel_by_voxel(node: Any) -> bool:
    """Whether a transposed convolution makes of each voxel a block of its own."""
    if node.get_type_name() != "ConvolutionBackpropData" or node.get_input_size() != 2:
        return False
    found = node.get_attributes()
    kernel = list(node.input_value(1).get_shape())[2:]
    plain = [*found["pads_begin"], *found["pads_end"], *found["output_padding"]]
    return kernel == list(found["strides"]) and not any(plain) and set(found["dilations"]) == {1}


def _convolutions_after(join: Any) -> list[Any]:
    """Convolutions and sums per channel that follow, each the only one that takes what comes before it."""
    found: list[Any] = []
    node = _only_target(join.output(0))
    while node is not None and (_keeps_first_axis(node) or (found and _adds_constant(node))):
        found.append(node)
        node = _only_target(node.output(0))
    return found


def _adds_constant(node: Any) -> bool:
    """Whether an operation adds the same to every slice."""
    return (
        node.get_type_name() == "Add"
        and (added := _constant(node.input_value(1))) is not None
        and (added.ndim < 3 or added.shape[-3] == 1)
    )


def _keeps_first_axis(node: Any) -> bool:
    """Whether a convolution gives as many slices as it takes, and looks as far to either side."""
    if node.get_type_name() not in CONVOLUTIONS:
        return False
    found = node.get_attributes()
    before, after = found["pads_begin"], found["pads_end"]
    width = list(node.input_value(1).get_shape())[-3]
    is_plain = found["strides"][0] == found["dilations"][0] == 1 and found["auto_pad"] == "explicit"
    return is_plain and list(before) == list(after) and width == 2 * before[0] + 1


def _padding(node: Any) -> Sequence[int]:
    return [int(n) for n in node.get_attributes()["pads_begin"]]
