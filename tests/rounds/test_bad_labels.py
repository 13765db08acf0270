"""Every kind of broken or odd label map through every command that reads label maps.

None crashes a command, none is lost silently, and the good cases beside them are all done.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bad_labels import LABEL_KINDS, LABEL_NAMES, OTHER_GRID, good_labels, write_labels
from bad_scans import Kind, good

from nnunet_flare.cli import doctor, evaluate, postprocess, pseudolabel
from nnunet_flare.documents import load_rows
from nnunet_flare.organs import FLARE22

ONE_BY_ONE = LABEL_KINDS + LABEL_NAMES
"""What a command sees that reads one label map of a case."""

IN_PAIRS = ONE_BY_ONE + OTHER_GRID


def rows_of(table: Path) -> list[dict[str, str]]:
    """A CSV table as our commands read it back: names that would be formulas are guarded in the file."""
    (_, columns), *rows = load_rows(table)
    return [dict(zip(columns, cells, strict=True)) for _, cells in rows]


def check_fates(cases: dict[str, Kind | None], done: set[str], printed: str, *, absent_is_silent: bool = False) -> None:
    """Good maps and usable kinds are done; every other one is not, and is named in what the command printed."""
    assert "Traceback" not in printed
    for case, kind in cases.items():
        if kind is None:
            assert case in done, f"{case}: a good map beside the bad ones was not done"
            continue
        if kind.name == "label_missing" and absent_is_silent:
            continue
        assert kind.fate in ("fine" if case in done else "refused", "either"), kind.name
        assert case in done or case in printed, f"{kind.name}: lost silently"
    assert not Path("pwned").exists()


def written(folder: Path) -> set[str]:
    return {path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz")}


@pytest.fixture
def good_maps(tmp_path: Path) -> Path:
    """A good label map for every case."""
    folder = tmp_path / "all_good"
    write_labels(folder, [Kind(kind.name, "fine", good_labels, kind.file) for kind in IN_PAIRS])
    return folder


def test_there_are_kinds_of_every_sort() -> None:
    kinds = [*IN_PAIRS]
    assert len({kind.name for kind in kinds}) == len(kinds) >= 45
    assert {kind.fate for kind in kinds} == {"refused", "fine", "either"}


# ------------------------------------------------------------------ before a run


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Kind | None]]:
    """A labelled data set with every kind of label map; the scans are good."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "nnUNet_raw" / "Dataset022_Bad"
    cases = write_labels(folder / "labelsTr", IN_PAIRS)
    (folder / "imagesTr").mkdir()
    (tmp_path / "unlabelled").mkdir()
    for case in cases:
        good(folder / "imagesTr" / f"{case}_0000.nii.gz")
    good(tmp_path / "unlabelled" / "u_0000.nii.gz")
    document = {"channel_names": {"0": "CT"}, "numTraining": len(cases), "file_ending": ".nii.gz"}
    names = {"background": 0, **{organ.name: organ.id for organ in FLARE22}}
    (folder / "dataset.json").write_text(json.dumps({**document, "labels": names}))
    return tmp_path, cases


def named_problems(cases: dict[str, Kind | None], printed: str) -> set[str]:
    """Cases without a line of their own; lines begin with the case."""
    lines = [line.strip().removeprefix("problem").strip() for line in printed.splitlines()]
    return {case for case in cases if not any(line.startswith(f"{case}: ") for line in lines)}


@pytest.mark.parametrize("command", ["run", "preprocess", "doctor"])
def test_a_dataset_with_bad_label_maps_is_refused_with_all_of_them_listed(dataset, capsys, command) -> None:
    folder, cases = dataset
    unlabelled = ["-d", "22", "-u", str(folder / "unlabelled")]
    if command == "doctor":
        code, expected = doctor.main(["-d", "22"]), 1
    else:
        more = ["--recipe", "demo", *(["-device", "cpu"] if command == "run" else [])]
        code, expected = pseudolabel.main([command, *unlabelled, *more]), 2
    printed = "".join(capsys.readouterr())
    assert code == expected, printed
    check_fates(cases, named_problems(cases, printed), printed)
    assert not list((folder / "nnUNet_results").iterdir()) and not list((folder / "nnUNet_preprocessed").iterdir())


# ------------------------------------------------------------------ commands on folders


def test_postprocess(tmp_path: Path, capsys) -> None:
    cases = write_labels(tmp_path / "in", ONE_BY_ONE)
    command = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-np", "1"]
    assert postprocess.main(command) == 1
    check_fates(cases, written(tmp_path / "out"), "".join(capsys.readouterr()), absent_is_silent=True)


def test_postprocess_with_images(tmp_path: Path, capsys) -> None:
    cases = write_labels(tmp_path / "in", ONE_BY_ONE)
    (tmp_path / "images").mkdir()
    for case in cases:
        good(tmp_path / "images" / f"{case}_0000.nii.gz")
    command = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-np", "1"]
    assert postprocess.main([*command, "--image", str(tmp_path / "images")]) == 1
    check_fates(cases, written(tmp_path / "out"), "".join(capsys.readouterr()), absent_is_silent=True)


def test_postprocess_learn(tmp_path: Path, capsys) -> None:
    cases = write_labels(tmp_path / "in", ONE_BY_ONE)
    output = tmp_path / "learned.yaml"
    assert postprocess.main(["learn", "-i", str(tmp_path / "in"), "-o", str(output), "-np", "1"]) == 1
    printed = "".join(capsys.readouterr())
    assert output.is_file()
    refused = {case for case in cases if f"left out: {case}: " in printed}
    check_fates(cases, set(cases) - refused, printed, absent_is_silent=True)


@pytest.mark.parametrize("bad", ["references", "predictions"])
def test_evaluate(tmp_path: Path, good_maps: Path, capsys, bad: str) -> None:
    cases = write_labels(tmp_path / "bad", IN_PAIRS)
    folders = {"references": (tmp_path / "bad", good_maps), "predictions": (good_maps, tmp_path / "bad")}[bad]
    output = tmp_path / "scores.csv"
    command = ["-ref", str(folders[0]), "-pred", str(folders[1]), "-o", str(output), "-np", "1"]
    assert evaluate.main(command) == 1
    scored = {row["Name"].removesuffix(".nii.gz") for row in rows_of(output)}
    foreign = {"label_unknown_id", "label_next_id", "label_scaled"}
    assert foreign <= scored, "the official scripts score the organs that they know, whatever else is there"
    usable = {case: None if case in foreign else kind for case, kind in cases.items()}
    check_fates(usable, scored, "".join(capsys.readouterr()))


def test_score_and_select(tmp_path: Path, good_maps: Path, capsys) -> None:
    cases = write_labels(tmp_path / "bad", IN_PAIRS)
    scores, chosen = tmp_path / "scores.csv", tmp_path / "selection.csv"
    assert pseudolabel.main(["score", "-i", str(good_maps), str(tmp_path / "bad"), "-o", str(scores)]) == 1
    assert pseudolabel.main(["select", "-i", str(scores), "-o", str(chosen)]) == 0
    for path in (scores, chosen):
        there = {row["case"] for row in rows_of(path)}
        check_fates(cases, there, "".join(capsys.readouterr()) if path == scores else " ".join(cases))


@pytest.mark.parametrize("bad", ["base", "teacher", "partial"])
def test_merge(tmp_path: Path, good_maps: Path, capsys, bad: str) -> None:
    cases = write_labels(tmp_path / "bad", IN_PAIRS)
    output = tmp_path / "out"
    folders = {"base": good_maps, "teacher": good_maps, bad: tmp_path / "bad"}
    command = ["merge", "-o", str(output), "--base", str(folders["base"]), "--teacher", str(folders["teacher"])]
    if bad == "partial":
        ids = [str(organ.id) for organ in FLARE22]
        command += ["--partial", str(folders["partial"]), "--annotated", *ids]
    assert pseudolabel.main([*command, "--labels", "flare22", "-np", "1"]) == 1
    printed = "".join(capsys.readouterr())
    fates = {row["case"]: row["result"] for row in rows_of(output / "merge.csv")}
    done = {case for case, fate in fates.items() if fate in ("written", "dropped")}
    assert {case for case in done if fates[case] == "written"} == written(output)
    check_fates(cases, done, printed, absent_is_silent=bad != "teacher")


def test_a_held_out_label_that_cannot_be_used_is_said_before_a_run(dataset, tmp_path: Path, capsys) -> None:
    """``--eval``: its label maps are read like the training set's."""
    folder, cases = dataset
    for case, kind in cases.items():  # a good training set
        if kind is not None:
            path = folder / "nnUNet_raw" / "Dataset022_Bad" / "labelsTr" / f"{case}.nii.gz"
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            (path.parent.parent / "imagesTr" / f"{case}_0000.nii.gz").unlink()
    document = folder / "nnUNet_raw" / "Dataset022_Bad" / "dataset.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), "numTraining": 3}))
    held_out = write_labels(tmp_path / "eval" / "labels", IN_PAIRS, good=0)
    (tmp_path / "eval" / "images").mkdir()
    for case in held_out:
        good(tmp_path / "eval" / "images" / f"{case}_0000.nii.gz")
    evaluation = ["--eval", str(tmp_path / "eval" / "images"), str(tmp_path / "eval" / "labels")]
    command = ["run", "-d", "22", "-u", str(folder / "unlabelled"), "-device", "cpu", "--recipe", "demo", *evaluation]
    assert pseudolabel.main(command) == 2
    printed = "".join(capsys.readouterr())
    check_fates(held_out, named_problems(held_out, printed), printed)
    assert not list((folder / "nnUNet_results").iterdir())
