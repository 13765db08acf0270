"""The table of ``--profile``: rows of a part stand under names of their own."""

import threading

from nnunet_flare.inference.profile import Profile


def test_a_part_enters_its_stages_under_its_prefix():
    profile = Profile()
    coarse = profile.part("coarse ")
    coarse.add("network", 2.0, calls=4)
    profile.add("network", 3.0)
    with coarse.part("left ").stage("network"):
        pass
    assert profile.seconds["coarse network"] == 2.0 and profile.seconds["network"] == 3.0
    assert profile.calls == {"coarse network": 4, "network": 1, "coarse left network": 1}
    rows = {line.split("  ")[0] for line in profile.table().splitlines()}
    assert {"coarse network", "network"} <= rows


def test_stages_of_many_threads_add_up():
    profile = Profile()
    workers = [threading.Thread(target=lambda: [profile.add("write", 0.5) for _ in range(200)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert profile.seconds["write"] == 400.0 and profile.calls["write"] == 800
