"""Which checkpoints of a trained model's folder predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.errors import InputError
from nnunet_flare.inference.choices import DEFAULT_CHECKPOINT, Fold


@dataclass(frozen=True)
class Member:
    """One model of an ensemble: a checkpoint of a fold in a trained model's folder."""

    folder: Path
    fold: Fold
    checkpoint: str = DEFAULT_CHECKPOINT

    @property
    def path(self) -> Path:
        """The checkpoint file."""
        return Path(self.folder) / f"fold_{self.fold}" / self.checkpoint

    @property
    def files(self) -> tuple[Path, ...]:
        """All that makes the model: the checkpoint, and the documents of its folder."""
        return (self.path, *(Path(self.folder) / name for name in ("plans.json", "dataset.json")))

    def stamps(self) -> list[tuple[int, ...]] | None:
        """What changes with the files, as far as the file system tells; None where one is missing."""
        try:
            found = [path.stat() for path in self.files]
        except OSError:
            return None
        return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]

    def __str__(self) -> str:
        return str(self.path)


def find_folds(folder: Path, folds: Sequence[Fold] | None, checkpoint: str) -> list[Fold]:
    """The folds to predict with: those asked for, else every numbered one that has the checkpoint, else ``all``.

    Raises:
        InputError: when there is no such folder, no fold has the checkpoint, or one is asked for twice.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder; expected a folder with plans.json, dataset.json and fold_*")
    if folds:
        asked = [_fold(fold) for fold in folds]
        if len(set(asked)) < len(asked):
            raise InputError(
                f"-f {' '.join(map(str, folds))}: names a fold twice, which would count double in the mean; give each "
                "once"
            )
        return asked
    there = {path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")}
    numbered = sorted(int(name) for name in there if name.isdigit())
    if numbered:
        return list(numbered)
    if "all" in there:
        return ["all"]
    other = sorted({path.name for path in folder.glob("fold_*/*.pth")})
    raise InputError(f"{folder}: no fold holds {checkpoint}; found {other or 'no checkpoint'} (choose with -chk)")


def _fold(fold: Fold) -> Fold:
    if fold == "all" or str(fold).isdigit():
        return fold if fold == "all" else int(fold)
    raise InputError(f"fold {fold!r}: expected a number or 'all'")
