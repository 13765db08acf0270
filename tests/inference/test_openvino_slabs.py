"""A network whose widest step is done in slabs: the same scores, bit by bit, from smaller features."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

openvino = pytest.importorskip("openvino")

from nnunet_flare.inference import openvino_runtime, openvino_slabs  # noqa: E402
from nnunet_flare.inference.cpus import thread_count  # noqa: E402
from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime, shared_core  # noqa: E402
from nnunet_flare.inference.openvino_slabs import join_in_slabs  # noqa: E402

SHAPE = (1, 1, 22, 8, 12)
"""Of a window; 22 slices are no multiple of 8 slabs."""

UNROUNDED = 1e-4
"""Far below the steps of bfloat16; a CPU without it normalises more exactly."""

NOISE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


class Net(nn.Module):
    """A U-Net of two stages."""

    def __init__(
        self,
        *,
        stride: int = 2,
        convolutions: int = 1,
        depthwise: bool = False,
        kernel: int = 0,
        places: bool = False,
        kept: bool = False,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 6, 22, 1, 1)) if places else None
        self.kept, self.outputs = kept, outputs
        self.first = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.InstanceNorm3d(6, affine=True), nn.LeakyReLU())
        self.down = nn.Conv3d(6, 8, 3, (stride, 2, 2), 1)
        kernels = kernel or (stride, 2, 2)
        padding = 0 if kernel == 0 else 1
        self.up = nn.ConvTranspose3d(8, 6, kernels, (stride, 2, 2), padding, output_padding=0 if kernel == 0 else 1)
        layers: list[nn.Module] = [nn.Conv3d(12, 12, 3, padding=1, groups=12)] if depthwise else []
        layers += [nn.Conv3d(12, 12, (3, 3, 1), padding=(1, 1, 0)) for _ in range(convolutions - 1)]
        layers += [nn.Conv3d(12, 6, 1 if depthwise else 3, padding=0 if depthwise else 1)]
        self.after = nn.Sequential(*layers, nn.InstanceNorm3d(6, affine=True), nn.LeakyReLU())
        self.last = nn.Conv3d(6, 4, 1)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        kept = self.first(window)
        small = self.down(kept)
        enlarged = self.up(small)
        enlarged = enlarged if self.places is None else enlarged + self.places
        scores = self.last(self.after(torch.cat((enlarged, kept), 1)))
        scores = scores + enlarged[:, :4] if self.kept else scores
        return scores if self.outputs == 1 else (scores, self.last(small[:, :6]))


@lru_cache
def _converted(**kinds: int):
    torch.manual_seed(0)
    net = Net(**kinds).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = openvino.convert_model(net, example_input=torch.zeros(SHAPE))
    model.reshape(list(SHAPE))
    return model


def converted(depth: int = SHAPE[2], **kinds: int):
    """A network of some kind for windows of so many slices, ready to be changed."""
    model = _converted(**kinds).clone()
    model.reshape([*SHAPE[:2], depth, *SHAPE[3:]])
    return model


def scores(model, precision: str) -> np.ndarray:
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": thread_count(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    depth = model.input(0).shape[2]
    return shared_core().compile_model(model, "CPU", options)({0: NOISE[:, :, :depth]})[0]


def largest_join(model) -> int:
    joins = [op for op in model.get_ops() if op.get_type_name() == "Concat" and op.get_attributes()["axis"] == 1]
    return max(math.prod(op.get_output_shape(0)) for op in joins)


@pytest.fixture(autouse=True)
def small_networks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_slabs, "WORTH_SLABS", 1)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize(
    "net",
    [{"depthwise": True}, {"stride": 1}, {"convolutions": 3}, {"depthwise": True, "convolutions": 2}],
    ids=str,
)
def test_scores_are_the_same_and_joined_features_a_slab(net, precision):
    model = converted(**net)
    whole = largest_join(model)
    assert join_in_slabs(model)
    assert largest_join(model) <= whole * (math.ceil(22 / 8) + 2 * net.get("convolutions", 1) + 2) / 22
    np.testing.assert_array_equal(scores(model, precision), scores(converted(**net), precision))


def test_a_network_of_another_kind_or_a_small_one_stays_as_it_is(monkeypatch):
    assert not join_in_slabs(converted(kernel=3))  # its enlarged voxels depend on several
    assert not join_in_slabs(converted(places=True))  # to each slice something else is added
    assert not join_in_slabs(converted(kept=True))  # the enlarged voxels are needed for more, and lie there as a whole
    assert join_in_slabs(converted())
    monkeypatch.undo()
    assert not join_in_slabs(converted())


@pytest.mark.parametrize("depth", [1, 3, 4, 9])
def test_a_window_of_fewer_slices_than_the_kernels_see_has_the_same_scores(depth):
    net = {"stride": 1, "convolutions": 4}
    model = converted(depth=depth, **net)
    join_in_slabs(model)
    np.testing.assert_array_equal(scores(model, "f32"), scores(converted(depth=depth, **net), "f32"))


def test_of_several_outputs_the_first_is_taken():
    model = converted(outputs=2)
    found = OpenVinoRuntime(model, precision="bf16", two_d=False)(NOISE)
    single = found if isinstance(found, np.ndarray) else found.single()
    np.testing.assert_allclose(single, scores(converted(), "bf16")[0], atol=UNROUNDED)


def test_scores_computed_in_bfloat16_come_as_that_and_others_are_not_rounded(monkeypatch):
    single = scores(converted(), "bf16")[0]
    found = OpenVinoRuntime(converted(), precision="bf16", two_d=False)(NOISE)
    if not isinstance(found, np.ndarray):  # else a CPU without bfloat16
        assert found.bits.nbytes * 2 == single.nbytes
        np.testing.assert_array_equal(found.single(), single)
    monkeypatch.setitem(openvino_runtime.PRECISION_HINTS, "bf16", "f32")  # what such a CPU makes of it
    found = OpenVinoRuntime(converted(), precision="bf16", two_d=False)(NOISE)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, scores(converted(), "f32")[0], atol=UNROUNDED)


def test_a_network_whose_memory_was_given_back_computes_the_same_again():
    runtime = OpenVinoRuntime(converted(), precision="fp32", two_d=False)
    before = np.array(runtime(NOISE))
    runtime.release()
    np.testing.assert_array_equal(runtime(NOISE), before)
