"""What is decided about a GPU, on stand-ins: device, precision, memory limits, what happens when memory runs out."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch
from pretend_gpu import gpu
from torch.cuda._utils import _get_device_index

from nnunet_flare.cli import predict
from nnunet_flare.errors import FlareError, InputError
from nnunet_flare.images import write_volume
from nnunet_flare.inference import memory, torch_runtime
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.devices import Device, open_device
from nnunet_flare.inference.model import Model
from nnunet_flare.inference.predictor import FlarePredictor
from nnunet_flare.inference.profile import Profile
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.torch_runtime import TorchRuntime
from nnunet_flare.rounds.executors.local import gpu_lock, visible_gpus

GIB = memory.GIGABYTE
CUDA = Device("cuda")


# ------------------------------------------------------------------ which device


def test_auto_is_what_torch_finds_and_the_commands_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(open_device("auto")) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(open_device("auto")) == "cpu"
    folder = models.write_model(tmp_path / "model")
    write_volume(tmp_path / "images" / "a_0000.nii.gz", scans.blobs((10, 36, 40)))
    words = ["-i", tmp_path / "images", "-o", tmp_path / "out", "-m", folder]
    assert predict.main([str(word) for word in words]) == 0  # also where a driver but no CUDA is there
    assert "device cpu, precision" in capsys.readouterr().err
    with pytest.raises(InputError, match="no CUDA device was found"):
        open_device("cuda")


def test_a_gpu_limit_where_auto_finds_no_gpu_is_refused(tmp_path):
    folder = models.write_model(tmp_path / "model")
    with pytest.raises(InputError, match="--gpu_memory needs -device cuda; -device auto is cpu here"):
        Segmenter.from_model_folder(folder, PredictionSettings(device="auto", gpu_memory_gb=2.0))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("0,1", ["0", "1"]),
        ("GPU-8f3a, GPU-77aa", ["GPU-8f3a", "GPU-77aa"]),
        ("MIG-GPU-8f3a/1/0", ["MIG-GPU-8f3a/1/0"]),
        ("MIG-2c1b,3", ["MIG-2c1b", "3"]),
        ("2,-1,1", ["2"]),
        ("", []),
        ("1,1", ["1"]),
    ],
)
def test_gpus_are_named_as_cuda_names_them(monkeypatch, listed, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus(None) == expected
    assert len({gpu_lock(gpu).name for gpu in expected}) == len(expected)
    assert all(gpu_lock(gpu).parent == gpu_lock("0").parent for gpu in expected)
    with pytest.raises(FlareError, match=rf"this machine has {len(expected)} GPU"):
        visible_gpus(len(expected) + 1)


# ------------------------------------------------------------------ precision


def test_batch_norms_with_large_variance_keep_to_single_precision_under_half(tmp_path, monkeypatch):
    plan = models.plans(features=(8, 16))
    plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op"] = (
        "torch.nn.modules.batchnorm.BatchNorm3d"
    )
    folder = models.write_model(tmp_path / "model", plan=plan)
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    for name, value in checkpoint["network_weights"].items():
        if name.endswith("running_var"):
            value.fill_(3e5)  # beyond half precision
        if name.endswith(("norm.weight", "all_modules.1.weight")):
            value.fill_(300.0)
    torch.save(checkpoint, path)
    settings = PredictionSettings(backend="torch", precision="fp32")
    network = Segmenter.from_model_folder(folder, settings).models[0].network
    window = np.random.default_rng(0).normal(size=(1, 1, 8, 32, 32)).astype(np.float32)
    runtimes = {p: TorchRuntime(network(), device=torch.device("cpu"), precision=p) for p in ("fp32", "fp16")}
    exact, half = (torch.from_numpy(runtimes[p](window)) for p in ("fp32", "fp16"))
    assert torch.isfinite(half).all() and len(exact.argmax(0).unique()) > 1
    assert not torch.equal(half, exact)
    assert (half.argmax(0) != exact.argmax(0)).float().mean() < 0.01
    norms = [m for m in runtimes["fp16"]._network.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert norms and all(t.dtype in (torch.float32, torch.int64) for m in norms for t in m.state_dict().values())


def flags() -> tuple[bool, bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("bf16", True)])
def test_single_precision_on_cuda_is_no_tf32_and_the_process_is_left_as_it_was(monkeypatch, precision, tf32):
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(flags())
            return x

    monkeypatch.setattr(torch_runtime, "computes_bf16", lambda device: True)
    runtime = TorchRuntime(Network(), device=torch.device("cpu"), precision=precision)
    runtime._device = CUDA
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: torch.inference_mode())
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        before = flags()
        runtime._scores(torch.zeros(1, 1, 2, 2, 2))
        assert seen == [(tf32, tf32, True)]
        assert flags() == before == (True, True, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_a_predictor_leaves_cudnns_benchmark_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    FlarePredictor(device="cuda")
    assert torch.backends.cudnn.benchmark is False


# ------------------------------------------------------------------ memory


@pytest.fixture
def card(monkeypatch) -> SimpleNamespace:
    """A GPU of 10 GB by what is asked about it; its allocator's share is kept."""
    found = SimpleNamespace(free=9 * GIB, total=10 * GIB, reserved=0, shares=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (found.free, found.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: found.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: found.reserved)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    share_of = lambda share, device: found.shares.append(share + 0 * _get_device_index(device))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", share_of)  # takes no GPU without a number
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return found


@pytest.mark.parametrize(
    ("free", "reserved", "beside"),
    [(10.0, 0.0, 0.5), (9.2, 0.1, 0.7), (2.0, 0.0, 1.0)],
    ids=["nothing-known", "measured", "other-programs"],
)
def test_a_limit_of_gpu_memory_counts_the_context(card, free, reserved, beside):
    card.free, card.reserved = int(free * GIB), int(reserved * GIB)
    allowed = memory.keep_to(CUDA, 2.0)
    assert allowed == pytest.approx((2.0 - beside) * GIB)
    assert card.shares[-1] * card.total + beside * GIB == pytest.approx(2.0 * GIB)
    assert memory.sums_device(torch.device("cuda"), 2.0, int(0.4 * (2.0 - beside) * GIB)).type == "cuda"
    assert memory.sums_device(torch.device("cuda"), 2.0, int(0.6 * (2.0 - beside) * GIB)).type == "cpu"


def test_a_limit_that_the_context_alone_takes_is_refused(card):
    with pytest.raises(InputError, match=r"--gpu_memory 0.4: the CUDA context alone needs about 0.5 GB"):
        memory.keep_to(CUDA, 0.4)


ERRORS = {
    "allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "context": RuntimeError("CUDA error: out of memory"),
    "library": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "no algorithm": RuntimeError("GET was unable to find an engine to execute this computation"),
}


@pytest.mark.parametrize("when", ["loading", "running"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_network_that_does_not_fit_the_gpu_is_run_by_the_cpu_and_this_is_said(
    tmp_path, monkeypatch, caplog, when, error
):
    caplog.set_level(logging.WARNING)
    folder = models.write_model(tmp_path / "model")
    expected = FlarePredictor.from_model_folder(folder, backend="torch", precision="fp32").predict(
        scans.blobs((10, 36, 40))
    )
    real = Model.runtime

    def runtime(model, how):
        if how.device.type == "cpu":
            return real(model, how)
        if when == "loading":
            raise ERRORS[error]

        def full(window):
            raise ERRORS[error]

        return full

    monkeypatch.setattr(Model, "runtime", runtime)
    with gpu() as card:
        card.room = 100_000  # sums and scan lie on the CPU, one window fits
        predictor = FlarePredictor.from_model_folder(folder, backend="torch", precision="fp32", device="cuda")
        np.testing.assert_array_equal(predictor.predict(scans.blobs((10, 36, 40))), expected)
    said = "the CPU predicts" if when == "loading" else "predicted again on the CPU"
    assert said in caplog.text and "the GPU has 10.0 GB, 0.0 GB of it free" in caplog.text


def test_other_errors_of_the_gpu_are_not_taken_for_a_lack_of_memory(tmp_path, card, monkeypatch):
    folder = models.write_model(tmp_path / "model")

    def runtime(model, how):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Model, "runtime", runtime)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        FlarePredictor.from_model_folder(folder, backend="torch", device="cuda").segmenter.load()


# ------------------------------------------------------------------ profile


@pytest.mark.parametrize("waits", [True, False])
def test_the_networks_time_is_booked_under_the_network_when_a_profile_is_wanted(tmp_path, monkeypatch, waits):
    import time

    pending = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: (time.sleep(sum(pending)), pending.clear()))
    folder = models.write_model(tmp_path / "model")
    profile = Profile(waits=waits)
    settings = PredictionSettings(backend="torch", precision="fp32")
    segmenter = Segmenter.from_model_folder(folder, settings, profile=profile)
    segmenter.load()
    forward = segmenter._forwards[0]

    class OnGpu(torch.Tensor):
        """Scores that say where they lie; the work behind them is still under way."""

        device = torch.device("cuda")

        def to(self, *_: object) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

        def sum(self, *_: object, **__: object) -> torch.Tensor:
            return torch.zeros(())

    def asynchronous(window: np.ndarray) -> torch.Tensor:
        pending.append(0.2)
        return torch.from_numpy(forward(window)).as_subclass(OnGpu)

    segmenter._forwards[0] = asynchronous
    scan = segmenter.prepare([scans.blobs((8, 32, 32))])
    segmenter.segment(scan)
    assert (profile.seconds["network"] >= 0.2 * segmenter.windows(scan)) == waits
    assert profile.seconds["export"] < 0.2
