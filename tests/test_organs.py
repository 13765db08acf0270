"""The label sets of FLARE22 and FLARE23, and that errors carry what commands need."""

from __future__ import annotations

import pickle

import pytest

from nnunet_flare.errors import CaseError, FlareError, InputError, TaskError
from nnunet_flare.organs import FLARE22, FLARE23, LABEL_SETS, dataset_labels

OFFICIAL_TOLERANCES_MM = {
    "Liver": 5, "RK": 3, "Spleen": 3, "Pancreas": 5, "Aorta": 2, "IVC": 2, "RAG": 2, "LAG": 2, "Gallbladder": 2,
    "Esophagus": 3, "Stomach": 5, "Duodenum": 7, "LK": 3,
}  # fmt: skip
"""``label_tolerance`` of the challenge's evaluation script, in its order."""


def test_flare22_is_the_official_table() -> None:
    assert [organ.id for organ in FLARE22] == list(range(1, 14))
    assert {organ.short: organ.nsd_tolerance_mm for organ in FLARE22} == OFFICIAL_TOLERANCES_MM
    assert [organ.short for organ in FLARE22] == list(OFFICIAL_TOLERANCES_MM)


def test_flare23_adds_the_lesion() -> None:
    assert FLARE23[:13] == FLARE22
    assert (FLARE23[13].id, FLARE23[13].nsd_tolerance_mm, FLARE23[13].min_volume_mm3) == (14, 2, None)


@pytest.mark.parametrize("organs", LABEL_SETS.values(), ids=LABEL_SETS)
def test_names_are_unique_and_smallest_volumes_plausible(organs: tuple) -> None:
    assert len({organ.name for organ in organs}) == len({organ.short for organ in organs}) == len(organs)
    litres = {organ.name: organ.min_volume_mm3 / 1e6 for organ in organs if organ.min_volume_mm3 is not None}
    assert max(litres, key=litres.__getitem__, default="liver") == "liver"
    assert all(1e-3 < volume < 2 for volume in litres.values())


def test_later_years_score_organs_as_flare22_and_lesions_alone() -> None:
    for year in (24, 25, 26):
        assert LABEL_SETS[f"flare{year}-organs"] == FLARE22
        (lesion,) = LABEL_SETS[f"flare{year}-lesion"]
        assert (lesion.id, lesion.short, lesion.nsd_tolerance_mm, lesion.sole) == (1, "Lesion", 2, True)
    assert not any(organ.sole for organ in FLARE23)


def test_dataset_json_has_the_background_first() -> None:
    labels = dataset_labels(FLARE23)
    assert list(labels)[:2] == ["background", "liver"]
    assert list(labels.values()) == list(range(15))


def test_label_sets_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        LABEL_SETS["flare22"] = ()  # type: ignore[index]
    with pytest.raises(AttributeError):
        FLARE22[0].id = 2  # type: ignore[misc]


def test_errors_have_their_exit_codes() -> None:
    assert {kind: kind.exit_code for kind in (FlareError, InputError, CaseError, TaskError)} == {
        FlareError: 1, InputError: 2, CaseError: 1, TaskError: 1
    }  # fmt: skip


def test_a_case_error_crosses_processes_with_its_case() -> None:
    error = pickle.loads(pickle.dumps(CaseError("liver_7", "the file is empty")))
    assert (str(error), error.case, error.reason) == ("liver_7: the file is empty", "liver_7", "the file is empty")
