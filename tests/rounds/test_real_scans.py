"""The whole loop on real CT: crops of two labelled scans, and one unlabelled scan, by the stock and our commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, geometry_difference, read_labels, read_volume, write_volume
from nnunet_flare.organs import FLARE22, dataset_labels
from nnunet_flare.rounds.run.ledger import read_ledger
from nnunet_flare.rounds.run.manifest import load_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def thinned(volume: Volume, step: tuple[int, int, int]) -> Volume:
    """Every ``step``-th voxel, with the spacing that goes with it."""
    array = np.ascontiguousarray(volume.array[tuple(slice(None, None, s) for s in step)])
    spacing = tuple(mm * s for mm, s in zip(volume.spacing_mm, step, strict=True))
    return Volume(array, spacing, volume.origin, volume.direction)


def part(volume: Volume, rows: slice) -> Volume:
    return Volume(np.ascontiguousarray(volume.array[rows]), volume.spacing_mm, volume.origin, volume.direction)


@pytest.fixture(scope="module")
def dataset(real_data, tmp_path_factory) -> Path:
    """Five labelled pieces (four of the torso, the slab), and chaos3 and the whole torso as unlabelled scans."""
    folder = tmp_path_factory.mktemp("real")
    raw = folder / "nnUNet_raw" / "Dataset022_Real"
    torso, torso_labels = (real_data / f"ts_torso3mm_{kind}.nii.gz" for kind in ("ct", "flare13"))
    slab, slab_labels = (real_data / f"ts_slab512_{kind}.nii.gz" for kind in ("ct", "flare13"))
    pieces = {f"torso_{i}": (torso, torso_labels, (1, 1, 1), slice(8 * i, 60 + 16 * i)) for i in range(4)}
    pieces["slab"] = (slab, slab_labels, (1, 8, 8), slice(None))
    for name, (image, label, step, rows) in pieces.items():
        write_volume(raw / "imagesTr" / f"{name}_0000.nii.gz", part(thinned(read_volume(image), step), rows))
        write_volume(raw / "labelsTr" / f"{name}.nii.gz", part(thinned(read_labels(label), step), rows))
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {"0": "CT"},
            "labels": dataset_labels(FLARE22),
            "numTraining": len(pieces),
            "file_ending": ".nii.gz",
        },
    )
    (folder / "unlabelled").mkdir()
    write_volume(
        folder / "unlabelled" / "chaos3_0000.nii.gz", thinned(read_volume(real_data / "chaos3_ct.nii.gz"), (2, 4, 4))
    )
    write_volume(folder / "unlabelled" / "torso_0000.nii.gz", thinned(read_volume(torso), (2, 2, 2)))
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()
    return folder


@pytest.fixture
def environment(dataset, monkeypatch) -> dict[str, str]:
    import os

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(dataset / name))
    monkeypatch.setenv("NNUNET_FLARE_ITERATIONS", "3")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    return dict(os.environ)


def stock(command: str, *arguments: str, environment: dict[str, str]) -> str:
    """One of stock nnU-Net's commands, as a user types it."""
    path = Path(sys.executable).with_name(command)
    done = subprocess.run([str(path), *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} {arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_stock_commands_plan_train_and_predict_with_our_names(dataset, environment):
    stock("nnUNetv2_plan_and_preprocess", "-d", "22", "-pl", "nnUNetPlannerFlareTiny", "-c", "3d_fullres",
          "-np", "1", "-npfp", "1", environment=environment)  # fmt: skip
    train = ("22", "3d_fullres", "0", "-tr", "nnUNetTrainerFlareST_2epochs", "-p", "nnUNetPlansFlareTiny")
    stock("nnUNetv2_train", *train, "-device", "cpu", environment=environment)
    again = stock("nnUNetv2_train", *train, "-device", "cpu", "--c", environment=environment)
    assert "Training done" in again
    stock("nnUNetv2_predict", "-i", str(dataset / "unlabelled"), "-o", str(dataset / "stock"), "-d", "22", "-c",
          "3d_fullres", "-tr", "nnUNetTrainerFlareST_2epochs", "-p", "nnUNetPlansFlareTiny", "-f", "0",
          "-device", "cpu", "-npp", "1", "-nps", "1", environment=environment)  # fmt: skip
    assert len(list((dataset / "stock").glob("*.nii.gz"))) == 2


def test_the_loop_labels_real_scans_on_their_own_grid_and_trains_on_them(dataset, environment, capsys):
    command = ["run", "-d", "22", "-u", str(dataset / "unlabelled"), "--name", "real", "-device", "cpu", "--set",
               "planner=nnUNetPlannerFlareTiny", "rounds=1", "members.count=2", "training.num_epochs=2",
               "training.iterations_per_epoch=3", "training.final_validation=false", "predict.tta=none",
               "selection.rule=mean-organ", "selection.threshold=0.0", "selection.top_fraction=0.5"]  # fmt: skip
    assert main(command) == 0
    run = load_run(dataset / "nnUNet_results" / "Dataset022_Real" / "flare_real")
    decided = {entry.case: entry.decision for entry in read_ledger(run.paths)}
    assert sorted(decided.values()) == ["refused", "taken"]
    for case in decided:
        label = read_labels(run.paths.label(0, case, ".nii.gz"), allowed=range(14))
        scan = read_volume(dataset / "unlabelled" / f"{case}_0000.nii.gz")
        assert geometry_difference(label, scan) is None
    assert (run.round(1).model / "fold_all" / "checkpoint_final.pth").is_file()


def test_flare_predict_gives_chaos3_back_at_full_size_in_its_exact_geometry(dataset, environment, real_data, tmp_path):
    from nnunet_flare.cli import predict

    run = load_run(dataset / "nnUNet_results" / "Dataset022_Real" / "flare_real")
    scan = real_data / "chaos3_ct.nii.gz"
    assert predict.main(["-i", str(scan), "-o", str(tmp_path), "-m", str(run.round(1).model), "-device", "cpu"]) == 0
    found = read_labels(next(tmp_path.glob("*.nii.gz")), allowed=range(14))
    assert geometry_difference(found, read_volume(scan)) is None and found.array.shape == (78, 512, 512)
