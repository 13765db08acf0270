"""Adversarial training in two processes, as nnU-Net runs on two GPUs: both end with the same two networks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


def one_of_two(rank: int, folder: str, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    from nnunetv2.run.run_training import get_trainer_from_args
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from two_processes import leave_together

    from nnunet_flare.trainers import adversarial

    trainer = get_trainer_from_args(
        "Dataset022_Tiny", "3d_fullres", "all", "nnUNetTrainerFlareAdversarial", "nnUNetPlansFlareTiny", False,
        torch.device("cpu"),
    )  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trainer.is_ddp, trainer.local_rank = True, rank  # stock takes a process group to be GPUs
    adversarial.DistributedDataParallel = lambda network, device_ids: DistributedDataParallel(network)
    sys.modules["nnunetv2.training.nnUNetTrainer.nnUNetTrainer"].DDP = adversarial.DistributedDataParallel
    torch.manual_seed(rank)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.network.train()
    stream = torch.Generator().manual_seed(rank)

    def batch(samples: int) -> dict[str, Any]:
        target = torch.randint(0, 3, (samples, 1, 8, 16, 16), generator=stream).to(torch.int16)
        data = torch.randn((samples, 1, 8, 16, 16), generator=stream)
        return {"data": data, "target": target, "keys": np.array(["a", "b"][:samples])}

    trainer.dataloader_unlabelled = iter([batch(1), batch(1)])
    outputs = [trainer.train_step(batch(trainer.batch_size)) for _ in range(2)]
    trainer.log_means(outputs, "discriminator_loss")
    state = {
        "generator": trainer.network.module.state_dict(),
        "discriminator": trainer.state_besides("checkpoint_latest.pth")["discriminator_weights"],
        "logged": trainer.logger.get_value("discriminator_loss", step=0),
        "own": [output["discriminator_loss"] for output in outputs],
        "batch": trainer.batch_size,
    }
    torch.save(state, f"{folder}/rank{rank}.pt")
    leave_together(folder, rank)


def test_two_processes_train_the_same_networks(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add("a", "b")
    tiny.plans["configurations"]["3d_fullres"]["flare"] = {
        "num_epochs": 1,
        "adversarial": {"warmup": 0, "finish": 0, "discriminator_features": 2, "deep_supervision": False},
    }
    arch = tiny.plans["configurations"]["3d_fullres"]["architecture"]
    arch["network_class_name"] = "nnunet_flare.networks.efficient_segnet.EfficientSegNet"
    kept = ("n_stages", "features_per_stage", "strides", "kernel_sizes", "dropout_op", "dropout_op_kwargs", "nonlin")
    arch["arch_kwargs"] = {
        **{key: arch["arch_kwargs"][key] for key in (*kept, "nonlin_kwargs")},
        "n_blocks_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [2, 2],
    }
    arch["_kw_requires_import"] = ["dropout_op", "nonlin"]
    tiny.save()
    names = ("raw", "preprocessed", "results")
    variables = {f"nnUNet_{name}": str(tmp_path / name) for name in names} | {"nnUNet_compile": "f"}
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), variables), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["batch"] == second["batch"] == 1, "half of the plan's batch each"
    assert first["own"] != second["own"], "each has its own samples"
    for network in ("generator", "discriminator"):
        for name, weight in first[network].items():
            torch.testing.assert_close(weight, second[network][name], msg=f"{network}: {name}")
    assert first["logged"] == second["logged"] == pytest.approx(np.mean(first["own"] + second["own"]))
