"""Backends and precisions: what is chosen, and that all of them predict the same."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch

from nnunet_flare.cli import export
from nnunet_flare.errors import InputError
from nnunet_flare.inference import cache, devices, openvino_conversion, openvino_runtime, runtimes, torch_runtime
from nnunet_flare.inference.model import Model
from nnunet_flare.inference.predictor import FlarePredictor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_openvino = pytest.mark.skipif(
    runtimes.choose_backend("auto", CPU) != "openvino", reason="OpenVINO is not installed (extra: openvino)"
)


def logits(folder: Path, data: np.ndarray, **options: object) -> torch.Tensor:
    return torch.from_numpy(FlarePredictor.from_model_folder(folder, **options).segmenter.logits(data))


@pytest.fixture
def case(tmp_path) -> tuple[Path, np.ndarray]:
    folder = models.write_model(tmp_path / "model", folds=(0, 1), plan=models.plans(features=(4, 8, 16)))
    predictor = FlarePredictor.from_model_folder(folder, backend="torch")
    return folder, predictor.segmenter.prepare([scans.blobs((20, 60, 60))]).prepared.data


@needs_openvino
@pytest.mark.parametrize("options", [{"folds": [0]}, {"tta": "mirror"}], ids=["one-fold", "folds-and-mirroring"])
def test_openvino_equals_torch(case, options):
    folder, data = case
    torch_scores = logits(folder, data, backend="torch", precision="fp32", **options)
    scores = logits(folder, data, backend="openvino", precision="fp32", **options)
    assert (scores - torch_scores).abs().max() < 0.02 * torch_scores.std()
    assert (scores.argmax(0) == torch_scores.argmax(0)).float().mean() > 0.999


EXACT = 1e-4
"""Largest difference of scores, as a share of their standard deviation; OpenVINO's own normalisation misses it."""


@needs_openvino
@pytest.mark.parametrize("patch", [(32, 96, 96), (256, 256)])
def test_single_precision_is_as_exact_as_pytorch_in_large_windows(tmp_path, patch):
    plan = models.plans(patch=patch, spacing=(4.0, 2.0, 2.0)[-len(patch) :])
    folder = models.write_model(tmp_path / "model", plan=plan)
    shape = patch if len(patch) == 3 else (1, *patch)
    data = np.random.default_rng(0).normal(3, 1, (1, *shape)).astype(np.float32)
    expected = logits(folder, data, backend="torch", precision="fp32")
    scores = logits(folder, data, backend="openvino", precision="fp32")
    assert (scores - expected).abs().max() < EXACT * expected.std()


@pytest.mark.parametrize("shape", [(32, 96, 96), (11, 13, 7), (40, 11, 1), (4, 22, 27), (17, 1, 1), (256, 250)])
def test_blocks_fill_the_window_and_come_to_an_end(shape):
    from nnunet_flare.inference.openvino_norms import block_edges

    for _ in range(10):
        edges = block_edges(shape)
        assert all(n % edge == 0 for n, edge in zip(shape, edges, strict=True))
        shape = tuple(n // edge for n, edge in zip(shape, edges, strict=True))
    assert max(shape) == 1


@needs_openvino
def test_openvino_runs_2d_models(tmp_path):
    folder = models.write_model(tmp_path / "model", plan=models.plans(patch=(32, 32), spacing=(2.0, 2.0)))
    volume = scans.blobs((5, 40, 40))
    ours = FlarePredictor.from_model_folder(folder, backend="openvino", precision="fp32").predict(volume)
    expected = FlarePredictor.from_model_folder(folder, backend="torch", precision="fp32").predict(volume)
    assert (ours == expected).mean() > 0.999


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_bf16_is_near_single_precision(case, backend, monkeypatch):
    folder, data = case
    monkeypatch.setattr(torch_runtime, "computes_bf16", lambda device: True)  # so small a network may be slow
    exact = logits(folder, data, backend="torch", precision="fp32", folds=[0])
    scores = logits(folder, data, backend=backend, precision="bf16", folds=[0])
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().mean() < 0.05 * exact.std()
    assert (scores.argmax(0) == exact.argmax(0)).float().mean() > 0.95


@needs_openvino
def test_converted_network_is_kept_and_made_anew_for_other_weights(case, tmp_path, monkeypatch):
    from nnunet_flare.inference import openvino_conversion

    folder, data = case
    conversions = []
    convert = openvino_conversion.convert
    monkeypatch.setattr(openvino_conversion, "convert", lambda *a, **k: conversions.append(1) or convert(*a, **k))
    options = {"backend": "openvino", "precision": "fp32", "folds": [0]}
    first = logits(folder, data, **options)
    again = logits(folder, data, **options)
    assert len(conversions) == 1
    assert torch.equal(first, again)
    models.write_model(folder, seed=5, plan=models.plans(features=(4, 8, 16)))
    other = logits(folder, data, **options)
    assert len(conversions) == 2
    assert not torch.allclose(first, other)
    torch_scores = logits(folder, data, backend="torch", precision="fp32", folds=[0])
    assert (other - torch_scores).abs().max() < 0.02 * torch_scores.std()


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, np.ndarray, torch.Tensor, Path]:
    """A model that was predicted with, what its scores were, and the cache as it was then; all to be left alone."""
    room = tmp_path_factory.mktemp("converted")
    folder = models.write_model(room / "model", plan=models.plans(features=(4, 8, 16)))
    data = np.random.default_rng(0).normal(size=(1, 20, 60, 60)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(room / "cache"))
        scores = logits(folder, data, backend="openvino", precision="fp32")
    return folder, data, scores, room / "cache"


@pytest.fixture
def known(converted, tmp_path) -> tuple[Path, np.ndarray, torch.Tensor]:
    """That model, its network converted in this test's own cache."""
    *found, there = converted
    shutil.copytree(there, os.environ[cache.VARIABLE])
    return tuple(found)


@pytest.fixture
def other_weights(case) -> tuple[Path, np.ndarray]:
    """A model that was predicted with, whose checkpoint was replaced by one of equal size and time."""
    folder, data = case
    logits(folder, data, backend="openvino", precision="fp32", folds=[0])
    path = folder / "fold_0" / "checkpoint_final.pth"
    before = path.stat()
    models.write_model(folder, seed=5, plan=models.plans(features=(4, 8, 16)))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return folder, data


@needs_openvino
def test_a_checkpoint_of_equal_size_and_time_is_not_taken_for_the_one_before(other_weights):
    folder, data = other_weights
    scores = logits(folder, data, backend="openvino", precision="fp32", folds=[0])
    expected = logits(folder, data, backend="torch", precision="fp32", folds=[0])
    assert (scores - expected).abs().max() < 0.02 * expected.std()


@needs_openvino
def test_the_same_weights_elsewhere_are_not_converted_again(known, tmp_path, caplog):
    folder, data, _ = known
    shutil.copytree(folder, tmp_path / "copy")
    caplog.clear()
    with caplog.at_level("INFO"):
        logits(tmp_path / "copy", data, backend="openvino", precision="fp32", folds=[0])
    assert "converting" not in caplog.text


DAMAGES = {
    "a changed byte": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x7f" + path.read_bytes()[-8:]),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@needs_openvino
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["network.bin", "network.xml", "checksums.json"])
def test_a_damaged_converted_network_is_said_and_made_anew(known, caplog, name, damage):
    folder, data, expected = known
    (stored,) = cache.cache_folder("openvino").glob(f"*/{name}")
    whole = stored.read_bytes()
    DAMAGES[damage](stored)
    assert torch.equal(logits(folder, data, backend="openvino", precision="fp32", folds=[0]), expected)
    assert "is damaged" in caplog.text and "made again" in caplog.text
    if name == "network.bin":
        assert stored.read_bytes() == whole
    caplog.clear()
    logits(folder, data, backend="openvino", precision="fp32", folds=[0])
    assert "damaged" not in caplog.text


@contextmanager
def no_file_above(size: int):
    """As on a full disk: what would make a file larger fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@needs_openvino
def test_on_a_full_disk_the_network_is_converted_once_and_used(case, tmp_path, monkeypatch, caplog):
    folder, data = case
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    converted, convert = [], openvino_conversion.convert
    monkeypatch.setattr(openvino_conversion, "convert", lambda *of: converted.append(1) or convert(*of))
    caplog.set_level("INFO")
    with no_file_above(10_000):
        ours = logits(folder, data, folds=[0], backend="openvino", precision="fp32")
    assert len(converted) == 1
    assert "not cached" in caplog.text and "perhaps the disk is full" in caplog.text
    assert list((tmp_path / "cache" / "openvino").iterdir()) == []
    torchs = logits(folder, data, folds=[0], backend="torch", precision="fp32")
    torch.testing.assert_close(ours, torchs, atol=1e-3, rtol=1e-3)


@needs_openvino
def test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing(case, tmp_path, capsys):
    with no_file_above(10_000):
        assert export.main(["-m", str(case[0]), "-o", str(tmp_path / "new" / "out"), "-f", "0"]) == 1
    said = capsys.readouterr().err
    assert "perhaps the disk is full" in said and "Traceback" not in said
    assert list((tmp_path / "new").iterdir()) == []


@needs_openvino
def test_without_a_cache_the_network_is_converted_in_memory(case, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "")
    folder, data = case
    assert logits(folder, data, backend="openvino", precision="fp32", folds=[0]).shape[1:] == data.shape[1:]


class Unknown(torch.nn.Module):
    """A network with an operation that OpenVINO has no rule for."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.network(x))


@needs_openvino
def test_a_network_that_openvino_does_not_know_is_run_by_pytorch_or_refused(case, monkeypatch, caplog):
    folder, data = case
    network = Model.network
    monkeypatch.setattr(Model, "network", lambda model: Unknown(network(model)))
    expected = logits(folder, data, backend="torch", precision="fp32", folds=[0])
    assert torch.equal(logits(folder, data, backend="auto", precision="fp32", folds=[0]), expected)
    assert "aten::special_bessel_j0); PyTorch runs it" in caplog.text
    with pytest.raises(InputError, match=r"OpenVINO cannot run this network .*bessel_j0"):
        logits(folder, data, backend="openvino", precision="fp32", folds=[0])


@needs_openvino
def test_an_openvino_that_is_not_whole_leaves_the_network_to_pytorch_or_is_refused(case, monkeypatch, caplog):
    """As where a library that it needs is missing."""

    def broken():
        raise ImportError("libopenvino.so: cannot open shared object file")

    folder, data = case
    monkeypatch.setattr("nnunet_flare.inference.openvino_runtime.silent_openvino", broken)
    monkeypatch.setattr(openvino_conversion, "silent_openvino", broken)
    expected = logits(folder, data, backend="torch", precision="fp32", folds=[0])
    assert torch.equal(logits(folder, data, backend="auto", precision="fp32", folds=[0]), expected)
    assert "cannot open shared object file); PyTorch runs it" in caplog.text
    with pytest.raises(InputError, match=r"OpenVINO cannot run this network \(libopenvino.so"):
        logits(folder, data, backend="openvino", precision="fp32", folds=[0])


def test_choices_know_the_hardware(monkeypatch):
    monkeypatch.setattr(runtimes, "cpu_flags", lambda: frozenset({"avx2"}))
    assert runtimes.choose_precision("auto", CPU) == "fp32"
    for flag in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(runtimes, "cpu_flags", lambda flag=flag: frozenset({flag}))
        assert runtimes.choose_precision("auto", CPU) == "bf16"
    assert runtimes.choose_precision("auto", CUDA) == "fp16"
    assert runtimes.choose_precision("fp32", CUDA) == "fp32"
    assert runtimes.choose_backend("auto", CUDA) == "torch"
    assert runtimes.choose_backend("torch", CPU) == "torch"


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the system does not tell what its CPU has")
def test_pytorch_has_bf16_where_the_cpu_has_avx512():
    needed = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert devices.computes_bf16(CPU) == (needed <= runtimes.cpu_flags())


@pytest.mark.parametrize(("capability", "has_it"), [((7, 5), False), ((8, 0), True)])
def test_gpus_have_bf16_from_ampere_on(monkeypatch, capability, has_it):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert devices.computes_bf16(CUDA) == has_it


def test_bf16_on_a_cpu_without_it_is_single_precision(case, monkeypatch, caplog):
    """PyTorch would take 80 times as long."""
    folder, data = case
    devices.say_no_bf16.cache_clear()
    monkeypatch.setattr(torch_runtime, "computes_bf16", lambda device: False)
    expected = logits(folder, data, backend="torch", precision="fp32", folds=[0, 1])
    assert torch.equal(logits(folder, data, backend="torch", precision="bf16", folds=[0, 1]), expected)
    assert caplog.text.count("fp32 is used") == 1


def test_openvino_says_so_too_and_normalises_as_exactly_as_in_single_precision(case, monkeypatch, caplog):
    pytest.importorskip("openvino")
    folder, data = case
    devices.say_no_bf16.cache_clear()
    core = openvino_runtime.shared_core()
    older = SimpleNamespace(
        read_model=core.read_model, compile_model=core.compile_model, get_property=lambda *_: ["FP32", "INT8"]
    )
    monkeypatch.setattr(openvino_runtime, "shared_core", lambda: older)
    expected = logits(folder, data, backend="openvino", precision="fp32", folds=[0, 1])
    assert torch.equal(logits(folder, data, backend="openvino", precision="bf16", folds=[0, 1]), expected)
    assert caplog.text.count("fp32 is used") == 1


def test_choices_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        runtimes.choose_precision("fp16", CPU)
    with pytest.raises(InputError, match="expected one of auto, fp32"):
        runtimes.choose_precision("int4", CPU)
    with pytest.raises(InputError, match="expected one of auto, torch"):
        runtimes.choose_backend("onnx", CPU)
    with pytest.raises(InputError, match="runs on the CPU"):
        runtimes.choose_backend("openvino", CUDA)
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    assert runtimes.choose_backend("auto", CPU) == "torch"
    with pytest.raises(InputError, match="pip install"):
        runtimes.choose_backend("openvino", CPU)


def test_cache_folder_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "c"))
    folder = cache.cache_folder("openvino")
    assert folder is not None and folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    assert cache.cache_folder("openvino") is None
    monkeypatch.setenv(cache.VARIABLE, "")
    assert cache.cache_folder("openvino") is None
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    assert cache.cache_folder("openvino") is None


def test_cache_keeps_the_entries_used_last_and_nothing_half_made(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEPT_ENTRIES", 3)
    made = []
    for number in range(5):
        entry = cache.cached(tmp_path, f"k{number}", lambda f: made.append(f) or (f / "x").write_text("1"))
        os.utime(entry, (number, number))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k2", "k3", "k4"]
    assert cache.cached(tmp_path, "k3", lambda f: made.append(f)) == tmp_path / "k3"
    assert len(made) == 5

    def fails(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise OSError(28, "No space left on device")

    assert cache.cached(tmp_path, "k9", fails) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k2", "k3", "k4"]


def test_what_a_killed_process_left_in_the_cache_goes_with_the_next_entry(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from nnunet_flare.inference.cache import cached

def killed(folder):
    (folder / "half").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)

cached(Path(sys.argv[1]), "k", killed)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    cache.cached(tmp_path, "other", lambda folder: (folder / "x").write_text("1"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
