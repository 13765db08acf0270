"""Every trainer in two processes, as nnU-Net runs on two GPUs; started once, as each imports for seconds."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

UNLABELLED = ("nnUNetTrainerFlareAdversarial", "nnUNetTrainerFlareMeanTeacher")
STEPS = 3
"""Torch notices in the second step that the first left a weight without a gradient."""


def one_of_two(rank: int, folder: str, variables: dict[str, str], trainers: dict[str, dict[str, Any]]) -> None:
    """Train each trainer, with its settings, for some steps; leaves ``<trainer>_rank<rank>.pt``, or what it raised."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from nnunet_flare.trainers import adversarial

    made = {name: _made(name, settings, folder) for name, settings in trainers.items()}  # stock takes a group for GPUs
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    adversarial.DistributedDataParallel = lambda network, device_ids: DistributedDataParallel(network)
    sys.modules["nnunetv2.training.nnUNetTrainer.nnUNetTrainer"].DDP = adversarial.DistributedDataParallel
    for name, trainer in made.items():
        try:
            state = _trained(name, trainer, rank, folder)
        except Exception as error:
            state = {"error": f"{type(error).__name__}: {error}"}
        torch.save(state, f"{folder}/{name}_rank{rank}.pt")
        if "error" in state:  # the other one may wait for ever
            break
    leave_together(folder, rank)


def _made(name: str, settings: dict[str, Any], folder: str) -> Any:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    preprocessed = Path(folder, "preprocessed", "Dataset022_Tiny")
    plans = json.loads((preprocessed / "nnUNetPlansFlareTiny.json").read_text())
    plans["continue_training"] = False
    plans["configurations"]["3d_fullres"]["flare"] = settings
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    return recursive_find_trainer_class_by_name(name)(plans, "3d_fullres", "all", dataset, torch.device("cpu"))


def _trained(name: str, trainer: Any, rank: int, folder: str) -> dict[str, Any]:
    trainer.is_ddp, trainer.local_rank = True, rank
    torch.manual_seed(rank)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.network.train()
    stream = torch.Generator().manual_seed(rank)
    trainer.dataloader_unlabelled = iter([_batch(stream, 1, channels=1 + ("Mean" in name)) for _ in range(STEPS)])
    outputs = [trainer.train_step(_batch(stream, trainer.batch_size, scales=_scales(trainer))) for _ in range(STEPS)]
    trainer.log_means(outputs, "labelled_loss")
    path = Path(folder, "results", f"{name}.pth")
    trainer.save_checkpoint(str(path))
    saved = torch.load(path, weights_only=False) if rank == 0 else {}
    networks = {"network": trainer.network.module.state_dict()}
    if hasattr(trainer, "discriminator"):
        networks["discriminator"] = trainer.state_besides("checkpoint_latest.pth")["discriminator_weights"]
    if hasattr(trainer, "average"):
        networks["average"] = trainer.average.network.state_dict()
    return {
        "networks": networks,
        "saved": saved.get("network_weights"),
        "logged": trainer.logger.get_value("labelled_loss", step=0),
        "own": [float(output["labelled_loss"]) for output in outputs],
        "batch": trainer.batch_size,
    }


def _scales(trainer: Any) -> int:
    return 2 if trainer.enable_deep_supervision else 1


def _batch(stream: torch.Generator, samples: int, *, channels: int = 1, scales: int = 1) -> dict[str, Any]:
    target = torch.randint(0, 3, (samples, 1, 8, 16, 16), generator=stream).to(torch.int16)
    data = torch.randn((samples, channels, 8, 16, 16), generator=stream)
    levels = [target, target[..., ::2, ::2]]
    return {"data": data, "target": levels if scales > 1 else target, "keys": np.array(["a", "b"][:samples])}


def leave_together(folder: str, rank: int) -> None:
    """End this process once the other has come here too, without taking the process group down.

    Torch's Gloo group can wait for itself for ever as it goes: its end, which holds the interpreter's lock, waits for a
    thread of its own that wants that lock to give a tensor back.
    """
    Path(folder, f"left{rank}").touch()
    deadline = time.monotonic() + 60  # the other may have died, or wait for a gradient of this one
    while not Path(folder, f"left{1 - rank}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(0)
