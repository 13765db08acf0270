"""What the commands share."""

import gc
import subprocess
import sys

import pytest

from nnunet_flare.cli.common import seldom_collecting


def test_the_garbage_collector_is_as_before_after_a_command():
    before = gc.get_threshold()
    with pytest.raises(KeyError), seldom_collecting():
        assert gc.get_threshold()[0] > before[0]
        raise KeyError
    assert gc.get_threshold() == before and gc.isenabled()


def test_a_program_that_ends_looks_through_nothing_that_it_made():
    code = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 10_000))  # runs after what is registered later
from nnunet_flare.cli.common import seldom_collecting
with seldom_collecting():
    kept = [[number] for number in range(10_000)]
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "True"
