"""OpenVINO leaves the process that it computes in as it was."""

import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

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


def test_what_is_logged_stays_as_it_was_when_two_threads_convert_at_once(monkeypatch):
    """The converter quietens the whole process; what one thread restores must not be what another one set."""
    from nnunet_flare.inference import openvino_conversion

    both, entered, model = threading.Event(), [], SimpleNamespace(is_of_packages=True)

    def convert_model(network, example_input):
        logging.root.setLevel(logging.ERROR)
        entered.append(network)
        if len(entered) == 2:
            both.set()
            time.sleep(0.3)  # the first one is done meanwhile, where nothing keeps them apart
        both.wait(0.5)
        return SimpleNamespace(reshape=lambda shape: None)

    monkeypatch.setattr(openvino_conversion, "silent_openvino", lambda: SimpleNamespace(convert_model=convert_model))
    monkeypatch.setattr(openvino_conversion, "_trace_shape", lambda model, shape: shape)
    monkeypatch.setattr(logging.root, "level", logging.INFO)
    with ThreadPoolExecutor(2) as pool:
        networks = (torch.nn.Identity(), torch.nn.Identity())
        list(pool.map(lambda network: openvino_conversion.convert(model, network, [1, 1, 2, 2, 2]), networks))
    assert len(entered) == 2 and logging.root.level == logging.INFO


LATE = """
import sys
from nnunet_flare.inference.openvino_runtime import silent_openvino
silent_openvino()
assert "openvino.tools.ovc" not in sys.modules
import openvino, torch
linear = openvino.convert_model(torch.nn.Linear(2, 3).eval(), example_input=torch.zeros(1, 2))
print(linear.output(0).get_partial_shape()[1], "openvino_telemetry" in sys.modules)
"""


def test_others_in_the_process_find_the_converter_where_it_always_is():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["3", "False"]), done.stderr
