"""Where a run lives. Its plans, data and models lie in nnU-Net's folders, so that one folder alone may go on with it.

``flare_runs/NAME.json`` in the preprocessed dataset names the run's folder and a token that ``run.json`` has too. A
folder that was copied has the token and another place: whatever would write is refused there, in the same words by
every command. A folder that was moved, whose old place is gone, is the run's new home.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from nnunet_flare.errors import FlareError, InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.run.paths import RunPaths
from nnunet_flare.rounds.run.settings import RunSettings

log = logging.getLogger(__name__)


def owner_file(settings: RunSettings) -> Path:
    """What says to which folder a run's name belongs."""
    return Path(settings.folders["nnUNet_preprocessed"]) / settings.dataset / "flare_runs" / f"{settings.name}.json"


def other_home(root: Path, settings: RunSettings) -> Path | None:
    """The folder that this run's name belongs to, where that is another one that still holds such a run."""
    owner = _owner(settings)
    if owner is None or not isinstance(owner.get("run_dir"), str):
        return None
    home = Path(owner["run_dir"])
    if _same_place(home, root) or not RunPaths(home).manifest.is_file():
        return None
    there = _manifest(home).get("settings")
    if not isinstance(there, dict):
        return None
    return home if (there.get("name"), there.get("dataset")) == (settings.name, settings.dataset) else None


def check_home(root: Path, settings: RunSettings) -> None:
    """Refuse to write into a copied run folder; note the new place of one that was moved.

    Raises:
        InputError: for a copy, naming both folders and what to do.
    """
    home = other_home(root, settings)
    if home is not None:
        raise InputError(
            f"{root}: {words(root, settings, home)}. Work on {home}; or remove or rename that folder, then this one "
            "is the run; or start a new run with another --name"
        )
    owner, place = _owner(settings), str(root.resolve())
    if owner is None or owner.get("run_dir") == place:
        if owner is None:
            write_owner(settings, root, str(settings.recipe["name"]), _manifest(root).get("token"))
        return
    log.warning("the run in %s was in %s before; the move is noted", root, owner.get("run_dir"))
    write_json(owner_file(settings), {**owner, "run_dir": place})


def words(root: Path, settings: RunSettings, home: Path) -> str:
    """What to say about a folder whose run lives elsewhere."""
    tokens = {_manifest(place).get("token") for place in (root, home)}
    what = "has the name of the run" if len(tokens - {None}) == 2 else "is a copy of the run"
    return (
        f"this folder {what} in {home}; both would write the same plans, data and models, so this one can only be read"
    )


def write_owner(settings: RunSettings, root: Path, recipe: str, token: str | None) -> None:
    """Note that a run lives in ``root``."""
    document = {"run_dir": str(root.resolve()), "recipe": recipe, "token": token}
    write_json(owner_file(settings), document)


def token(root: Path) -> str | None:
    """What a run and its copies have alone; None where an earlier version of this package began it."""
    found = _manifest(root).get("token")
    return found if isinstance(found, str) else None


def _owner(settings: RunSettings) -> dict[str, Any] | None:
    path = owner_file(settings)
    if not path.is_file():
        return None
    try:
        document = read_json(path)
    except (FlareError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, and the next command writes it again") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected an object; remove it, and the next command writes it again")
    return document


def _manifest(root: Path) -> dict[str, Any]:
    """What a run's manifest holds; nothing where it cannot be read."""
    try:
        document = read_json(RunPaths(root).manifest)
    except (FlareError, OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _same_place(one: Path, other: Path) -> bool:
    """Whether two paths are one folder: also through a link, or where it is mounted twice."""
    try:
        return one.resolve() == other.resolve() or os.path.samefile(one, other)
    except OSError:
        return False
