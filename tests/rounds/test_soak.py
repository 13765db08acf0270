"""kill -9 of the driver, of its workers or of all at once: the run goes on, and ends as one that never was killed.

Three kills always; 51 (a third each in training, prediction and building) and nine elsewhere by ``make soak``, which
writes them to ``docs/soak.md``. ``FLARE_SOAK_KILLS`` (a multiple of three) and ``FLARE_SOAK_SEED`` choose others,
``FLARE_SOAK_PAGE`` names the page, and a soak in ``FLARE_SOAK_DIR`` goes on where it was cut.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path

import pytest
from soak import STAGES, Soak, page
from test_killed_runs import same_input
from tiny_loop import TINY, TinyLoop

from nnunet_flare.files import write_text
from nnunet_flare.phantom import write_phantom

__all__ = ["same_input"]

SEED = int(os.environ.get("FLARE_SOAK_SEED", "6"))
ONE_THREAD = {"nnUNet_n_proc_DA": "0", "NNUNET_FLARE_THREADS": "1"}


@pytest.mark.timeout(900)
def test_killed_once_each_while_training_labelling_and_building_the_run_ends_as_an_undisturbed_one(
    tiny_loop, same_input
):
    soak = Soak(
        same_input.folder,
        same_input.command("--shards", "2"),
        same_input.run_dir,
        {**same_input.environment, **ONE_THREAD},
        kills=3,
        seed=SEED,
        like=tiny_loop.run_dir,
    )
    kills = soak.run()
    assert Counter(kill.stage for kill in kills) == dict.fromkeys(STAGES, 1)
    assert all(kill.equal for kill in kills)
    assert "taking over the lock" in (same_input.folder / "driver.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(14_400)
def test_soak(tmp_path):
    """Trainings of three epochs, so that most are killed between two checkpoints."""
    folder = Path(os.environ.get("FLARE_SOAK_DIR", tmp_path / "soak"))
    if not folder.exists():
        write_phantom(folder, labelled=4, unlabelled=6, test=2, size=(20, 32, 32), seed=3)
        (folder / "unlabelled" / "truncated_0000.nii.gz").write_bytes(b"\x1f\x8b not a scan")
    loop, kills = TinyLoop(folder, -1), int(os.environ.get("FLARE_SOAK_KILLS", "51"))
    settings = [each for each in TINY if "num_epochs" not in each] + ["training.num_epochs=3", "training.save_every=1"]
    command = ["run", "-d", "22", "-u", str(loop.unlabelled), "--recipe", "demo", "--name", "tiny", "-device", "cpu"]
    soak = Soak(
        folder,
        [*command, "--shards", "2", "--set", *settings],
        loop.run_dir,
        {**loop.environment, **ONE_THREAD},
        kills=kills,
        others=kills // 6 + 1,
        seed=SEED,
    )
    done = soak.run()
    assert all(kill.equal for kill in done)
    counts = Counter(kill.stage for kill in done)
    assert all(3 * counts[stage] >= kills for stage in STAGES)
    if "FLARE_SOAK_PAGE" in os.environ:
        made_with = f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores"
        write_text(Path(os.environ["FLARE_SOAK_PAGE"]), page(done, seed=SEED, made_with=made_with))
