"""What a prepared dataset holds and where: its folders, its cases, and files that belong to none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_flare.cases import Case
from nnunet_flare.preparation.layouts import Group
from nnunet_flare.preparation.place import strangers

FOLDERS: dict[Group, str] = {
    "training": "imagesTr",
    "unlabelled": "unlabelled",
    "source": "unlabelledCT",
    "validation": "imagesTs",
    "healthy": "imagesHealthy",
}
"""Validation scans with a label map lie in ``imagesVal`` and ``labelsVal``, to be scored; the others are test scans.
Where the task is to adapt to several modalities, the names of these folders end in the modality's."""

PSEUDO = "pseudo"
"""Below it one folder of published pseudo-labels for each team."""

DOMAINS = "unlabelled_domains.csv"
"""In the dataset's folder: ``case,domain`` of the scans in ``unlabelled``, where they are of several modalities."""


@dataclass
class PreparedDataset:
    """What :func:`prepare` made: the dataset, cases by group, roles; who was set aside or is odd, with the reason."""

    dataset: Path
    unlabelled: Path
    cases: dict[Group, list[str]]
    expected: Mapping[Group, int]
    roles: dict[str, Case] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scored: dict[str, list[str]] = field(default_factory=dict)
    """Validation cases with a label map, by what follows ``imagesVal`` and ``labelsVal`` in the folders' names."""
    pseudo: dict[str, list[str]] = field(default_factory=dict)
    """Cases with a published pseudo-label, by team."""
    domains: dict[str, str] = field(default_factory=dict)
    """Modality of the unlabelled cases."""
    not_recognised: dict[Path, str] = field(default_factory=dict)
    """Files of the download that look like images and belong to nothing, with the reason."""


def name_strangers(prepared: PreparedDataset) -> None:
    """Set aside files from an earlier call whose case is not used any more: they would train, or be scored."""
    used: dict[str, list[str]] = {FOLDERS[g]: cases for g, cases in prepared.cases.items() if g != "validation"}
    scored = [path.name for kind in ("imagesVal*", "labelsVal*") for path in prepared.dataset.glob(kind)]
    used |= {name: prepared.scored.get(name[len("imagesVal") :], []) for name in scored}
    if (prepared.dataset / PSEUDO).is_dir():
        teams = [folder.name for folder in sorted((prepared.dataset / PSEUDO).iterdir())]
        used |= {f"{PSEUDO}/{team}": prepared.pseudo.get(team, []) for team in teams}
    for folder, cases in used.items():
        for case, path in strangers(prepared.dataset / folder, cases):
            key = f"{folder}/{case}" if folder.startswith(PSEUDO) else case
            also = "" if folder.startswith((PSEUDO, "labels")) else " and its label map"
            why = f"{path} is from an earlier call, and its case is no longer used; remove it{also}"
            prepared.set_aside[key] = "; ".join(filter(None, (prepared.set_aside.get(key), why)))
