"""The report as files: what it says, what it draws, and that no name can break it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib import resources

import nibabel
import numpy as np
import pytest
from fake_run import ORGANS, PATCH, SPACING_MM, boxes, fake_run, least_organ

from nnunet_flare.cases import FILE_NAME, Case, write_table
from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.drawing import colour, rgb, upright
from nnunet_flare.errors import InputError
from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, write_volume
from nnunet_flare.recipes.load import shipped_recipes
from nnunet_flare.report.gather import gather
from nnunet_flare.report.page import script_json, worth_looking_at, write_report
from nnunet_flare.report.papers import paper_and_ours
from nnunet_flare.report.planes import DISAGREEMENT, PANEL, Scene, direction_of, draw_case
from nnunet_flare.report.volumes import LONGEST, smaller, write_volumes
from nnunet_flare.rounds.run.ledger import read_decisions, write_round
from nnunet_flare.rounds.stages.arrays import read_array, write_array

CASES = [f"case_{number:03d}" for number in range(8)]
HOSTILE = ('<img src=x onerror="alert(1)">', "</script><script>alert(1)</script>", "a&b\"'`${1}\u2028", "{{ 7 * 7 }}")


def data_of(run) -> dict:
    text = (run.paths.report / "data.js").read_text(encoding="utf-8")
    assert text.startswith("window.FLARE_REPORT = ") and text.endswith(";\n")
    return json.loads(text[len("window.FLARE_REPORT = ") : -2])


def test_decisions_in_the_browser_belong_to_one_run_however_it_is_named_and_resumed(tmp_path):
    one, same_name = (fake_run(tmp_path / name, cases=CASES[:1], rounds=1, pictured=0) for name in "ab")
    for run in (one, same_name):
        write_report(run, pictures=0)
    assert data_of(one)["id"] != data_of(same_name)["id"]
    before = data_of(one)["id"]
    later = replace(one, recipe=one.recipe.model_copy(update={"summary": "with a key that a later version added"}))
    write_report(later, pictures=0)
    assert later.recipe.hash != one.recipe.hash and data_of(one)["id"] == before


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip():
            self.words.append(data.strip())


def page_of(run) -> Page:
    return Page((run.paths.report / "index.html").read_text(encoding="utf-8"))


def test_the_command_writes_one_folder_with_rounds_cases_and_pictures(tmp_path, capsys):
    run = fake_run(tmp_path, cases=CASES)
    assert main(["report", "-o", str(run.root), "--pictures", "all"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(run.paths.report / "index.html")
    words = " ".join(page_of(run).words)
    assert "0.813" in words and "0.734" in words  # held-out and validation Dice
    assert "selection.threshold 0.6 0.0" in words  # changed against the shipped recipe
    data = data_of(run)
    assert len(data["rows"]) == 16 and [organ["name"] for organ in data["organs"]] == list(ORGANS)
    pictures = sorted(str(p.relative_to(run.paths.report)) for p in run.paths.report.rglob("*.jpg"))
    assert pictures == [f"pictures/r{r}/{case}.jpg" for r in (0, 1) for case in CASES[:3]]
    assert [row[0] for row in data["rows"] if row[10]] == CASES[:3] * 2


def test_the_validation_dice_of_a_given_model_is_that_of_the_folds_that_label(tmp_path):
    run = fake_run(tmp_path, cases=CASES[:1], rounds=1, pictured=0)
    given = tmp_path / "given"
    for fold, dice in (("0", 0.5), ("1", 0.8), ("2", 0.6), ("all", 0.99)):
        write_json(given / f"fold_{fold}" / "validation" / "summary.json", {"foreground_mean": {"Dice": dice}})
    run = replace(run, settings=replace(run.settings, init_model=str(given), init_folds=("1", "2")))
    assert gather(run).rounds[0].validation == pytest.approx(0.7)


def test_the_page_refers_to_nothing_outside_its_folder(tmp_path):
    run = fake_run(tmp_path, cases=CASES)
    write_report(run)
    links = [a.get("src") or a.get("href") for _, a in page_of(run).tags if a.get("src") or a.get("href")]
    assert {link for link in links if not link.startswith("#")} == {"report.css", "data.js", "report.js", "view3d.js"}
    for name in ("report.css", "report.js", "view3d.js", "index.html"):
        assert not re.search(r"https?://|@import|url\(", (run.paths.report / name).read_text())


def test_hostile_names_stay_text(tmp_path):
    run = fake_run(tmp_path, cases=[*CASES, '"><b>x</b>'], organs=HOSTILE, pictured=0)
    write_report(run)
    page = page_of(run)
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert any(HOSTILE[0].replace("_", " ") in word for word in page.words)
    assert any("{{ 7 * 7 }}" in word for word in page.words)
    raw = (run.paths.report / "data.js").read_text(encoding="utf-8")
    assert "<" not in raw and "\u2028" not in raw
    assert [organ["name"] for organ in data_of(run)["organs"]] == list(HOSTILE)


def test_script_json_is_json_that_cannot_leave_its_script():
    text = script_json(["</script>", "<!--", "&", "\u2028\u2029"])
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == ["</script>", "<!--", "&", "\u2028\u2029"]


def test_volumes_outside_the_labelled_sets_range_are_counted(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1)
    report = gather(run)
    voxel_ml = np.prod(SPACING_MM) / 1000
    counts = np.bincount(boxes(len(ORGANS)).ravel())
    assert report.ranges["liver"] == pytest.approx((counts[1] * voxel_ml, counts[1] * voxel_ml))
    row = report.rows[0]
    assert row.least == least_organ(run, 0, row.entry.case)
    expected = {o for o, ml in row.volume_ml.items() if ml < report.ranges[o][0] or ml > report.ranges[o][1]}
    assert set(row.outside) == expected and expected


def test_a_region_of_which_a_partial_case_has_a_part_annotated_has_no_size_there(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1, organs=("right", "left"))
    document = json.loads((run.raw / "dataset.json").read_text())
    document["labels"] = {"background": 0, "kidneys": [1, 2], "left": 2}
    (run.raw / "dataset.json").write_text(json.dumps(document | {"regions_class_order": [1, 2]}))
    whole = read_array(run.base_data / "first_seg.b2nd")
    write_array(run.base_data / "second_seg.b2nd", np.where(whole == 1, 1, 0).astype(np.uint8), PATCH)
    shutil.copy(run.base_data / "first.pkl", run.base_data / "second.pkl")
    write_table(run.raw / FILE_NAME, {"first": Case(), "second": Case("partial", (1,))})
    size = pytest.approx((whole > 0).sum() * np.prod(SPACING_MM) / 1000)
    assert gather(run).ranges["kidneys"] == (size, size)


def test_an_organ_that_no_member_found_is_marked_and_not_drawn_as_the_best(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1)
    entries = read_decisions(run.paths, 0)
    organ = ORGANS[1]
    absent = {
        "agreement": {**entries[0].agreement, organ: 1.0},
        "present": {**dict.fromkeys(ORGANS, True), organ: False},
    }
    write_round(run.paths, 0, [replace(entries[0], **absent), *entries[1:]])
    report = gather(run)
    assert report.rows[0].absent == (organ,) and report.rows[1].absent == ()
    others = [entry.agreement[organ] for entry in entries[1:]]
    assert report.rounds[0].agreement[organ][4] == pytest.approx(np.quantile(others, 0.95))
    assert report.rounds[0].absent == {name: int(name == organ) for name in ORGANS}
    write_report(run)
    assert "1 absent" in " ".join(page_of(run).words)
    assert data_of(run)["rows"][0][12] == [1]


def test_a_ledger_of_an_older_version_says_absent_by_the_cases_own_file(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1)
    path = run.paths.case(0, CASES[0])
    document = json.loads(path.read_text())
    document["present"][ORGANS[0]] = False
    path.write_text(json.dumps(document))
    assert next(row for row in gather(run).rows if row.entry.case == CASES[0]).absent == (ORGANS[0],)


def test_pictures_go_to_the_doubtful_cases_and_are_drawn_once(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1, pictured=8)
    rows = gather(run).rows
    taken = sorted((r for r in rows if r.entry.decision == "taken"), key=lambda r: r.entry.score)
    refused = sorted((r for r in rows if r.entry.decision == "refused"), key=lambda r: -r.entry.score)
    assert taken and refused
    assert [r.entry.case for r in worth_looking_at(rows, 2)] == [taken[0].entry.case, refused[0].entry.case]
    assert len(worth_looking_at(rows, None)) == 8 and worth_looking_at(rows, 0) == []
    write_report(run, pictures=2)
    (first, second) = sorted(run.paths.report.rglob("*.jpg"))
    os.utime(first, (time.time() + 60, time.time() + 60))
    before = first.stat().st_mtime_ns
    os.utime(second, (1, 1))  # older than its label maps
    write_report(run, pictures=2)
    assert first.stat().st_mtime_ns == before and second.stat().st_mtime > 1


def test_a_case_without_its_arrays_is_listed_without_a_picture(tmp_path, caplog):
    run = fake_run(tmp_path, cases=CASES, rounds=1, pictured=0)
    write_report(run, pictures=1)
    assert not list(run.paths.report.rglob("*.jpg")) and "no picture of 1 case" in caplog.text
    assert len(data_of(run)["rows"]) == 8


def test_a_single_model_has_no_agreement_but_a_picture(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1, members=1)
    write_report(run, pictures=None)
    page, rows = page_of(run), data_of(run)["rows"]
    assert "svg" not in {tag for tag, attributes in page.tags if attributes.get("class") == "boxes"}
    assert "judged yet" not in " ".join(page.words)
    assert {row[4] for row in rows} == {None} and {row[5] for row in rows} == {-1}
    assert len(list(run.paths.report.rglob("*.jpg"))) == 3


def test_a_value_that_is_no_number_is_named(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1, pictured=0)
    entries = [replace(entry, score=float("inf")) for entry in read_decisions(run.paths, 0)]
    run.paths.decisions(0).write_text(json.dumps({"cases": [asdict(entry) for entry in entries]}))
    with pytest.raises(InputError, match=r"decisions\.json: cases\[0\]\.score: found inf"):
        write_report(run, pictures=0)


def test_a_run_that_judged_nothing_yet_has_a_report(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1)
    run.paths.decisions(0).unlink()
    write_report(run)
    assert "No round has been judged yet" in " ".join(page_of(run).words)
    assert data_of(run)["rows"] == []


@pytest.mark.parametrize("wrong", ["none", "-1", "2.5", ""])
def test_a_wrong_number_of_pictures_is_refused(tmp_path, capsys, wrong):
    run = fake_run(tmp_path, cases=CASES, rounds=1)
    assert main(["report", "-o", str(run.root), f"--pictures={wrong}"]) == 2
    assert "expected 'all' or a number" in capsys.readouterr().err


def test_the_picture_shows_fused_label_contours_and_disagreement():
    fused = np.zeros((10, 20, 20), np.uint8)
    fused[2:8, 5:15, 5:15] = 1
    other = np.roll(fused, 4, axis=2)
    scene = Scene(np.full(fused.shape, -160.0, np.float32), fused, np.stack([fused, other]), (4.0, 4.0, 4.0))
    picture = draw_case(scene, 1)
    assert picture.shape == (3 * PANEL, 3 * PANEL, 3)
    whole, contours, heat = picture[:PANEL], picture[PANEL : 2 * PANEL], picture[2 * PANEL :]
    blue = (np.array(rgb(colour(1))) * 0.45 * 255).round()
    assert (np.abs(whole[PANEL // 2, PANEL // 2] - blue) <= 1).all()
    found = {tuple(pixel) for pixel in contours[:, :PANEL].reshape(-1, 3)}
    assert (255, 255, 255) in found and (240, 228, 66) in found  # both members
    orange = np.array(rgb(DISAGREEMENT))
    assert (np.abs(heat - (0.45 * orange * 255).round()) <= 1).all(axis=-1).any()  # one of two members differs


def test_planes_are_shown_upright_whatever_the_files_orientation():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 9, (4, 5, 6))
    lps = upright(Volume(array, (5.0, 2.0, 1.0)))
    np.testing.assert_array_equal(lps.array, array[::-1])
    # x of the file runs to the patient's front, y to the head, z to the patient's right
    turned = Volume(array, (5.0, 2.0, 1.0), direction=(0, 0, -1, -1, 0, 0, 0, 1, 0))
    shown = upright(turned)
    np.testing.assert_array_equal(shown.array, array.transpose(1, 2, 0)[::-1, ::-1, ::-1])
    assert shown.spacing_mm == (2.0, 1.0, 5.0)


@pytest.mark.parametrize("in_plane, tilt", [(45, 15), (44, 20), (-46, 20), (30, 30), (60, 45)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_planes_of_oblique_scans_are_never_shown_mirrored(in_plane, tilt, axes):
    """As of the heart in MR: two axes of the patient may lie closest to the same axis of the file."""
    (c, s), (d, t) = ((np.cos(angle), np.sin(angle)) for angle in np.radians([in_plane, tilt]))
    direction = np.array([[d * c, -s, t * c], [d * s, c, t * s], [-t, 0, d]])[:, axes]
    place = np.moveaxis(np.indices((5, 6, 7)), 0, -1)[..., ::-1] @ direction.T
    shown = [
        upright(Volume(place[..., world], (1, 1, 1), direction=tuple(direction.ravel()))).array for world in range(3)
    ]
    along = np.array([[np.diff(array, axis=axis).mean() for axis in (2, 1, 0)] for array in shown])
    assert np.linalg.det(along) == pytest.approx(-1) and (np.diag(along) * (1, 1, -1) > 0).all()  # to the feet


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_planes_are_shown_upright_whatever_the_reader(tmp_path, reader):
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    rng = np.random.default_rng(1)
    stored = Volume(
        rng.integers(0, 99, (4, 5, 6)).astype(np.int16), (5.0, 2.0, 1.0), direction=(-1, 0, 0, 0, 1, 0, 0, 0, 1)
    )
    write_volume(tmp_path / "scan.nii.gz", stored)
    array, properties = recursive_find_reader_writer_by_name(reader)().read_images([str(tmp_path / "scan.nii.gz")])
    z, y, x = properties["spacing"]
    read = Volume(array[0], (z, y, x), direction=direction_of(properties))
    np.testing.assert_array_equal(upright(read).array, upright(stored).array)


# ------------------------------------------------------------------ the 3-D view


def volumes_of(path) -> dict:
    """Key, image, label and centre of a case's script."""
    key, document = re.fullmatch(r"window\.FLARE_VOLUMES\[(.+?)\] = (.+);\n", path.read_text()).groups()
    found = json.loads(document)
    for name in ("image", "label"):
        found[name] = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(found[name])))
    return {"key": json.loads(key), **found}


def test_3d_views_are_made_where_asked_and_stay_when_the_run_reports_again(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1)
    write_report(run, pictures=None)
    assert not (run.paths.report / "niivue").exists() and {row[11] for row in data_of(run)["rows"]} == {0}
    assert main(["report", "-o", str(run.root), "--pictures", "all", "--view3d"]) == 0
    assert [row[0] for row in data_of(run)["rows"] if row[11]] == CASES[:3]
    first = run.paths.report / "volumes" / "r0" / f"{CASES[0]}.js"
    before = first.stat().st_mtime_ns
    write_report(run, pictures=2)  # as the run itself does after its next round
    assert first.stat().st_mtime_ns == before and sum(row[11] for row in data_of(run)["rows"]) == 3
    assert (run.paths.report / "niivue" / "niivue.umd.js").is_file()
    assert "BSD 2-Clause" in (run.paths.report / "niivue" / "LICENSES.txt").read_text()


def test_3d_views_without_their_viewer_are_refused_in_one_line_and_the_report_stays(tmp_path, monkeypatch, capsys):
    run = fake_run(tmp_path, cases=CASES, rounds=1)
    write_report(run)
    before = (run.paths.report / "index.html").read_bytes()
    monkeypatch.setitem(sys.modules, "nnunet_flare_niivue", None)
    assert main(["report", "-o", str(run.root), "--view3d"]) == 2
    assert "pip install ./packaging/niivue" in capsys.readouterr().err
    assert (run.paths.report / "index.html").read_bytes() == before and not (run.paths.report / "volumes").exists()


def test_a_3d_view_holds_scan_and_label_in_their_place(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1)
    write_report(run, pictures=None, view3d=True)
    found = volumes_of(run.paths.report / "volumes" / "r0" / f"{CASES[1]}.js")
    assert found["key"] == f"r0/{CASES[1]}"
    label = found["label"]
    assert nibabel.aff2axcodes(label.affine) == ("L", "P", "I") and label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(label.dataobj).transpose(2, 1, 0)[::-1], boxes(len(ORGANS)))
    assert label.header.get_zooms() == SPACING_MM[::-1] and found["image"].shape == label.shape
    organ = ORGANS.index(least_organ(run, 0, CASES[1])) + 1
    voxel = tuple(int((1 - share) * size) for share, size in zip(found["centre"], label.shape, strict=True))
    assert np.asarray(label.dataobj)[voxel] == organ


def test_a_large_scan_is_made_small_for_the_3d_view(tmp_path):
    scan = np.full((40, 300, 130), -160.0, np.float32)
    scan[:, :150] = 240.0
    fused = np.zeros(scan.shape, np.uint8)
    fused[:, 150:] = 3
    grey, labels, spacing_mm = smaller(Scene(scan, fused, fused[None], (5.0, 0.8, 0.7)))
    assert grey.shape == labels.shape == (40, 100, 65) and max(grey.shape) <= LONGEST
    assert spacing_mm == pytest.approx((5.0, 2.4, 1.4))
    assert (grey[:, :50] == 255).all() and (grey[:, 50:] == 0).all() and (labels[:, 50:] == 3).all()
    assert labels.dtype == grey.dtype == np.uint8 and not labels[:, :50].any()


def test_an_organ_that_is_nowhere_is_viewed_from_the_middle(tmp_path):
    empty = np.zeros((4, 6, 8), np.uint8)
    write_volumes(
        tmp_path / "case.js", 'r0/a"<b>', Scene(empty.astype(np.float32), empty, empty[None], (1.0, 1.0, 1.0)), 5
    )
    found = volumes_of(tmp_path / "case.js")
    assert found["key"] == 'r0/a"<b>' and "<b>" not in (tmp_path / "case.js").read_text()
    assert found["centre"] == pytest.approx([0.5, 0.5, 0.5], abs=0.15)


def test_the_viewer_is_the_distributed_file_that_its_note_names():
    folder = resources.files("nnunet_flare_niivue")
    sha = hashlib.sha256((folder / "niivue.umd.js").read_bytes()).hexdigest()
    assert f"SHA-256: {sha}" in (folder / "LICENSES.txt").read_text(encoding="utf-8")


# ------------------------------------------------------------------ the recipe and its paper


def test_the_report_says_where_the_recipe_leaves_its_paper(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1, recipe="noisy_student")
    write_report(run)
    page = page_of(run)
    words = " ".join(page.words)
    assert "Paper and ours" in words and "network residual encoder, 63.1 M parameters" in words
    assert "paper" in [attributes.get("id") for _, attributes in page.tags]


WITHOUT_PAPER = ("demo", "distill")
"""Recipes that follow no single paper."""


@pytest.mark.parametrize("recipe", [name for name in shipped_recipes() if name not in WITHOUT_PAPER])
def test_every_recipe_has_a_table_of_paper_and_ours(recipe):
    head, *rows = paper_and_ours(recipe)
    assert len(head) >= 3 and len(rows) > 3
    assert {len(cells) for cells in rows} == {len(head)}


def test_a_page_is_shown_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_flare.report.papers.CHECKOUT", tmp_path)
    (tmp_path / "recipes-my-own.md").write_text(
        "| | a table | without |\n|---|---|---|\n| x | y | z |\n\n"
        "| | paper | ours |\n|---|---|---|\n| `a<b` | [a page](x.md) **bold** | <script>1</script> a\\|b |\n"
    )
    assert paper_and_ours("my_own") == [
        ["", "paper", "ours"],
        ["<code>a&lt;b</code>", "a page <b>bold</b>", "&lt;script&gt;1&lt;/script&gt; a|b"],
    ]
    assert paper_and_ours("nobody's") == []
