"""What SECURITY.md says: no code out of files, no shell strings, no network, nothing written outside named folders."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_folders
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnunet_flare
from nnunet_flare.cli import predict, pseudolabel
from nnunet_flare.datasets import check_dataset
from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume, write_volume
from nnunet_flare.phantom import write_phantom
from nnunet_flare.rounds.run.unlabelled import safe_id

PACKAGE = Path(nnunet_flare.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

CODE_FROM_FILES = {
    "checkpoints.py: torch.load": "with --trust-checkpoint only; weights_only before that",
    "trainers/checkpoints.py: torch.load": "a training's own checkpoints, to resume it",
    "rounds/stages/arrays.py: pickle.load": "nnU-Net's pickles in nnUNet_preprocessed",
    "documents.py: yaml.load": "with SafeLoader or BaseLoader",
}
"""Every place that could run what a file holds, and why it may be there; each is a line of SECURITY.md."""

DANGEROUS = {
    "pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec",
    "numpy.load", "np.load", "joblib.load", "marshal.load", "shelve.open", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip

NETWORK = {"urllib", "http", "requests", "ftplib", "smtplib", "httpx", "aiohttp", "xmlrpc", "telnetlib", "boto3"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_files_are_opened_as_code_only_where_it_is_said() -> None:
    found = set()
    for path in SOURCES:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            is_safe = name == "torch.load" and any(
                k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
                for k in call.keywords
            )
            if name in DANGEROUS and not is_safe:
                found.add(f"{path.relative_to(PACKAGE).as_posix()}: {name}")
    assert found == set(CODE_FROM_FILES)


def test_no_command_goes_through_a_shell() -> None:
    for path in SOURCES:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            shells = [k for k in call.keywords if k.arg == "shell"]
            assert not shells, f"{path}, line {call.lineno}: {name}(shell=...)"


def test_nothing_opens_a_network_connection() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & NETWORK, f"{path}: {names}"
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"socket\.(?!gethostname)", text), f"{path}: uses sockets"


# ------------------------------------------------------------------ names that lead elsewhere


@pytest.mark.parametrize("case", ["../evil", "a/b", "/etc/evil", "..", ".hidden", "a\\b", "", "x/../../y"])
def test_a_case_id_of_dataset_json_that_leads_elsewhere_is_refused(tmp_path: Path, case: str) -> None:
    document = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
        "dataset": {case: {"images": ["a.nii.gz"], "label": "b.nii.gz"}},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    assert any("is not a plain file name" in line for line in check_dataset(tmp_path))


@pytest.mark.parametrize("case", ["../evil", "/etc/evil", ".."])
def test_a_case_id_of_flare_cases_that_leads_elsewhere_is_refused(tmp_path: Path, case: str) -> None:
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "numTraining": 0}
    (tmp_path / "dataset.json").write_text(json.dumps({**document, "file_ending": ".nii.gz"}))
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    (tmp_path / "flare_cases.json").write_text(json.dumps({"version": 1, "cases": {case: {"role": "labelled"}}}))
    assert any("are not in the dataset" in line for line in check_dataset(tmp_path))


@given(st.text(max_size=40))
def test_the_id_of_an_unlabelled_scan_is_a_plain_name(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?", safe_id(name))


def test_ids_of_reviews_must_be_cases_of_the_run(tmp_path: Path) -> None:
    from nnunet_flare.errors import InputError
    from nnunet_flare.rounds.run.decisions import read_reviews

    (tmp_path / "d.csv").write_text("case,decision\n../../evil,accept\n")
    with pytest.raises(InputError, match="is not an unlabelled case"):
        read_reviews(tmp_path / "d.csv", ["a"], ["liver"])


# ------------------------------------------------------------------ names in plans.json that could run a file

FOREIGN = """
import pathlib
from dynamic_network_architectures.architectures.unet import PlainConvUNet

pathlib.Path({marker!r}).write_text("this ran")

class Net(PlainConvUNet):
    pass

def entry(**anything):
    return Net

def touch(*anything, **more):
    return None
"""
"""A file of a model's folder: it leaves a marker when it is imported, whatever for."""

Poison = Callable[[dict[str, Any], dict[str, Any], Path], None]
"""Changes the plans and the configuration of a model in a folder."""


def network(name: str) -> Poison:
    def change(plans: dict[str, Any], configuration: dict[str, Any], folder: Path) -> None:
        configuration["architecture"]["network_class_name"] = name

    return change


def from_the_hub(plans: dict[str, Any], configuration: dict[str, Any], folder: Path) -> None:
    """What runs ``hubconf.py`` of the folder."""
    arguments = {"repo_or_dir": str(folder), "model": "entry", "source": "local"}
    configuration["architecture"] |= {"arch_kwargs": arguments, "_kw_requires_import": []}
    configuration["architecture"]["network_class_name"] = "torch.hub.load"


def layer(name: str, *, imported: bool = True) -> Poison:
    def change(plans: dict[str, Any], configuration: dict[str, Any], folder: Path) -> None:
        configuration["architecture"]["arch_kwargs"]["conv_op"] = name
        if not imported:
            configuration["architecture"]["_kw_requires_import"] = []

    return change


def configured(key: str, value: Any) -> Poison:
    def change(plans: dict[str, Any], configuration: dict[str, Any], folder: Path) -> None:
        configuration[key] = value

    return change


def planned(key: str, value: Any) -> Poison:
    def change(plans: dict[str, Any], configuration: dict[str, Any], folder: Path) -> None:
        plans[key] = value

    return change


UNET = "dynamic_network_architectures.architectures.unet"

POISONED: dict[str, tuple[Poison, str]] = {
    "hub": (from_the_hub, "torch.hub.load"),
    "network on the path": (network("foreign_net.Net"), "foreign_net.Net"),
    "function of a network's module": (network(f"{UNET}.torch.hub.load"), "torch.hub.load"),
    "layer as network": (network("torch.nn.Sequential"), "torch.nn.Sequential"),
    "layer through a network's module": (network(f"{UNET}.nn.Sequential"), "nn.Sequential"),
    "network that is a number": (network(3), "3"),  # type: ignore[arg-type]
    "layer on the path": (layer("foreign_net.touch"), "foreign_net.touch"),
    "layer that some trainers look up": (layer("foreign_net.touch", imported=False), "foreign_net.touch"),
    "function as layer": (layer("torch.nn.functional.conv3d"), "conv3d"),
    "module of a layer's module": (layer("torch.nn.modules.conv.torch.hub.load"), "torch.hub.load"),
    "normalisation": (configured("normalization_schemes", ["foreign_net.touch"]), "foreign_net.touch"),
    "normalisation that is a module": (configured("normalization_schemes", ["np"]), "np"),
    "preprocessor": (configured("preprocessor_name", "foreign_net.touch"), "foreign_net.touch"),
    "preprocessor that is a function": (configured("preprocessor_name", "crop_to_nonzero"), "crop_to_nonzero"),
    "resampling": (configured("resampling_fn_data", "foreign_net.touch"), "foreign_net.touch"),
    "resampling that is a function of another": (configured("resampling_fn_data", "join"), "join"),
    "reader": (planned("image_reader_writer", "foreign_net.touch"), "foreign_net.touch"),
    "reader that is a module": (planned("image_reader_writer", "os"), "os"),
    "label manager": (planned("label_manager", "foreign_net.touch"), "foreign_net.touch"),
    "label manager that is a module": (planned("label_manager", "np"), "np"),
    "planner": (planned("experiment_planner_used", "../foreign_net"), "../foreign_net"),
}


def model_folder(folder: Path, poison: Poison | None, *, trainer: str = "nnUNetTrainer") -> Path:
    """A model folder of stock nnU-Net whose plans were changed after its training, with the foreign files in it."""
    target = model_folders.write_model(folder / "nnUNetTrainer__nnUNetPlans__3d_fullres", trainer=trainer)
    marker = str(folder / "marker")
    for name in ("foreign_net.py", "hubconf.py"):
        (target / name).write_text(FOREIGN.format(marker=marker))
    plans = json.loads((target / "plans.json").read_text())
    if poison is not None:
        poison(plans, plans["configurations"]["3d_fullres"], target)
    (target / "plans.json").write_text(json.dumps(plans))
    return target


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    voxels = np.random.default_rng(0).normal(0, 300, (12, 40, 40)).astype(np.int16)
    write_volume(tmp_path / "scan_0000.nii.gz", Volume(voxels, (4.0, 2.0, 2.0)))
    return tmp_path / "scan_0000.nii.gz"


@pytest.mark.parametrize("name", POISONED)
def test_a_model_folder_runs_no_code_of_its_own(
    name: str, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison, named = POISONED[name]
    trainer = "nnUNetTrainerBN" if name == "layer that some trainers look up" else "nnUNetTrainer"
    model = model_folder(tmp_path, poison, trainer=trainer)
    monkeypatch.syspath_prepend(str(model))
    code = predict.main(["-i", str(scan), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"])
    error = capsys.readouterr().err
    assert not (tmp_path / "marker").exists()
    assert code == 2 and error.count("\n") == 1
    assert "plans.json" in error and named in error


@pytest.mark.parametrize("trainer", ["os", "../foreign_net", "foreign_net.Net", "nnUNetLogger"])
def test_a_checkpoint_names_no_trainer_that_is_none(
    trainer: str, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder(tmp_path, None, trainer=trainer)
    monkeypatch.syspath_prepend(str(model))
    assert predict.main(["-i", str(scan), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"]) == 2
    assert trainer in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "marker").exists()


def test_a_network_of_the_users_own_needs_the_flag(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunet_flare.images import read_labels
    from nnunet_flare.inference.predictor import FlarePredictor

    words = ["-i", str(scan), "-device", "cpu", "--precision", "fp32", "--backend", "torch"]
    own, stock = model_folder(tmp_path, network("foreign_net.Net")), model_folder(tmp_path / "stock", None)
    monkeypatch.syspath_prepend(str(own))
    assert predict.main([*words, "-o", str(tmp_path / "no"), "-m", str(own)]) == 2
    error = capsys.readouterr().err
    assert "foreign_net.Net" in error and "--trust-checkpoint" in error and not (tmp_path / "marker").exists()
    with pytest.raises(InputError, match=r"foreign_net\.Net"):
        FlarePredictor.from_model_folder(own)
    assert not (tmp_path / "marker").exists()
    assert predict.main([*words, "-o", str(tmp_path / "yes"), "-m", str(own), "--trust_checkpoint"]) == 0
    assert predict.main([*words, "-o", str(tmp_path / "same"), "-m", str(stock)]) == 0
    labels = [read_labels(tmp_path / name / "scan.nii.gz", "scan").array for name in ("yes", "same")]
    assert (tmp_path / "marker").exists() and np.array_equal(*labels)
    predictor = FlarePredictor.from_model_folder(own, trust_checkpoint=True, precision="fp32", backend="torch")
    assert np.array_equal(predictor.predict(scan), labels[0])


def test_networks_and_layers_of_the_known_packages_are_admitted() -> None:
    from nnunet_flare.trusted_names import check_network

    for name in (f"{UNET}.PlainConvUNet", f"{UNET}.ResidualEncoderUNet",
                 "nnunet_flare.networks.residual_unet.ResidualUNet"):  # fmt: skip
        plan = model_folders.plans()["configurations"]["3d_fullres"]
        plan["architecture"]["network_class_name"] = name
        plan["architecture"]["arch_kwargs"]["norm_op"] = None
        check_network(plan, "plans.json")


# ------------------------------------------------------------------ the loop on models and plans from elsewhere


@pytest.fixture
def dataset(tmp_path: Path, nnunet_folders: dict[str, Path]) -> Path:
    write_phantom(tmp_path / "data", labelled=2, unlabelled=2, test=0, size=(12, 16, 16), seed=1)
    (tmp_path / "data" / "nnUNet_raw" / "Dataset022_FLAREPhantom").rename(nnunet_folders["nnUNet_raw"] / "Dataset022_P")
    return nnunet_folders["nnUNet_raw"] / "Dataset022_P"


def start(tmp_path: Path, *words: str, settings: tuple[str, ...] = ("selection.rule=all",)) -> int:
    return pseudolabel.main(
        ["run", "-d", "22", "-u", str(tmp_path / "data" / "unlabelled"), "--recipe", "demo", "-device", "cpu",
         *words, "--set", "rounds=1", *settings]
    )  # fmt: skip


@pytest.mark.parametrize("how", ["--init_model", "given-model", "roi.model"])
def test_a_given_model_is_looked_at_before_anything_starts(
    how: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = model_folder(tmp_path, from_the_hub)
    labels = json.loads((dataset / "dataset.json").read_text())["labels"]
    document = json.loads((given / "dataset.json").read_text())
    (given / "dataset.json").write_text(json.dumps({**document, "labels": labels}))
    settings = {"--init_model": (), "given-model": ("planner=given-model",), "roi.model": (f"roi.model={given}",)}[how]
    words = () if how == "roi.model" else ("--init_model", str(given), "-f", "0")
    assert start(tmp_path, *words, settings=("selection.rule=all", *settings)) == 2
    error = capsys.readouterr().err
    assert "torch.hub.load" in error and "--trust" in error
    assert not (tmp_path / "marker").exists() and not list(tmp_path.rglob("run.json"))


def test_plans_that_lie_in_the_preprocessed_folder_are_looked_at_before_nnunet_reads_them(
    dataset: Path, tmp_path: Path, nnunet_folders: dict[str, Path]
) -> None:
    from nnunet_flare.recipes.load import load_recipe
    from nnunet_flare.rounds.check_input import Request
    from nnunet_flare.rounds.run.configurations import check_names
    from nnunet_flare.rounds.start import plan_run

    recipe = load_recipe("demo", {"rounds": "1", "members.count": "2"})
    run = plan_run(Request("22", tmp_path / "data" / "unlabelled", device="cpu"), recipe, nnunet_folders).run
    plans = model_folders.plans()
    from_the_hub(plans, plans["configurations"]["3d_fullres"], tmp_path)
    run.base.plans_file.parent.mkdir(parents=True, exist_ok=True)
    run.base.plans_file.write_text(json.dumps(plans))
    with pytest.raises(InputError, match=r"torch\.hub\.load.*--trust-checkpoint"):
        check_names(run, run.base)


@pytest.mark.parametrize(
    "setting", ["trainer=../../x", "final.trainer=a/b", "planner=os.system", "configuration=../3d_fullres"]
)
def test_a_recipe_names_no_class_that_leads_elsewhere(
    setting: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, settings=(setting,)) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err


def test_first_weights_that_are_a_program_are_refused_before_stock_nnunet_opens_them(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    class Program:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "marker",)

    torch.save({"network_weights": Program()}, tmp_path / "weights.pth")
    assert start(tmp_path, settings=(f"training.pretrained_weights={tmp_path / 'weights.pth'}",)) == 2
    assert "weights.pth" in capsys.readouterr().err and not (tmp_path / "marker").exists()


def test_a_reader_that_is_none_is_found_in_dataset_json(dataset: Path) -> None:
    document = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**document, "overwrite_image_reader_writer": "os"}))
    assert any("overwrite_image_reader_writer" in line for line in check_dataset(dataset))
    (dataset / "dataset.json").write_text(json.dumps({**document, "overwrite_image_reader_writer": "NibabelIO"}))
    assert check_dataset(dataset) == []


def test_plans_of_a_given_model_do_not_lead_out_of_the_preprocessed_folder(tmp_path: Path) -> None:
    from nnunet_flare.rounds.stages.given_plans import model_plans

    given = model_folder(tmp_path, planned("plans_name", "../../elsewhere"))
    with pytest.raises(InputError, match=r"plans_name is '\.\./\.\./elsewhere'"):
        model_plans(given)
