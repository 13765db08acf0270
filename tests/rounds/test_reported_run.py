"""A run reports by itself: after every round and after the final model."""

from __future__ import annotations

from nnunet_flare.files import read_json
from nnunet_flare.rounds.run.ledger import read_decisions


def test_the_tiny_run_wrote_its_report_with_pictures_and_scores(tiny_loop):
    run = tiny_loop.run()
    for name in ("report-r0", "report-r1"):
        assert read_json(run.paths.done(name))["result"] == {"exit_code": 0}
    page = (run.paths.report / "index.html").read_text(encoding="utf-8")
    for number in (0, 1):
        assert f"{read_json(run.paths.evaluation(number) / 'dice.json')['mean']:.3f}" in page
    labelled = {entry.case for entry in read_decisions(run.paths, 0) if entry.decision != "failed"}
    assert {path.stem for path in (run.paths.report / "pictures" / "r0").glob("*.jpg")} == labelled
