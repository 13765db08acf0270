"""Task 1 of FLARE24 to FLARE26: one class, scored as the official script scores it, and what healthy scans show."""

import csv
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_flare.cli.evaluate import main
from nnunet_flare.errors import CaseError
from nnunet_flare.evaluation.measures import evaluate_case, evaluate_folders
from nnunet_flare.evaluation.structures import read_structures
from nnunet_flare.images import Volume, write_labels
from nnunet_flare.organs import FLARE23, LESION

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance

SPACING_MM = (2.5, 0.8, 0.8)
SHAPE = (8, 20, 20)


def by_the_rules(reference, prediction, spacing_mm):
    """(DSC, NSD) by the rules of FLARE24's task 1, spelled out."""
    reference, prediction = reference.transpose(2, 1, 0), prediction.transpose(2, 1, 0)
    truth, found = reference > 0, prediction > 0
    if prediction.max() > 1:
        return 0, 0
    if not truth.any() and not found.any():
        return 1, 1
    if truth.any() != found.any():
        return 0, 0
    dsc = 2 * np.count_nonzero(truth & found) / (np.count_nonzero(truth) + np.count_nonzero(found))
    if dsc < 0.2:
        return round(dsc, 4), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distances = surface_distance.compute_surface_distances(truth, found, tuple(spacing_mm)[::-1])
    return round(dsc, 4), round(surface_distance.compute_surface_dice_at_tolerance(distances, 2), 4)


def lesions(rng, *, most):
    """A map of up to ``most`` boxes of lesion, some of them at the border."""
    found = np.zeros(SHAPE, dtype=np.uint8)
    for _ in range(rng.integers(0, most + 1)):
        low = rng.integers(-2, np.array(SHAPE) - 1)
        high = low + rng.integers(2, 8, 3)
        found[tuple(slice(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True))] = 1
    return found


@given(seed=st.integers(0, 100_000), organs=st.sampled_from([0, 0, 0, 5]), most=st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_lesion_maps_score_by_the_official_rules(seed, organs, most):
    rng = np.random.default_rng(seed)
    reference = lesions(rng, most=most)
    prediction = np.roll(reference, tuple(rng.integers(-3, 4, 3)), (0, 1, 2)) | lesions(rng, most=most // 2)
    prediction[0, 0, : rng.integers(0, 3)] = organs
    spacing_mm = tuple(rng.choice([0.7, 1.0, 2.0, 3.0], 3))
    scores = evaluate_case(Volume(reference, spacing_mm), Volume(prediction, spacing_mm), LESION)
    assert (scores.dsc[1], scores.nsd[1]) == pytest.approx(by_the_rules(reference, prediction, spacing_mm), abs=1e-9)


@pytest.fixture
def folders(tmp_path):
    """Cases: found, missed, healthy and clean, healthy with 24 and with 6 voxels, and a map with organs in it."""
    box = np.zeros(SHAPE, dtype=np.uint8)
    box[2:5, 4:9, 4:9] = 1
    nothing, some, few, organs = (np.zeros(SHAPE, dtype=np.uint8) for _ in range(4))
    some[1:3, 2:5, 2:6], few[3, 3, 2:8] = 1, 1
    organs[...] = box
    organs[6, 10:15, 10:15], organs[7, 0, 0] = 5, 3
    cases = {
        "found": (box, np.roll(box, 1, 2)),
        "missed": (box, nothing),
        "healthy_clean": (nothing, nothing),
        "healthy_some": (nothing, some),
        "healthy_few": (nothing, few),
        "organs": (box, organs),
    }
    for case, maps in cases.items():
        for folder, labels in zip(("ref", "pred"), maps, strict=True):
            write_labels(tmp_path / folder / f"{case}.nii.gz", labels, Volume(labels, SPACING_MM))
    return tmp_path


def rows(path):
    with open(path, newline="") as stream:
        return {row.pop("Name").removesuffix(".nii.gz"): row for row in csv.DictReader(stream)}


def score(folders, *words):
    command = ["-ref", str(folders / "ref"), "-pred", str(folders / "pred"), "-o", str(folders / "o.csv"), "-np", "1"]
    return main([*command, *words])


@pytest.mark.parametrize("labels", ["flare24-lesion", "flare25-lesion", "flare26-lesion"])
def test_the_table_has_the_official_columns_and_the_score_of_a_map_with_organs_is_explained(folders, capsys, labels):
    assert score(folders, "--labels", labels) == 0
    assert (folders / "o.csv").read_text().splitlines()[0] == "Name,Lesion_DSC,Lesion_NSD"
    table = {
        case: (float(row["Lesion_DSC"]), float(row["Lesion_NSD"])) for case, row in rows(folders / "o.csv").items()
    }
    assert table["healthy_clean"] == (1, 1) and table["found"] == (0.8, 1.0)
    assert {case for case, pair in table.items() if pair == (0, 0)} == {
        "missed",
        "healthy_some",
        "healthy_few",
        "organs",
    }
    said = capsys.readouterr()
    assert "organs: the prediction holds [3, 5], and lesion is 1 alone; such a label map scores 0" in said.err
    assert json.loads((folders / "o.json").read_text())["notes"][0].startswith("organs: ")


def test_false_positives_on_healthy_scans_stand_beside_the_scores(folders, capsys):
    assert score(folders, "--labels", "flare24-lesion") == 0
    voxel_ml = 2.5 * 0.8 * 0.8 / 1000
    assert rows(folders / "o_healthy.csv") == {
        "healthy_clean": {"Lesion_FP_ml": "0.0000"},
        "healthy_few": {"Lesion_FP_ml": f"{6 * voxel_ml:.4f}"},
        "healthy_some": {"Lesion_FP_ml": f"{24 * voxel_ml:.4f}"},
    }
    (row,) = json.loads((folders / "o.json").read_text())["healthy"]
    assert (row["structure"], row["scans"], row["with_any"]) == ("Lesion", 3, 2)
    assert row["share"] == pytest.approx(2 / 3) and row["mean_ml"] == pytest.approx(10 * voxel_ml)
    assert row["largest_case"] == "healthy_some.nii.gz" and row["largest_ml"] == pytest.approx(24 * voxel_ml)
    said = capsys.readouterr().out
    assert "Lesion: 2 of 3 scans without it in the reference have false positives (66.7%), 0.0160 ml on average" in said


def test_false_positives_of_an_earlier_call_do_not_stay_beside_other_scores(folders):
    assert score(folders, "--labels", "flare24-lesion") == 0 and (folders / "o_healthy.csv").is_file()
    assert score(folders, "--labels", "flare24-organs") == 0
    assert (folders / "o_summary.csv").is_file() and not (folders / "o_healthy.csv").exists()


def test_a_table_of_names_alone_is_somebody_elses(folders):
    (folders / "o_healthy.csv").write_text("Name\nvolunteer_1\n")
    assert score(folders, "--labels", "flare24-organs") == 0
    assert (folders / "o_healthy.csv").read_text() == "Name\nvolunteer_1\n"


@pytest.mark.parametrize("other, labels", [("healthy", "flare24-lesion"), ("summary", "flare24-organs")])
def test_scores_of_the_name_of_a_further_table_are_neither_replaced_nor_removed(folders, capsys, other, labels):
    """As the scores of healthy scans, which somebody called scores_healthy.csv, beside scores.csv."""
    assert score(folders, "--labels", "flare24-lesion", "-o", str(folders / f"o_{other}.csv")) == 0
    before = (folders / f"o_{other}.csv").read_text()
    assert score(folders, "--labels", labels) == 2 and not (folders / "o.csv").exists()
    assert f"o_{other}.csv, which belongs to it, exists and holds something else" in capsys.readouterr().err
    if other == "healthy":
        assert score(folders, "--labels", "flare24-organs") == 0 and (folders / "o.csv").exists()
    assert (folders / f"o_{other}.csv").read_text() == before


def test_a_scan_with_organs_and_no_lesion_is_healthy_too():
    reference = np.ones(SHAPE, dtype=np.uint8)
    prediction = reference.copy()
    prediction[0, 0, :5] = 14
    scores = evaluate_case(Volume(reference, SPACING_MM), Volume(prediction, SPACING_MM), FLARE23)
    assert scores.false_positive_ml == {14: pytest.approx(5 * 1.6 / 1000)}
    assert not evaluate_case(Volume(prediction, SPACING_MM), Volume(reference, SPACING_MM), FLARE23).false_positive_ml


def test_corrected_rules_pass_over_organs_in_the_map(folders):
    assert score(folders, "--labels", "flare24-lesion", "--corrected") == 0
    assert float(rows(folders / "o.csv")["organs"]["Lesion_DSC"]) == 1


def test_a_reference_with_organs_is_set_aside_with_its_values(folders, capsys):
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[2, 2, 2:5] = 1, 2, 9
    write_labels(folders / "ref" / "found.nii.gz", labels, Volume(labels, SPACING_MM))
    assert score(folders, "--labels", "flare24-lesion") == 1
    assert "not scored: found: the reference holds [2, 9], expected 0 and 1 (lesion)" in capsys.readouterr().err
    with pytest.raises(CaseError, match="holds"):
        evaluate_case(Volume(labels, SPACING_MM), Volume(labels, SPACING_MM), LESION)


def test_a_missing_prediction_is_left_out_as_by_the_script(folders):
    (folders / "pred" / "missed.nii.gz").unlink()
    assert score(folders, "--labels", "flare26-lesion") == 0
    assert "missed" not in rows(folders / "o.csv")


@pytest.mark.parametrize("labels", ["flare24-organs", "flare25-organs", "flare26-organs"])
def test_organs_of_later_years_score_as_those_of_flare22(folders, labels):
    assert read_structures(labels) == read_structures("flare22")
    tables = []
    for name in ("flare22", labels):
        tables.append(
            evaluate_folders(folders / "ref", folders / "pred", read_structures(name), processes=1).csv_text()
        )
    assert tables[0] == tables[1] and "Liver_DSC" in tables[0]
