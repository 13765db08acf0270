"""The final model for stock nnU-Net: a folder, or the zip file that its install command takes."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.files import remove_leftovers, replacing, scratch_folder, write_json
from nnunet_flare.outputs import check_new, check_outputs, put_new
from nnunet_flare.rounds.model_card import model_card
from nnunet_flare.rounds.run.configurations import read_plans, resolve
from nnunet_flare.rounds.run.dataset import read_dataset
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph, is_done
from nnunet_flare.trainers.settings import KEY

TRAINER = "nnUNetTrainer"
CHECKPOINT = "checkpoint_final.pth"
LICENCE_UNKNOWN = (
    "Not given when this file was made (`export --license FILE`). Ask who trained the model before you pass it on; the "
    "licence of the data may forbid it."
)


@dataclass(frozen=True)
class StockModel:
    """A final model without a trace of this package: ``plans.json``, ``dataset.json`` and the checkpoint's content."""

    plans: dict[str, Any]
    dataset: dict[str, Any]
    checkpoint: dict[str, Any]


def stock_model(run: Run) -> StockModel:
    """The final model as stock's trainer would have saved it.

    The list of the training cases' files is left out: stock does not need it, and it names patients.

    Raises:
        InputError: as :func:`final_checkpoint`, and when its network is not one that the plans define.
    """
    from nnunet_flare.checkpoints import load_checkpoint

    source, final = final_checkpoint(run), run.rounds[-1]
    model = final.model
    name, path = final.base.configuration, model / "plans.json"
    plans = read_plans(path)
    shape = {"architecture": {"network_class_name": str}}
    network = resolve(plans, name, path, shape=shape)["architecture"]["network_class_name"]
    if network.startswith("nnunet_flare."):
        raise InputError(f"{model}: its network {network} is part of nnunet-flare; stock nnU-Net cannot build it")
    for configuration in plans["configurations"].values():
        configuration.pop(KEY, None)
    dataset = _without_files(read_dataset(model / "dataset.json"))
    checkpoint = dict(load_checkpoint(source))
    arguments = {**checkpoint["init_args"], "plans": plans}
    if isinstance(arguments.get("dataset_json"), dict):
        arguments["dataset_json"] = _without_files(arguments["dataset_json"])
    return StockModel(plans, dataset, {**checkpoint, "trainer_name": TRAINER, "init_args": arguments})


def final_checkpoint(run: Run) -> Path:
    """The checkpoint of the final training.

    Raises:
        InputError: when the final training is not done.
    """
    final = run.rounds[-1]
    source = final.model / "fold_all" / CHECKPOINT
    training = next(t for t in graph(run).values() if t.stage == "train" and t.round == final.number)
    if not is_done(run, training):  # a checkpoint may be there all the same, of a training that is to be done again
        raise InputError(
            f"{run.root}: the final training, {training.name}, is not done; see flare-pseudolabel status -o {run.root}"
        )
    if not source.is_file():
        raise InputError(f"{source}: missing; flare-pseudolabel retry -o {run.root} trains the final model again")
    return source


def _without_files(dataset: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dataset.items() if key != "dataset"}


def export_stock_model(run: Run, folder: Path) -> Path:
    """Write the final model under the name of stock's trainer, so that it works without this package.

    Raises:
        InputError: as :func:`stock_model`, and for a folder that holds something.
    """
    import torch

    check_new(folder, option="export --stock_model")
    model = stock_model(run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    with scratch_folder(folder.parent) as room:
        scratch = room / folder.name
        (scratch / "fold_all").mkdir(parents=True)
        write_json(scratch / "plans.json", model.plans)
        write_json(scratch / "dataset.json", model.dataset)
        with replacing(scratch / "fold_all" / CHECKPOINT) as temporary:
            torch.save(model.checkpoint, temporary)
        put_new(scratch, folder)
    return folder


def export_zip(run: Run, path: Path, *, licence: Path | None = None) -> Path:
    """Write the final model as one file that ``nnUNetv2_install_pretrained_model_from_zip`` takes, with its card.

    The optimiser's state is left out: it is half of a checkpoint, and only resuming the training needs it.

    Args:
        run: a run with a finished final training.
        path: a new ``.zip`` file.
        licence: text of the licence of the weights.

    Raises:
        InputError: as :func:`stock_model` and :func:`check_zip`.
    """
    import torch

    check_zip(path, licence=licence)
    model, final = stock_model(run), run.rounds[-1]
    text = None if licence is None else licence.read_text(encoding="utf-8", errors="replace")
    card = model_card(run, trainer=TRAINER, licence=LICENCE_UNKNOWN if text is None else "See LICENSE.txt.")
    weights = io.BytesIO()
    torch.save({key: value for key, value in model.checkpoint.items() if key != "optimizer_state"}, weights)
    folder = f"{run.settings.dataset}/{TRAINER}__{final.base.plans_name}__{final.configuration}"
    documents = {
        "README.md": card,
        "plans.json": json.dumps(model.plans, indent=2),
        "dataset.json": json.dumps(model.dataset, indent=2),
        **({} if text is None else {"LICENSE.txt": text}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in documents.items():
            archive.writestr(f"{folder}/{name}", content)
        archive.writestr(f"{folder}/fold_all/{CHECKPOINT}", weights.getbuffer())
    return path


def check_zip(path: Path, *, licence: Path | None = None) -> None:
    """Whether :func:`export_zip` may write there.

    Raises:
        InputError: for a wrong ending, an existing file, or a missing licence file.
    """
    if path.suffix.lower() != ".zip":
        raise InputError(f"export --zip {path}: expected a name that ends with .zip")
    if licence is not None and not licence.is_file():
        raise InputError(f"export --license {licence}: no such file")
    check_new(path, option="export --zip")
    check_outputs([path], [licence], option="export --zip")
