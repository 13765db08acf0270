"""A predictor in a process that was forked: it predicts or says why not, and never waits for ever."""

import os
import subprocess
import sys
from pathlib import Path

import model_folders as models
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

FORKED = """
import os, signal, sys
import numpy as np
from nnunet_flare.errors import InputError
from nnunet_flare.inference.predictor import FlarePredictor

def in_a_fork():
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            predict()
            print("predicted", flush=True)
        except InputError as error:
            print(f"refused: {error}", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

scan = np.random.default_rng(0).normal(0, 300, (10, 36, 40)).astype(np.int16)
predictor = FlarePredictor.from_model_folder(sys.argv[1], backend="torch", precision="fp32")
predict = lambda: predictor.predict(scan, spacing_mm=(4.0, 2.0, 2.0))
in_a_fork()
predict()
in_a_fork()
predict()
"""


def test_a_predictor_that_was_used_before_the_fork_refuses_in_place_of_waiting_for_ever(tmp_path):
    """With threads that exist in the parent only, PyTorch waits for ever."""
    folder = models.write_model(tmp_path / "model")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(models.__file__).parent)}
    words = [sys.executable, "-W", "ignore", "-c", FORKED, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "predicted"
    assert second.startswith("refused: the networks were built in process ") and "'spawn'" in second
