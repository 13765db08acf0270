"""Where a run keeps what: every path of a RUN_DIR in one class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The files of a run below its folder ``root``."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Recipe, data, versions and hardware of the run; written once."""
        return self.root / "run.json"

    @property
    def unlabelled(self) -> Path:
        """The frozen list of unlabelled cases."""
        return self.root / "unlabelled.json"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.sqlite"

    @property
    def driver_lock(self) -> Path:
        return self.root / "driver.lock"

    @property
    def stop(self) -> Path:
        """Written by a select task that ends the run early; holds the last round that is labelled."""
        return self.root / "early_stop.json"

    @property
    def reviews(self) -> Path:
        """A person's decisions on cases (``--decisions``)."""
        return self.root / "reviews.json"

    @property
    def report(self) -> Path:
        """The HTML report's folder."""
        return self.root / "report"

    def box(self, case: str) -> Path:
        """Where the coarse model found the organs of an unlabelled scan."""
        return self.root / "roi" / f"{case}.json"

    def done(self, task: str) -> Path:
        """Marker of a finished task, written after its output was checked."""
        return self.root / "tasks" / f"{task}.done.json"

    def failed(self, task: str) -> Path:
        return self.root / "tasks" / f"{task}.failed.json"

    def task_lock(self, task: str) -> Path:
        return self.root / "tasks" / f"{task}.lock"

    def log(self, task: str) -> Path:
        return self.root / "logs" / f"{task}.log"

    def round(self, number: int) -> Path:
        """Everything a round produced but its label maps."""
        return self.root / "rounds" / f"r{number}"

    def case(self, number: int, case: str) -> Path:
        """One case's agreement and volumes in a round; its presence says that the case is labelled (or set aside)."""
        return self.round(number) / "cases" / f"{case}.json"

    def members(self, number: int, case: str) -> Path:
        """The members' label maps of a case on the network grid, (members, Z, Y, X)."""
        return self.round(number) / "members" / f"{case}.b2nd"

    def training_label(self, number: int, case: str) -> Path:
        """The case's ``_seg`` array as nnU-Net stores it."""
        return self.round(number) / "seg" / f"{case}_seg.b2nd"

    def properties(self, number: int, case: str) -> Path:
        """The case's pickle beside :meth:`training_label`."""
        return self.round(number) / "seg" / f"{case}.pkl"

    def label(self, number: int, case: str, file_ending: str) -> Path:
        """The fused label map on the image's own grid."""
        return self.root / "labels" / f"r{number}" / f"{case}{file_ending}"

    def scores(self, number: int) -> Path:
        return self.root / "tables" / f"scores_r{number}.csv"

    def selection(self, number: int) -> Path:
        return self.root / "tables" / f"selection_r{number}.csv"

    def decisions(self, number: int) -> Path:
        """What the select task decided, in full; the ledger is rebuilt from these files."""
        return self.round(number) / "decisions.json"

    def evaluation(self, number: int) -> Path:
        """Predictions and measures of the held-out cases."""
        return self.root / "evaluation" / f"r{number}"
