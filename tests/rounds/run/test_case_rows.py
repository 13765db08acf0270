"""A run's cases as rows of plain values."""

from __future__ import annotations

from pathlib import Path

from nnunet_flare.rounds.run.case_rows import case_rows
from nnunet_flare.rounds.run.labelled_case import LabelledCase, write_labelled_case
from nnunet_flare.rounds.run.ledger import Entry, write_round
from nnunet_flare.rounds.run.paths import RunPaths


def test_cases_that_a_single_model_labelled_have_their_volumes(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    nothing = {"score": 1.0, "mean_organ": None, "min_organ": None, "agreement": {}, "ignored": {}, "present": {}}
    known = {"round": 0, "role": "pseudo", "decision": "taken", "reason": "", "model": "", "recipe_hash": ""}
    write_round(paths, 0, [Entry(case="a", label_sha256="0", **known, **nothing)])
    volumes = {"liver": 1500.0, "spleen": 0.0}
    found = LabelledCase(agreement=dict.fromkeys(volumes), volume_mm3=volumes, members=1, label_sha256="0")
    write_labelled_case(paths.case(0, "a"), "a", 0, found)
    (row,) = case_rows(paths)
    assert (row["volume_ml_liver"], row["volume_ml_spleen"]) == (1.5, 0.0)
    assert row["agreement_liver"] is None
