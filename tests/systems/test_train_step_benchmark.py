"""The benchmark of training steps runs every trainer; on a CPU and a tiny network its figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

from nnunet_flare.plugin import TRAINERS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_trainer_takes_the_same_batch_as_stock(tmp_path):
    words = [sys.executable, BENCHMARKS / "train_step.py", "--models", "tiny", "--steps", "1", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in [*words, tmp_path / "found.json"]], check=True, env=environment)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]["tiny"]
    assert set(rows) == {"nnUNetTrainer", *TRAINERS}
    assert rows["nnUNetTrainer"]["ratio"] == 1 and all(row["s"] > 0 and len(row["runs"]) == 1 for row in rows.values())
