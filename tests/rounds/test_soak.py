"""kill -9 of the driver or of any of its workers at seeded random moments: the run ends as one that never was killed.

``FLARE_SOAK_KILLS`` says how often (default 6; ``make soak`` uses 50), ``FLARE_SOAK_SEED`` which moments. Every kill is
logged with what the run was doing.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections import Counter

import psutil
import pytest
from test_killed_runs import processes_of, same_input, start

from nnunet_flare.rounds.ledger import read_ledger
from nnunet_flare.rounds.manifest import load_run
from nnunet_flare.rounds.tasks import graph, is_done

__all__ = ["same_input"]

log = logging.getLogger(__name__)

LONGEST_S = 15.0
"""Kills come after up to this long; a task of the tiny run takes 5 to 20 s with its start."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def is_finished(run_dir) -> bool:
    if not (run_dir / "run.json").is_file():
        return False
    run = load_run(run_dir)
    return all(is_done(run, task) for task in graph(run).values())


def decided(run_dir) -> dict[str, tuple]:
    entries = read_ledger(load_run(run_dir).paths)
    found = {e.case: (e.decision, e.score, e.label_sha256) for e in entries}
    assert len(found) == len(entries), "a case is there twice"
    return found


def test_killed_at_random_moments_the_run_ends_as_an_undisturbed_one(tiny_loop, same_input, tmp_path):
    kills, seed = int(os.environ.get("FLARE_SOAK_KILLS", "6")), int(os.environ.get("FLARE_SOAK_SEED", "0"))
    rng = random.Random(seed)
    environment = {**same_input.environment, "nnUNet_n_proc_DA": "0", "NNUNET_FLARE_THREADS": "1"}
    output, run_dir = tmp_path / "driver.log", same_input.run_dir
    undisturbed = decided(tiny_loop.run_dir)
    hit: Counter[str] = Counter()
    runs = 0
    while sum(hit.values()) < kills:
        driver = start(same_input.command(), environment, output)
        moment = time.monotonic() + rng.uniform(0.5, LONGEST_S)
        while driver.poll() is None and time.monotonic() < moment:
            time.sleep(0.02)
        if driver.poll() is None:
            doing = sorted(path.name.removesuffix(".lock") for path in run_dir.glob("tasks/*.lock")) or [
                "between tasks"
            ]
            workers = processes_of(run_dir)
            victim = rng.choice(workers) if workers and rng.random() < 0.5 else psutil.Process(driver.pid)
            who = "driver" if victim.pid == driver.pid else "worker"
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
            hit[doing[0].partition("-")[0]] += 1
            log.info("kill %d of the %s during %s", sum(hit.values()), who, ", ".join(doing))
        driver.wait(timeout=300)
        ends = time.monotonic() + 30
        while processes_of(run_dir) and time.monotonic() < ends:
            time.sleep(0.1)
        assert not processes_of(run_dir), "a task outlived its driver"
        if is_finished(run_dir):
            assert decided(run_dir) == undisturbed
            runs += 1
            if sum(hit.values()) < kills:
                for name in ("nnUNet_preprocessed", "nnUNet_results"):
                    shutil.rmtree(tmp_path / name)
                    (tmp_path / name).mkdir()
    driver = start(same_input.command(), environment, output)
    assert driver.wait(timeout=600) == 1, output.read_text()[-3000:]  # the one unreadable scan
    assert decided(run_dir) == undisturbed
    log.info("%d kills over %d runs, seed %d: %s", kills, runs + 1, seed, dict(hit))
