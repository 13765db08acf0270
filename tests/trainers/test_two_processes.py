"""All trainers in two processes with stock's U-Net, as nnU-Net runs on two GPUs: both end with the same networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_dataset import TinyDataset
from two_processes import one_of_two

from nnunet_flare.files import write_json
from nnunet_flare.plugin import TRAINERS

SETTINGS: dict[str, dict[str, Any]] = {
    "nnUNetTrainerFlareST": {},
    "nnUNetTrainerFlarePartial": {},
    "nnUNetTrainerFlareSelective": {},
    "nnUNetTrainerFlareDistill": {"teacher": {"folder": "to be filled in"}},
    "nnUNetTrainerFlareAdversarial": {"adversarial": {"warmup": 0, "finish": 0, "discriminator_features": 2}},
    "nnUNetTrainerFlareMeanTeacher": {"mean_teacher": {"threshold": 0.4, "ramp_up": 0}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what both processes ended with."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
            monkeypatch.setenv(f"nnUNet_{name}", str(folder / name))
        monkeypatch.setenv("nnUNet_compile", "f")
        tiny = TinyDataset(folder)
        tiny.environment = monkeypatch
        tiny.add("a", "b")
        teacher = tiny.trainer(name="nnUNetTrainer", results="teachers")
        teacher.initialize()
        base = Path(teacher.output_folder_base)
        write_json(base / "plans.json", tiny.plans)
        write_json(base / "dataset.json", tiny.dataset_json)
        teacher.save_checkpoint(str(Path(teacher.output_folder, "checkpoint_final.pth")))
    settings = {name: {"num_epochs": 1, **given} for name, given in SETTINGS.items()}
    settings["nnUNetTrainerFlareDistill"]["teacher"] = {"folder": str(base)}
    variables = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    torch.multiprocessing.spawn(one_of_two, (str(folder), variables | {"nnUNet_compile": "f"}, settings), nprocs=2)
    return folder


def test_every_trainer_is_among_them() -> None:
    assert set(SETTINGS) == set(TRAINERS)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_the_same_networks(trained: Path, name: str) -> None:
    paths = [trained / f"{name}_rank{rank}.pt" for rank in (0, 1)]
    assert all(path.is_file() for path in paths), "an earlier trainer failed"
    first, second = (torch.load(path, weights_only=False) for path in paths)
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    assert first["batch"] == second["batch"] == 1, "half of the plan's batch each"
    assert first["own"] != second["own"], "each has its own samples"
    for network, weights in first["networks"].items():
        for key, weight in weights.items():
            torch.testing.assert_close(weight, second["networks"][network][key], msg=f"{network}: {key}")
    assert first["logged"] == second["logged"] == pytest.approx(sum(first["own"] + second["own"]) / 6)


def test_the_average_is_saved_as_the_network(trained: Path) -> None:
    state = torch.load(trained / "nnUNetTrainerFlareMeanTeacher_rank0.pt", weights_only=False)
    networks = state["networks"]
    assert any(not torch.equal(networks["network"][key], weight) for key, weight in networks["average"].items())
    for key, weight in state["saved"].items():
        assert torch.equal(weight, networks["average"][key]), key
