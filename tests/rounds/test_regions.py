"""A run on a data set of regions with an *ignore* label: judged region by region, stored as label maps."""

from __future__ import annotations

import csv
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from in_process import do_all, phantom, started
from kinds import dice, expect_dice_by_hand, mask, redress

from nnunet_flare.images import read_labels
from nnunet_flare.report.gather import gather
from nnunet_flare.report.page import write_report
from nnunet_flare.rounds.run.ledger import read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array, read_properties
from nnunet_flare.rounds.stages.label import read_labelled

REGIONS = {"organs": (1, 2, 3), "pair": (2, 3), "spleen": (3,)}
IGNORE = 4
NEARLY_ALL = 0.9995
"""Stock adds windows in half precision, which says little where a window's weight is smallest."""
LABELS = {"background": 0, "organs": [1, 2, 3], "pair": [2, 3], "spleen": 3, "ignore": IGNORE}


def unfinished(labels: np.ndarray) -> np.ndarray:
    """Liver, right kidney and spleen; nobody annotated the lowest slices."""
    labels = np.where(labels > 3, 0, labels)
    labels[:4] = IGNORE
    return labels


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("regions")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=2, unlabelled=2, test=1)
        redress(folder, unfinished, labels=LABELS, regions_class_order=[1, 2, 3])
        settings = {"members.count": "2", "training.class_weights": "null", "training.iterations_per_epoch": "6"}
        test = folder / "test"
        run = started(folder, folders, "demo", settings, eval_images=test / "images", eval_labels=test / "labels")
        do_all(run, monkeypatch)
        yield run


def members_of(run: Run) -> dict[str, np.ndarray]:
    cases = [entry.case for entry in read_ledger(run.paths)]
    assert cases
    return {case: read_array(run.paths.members(0, case)) for case in cases}


def test_agreement_and_volumes_are_those_of_the_regions_in_the_members_label_maps(finished: Run) -> None:
    with open(finished.paths.scores(0), newline="", encoding="utf-8") as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    for case, members in members_of(finished).items():
        by_hand = {n: dice(*(mask(member, ids) for member in members)) for n, ids in REGIONS.items()}
        labelled = read_labelled(finished, 0, case)
        assert labelled.agreement == pytest.approx(by_hand)
        assert {name: float(rows[case][name]) for name in REGIONS} == pytest.approx(by_hand, abs=1e-4)
        assert float(rows[case]["mean_organ"]) == pytest.approx(np.mean(list(by_hand.values())), abs=1e-4)
        fused = np.maximum(read_array(finished.paths.training_label(0, case))[0], 0)
        voxel_mm3 = 8.5 * 5.0 * 5.2
        volumes = {name: mask(fused, ids).sum() * voxel_mm3 for name, ids in REGIONS.items()}
        assert labelled.volume_mm3 == pytest.approx(volumes, rel=0.05)  # the grid is rounded to whole voxels
        assert labelled.volume_mm3["organs"] >= labelled.volume_mm3["pair"] >= labelled.volume_mm3["spleen"]


def test_members_draw_regions_as_stock_does(finished: Run) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    case, members = next(iter(members_of(finished).items()))
    data = torch.from_numpy(read_array(finished.unlabelled_data / f"{case}.b2nd").astype(np.float32))
    found = []
    for fold, member in enumerate(members):
        predictor = nnUNetPredictor(1.0, use_gaussian=True, use_mirroring=False, device=torch.device("cpu"),
                                    perform_everything_on_device=False, allow_tqdm=False)  # fmt: skip
        predictor.initialize_from_trained_model_folder(str(finished.round(0).model), (fold,))
        logits = predictor.predict_logits_from_preprocessed_data(data).float()
        manager = predictor.label_manager
        probabilities = manager.apply_inference_nonlin(logits).numpy()
        clear = (abs(probabilities - 0.5) > 5e-3).all(axis=0)
        stock = np.asarray(manager.convert_probabilities_to_segmentation(probabilities))
        assert clear.mean() > 0.5
        assert (member == stock)[clear].mean() > NEARLY_ALL
        found.append(probabilities)
    mean = np.mean(found, axis=0)
    clear = (abs(mean - 0.5) > 5e-3).all(axis=0)
    fused = np.maximum(read_array(finished.paths.training_label(0, case))[0], 0)
    expected = np.asarray(manager.convert_probabilities_to_segmentation(mean))
    assert (fused == expected)[clear].mean() > NEARLY_ALL
    assert len(np.unique(members)) > 1, "the members draw something"


def test_pseudo_labels_are_label_maps_without_ignore(finished: Run) -> None:
    for case in members_of(finished):
        stored = read_labels(finished.paths.label(0, case, ".nii.gz"), allowed=range(4))
        assert stored.array.dtype == np.uint8 and not (read_array(finished.paths.members(0, case)) == IGNORE).any()


def test_unfinished_voxels_stay_ignored_in_every_rounds_training_data(finished: Run) -> None:
    labelled = [path.name[: -len(".nii.gz")] for path in (finished.raw / "labelsTr").iterdir()]
    for case in labelled:
        raw = read_labels(finished.raw / "labelsTr" / f"{case}.nii.gz").array
        for of in finished.rounds:
            stored = read_array(of.data / f"{case}_seg.b2nd")[0]
            assert (stored == IGNORE).mean() == pytest.approx((raw == IGNORE).mean(), abs=0.05)
            located = read_properties(of.data / f"{case}.pkl")["class_locations"]
            assert set(located) == {(1, 2, 3), (2, 3), 3, (-1, 0, 1, 2, 3)}
    for entry in read_ledger(finished.paths):
        if entry.decision == "taken":  # stock's loader asks for the same places in a pseudo-labelled case
            located = read_properties(finished.final.data / f"{entry.case}.pkl")["class_locations"]
            label = read_array(finished.final.data / f"{entry.case}_seg.b2nd")[0]
            assert set(located) == {(1, 2, 3), (2, 3), 3, (-1, 0, 1, 2, 3)}
            for group, places in located.items():
                ids = group if isinstance(group, tuple) else (group,)
                assert mask(label, ids)[tuple(places[:, 1:].T)].all() and bool(len(places)) == mask(label, ids).any()


def test_held_out_dice_is_by_region_and_counts_no_ignored_voxel(finished: Run) -> None:
    for of in finished.rounds:
        expect_dice_by_hand(finished, of.number, REGIONS, IGNORE, ".nii.gz")


def test_the_report_shows_the_regions(finished: Run) -> None:
    report = gather(finished)
    assert list(report.organs) == list(REGIONS) and report.drawn == {"organs": 1, "pair": 2, "spleen": 3}
    assert report.ranges == {}  # how large organs are is not known where some voxels are not annotated
    page = write_report(finished).read_text(encoding="utf-8")
    assert all(name in page for name in REGIONS)
    assert list((finished.paths.report / "pictures" / "r0").glob("*.jpg"))
