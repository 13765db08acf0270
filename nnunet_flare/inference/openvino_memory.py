"""What a window of a network that OpenVINO compiled takes, counted without computing anything.

OpenVINO plans where intermediate results lie when it compiles: what is never needed together shares memory. The most
that is needed at once is hardly less than what it takes. Scores lie beside it, in memory of their own.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

BYTES = {"bf16": 2, "f16": 2, "u8": 1, "i8": 1, "boolean": 1, "i64": 8, "f64": 8}
"""Of a value, by its type's name; of all others 4."""

MORE, OVERHEAD = 1.06, 12 << 20
"""What is lost between results as a factor, and what the libraries take at the first window besides."""


def bytes_of_window(compiled: Any) -> int:
    """Bytes that a compiled network takes at its first window and keeps: intermediate results and scores."""
    scores = compiled.output(0)
    beside = math.prod(scores.shape) * BYTES.get(scores.element_type.get_type_name(), 4)
    return int(MORE * (_most_at_once(compiled.get_runtime_model()) + beside)) + OVERHEAD


def _most_at_once(steps: Any) -> int:
    """Bytes of the intermediate results that are needed together, at the step where they are most."""
    nodes = sorted(steps.get_ordered_ops(), key=lambda node: int(_said(node, "execOrder", "0")))
    place = {node.get_friendly_name(): number for number, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for number, node in enumerate(nodes):
        if _said(node, "layerType", node.get_type_name()) in ("Const", "Constant", "Input", "Output"):
            continue
        types = _said(node, "outputPrecisions", "").split(",")
        for output, kind in zip(node.outputs(), types * node.get_output_size(), strict=False):
            size = math.prod(output.shape) * BYTES.get(kind, 4)
            takers = [place[target.get_node().get_friendly_name()] for target in output.get_target_inputs()]
            change[number] += size
            change[max(takers, default=number) + 1] -= size
    return max(accumulate(change))


def _said(node: Any, key: str, default: str) -> str:
    """What the compiled network says of a step."""
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else default
