"""Scoring folders: the official table, cases missing on a side, geometry, failures, parallel workers."""

import csv
import json

import nibabel
import numpy as np
import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.measures import evaluate_folders
from nnunet_flare.evaluation.structures import structures_of
from nnunet_flare.evaluation.table import CaseRow, ScoreTable, read_csv
from nnunet_flare.images import Volume, write_labels
from nnunet_flare.images.orientation import Turn, turn_volume
from nnunet_flare.organs import FLARE22, FLARE23

RAS = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)


def scan(seed, direction=RAS):
    coarse = np.random.default_rng(seed).integers(0, 14, (3, 4, 5), dtype=np.uint8)
    return Volume(np.kron(coarse, np.ones((4, 4, 4), np.uint8)), (2.5, 0.8, 0.7), (11.0, -7.0, 3.0), direction)


def shifted(volume):
    return volume.with_array(np.roll(volume.array, 1, axis=1))


def put(folder, name, volume):
    write_labels(folder / f"{name}.nii.gz", volume.array, volume)


@pytest.fixture
def folders(tmp_path):
    """Three cases with their predictions."""
    for seed, name in enumerate(["case_c", "case_a", "case_b"]):
        put(tmp_path / "ref", name, scan(seed))
        put(tmp_path / "pred", name, shifted(scan(seed)))
    return tmp_path / "ref", tmp_path / "pred"


def test_the_table_has_the_official_columns_and_the_cases_in_order(folders, tmp_path):
    evaluate_folders(*folders, FLARE22, processes=1).write_csv(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    assert ",".join(rows[0]) == (
        "Name,Liver_DSC,RK_DSC,Spleen_DSC,Pancreas_DSC,Aorta_DSC,IVC_DSC,RAG_DSC,LAG_DSC,Gallbladder_DSC,Esophagus_DSC,"
        "Stomach_DSC,Duodenum_DSC,LK_DSC,Liver_NSD,RK_NSD,Spleen_NSD,Pancreas_NSD,Aorta_NSD,IVC_NSD,RAG_NSD,LAG_NSD,"
        "Gallbladder_NSD,Esophagus_NSD,Stomach_NSD,Duodenum_NSD,LK_NSD"
    )
    assert [row[0] for row in rows[1:]] == ["case_a.nii.gz", "case_b.nii.gz", "case_c.nii.gz"]
    assert all(float(cell) == round(float(cell), 4) for row in rows[1:] for cell in row[1:])


def test_workers_give_the_table_of_a_single_process(folders):
    alone = evaluate_folders(*folders, FLARE22, processes=1)
    assert evaluate_folders(*folders, FLARE22, processes=2).rows == alone.rows


def test_a_written_table_reads_back_as_it_was(folders, tmp_path):
    table = evaluate_folders(*folders, FLARE22, corrected=True, processes=1)
    table.write_csv(tmp_path / "out.csv")
    assert read_csv(tmp_path / "out.csv", structures_of(FLARE22)).rows == table.rows


def test_reading_a_table_of_other_labels_is_refused_with_both_columns(folders, tmp_path):
    evaluate_folders(*folders, FLARE23, processes=1).write_csv(tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"out\.csv.*--labels"):
        read_csv(tmp_path / "out.csv", structures_of(FLARE22))


@pytest.mark.parametrize("line", ["case.nii.gz,1.0,x", "case.nii.gz,1.0", "case.nii.gz,nan,1.0"])
def test_broken_cells_of_a_table_are_refused_with_their_line(tmp_path, line):
    (tmp_path / "out.csv").write_text(f"Name,Liver_DSC,Liver_NSD\n{line}\n")
    with pytest.raises(InputError, match="line 2"):
        read_csv(tmp_path / "out.csv", structures_of(FLARE22[:1]))


def test_flare22_lists_and_leaves_out_a_reference_without_prediction(folders):
    (folders[1] / "case_a.nii.gz").unlink()
    table = evaluate_folders(*folders, FLARE22, missing="skip", processes=1)
    assert [row.name for row in table.rows] == ["case_b.nii.gz", "case_c.nii.gz"]
    assert "case_a.nii.gz" in table.notes[0]


def test_flare23_stops_at_a_reference_without_prediction(folders):
    (folders[1] / "case_a.nii.gz").unlink()
    with pytest.raises(InputError, match=r"1 reference.*case_a\.nii\.gz"):
        evaluate_folders(*folders, FLARE23, missing="stop", processes=1)


def test_a_missing_prediction_can_score_zero(folders):
    (folders[1] / "case_a.nii.gz").unlink()
    table = evaluate_folders(*folders, FLARE22, missing="zero", processes=1)
    assert [row.name for row in table.rows] == ["case_a.nii.gz", "case_b.nii.gz", "case_c.nii.gz"]
    assert set(table.rows[0].dsc.values()) == set(table.rows[0].nsd.values()) == {0.0}


@pytest.mark.parametrize("missing, is_failure", [("skip", True), ("stop", False), ("zero", False)])
def test_a_prediction_without_reference_is_listed(folders, missing, is_failure):
    (folders[0] / "case_a.nii.gz").unlink()
    table = evaluate_folders(*folders, FLARE22, missing=missing, processes=1)
    assert "case_a.nii.gz" in table.notes[0]
    assert bool(table.failed) == is_failure


@pytest.mark.parametrize(
    "turn",
    [Turn((0, 1, 2), (True, False, False)), Turn((0, 1, 2), (True, True, True)), Turn((2, 0, 1), (False, True, False))],
)
def test_a_prediction_in_another_orientation_is_turned_by_its_header_and_said(folders, turn, caplog):
    expected = evaluate_folders(*folders, FLARE22, processes=1).rows
    put(folders[1], "case_b", turn_volume(shifted(scan(2)), turn))
    table = evaluate_folders(*folders, FLARE22, processes=1)
    assert table.rows == expected
    assert "case_b: prediction stored as" in caplog.text


def test_a_prediction_on_another_grid_is_set_aside_with_both_grids(folders):
    moved = scan(2)
    put(folders[1], "case_b", Volume(moved.array, moved.spacing_mm, (0.0, 0.0, 0.0), moved.direction))
    table = evaluate_folders(*folders, FLARE22, processes=1)
    assert [row.name for row in table.rows] == ["case_a.nii.gz", "case_c.nii.gz"]
    ((case, reason),) = table.failed
    assert case == "case_b" and "origin" in reason and "11.0" in reason


def test_lost_headers_can_be_ignored_as_the_official_script_does(folders):
    expected = evaluate_folders(*folders, FLARE22, processes=1).rows
    put(folders[1], "case_b", Volume(shifted(scan(2)).array, (1.0, 1.0, 1.0)))
    table = evaluate_folders(*folders, FLARE22, as_stored=True, processes=1)
    assert table.rows == expected and not table.failed


def test_another_shape_is_refused_even_as_stored(folders):
    put(folders[1], "case_b", Volume(scan(2).array[:-1], (1.0, 1.0, 1.0)))
    table = evaluate_folders(*folders, FLARE22, as_stored=True, processes=1)
    assert "(11, 16, 20)" in table.failed[0][1] and "(12, 16, 20)" in table.failed[0][1]


def test_an_unreadable_prediction_is_set_aside_and_the_others_are_scored(folders):
    (folders[1] / "case_b.nii.gz").write_bytes(b"not an image")
    table = evaluate_folders(*folders, FLARE22, processes=2)
    assert len(table.rows) == 2
    assert table.failed[0][0] == "case_b"


@pytest.mark.parametrize("side", [0, 1])
def test_missing_and_empty_folders_are_refused(folders, tmp_path, side):
    empty = tmp_path / "empty"
    for expected in ("no such folder", "no (references|predictions)"):
        sides = list(folders)
        sides[side] = empty
        with pytest.raises(InputError, match=expected):
            evaluate_folders(*sides, FLARE22)
        empty.mkdir(exist_ok=True)


def test_two_files_of_one_case_are_refused(folders):
    (folders[1] / "case_b.nii").write_bytes((folders[1] / "case_b.nii.gz").read_bytes())
    with pytest.raises(InputError, match="case_b"):
        evaluate_folders(*folders, FLARE22)


def test_single_files_are_a_pair_whatever_their_names(folders):
    table = evaluate_folders(folders[0] / "case_b.nii.gz", folders[1] / "case_b.nii.gz", FLARE22)
    assert [row.name for row in table.rows] == ["case_b.nii.gz"]


def table_of(values, organs=FLARE23, corrected=False):
    rows = []
    for place, case in enumerate(values):
        scores = {organ.id: value for organ, value in zip(organs, case, strict=True)}
        rows.append(CaseRow(f"case_{place}.nii.gz", scores, scores))
    return ScoreTable(structures_of(organs), tuple(rows), corrected)


def test_the_organ_mean_leaves_lesions_out_and_rounds_as_the_official_script():
    organs = (FLARE23[0], FLARE23[1], FLARE23[13])
    values = [[0.9000, 0.8000, 0.1], [0.9001, 0.8001, 0.2], [0.9000, 0.8001, 0.0]]
    # organ means 0.90003 and 0.80007: rounded first to 0.9000 and 0.8001, whose mean 0.85005 is rounded again
    assert table_of(values, organs).mean("DSC") == np.round(np.mean([0.9000, 0.8001]), 4)
    assert table_of([[0.90004, 0.80004, 0.1]], organs).mean("DSC") == 0.85
    assert table_of([[0.90004, 0.80009, 0.1]], organs).mean("DSC") == np.round((0.9 + 0.8001) / 2, 4)
    exact = np.mean([np.mean([0.9000, 0.9001, 0.9000]), np.mean([0.8000, 0.8001, 0.8001])])
    assert table_of(values, organs, corrected=True).mean("DSC") == pytest.approx(exact, abs=1e-12)


def test_the_summary_gives_mean_sd_median_and_names_the_worst_cases():
    values = np.array([[0.9], [0.5], [0.7], [0.1]])
    row = table_of(values, FLARE22[:1]).summary()[0]
    assert (row.structure, row.measure, row.cases) == ("Liver", "DSC", 4)
    assert row.mean == pytest.approx(0.55)
    assert row.sd == pytest.approx(np.std(values, ddof=1))
    assert row.median == pytest.approx(0.6)
    assert [name for name, _ in row.worst] == ["case_3.nii.gz", "case_1.nii.gz", "case_2.nii.gz"]


def test_the_json_holds_rules_scores_and_failures(folders, tmp_path):
    (folders[1] / "case_b.nii.gz").write_bytes(b"not an image")
    table = evaluate_folders(*folders, FLARE22, corrected=True, processes=1)
    table.write_json(tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["rules"] == "corrected"
    assert document["failed"][0]["case"] == "case_b"
    assert document["cases"][0]["DSC"]["liver"] == table.rows[0].dsc[1]
    assert len(document["summary"]) == 26


def place(folder, name, sform, qform=None):
    """The label map of a case with these matrices in its header."""
    image = nibabel.Nifti1Image(scan(2).array.transpose(2, 1, 0), sform)
    image.header.set_sform(sform, 2)
    image.header.set_qform(sform if qform is None else qform, 1)
    nibabel.save(image, folder / f"{name}.nii.gz")


def test_a_reference_that_the_libraries_read_differently_is_read_as_it_lies_on_the_predictions_grid(folders):
    """A prediction by a nibabel reader follows the sform; SimpleITK takes the reference's qform, x mirrored."""
    grid = np.diag([0.7, 0.8, 2.5, 1.0])
    grid[:3, 3] = 11.0, -7.0, 3.0
    mirrored = np.diag([-1.0, 1, 1, 1]) @ grid
    for prediction in (mirrored, grid):
        place(folders[0], "case_b", mirrored, grid)
        place(folders[1], "case_b", prediction)
        table = evaluate_folders(*folders, FLARE22, processes=1)
        row = next(row for row in table.rows if row.name == "case_b.nii.gz")
        assert set(row.dsc.values()) == {1.0} and not table.failed
        assert "reads the axes" in " ".join(table.notes)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: Volume(v.array, v.spacing_mm, (11.0, -7.0, 3.004), v.direction),
        lambda v: Volume(v.array, v.spacing_mm, v.origin, (-1.0, 0.0015, 0.0, -0.0015, -1.0, 0.0, 0.0, 0.0, 1.0)),
        lambda v: turn_volume(
            Volume(v.array, v.spacing_mm, (11.0, -7.0, 3.004), v.direction), Turn((1, 0, 2), (True, False, False))
        ),
    ],
)
def test_headers_that_are_rounded_differently_are_one_grid(folders, change):
    expected = evaluate_folders(*folders, FLARE22, processes=1)
    put(folders[1], "case_b", change(shifted(scan(2))))
    table = evaluate_folders(*folders, FLARE22, processes=1)
    assert not table.failed and table.rows == expected.rows
    assert "nearly the same grid" in " ".join(table.notes) and "nearly" not in " ".join(expected.notes)


def test_half_a_voxel_is_another_grid(folders):
    moved = scan(2)
    put(folders[1], "case_b", Volume(moved.array, moved.spacing_mm, (11.35, -7.0, 3.0), moved.direction))
    assert evaluate_folders(*folders, FLARE22, processes=1).failed[0][0] == "case_b"


def test_voxels_that_the_reference_ignores_count_neither_for_nor_against(tmp_path):
    from nnunet_flare.evaluation.structures import read_ignored, read_structures

    labels = {"background": 0, "organs": [1, 2], "spleen": 2, "ignore": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "regions_class_order": [1, 2]}))
    rng = np.random.default_rng(0)
    reference, prediction = (rng.integers(0, 3, (6, 8, 8), dtype=np.uint8) for _ in range(2))
    reference[3:] = 3
    for name, array in (("ref", reference), ("pred", prediction)):
        put(tmp_path / name, "case", Volume(array, (2.0, 1.0, 1.0)))
    sets = read_structures(str(tmp_path / "dataset.json"))
    ignored = read_ignored(str(tmp_path / "dataset.json"))
    assert ignored == 3 and read_ignored("flare22") is None
    row = evaluate_folders(
        tmp_path / "ref", tmp_path / "pred", sets, corrected=True, ignored=ignored, processes=1
    ).rows[0]
    for structure in sets:
        a, b = (np.isin(array[:3], structure.labels) for array in (reference, prediction))
        assert row.dsc[structure.id] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_organs_of_a_dataset_have_the_official_rules_however_they_are_spelled(tmp_path):
    from nnunet_flare.evaluation.structures import read_structures

    names = {"background": 0, "Liver": 1, "Right Kidney": 2, "AORTA": 3, "oesophagus": 4, "Tumour": 5, "bladder": 6}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": names}))
    found = read_structures(str(tmp_path / "dataset.json"), tolerance_mm=1)
    assert [one.nsd_tolerance_mm for one in found] == [5, 3, 2, 3, 1, 1]
    assert [one.name for one in found if one.labelled_slices_only] == ["AORTA", "oesophagus"]
    assert [one.short for one in found] == list(names)[1:]
