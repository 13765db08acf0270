"""Weights of stock nnU-Net and nnssl in our networks: what is taken, what must be there, what is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_flare.errors import InputError
from nnunet_flare.pretrained import RES_ENC_L, plan_transfer, read_pretrained, take_weights

ARCH: dict[str, Any] = {
    **copy.deepcopy(RES_ENC_L),
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
}
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "arch_kwargs": ARCH,
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


def network(*, heads: int = 3, channels: int = 1, seed: int = 0, arch: dict | None = None) -> nn.Module:
    torch.manual_seed(seed)
    kwargs = {**ARCH, **(arch or {})}
    found: nn.Module = get_network_from_plans(
        ARCHITECTURE["network_class_name"], kwargs, ARCHITECTURE["_kw_requires_import"], channels, heads,
        allow_init=True, deep_supervision=True,
    )  # fmt: skip
    return found


def nnssl_plan(**changes: Any) -> dict[str, Any]:
    """As nnssl writes it, by its own code and published files."""
    return {
        "architecture_plans": {
            "arch_class_name": "ResidualEncoderUNet",
            "arch_kwargs": copy.deepcopy(ARCH),
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"],
        },
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenNeuro_v2",
            "plans_name": "nnsslPlans",
            "configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": [16, 32, 32]}},
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [16, 16, 16],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
        **changes,
    }


def write_nnssl(path: Path, weights: dict[str, torch.Tensor], **changes: Any) -> Path:
    torch.save({"network_weights": weights, "citations": [], "nnssl_adaptation_plan": nnssl_plan(**changes)}, path)
    return path


def write_stock(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    configurations = {
        "3d_fullres": {"architecture": ARCHITECTURE, "patch_size": [16, 32, 32]},
        "3d_fullres_x_r0": {"inherits_from": "3d_fullres"},
    }
    arguments = {"plans": {"configurations": configurations}, "configuration": "3d_fullres_x_r0", "fold": 0}
    torch.save({"network_weights": weights, "init_args": arguments, "trainer_name": "nnUNetTrainer"}, path)
    return path


def same(one: nn.Module, other: nn.Module, *, where: str) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for (name, a), b in pairs if name.startswith(where))


# ------------------------------------------------------------------ what is taken


def test_the_encoder_of_a_self_supervised_network_is_taken_and_nothing_else(tmp_path: Path) -> None:
    source, target = network(heads=1, seed=1), network(seed=2)
    before = copy.deepcopy(target)
    words = take_weights(read_pretrained(write_nnssl(tmp_path / "a.pth", source.state_dict())), target, "encoder")
    assert same(source, target, where="encoder.")
    assert same(source, target, where="decoder.encoder."), "the same weights under their other name"
    assert same(before, target, where="decoder.stages") and same(before, target, where="decoder.seg_layers")
    assert "weights (encoder) of" in words and "start from random values (decoder." in words


def test_an_encoder_under_another_name_is_found_where_the_file_says_it_is(tmp_path: Path) -> None:
    source, target = network(seed=1), network(seed=2)
    weights = {f"online_{name}": value for name, value in source.state_dict().items() if name.startswith("encoder.")}
    weights["projector.0.weight"] = torch.zeros(3, 3)
    places = {"key_to_encoder": "online_encoder.stages", "key_to_stem": "online_encoder.stem"}
    words = take_weights(read_pretrained(write_nnssl(tmp_path / "a.pth", weights, **places)), target, "encoder")
    assert same(source, target, where="encoder.")
    assert "1 weights of the file are not used (projector.0.weight)" in words


def test_all_but_the_heads_goes_to_other_labels(tmp_path: Path) -> None:
    source, target = network(heads=5, seed=1), network(heads=3, seed=2)
    before = copy.deepcopy(target)
    take_weights(read_pretrained(write_stock(tmp_path / "a.pth", source.state_dict())), target, "but-head")
    assert same(source, target, where="encoder.") and same(source, target, where="decoder.stages")
    assert same(before, target, where="decoder.seg_layers")


def test_everything_is_taken_for_the_same_labels(tmp_path: Path) -> None:
    source, target = network(seed=1), network(seed=2)
    compiled = {f"_orig_mod.{name}": value for name, value in source.state_dict().items()}
    take_weights(read_pretrained(write_stock(tmp_path / "a.pth", compiled)), target, "all")
    assert same(source, target, where="")


def test_the_file_says_its_network_and_patch(tmp_path: Path) -> None:
    stock = read_pretrained(write_stock(tmp_path / "a.pth", network().state_dict()))
    assert (stock.architecture, stock.patch_size) == (ARCHITECTURE, (16, 32, 32))
    nnssl = read_pretrained(write_nnssl(tmp_path / "b.pth", network().state_dict()))
    assert nnssl.architecture == ARCHITECTURE
    assert nnssl.patch_size == (16, 16, 16)
    bare = write_nnssl(tmp_path / "c.pth", network().state_dict(), recommended_downstream_patchsize=None)
    assert read_pretrained(bare).patch_size == (16, 32, 32)


def test_res_enc_l_is_the_network_of_the_presets() -> None:
    """As published: 448 tensors of the encoder, 32 features in the stem."""
    with torch.device("meta"):
        found = get_network_from_plans(
            ARCHITECTURE["network_class_name"], RES_ENC_L, ARCHITECTURE["_kw_requires_import"], 1, 1,
            allow_init=False, deep_supervision=True,
        )  # fmt: skip
    assert isinstance(found, ResidualEncoderUNet)
    names = [name for name in found.state_dict() if name.startswith("encoder.")]
    assert len(names) == 448
    assert tuple(found.state_dict()["encoder.stem.convs.0.conv.weight"].shape) == (32, 1, 3, 3, 3)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("target", "part", "says"),
    [
        ({"heads": 5}, "all", r"3 of another shape|2 of another shape|of another shape \(decoder.seg_layers"),
        ({"arch": {"features_per_stage": [4, 8, 16]}}, "encoder", r"of another shape \(encoder.stages.2.*\(16, 8, "),
        ({"arch": {"n_blocks_per_stage": [1, 2, 1]}}, "encoder", r"missing there \(encoder.stages.1.blocks.1"),
        ({"channels": 2}, "encoder", r"of another shape \(encoder.stem.*\(4, 1, 3, 3, 3\), here \(4, 2, 3, 3, 3\)"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path: Path, target: dict, part: str, says: str) -> None:
    given = read_pretrained(write_stock(tmp_path / "a.pth", network(seed=1).state_dict()))
    other = network(seed=2, **target)
    before = copy.deepcopy(other)
    with pytest.raises(InputError, match=says):
        take_weights(given, other, part)
    assert same(before, other, where="")


def test_an_encoder_alone_does_not_pass_for_more(tmp_path: Path) -> None:
    weights = {name: value for name, value in network().state_dict().items() if name.startswith("encoder.")}
    given = read_pretrained(write_nnssl(tmp_path / "a.pth", weights))
    with pytest.raises(
        InputError, match=r"but-head weights: \d+ missing there \(decoder.stages.*Set training.pretrained_part"
    ):
        take_weights(given, network(), "but-head")
    transfer = plan_transfer(given, network(), "encoder")
    assert not transfer.missing and not transfer.different


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="holds state_dict, expected 'network_weights'"):
        read_pretrained(path)
    torch.save({"network_weights": {"encoder.x": 3}}, path)
    with pytest.raises(InputError, match=r"network_weights\.encoder\.x is int, expected a tensor"):
        read_pretrained(path)
    torch.save({"network_weights": {}, "nnssl_adaptation_plan": {"key_to_stem": "x"}}, path)
    with pytest.raises(InputError, match="nnssl_adaptation_plan is not what its program writes"):
        read_pretrained(path)
    plan = nnssl_plan(architecture_plans={"arch_class_name": "PrimusM", "arch_kwargs": None})
    torch.save({"network_weights": {}, "nnssl_adaptation_plan": plan}, path)
    with pytest.raises(InputError, match="is a PrimusM, expected a convolutional network"):
        read_pretrained(path)


class Program:
    """What unpickling a file could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was_run"),))


def test_a_file_is_read_as_data_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"network_weights": {}, "nnssl_adaptation_plan": Program()}, "a.pth")
    with pytest.raises(InputError, match="holds more than weights and numbers"):
        read_pretrained(Path("a.pth"))
    assert not Path("was_run").exists()
