"""A given model of other labels (``--init_map``): its classes become the dataset's, or it is refused."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from in_process import do_all, phantom, started

from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.fusion.ids import IdMap
from nnunet_flare.images import read_labels
from nnunet_flare.inference.core import MembersPrediction
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.stages.mapped import MappedLabeller, check_id_map

THEIRS = {"background": 0, "spleen": 1, "kidney_left": 2, "kidney_right": 3, "liver_left": 4, "liver_right": 5}
OURS = {"background": 0, "liver": 1, "spleen": 2}
IDS = {1: 2, 2: 0, 3: 0, 4: 1, 5: 1}


def id_map(folder: Path, ids: dict[int, int], *, others: str = "refuse") -> str:
    path = folder / "map.yaml"
    path.write_text(yaml.safe_dump({"name": "theirs", "ids": ids, "others": others}))
    return str(path)


def check(name: str, *, theirs: Any = THEIRS, recipe: str = "distill", **changes: str) -> None:
    check_id_map(name, theirs, OURS, load_recipe(recipe, changes), where="--init_model model")


def test_a_map_of_every_class_is_taken(tmp_path: Path) -> None:
    check(id_map(tmp_path, IDS))
    check(id_map(tmp_path, {1: 2, 4: 1, 5: 1}, others="background"))


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ({1: 2, 4: 1, 5: 1}, r"does not list \{'kidney_left': 2, 'kidney_right': 3\} of --init_model model"),
        ({**IDS, 4: 7}, r"maps to \[7\], which are not labels of the dataset"),
        ({**IDS, 1: 0}, "does not know spleen, so its pseudo-labels would teach that they are absent"),
    ],
)
def test_a_map_with_gaps_is_refused(tmp_path: Path, ids: dict[int, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check(id_map(tmp_path, ids))


def test_a_model_of_regions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one whole number each"):
        check(id_map(tmp_path, IDS), theirs={"background": 0, "all": [1, 2]})


@pytest.mark.parametrize(
    ("recipe", "changes", "says"),
    [
        ("distill", {"final.trainer": "nnUNetTrainerFlareDistill"}, "nnUNetTrainerFlareDistill needs the model's own"),
        ("uncertainty", {"final.start": "member"}, "final.start=member needs the model's own classes"),
    ],
)
def test_what_needs_the_models_own_classes_is_refused(tmp_path: Path, recipe: str, changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check(id_map(tmp_path, IDS), recipe=recipe, **changes)


@dataclass
class FakeModel:
    """Predicts fixed probabilities; two members."""

    softmax: np.ndarray
    plans_manager: Any = None
    configuration_manager: Any = None

    def predict_members(self, data: np.ndarray, *, only: Any = None) -> MembersPrediction:
        assert only is None, "its own classes are not the dataset's"
        labels = self.softmax.argmax(0).astype(np.uint8)
        return MembersPrediction([labels, np.zeros_like(labels)], self.softmax)


def test_classes_of_one_organ_are_added_up() -> None:
    softmax = np.random.default_rng(1).random((6, 2, 3, 4), np.float32)
    softmax /= softmax.sum(0)
    labeller = MappedLabeller(FakeModel(softmax), IdMap("theirs", IDS, True), SimpleNamespace(num_segmentation_heads=3))
    found = labeller.predict_members(np.zeros((1, 2, 3, 4), np.float32))
    background = softmax[0] + softmax[2] + softmax[3]
    np.testing.assert_allclose(found.mean_softmax, [background, softmax[4] + softmax[5], softmax[1]], rtol=1e-6)
    expected = np.vectorize({0: 0, **IDS}.get)(softmax.argmax(0))
    np.testing.assert_array_equal(found.labels[0], expected)
    assert found.labels[0].dtype == np.uint8 and not found.labels[1].any()
    only_liver = labeller.predict_members(np.zeros((1, 2, 3, 4), np.float32), only=[1])
    np.testing.assert_allclose(only_liver.mean_softmax[0], background + softmax[1], rtol=1e-6)
    assert not only_liver.mean_softmax[2].any() and set(np.unique(only_liver.labels[0])) <= {0, 1}


def test_a_given_model_labels_through_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights twice: as a model of the dataset's labels, and of the same labels under other ids."""
    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=1, test=1)
    held_out = {f"eval_{kind}": tmp_path / "test" / kind for kind in ("images", "labels")}
    plain = started(tmp_path, folders, "noisy_student", {}, **held_out)
    do_all(plain, monkeypatch, until=lambda name: name.startswith("select"))
    copy = tmp_path / plain.round(0).model.name
    shutil.copytree(plain.round(0).model, copy)
    document = read_json(copy / "dataset.json")
    last = max(document["labels"].values())
    there = {organ: i and i % last + 1 for organ, i in document["labels"].items()}
    write_json(copy / "dataset.json", {**document, "labels": there})
    ids = {i: i % last + 1 for i in range(1, last + 1)}
    settings = {"planner": "given-model", **dict.fromkeys(("plan.spacing_mm", "plan.patch_size"), "null")}
    settings |= dict.fromkeys(("plan.base_features", "plan.stages"), "null")
    with pytest.raises(InputError, match="give --init_map with their ids, or start only from its weights"):
        started(tmp_path, folders, "distill", settings, init_model=copy)
    mapped = started(
        tmp_path, folders, "distill", settings, init_model=copy, init_map=id_map(tmp_path, ids), **held_out
    )
    do_all(mapped, monkeypatch, until=lambda name: name.startswith("select"))
    (case,) = (path.name for path in plain.paths.label(0, "x", ".nii.gz").parent.glob("*.nii.gz"))
    for folder in (plain.paths.label(0, "x", ".nii.gz").parent, plain.paths.evaluation(0)):
        other = mapped.root / folder.relative_to(plain.root)
        for path in folder.glob("*.nii.gz"):
            before, after = (read_labels(place / path.name, case).array for place in (folder, other))
            expected = np.vectorize({0: 0, **ids}.get)(before)
            assert before.any()
            np.testing.assert_array_equal(after, expected, err_msg=path.name)
