"""The recipe partial: a loop over the organs, one over the tumour, and the union of both with the annotations."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from in_process import FOLDERS, TINY_PLAN, do_all, phantom, started

from nnunet_flare.cases import Case, read_table, write_table
from nnunet_flare.errors import CaseError, InputError, TaskError
from nnunet_flare.files import read_json
from nnunet_flare.images import read_labels, read_volume, write_labels, write_volume
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.report import planes
from nnunet_flare.report.page import write_report
from nnunet_flare.report.planes import read_scene
from nnunet_flare.rounds.export import export_dataset
from nnunet_flare.rounds.run import loops
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run, load_run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, read_list
from nnunet_flare.rounds.stages import union
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.stages.build_loops import build_loop_round
from nnunet_flare.rounds.stages.label import _load_labeller
from nnunet_flare.rounds.stages.preprocess import preprocess_again
from nnunet_flare.rounds.stages.replanned import LabelledScan, preprocess_scans
from nnunet_flare.rounds.status import status

ORGANS, TUMOUR = tuple(range(1, 14)), 14


def test_the_papers_numbers() -> None:
    recipe = load_recipe("partial")
    assert recipe.trainer == "nnUNetTrainerFlarePartial" and recipe.selection.rule == "all"
    assert [loop.ids(range(1, 15)) for loop in recipe.loops] == [ORGANS, (TUMOUR,)]
    assert recipe.final_round == 4, "two rounds of each loop, then the union"
    assert [recipe.member_folds(number) for number in range(5)] == [["all"]] * 5
    assert (recipe.predict.step_size, recipe.predict.tta) == (0.5, "mirror")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trainer": "nnUNetTrainerFlareST"},
            "trainer: found 'nnUNetTrainerFlareST', expected nnUNetTrainerFlarePartial",
        ),
        ({"final.trainer": "nnUNetTrainerFlareST"}, "final.trainer: found 'nnUNetTrainerFlareST'"),
        (
            {"loops": "[{name: a, organs: [1]}, {name: a, organs: [2]}]"},
            "loops: found .'a', 'a'., expected different names",
        ),
        ({"loops": "[{name: a, organs: [1]}, {name: b}]"}, "loop b: expected either 'organs' or 'all_but'"),
        ({"selection.rule": "[all, all, round-change]", "members.count": "2"}, "'round-change' for round 2"),
        ({"stop.patience": "1", "members.count": "2"}, "stop.patience: found 1, expected none"),
        ({"fusion.teachers": "[a, b, c]", "fusion.id_maps": "[btcv, amos]"}, "fusion.id_maps: found"),
    ],
)
def test_what_loops_cannot_have_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("partial", settings)


def test_teachers_need_loops() -> None:
    with pytest.raises(InputError, match=r"fusion.teachers: only the union of several loops"):
        load_recipe("uncertainty", {"fusion.teachers": "[a]"})


def case_names(folder: Path) -> list[str]:
    return sorted(p.name[: -len(".nii.gz")] for p in (folder / "labelsTr").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The recipe on a phantom with lesions, one round per loop pair, one process, interrupted in the middle.

    Of eight cases with labels three are complete, five partial; one of them has the liver alone.
    """
    folder = tmp_path_factory.mktemp("partial")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=3, partial=5, lesions=True, unlabelled=3, test=1)
        raw = folders["nnUNet_raw"] / "Dataset022_FLAREPhantom"
        table = dict(read_table(raw / "flare_cases.json").cases)
        first = next(case for case, entry in table.items() if entry.role == "partial")
        volume = read_labels(raw / "labelsTr" / f"{first}.nii.gz")
        write_labels(raw / "labelsTr" / f"{first}.nii.gz", np.where(volume.array == 1, 1, 0).astype(np.uint8), volume)
        write_table(raw / "flare_cases.json", {**table, first: Case("partial", (1,))})
        teacher = folder / "teacher"
        for path in sorted((folder / "unlabelled_truth").iterdir())[:2]:
            truth = read_labels(path)
            write_labels(teacher / path.name, np.where(truth.array > 13, 0, truth.array).astype(np.uint8), truth)
        settings = {"fusion.teachers": f"[{teacher}]"}
        run = started(folder, folders, "partial", settings)
        do_all(run, monkeypatch, until=lambda name: name.startswith("label"))
        leave_arrays_of_an_earlier_run(run)
        do_all(run, monkeypatch, until=lambda name: name == "build-r3")
        assert "build-r3" in do_all(run, monkeypatch)
    return run


def scans_that_lack_organs(run: Run) -> list[UnlabelledCase]:
    return loops.training_scans(run, ORGANS)


def leave_arrays_of_an_earlier_run(run: Run) -> None:
    """It had the scans of two partial cases unlabelled: one mirrored and brighter, one that could not be read."""
    first, second = scans_that_lack_organs(run)[:2]
    scan, mirrored = read_volume(Path(first.source)), run.root / "mirrored.nii.gz"
    write_volume(mirrored, scan.with_array(np.ascontiguousarray(scan.array[:, ::-1]) + 100))
    preprocess_again(run, UnlabelledCase(first.case, str(mirrored), (str(mirrored),), 1))
    with pytest.raises(CaseError):
        preprocess_again(run, UnlabelledCase(second.case, "gone.nii.gz", ("gone.nii.gz",), 1))


def table_of(run: Run, number: int) -> dict[str, Case]:
    return dict(read_table(run.preprocessed / f"flare_cases.{run.round(number).configuration}.json", strict=True).cases)


def test_a_loop_starts_with_what_is_annotated_of_its_organs(finished: Run) -> None:
    truth = loops.true_cases(finished)
    organs, tumour = table_of(finished, 0), table_of(finished, 2)
    for case, entry in truth.items():
        known = set(range(1, 15)) if entry.role == "labelled" else set(entry.annotated or ())
        assert (organs[case].role == "partial") == bool(known & set(ORGANS))
        if organs[case].role == "partial":
            assert set(organs[case].annotated or ()) == known & set(ORGANS)
        assert tumour[case] == (Case("partial", (TUMOUR,)) if TUMOUR in known else Case("unlabelled"))
    plans = read_json(finished.plans_file)["configurations"]
    assert "data_identifier" not in plans[finished.round(2).configuration], "no pseudo-label yet: the data as it is"


def test_pseudo_labels_fill_only_organs_that_nobody_annotated(finished: Run) -> None:
    truth = loops.true_cases(finished)
    lacking = [case for case, entry in truth.items() if entry.role == "partial" and set(entry.annotated) & set(ORGANS)]
    lacking = [case for case in lacking if not set(ORGANS) <= set(truth[case].annotated)]
    assert lacking
    for case in lacking:
        entry = table_of(finished, 1)[case]
        annotated = loops.annotated_of(truth[case], ORGANS)
        assert entry.role == "partial" and entry.annotated == ORGANS and entry.validated == annotated
        merged = read_array(finished.round(1).data / f"{case}_seg.b2nd")[0]
        true = read_array(finished.base_data / f"{case}_seg.b2nd")[0]
        pseudo = read_array(finished.paths.training_label(0, case))[0]
        for organ in annotated:
            np.testing.assert_array_equal(merged == organ, true == organ)
        elsewhere = true <= 0
        for organ in set(ORGANS) - set(annotated):
            np.testing.assert_array_equal((merged == organ)[elsewhere], (pseudo == organ)[elsewhere])


def test_a_scan_that_was_annotated_after_an_earlier_run_had_it_unlabelled_is_labelled_as_it_is_now(
    finished: Run, tmp_path: Path
) -> None:
    first, second = scans_that_lack_organs(finished)[:2]
    decisions = {entry.case: entry for entry in read_decisions(finished.paths, 0)}
    for scan in (first, second):
        assert decisions[scan.case].decision == "taken", decisions[scan.case].reason
        assert table_of(finished, 1)[scan.case].annotated == ORGANS
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(planes, "_in_hu", lambda array, *_: array)
        shown = read_scene(finished, 0, first.case).scan
    now = read_array(finished.base_data / f"{first.case}.b2nd")[0]
    assert sorted(shown.ravel()) == sorted(now.ravel()), "the picture is of the scan that was labelled"
    label = finished.paths.label(0, first.case, ".nii.gz")
    anew = LabelledScan(first.case, first.images, label, "label")  # for a final model of other plans
    assert preprocess_scans(finished, finished.final_base, tmp_path / "data", [anew]) == {}


def test_a_tumours_absence_in_scans_that_nobody_searched_is_left_open(finished: Run) -> None:
    table = table_of(finished, 4)
    unlabelled = [entry.case for entry in read_decisions(finished.paths, 4) if entry.role == "pseudo"]
    for case in unlabelled:
        if case in table:
            assert table[case].annotated == ORGANS and table[case].positive == (TUMOUR,)
    searched = [c for c, e in loops.true_cases(finished).items() if e.role == "labelled" or TUMOUR in e.annotated]
    assert all(TUMOUR not in table[case].positive for case in searched)


def test_labels_of_a_loop_hold_its_organs_alone_and_others_count_as_background(finished: Run) -> None:
    assert {p.name for p in (finished.root / "labels").iterdir()} == {"r0", "r1", "r2", "r3", "r4"}
    for number, allowed in ((0, {0, *ORGANS}), (3, {0, TUMOUR})):
        for path in (finished.root / "labels" / f"r{number}").iterdir():
            assert set(np.unique(read_labels(path).array)) <= allowed
    case = next(entry.case for entry in read_decisions(finished.paths, 3) if entry.role == "pseudo")
    data = read_array(finished.unlabelled_data / f"{case}.b2nd")
    predictor = _load_labeller(finished, finished.round(3))
    softmax = predictor.predict_members(data).mean_softmax
    merged = predictor.predict_members(data, only=[TUMOUR])
    others = softmax[:TUMOUR].sum(0)
    np.testing.assert_allclose(merged.mean_softmax[0], others, atol=1e-5)
    assert not merged.mean_softmax[1:TUMOUR].any()
    np.testing.assert_array_equal(merged.labels[0] == TUMOUR, softmax[TUMOUR] > others)


def test_the_union_takes_tumour_over_organ_and_the_annotation_over_all(finished: Run) -> None:
    truth = loops.true_cases(finished)
    entries = {entry.case: entry for entry in read_decisions(finished.paths, 4)}
    assert any(entry.decision == "taken" for entry in entries.values())
    teacher = union.teacher_maps(Path(finished.recipe.fusion.teachers[0]))
    for case, entry in entries.items():
        if entry.decision != "taken":
            continue
        made = read_labels(finished.paths.label(4, case, ".nii.gz")).array
        organ, tumour = (
            read_labels(path).array if (path := finished.paths.label(n, case, ".nii.gz")).is_file() else None
            for n in (1, 3)
        )
        annotated = loops.annotated_of(truth[case], range(1, 15)) if case in truth else ()
        if case in truth:
            true = read_labels(finished.raw / "labelsTr" / f"{case}.nii.gz").array
            for each in annotated:
                np.testing.assert_array_equal(made == each, true == each)
        if case in teacher and case not in truth:
            taught = read_labels(teacher[case]).array
            np.testing.assert_array_equal(made == TUMOUR, tumour == TUMOUR)
            rest = tumour != TUMOUR
            np.testing.assert_array_equal(made[rest], np.where(taught == organ, organ, 15)[rest])
        if case not in teacher and case not in truth:
            np.testing.assert_array_equal(made, np.where(tumour == TUMOUR, TUMOUR, organ))
    configuration = read_json(finished.plans_file)["configurations"][finished.round(4).configuration]
    assert configuration["flare"]["ignore_label"] == 15


def test_a_scan_that_was_replaced_after_its_last_loop_is_not_united_with_its_old_label(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run on the dataset has preprocessed it again."""
    before, folder = finished.root.parents[2], tmp_path / "copy"
    shutil.copytree(before, folder, symlinks=True)
    for path in folder.glob("nnUNet_*/Dataset022_FLAREPhantom/**/*.json"):
        path.write_text(path.read_text().replace(str(before), str(folder)))
    for name in FOLDERS:
        monkeypatch.setenv(name, str(folder / name))
    run = load_run(folder / finished.root.relative_to(before))
    build_loop_round(run, run.final)
    case = next(entry.case for entry in read_decisions(run.paths, 3) if entry.role == "pseudo")
    scan, other = next(s for s in read_list(run.paths.unlabelled) if s.case == case), tmp_path / "other.nii.gz"
    volume = read_volume(Path(scan.images[0]))
    write_volume(other, volume.with_array(np.ascontiguousarray(volume.array[:, ::-1])))
    preprocess_again(run, UnlabelledCase(case, str(other), (str(other),), 1))
    with pytest.raises(TaskError, match=rf"their scans, are damaged or changed since they were judged \({case}\)"):
        build_loop_round(run, run.final)


def test_the_final_training_data_is_the_resampled_union(finished: Run) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    case = next(e.case for e in read_decisions(finished.paths, 4) if e.decision == "taken" and e.role == "pseudo")
    plans = PlansManager(str(finished.plans_file))
    manager = plans.get_configuration("3d_fullres")
    scan, label = finished.raw / "imagesUn" / f"{case}_0000.nii.gz", finished.paths.label(4, case, ".nii.gz")
    document = read_json(finished.raw / "dataset.json")
    data, seg, _ = manager.preprocessor_class(verbose=False).run_case([str(scan)], str(label), plans, manager, document)
    np.testing.assert_array_equal(read_array(finished.round(4).data / f"{case}.b2nd"), data)
    made = read_array(finished.round(4).data / f"{case}_seg.b2nd")
    # Stock marks what lies outside the scan's nonzero voxels before it resamples, we do so afterwards.
    assert (np.maximum(made, 0) != np.maximum(seg, 0)).mean() < 1e-3
    assert (finished.round(4).model / "fold_all" / "checkpoint_final.pth").is_file()


def test_the_final_round_leaves_the_run_as_a_plain_dataset_and_a_loops_round_does_not(finished: Run) -> None:
    with pytest.raises(InputError, match=r"export --round 2: belongs to a loop"):
        export_dataset(finished, 2, 601)
    target = export_dataset(finished, None, 601)
    document = read_json(target / "dataset.json")
    taken = {e.case for e in read_decisions(finished.paths, 4) if e.decision == "taken"}
    labelled = {case for case, entry in loops.true_cases(finished).items()}
    assert set(case_names(target)) == taken | labelled and document["numTraining"] == len(taken | labelled)
    assert document["labels"]["ignore"] == 15
    for case in taken:
        made = read_labels(finished.paths.label(4, case, ".nii.gz")).array
        np.testing.assert_array_equal(read_labels(target / "labelsTr" / f"{case}.nii.gz").array, made)
    assert dict(read_table(target / "flare_cases.json").cases) == table_of(finished, 4)


def test_status_and_report_know_the_loops(finished: Run, caplog) -> None:
    text = status(finished)
    assert "loops: organs r0 to r1, tumour r2 to r3, then their union" in text
    union_row = next(line.split() for line in text.splitlines() if line.startswith("final"))
    taken = sum(entry.decision == "taken" for entry in read_decisions(finished.paths, 4))
    assert union_row[4] == str(taken)
    page = write_report(finished, pictures=2)
    assert page.is_file() and "no picture" not in caplog.text
    drawn = {path.stem for path in (finished.paths.report / "pictures").rglob("*.jpg")}
    assert drawn


def test_loops_do_not_wait_for_each_other(finished: Run) -> None:
    tasks = graph(finished)
    assert tasks["build-r2"].needs == ("plan",)
    assert set(tasks["build-r4"].needs) == {"select-r1", "select-r3"}
    assert TINY_PLAN["planner"] == finished.recipe.planner


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Try to start the recipe with some settings; the error text."""
    folders = phantom(tmp_path, monkeypatch, labelled=1, partial=1, lesions=True, unlabelled=2, test=1)

    def start(settings: dict[str, str]) -> str:
        with pytest.raises(InputError) as caught:
            started(tmp_path, folders, "partial", settings)
        return str(caught.value)

    return start


def test_loops_and_teachers_that_do_not_fit_the_data_are_refused_all_at_once(refused, tmp_path: Path) -> None:
    good, foreign = tmp_path / "good", tmp_path / "foreign"
    for path in sorted((tmp_path / "unlabelled_truth").iterdir()):
        truth = read_labels(path)
        write_labels(good / path.name, truth.array, truth)
        write_labels(foreign / path.name, np.where(truth.array == 1, 99, 0).astype(np.uint8), truth)
    (tmp_path / "empty").mkdir()
    teachers = ", ".join(str(folder) for folder in (good, foreign, tmp_path / "empty", tmp_path / "missing"))
    loops_given = "[{name: organs, all_but: [14]}, {name: tumour, organs: [14, 15]}, {name: again, organs: [1, 14]}]"
    error = refused({"loops": loops_given, "fusion.teachers": f"[{teachers}]"})
    assert "labels [15] are not in dataset.json" in error
    assert "loop again: labels [1, 14] also belong to loop organs" in error
    assert error.count("[99]") == 2 and str(good) not in error
    assert f"{tmp_path / 'empty'}: has no label map of any case" in error
    assert f"{tmp_path / 'missing'}: no such folder" in error
    assert "6 problem(s)" in error
    assert "id_maps" in refused({"fusion.teachers": f"[{good}]", "fusion.id_maps": "[nobody]"})
    assert "flare_tiny" not in str(list((tmp_path / "nnUNet_results").rglob("*")))


def test_a_loop_whose_organs_nobody_annotated_is_refused(refused, tmp_path: Path) -> None:
    raw = tmp_path / "nnUNet_raw" / "Dataset022_FLAREPhantom"
    cases = case_names(raw)
    for case in cases:
        label = read_labels(raw / "labelsTr" / f"{case}.nii.gz")
        write_labels(raw / "labelsTr" / f"{case}.nii.gz", np.where(label.array == 1, 1, 0).astype(np.uint8), label)
    write_table(raw / "flare_cases.json", {case: Case("partial", (1,)) for case in cases})
    assert "loop tumour: no labelled or partial case has one of its labels [14] annotated" in refused({})


def test_a_dataset_without_a_fully_labelled_case_starts_and_says_so(tmp_path: Path, monkeypatch, caplog) -> None:
    folders = phantom(tmp_path, monkeypatch, labelled=2, lesions=True, unlabelled=1, test=1)
    raw = tmp_path / "nnUNet_raw" / "Dataset022_FLAREPhantom"
    for case, organs in zip(case_names(raw), (ORGANS, (1, TUMOUR)), strict=True):
        label = read_labels(raw / "labelsTr" / f"{case}.nii.gz")
        kept = np.where(np.isin(label.array, organs), label.array, 0).astype(np.uint8)
        write_labels(raw / "labelsTr" / f"{case}.nii.gz", kept, label)
        known = {**read_table(raw / "flare_cases.json").cases} if (raw / "flare_cases.json").is_file() else {}
        write_table(raw / "flare_cases.json", {**known, case: Case("partial", organs)})
    with caplog.at_level(logging.INFO):
        run = started(tmp_path, folders, "partial", {})
    assert "no fully labelled case; only the 2 partial cases train" in caplog.text
    do_all(run, monkeypatch, until=lambda name: name == "train-r0-fall")
    table = table_of(run, 0)
    assert sorted(entry.annotated for entry in table.values()) == [(1,), ORGANS]
