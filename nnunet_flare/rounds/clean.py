"""``flare-pseudolabel clean``: give back the disk of rounds that nothing needs any more.

A round is over when its own tasks are done and the next round's data is built, and the last round of a loop when the
union is. Of such a round go the checkpoints, its training data and the label arrays on the network grid. Kept are the
final model, the ledger and every table, log and fused label map, so that ``status``, ``report`` (without new pictures
of those rounds) and ``export`` go on working.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.files import remove_scratch
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import is_marked
from nnunet_flare.rounds.run.tasks import graph


@dataclass(frozen=True)
class Item:
    """One thing that can go: what it is in words, its paths, and the bytes that come free."""

    what: str
    paths: tuple[Path, ...]
    size_bytes: int


def cleanable(run: Run) -> list[Item]:
    """What can go now, round by round; empty when nothing can.

    Files with several names (a round's images are hard links) count only when their last name goes.
    """
    found: list[tuple[str, list[Path]]] = []
    for number in rounds_over(run):
        if not (number == 0 and run.settings.init_model is not None):
            checkpoints = sorted(run.round(number).model.glob("fold_*/checkpoint_*.pth"))
            found.append((f"round {number}: checkpoints", checkpoints))
        if number > 0:
            found.append((f"round {number}: training data", [run.round(number).data]))
        folder = run.paths.round(number)
        found.append((f"round {number}: label arrays", [folder / "members", folder / "seg"]))
    found = [(what, [path for path in paths if path.exists()]) for what, paths in found]
    sizes = _freed([paths for _, paths in found])
    return [Item(what, tuple(paths), size) for (what, paths), size in zip(found, sizes, strict=True) if paths]


def rounds_over(run: Run) -> list[int]:
    """Rounds before the final one whose results every later task has already taken."""
    tasks, last = graph(run), run.recipe.last_rounds()
    over = []
    for number in range(run.final.number):
        own = [task.name for task in tasks.values() if task.round == number]
        then = {number + 1, run.final.number if number in last else number + 1}
        following = [t.name for t in tasks.values() if t.round in then and t.stage in ("build", "train")]
        if all(is_marked(run.paths.done(name)) for name in (*own, *following)):
            over.append(number)
    return over


def clean(run: Run, items: Sequence[Item]) -> int:
    """Remove what :func:`cleanable` found; returns the bytes that came free.

    Raises:
        LockedError: while a driver or a submission works on the run.
    """
    with LockFile(run.paths.driver_lock, f"the run in {run.root}"):
        for item in items:
            for path in item.paths:
                if path.is_dir() and not path.is_symlink():
                    remove_scratch(path)
                else:
                    path.unlink(missing_ok=True)
    return sum(item.size_bytes for item in items)


def _freed(groups: Sequence[Sequence[Path]]) -> list[int]:
    """Bytes that come free with each group, when all of them go: an inode counts where its last name is removed."""
    seen: Counter[tuple[int, int]] = Counter()
    sizes = []
    for paths in groups:
        total = 0
        for entry in _files(paths):
            inode = (entry.st_dev, entry.st_ino)
            seen[inode] += 1
            if seen[inode] == entry.st_nlink:
                total += entry.st_blocks * 512
        sizes.append(total)
    return sizes


def _files(paths: Sequence[Path]) -> Iterator[os.stat_result]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            for folder, _, names in os.walk(path):
                for name in names:
                    yield (Path(folder) / name).lstat()
        else:
            yield path.lstat()
