"""OpenVINO leaves the process that it computes in as it was."""

import subprocess
import sys

import pytest

pytest.importorskip("openvino")

ASKED_TO_END = """
import signal, sys
import numpy as np
from openvino import Model, opset13 as ops
from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

def compiled():
    window = ops.parameter([1, 1, 4, 4, 4], np.float32)
    return OpenVinoRuntime(Model([ops.relu(window)], [window]), precision="fp32", two_d=False)

first, second = compiled(), compiled()
assert second(np.full((1, 1, 4, 4, 4), 3, np.float32)).max() == 3
del first
del second
signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))
signal.raise_signal(signal.SIGTERM)
"""


def test_a_process_whose_networks_are_gone_one_after_another_still_ends_in_good_order_when_it_is_asked_to():
    """As between two scans of a service, with several folds: with a core for each network this was a crash."""
    done = subprocess.run([sys.executable, "-c", ASKED_TO_END], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "asked to end")
