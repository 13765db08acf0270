"""A run that starts from given weights: plans with their network, or plans that are checked against them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from in_process import TINY_PLAN, TINY_TRAINING, do_all, phantom

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_pretrained import ARCH, network, write_nnssl

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.start import plan_run, start_run
from nnunet_flare.trainers.settings import TRUST_VARIABLE

BEFORE = {"training.pretrained_weights": "w.pth"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {**BEFORE, "training.pretrained_part": "half"},
            "pretrained_part: found 'half', expected one of all,",
        ),
        ({"training.pretrained_part": "encoder"}, "without training.pretrained_weights; give both"),
        ({"plan.network": "pretrained"}, "plan.network: found 'pretrained' without training.pretrained_weights"),
        ({**BEFORE, "plan.network": "pretrained", "plan.stages": "4"}, "network: found 'pretrained' beside stages"),
        (
            {**BEFORE, "final.plan.network": "pretrained"},
            "final.plan.network: only the rounds start from given weights",
        ),
        ({**BEFORE, "trainer": "nnUNetTrainer", "training.pretrained_part": "all"}, "nnUNetTrainer is a stock trainer"),
        ({"training.init_part": "all"}, "training.init_part: is set by the loop"),
        ({**BEFORE, "plan.network": "pretrained", "planner": "given-model"}, "takes the network of the given model"),
    ],
)
def test_keys_that_make_no_sense_together_are_refused(changes: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_recipe("noisy_student", changes)


def started(folder: Path, folders: dict[str, Path], *, part: str, trusted: bool = False, **changes: str) -> Run:
    source = write_nnssl(folder / "w.pth", network(heads=1, seed=1).state_dict())
    plan = {key: value for key, value in TINY_PLAN.items() if key in ("planner", "plan.spacing_mm")}
    keys = {"training.pretrained_weights": str(source), "training.pretrained_part": part}
    recipe = load_recipe("noisy_student", {**plan, **TINY_TRAINING, **keys, **changes})
    request = Request("22", folder / "unlabelled", device="cpu", trust_checkpoint=trusted)
    return start_run(plan_run(request, recipe, folders))


def test_a_run_takes_network_and_patch_of_self_supervised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=2, test=0)
    run = started(tmp_path, folders, part="encoder", **{"plan.network": "pretrained"})
    assert do_all(run, monkeypatch, until=lambda name: name.startswith("label")) == [
        "plan", "unlabelled", "build-r0", "train-r0-fall",
    ]  # fmt: skip
    configuration = read_json(run.plans_file)["configurations"]["3d_fullres"]
    assert configuration["architecture"]["arch_kwargs"] == ARCH
    assert configuration["patch_size"] == [16, 16, 16]
    settings = read_json(run.plans_file)["configurations"][run.round(0).configuration]["flare"]
    assert settings["init_part"] == "encoder" and settings["init_from"] == str(tmp_path / "w.pth")
    (log,) = (run.round(0).model / "fold_all").glob("training_log_*.txt")
    assert "Started from" in log.read_text() and "weights (encoder) of" in log.read_text()
    final = run.round(0).model / "fold_all" / "checkpoint_final.pth"
    assert torch.load(final, weights_only=False)["network_weights"].keys() == network().state_dict().keys()


def test_plans_of_another_network_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=1, test=0)
    run = started(tmp_path, folders, part="encoder", **{"plan.patch_size": "[16, 32, 32]", "plan.stages": "3"})
    with pytest.raises(InputError, match=r"w\.pth: its network differs.*missing there.*plan\.network=pretrained"):
        do_all(run, monkeypatch)
    assert not list(run.results.rglob("*.pth"))


def test_a_task_that_is_typed_trusts_the_weights_that_the_run_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run with --trust_checkpoint and --executor print: nothing but the run's folder says so to the trainer."""
    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=1, test=0)
    monkeypatch.setenv(TRUST_VARIABLE, "")
    run = started(tmp_path, folders, part="encoder", trusted=True, **{"plan.network": "pretrained"})
    do_all(run, monkeypatch, until=lambda name: name == "train-r0-fall")
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    torch.save({**content, "made_by": Path("lab")}, tmp_path / "w.pth")
    assert main(["task", "-o", str(run.root), "train-r0-fall"]) == 0
    assert (run.round(0).model / "fold_all" / "checkpoint_final.pth").is_file()
