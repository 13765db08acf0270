"""A process that is asked to end gives its locks back, and the worker processes of nnU-Net's pools always end."""

import signal
import subprocess
import sys
import textwrap

import pytest

from nnunet_flare.signals import unwinding_on_sigterm


def test_inside_sigterm_unwinds_and_outside_it_is_as_before():
    before = signal.getsignal(signal.SIGTERM)
    left = []
    with pytest.raises(SystemExit) as ended, unwinding_on_sigterm():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            left.append("locks given back")
    assert ended.value.code == 128 + signal.SIGTERM
    assert left == ["locks given back"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_a_worker_that_is_ended_right_after_its_fork_ends():
    code = """
        import os, signal, time

        sent, tell = os.pipe()
        os.register_at_fork(after_in_child=lambda: os.read(sent, 1))  # runs before ours, until the signal was sent

        from nnunet_flare.signals import unwinding_on_sigterm

        with unwinding_on_sigterm():
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(worker, signal.SIGTERM)
            os.write(tell, b".")
            _, status = os.waitpid(worker, 0)
        print(os.WTERMSIG(status))
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == str(signal.SIGTERM.value), found.stderr
