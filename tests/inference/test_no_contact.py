"""A prediction contacts nobody, starts no process, and leaves nothing in the home folder but the cache."""

import os
import subprocess
import sys

import model_folders as models
import pytest
import small_scans as scans
import torch

from nnunet_flare.images import write_volume
from nnunet_flare.inference import runtimes

WATCHED = """
import sys
def watch(event, args):
    if event in ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen") or event.startswith("socket."):
        if event not in ("socket.__new__", "socket.gethostname", "socket.bind"):  # urllib3 tries a port on this machine
            print("SEEN", event, args, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from nnunet_flare.cli.predict import main
sys.exit(main(sys.argv[1:]))
"""
BACKENDS = ["torch"] + (["openvino"] if runtimes.choose_backend("auto", torch.device("cpu")) == "openvino" else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prediction_contacts_nobody_and_starts_no_process(tmp_path, backend):
    model = models.write_model(tmp_path / "model")
    write_volume(tmp_path / "images" / "a_0000.nii.gz", scans.blobs((10, 36, 40)))
    home = tmp_path / "home"
    home.mkdir()
    left_out = ("CI", "TF_BUILD", "JENKINS_URL", "XDG_CACHE_HOME", "NNUNET_FLARE_CACHE", "COV_", "COVERAGE_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    words = ["-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model, "-device", "cpu", "--backend", backend]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, words)],
        env={**inherited, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SEEN" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "a.nii.gz").is_file()
    files = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    assert files <= {(".cache", "nnunet-flare")}
    assert bool(files) == (backend == "openvino")
