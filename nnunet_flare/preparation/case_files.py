"""The files of one case of a download: which are its scan, its label map and its published pseudo-labels."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nnunet_flare.preparation.layouts import Group, Rule

FILE_ENDING = ".nii.gz"

Kind = Literal["image", "label", "either"]


@dataclass(frozen=True)
class DownloadedScan:
    """One case of a download; ``label`` is None where there is none or none is wanted, ``pseudo`` is by team."""

    case: str
    group: Group
    image: Path
    label: Path | None = None
    domain: str = "CT"
    pseudo: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class Download:
    """The cases of a download by id, what is wrong with others before any is opened, and what is not recognised."""

    scans: dict[str, DownloadedScan] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    copies: int = 0
    """Files that lie elsewhere as well, and are taken from there."""
    unknown: dict[Path, str] = field(default_factory=dict)
    archives: list[Path] = field(default_factory=list)


@dataclass
class CaseFiles:
    """The files of one case: what they are by name and folder, with the rule that says so."""

    rules: dict[Path, Rule] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    labels: list[Path] = field(default_factory=list)
    either: list[Path] = field(default_factory=list)
    spare: list[Path] = field(default_factory=list)
    pseudo: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, path: Path, kind: Kind, rule: Rule, *, spare: bool) -> None:
        """Enter a scan or label map; ``spare`` as of a rule."""
        self.rules[path] = rule
        of_kind = {"image": self.images, "label": self.labels, "either": self.either}[kind]
        (self.spare if spare else of_kind).append(path)

    @property
    def rule(self) -> Rule | None:
        """What a scan is says the rule of its image; a label map's alone counts where there is no image."""
        first = next(iter([*self.images, *self.labels, *self.either, *self.spare]), None)
        return None if first is None else self.rules[first]

    def contradiction(self, label: Path | None) -> str | None:
        """Where the scan lies in folders of several kinds, or has a training label map and is no training scan."""
        scans = self.images or self.spare
        told = {(rule.group, rule.domain): path for path in reversed(scans) for rule in [self.rules[path]]}
        if len(told) > 1:
            listed = " and ".join(f"{path} ({domain}, {group})" for (group, domain), path in told.items())
            return f"the same scan in folders of {len(told)} kinds: {listed}; remove all but one"
        if label is not None and scans and self.rules[label].group == "training" != self.rules[scans[0]].group:
            group = self.rules[scans[0]].group
            return f"{label} is a training label map, and the scan of this name, {scans[0]}, is for {group}; remove one"
        return None


def decide(case: str, files: CaseFiles, download: Download) -> None:
    """Enter a case into the download, or what is wrong with it."""
    rule = files.rule
    images = _distinct([*files.images, *files.spare], download)
    others = [path for path in images if path in files.spare] if files.images else []
    images = [path for path in images if path not in others]
    fixed = [path for path in files.labels if re.search(r"(^|[^a-z])fix", path.parent.name.lower())]
    labels = _distinct(fixed or files.labels, download)
    if images and not labels:
        labels = _distinct(files.either, download)
    else:
        images = [*images, *files.either]
    if rule is None:
        for path in (path for paths in files.pseudo.values() for path in paths):
            download.unknown[path] = f"a pseudo-label of '{case}', whose scan is not in this download"
        return
    contradiction = files.contradiction(labels[0] if labels else None)
    if contradiction is not None:
        download.problems[case] = contradiction
        return
    for path in others:
        download.unknown[path] = f"differs from {images[0]}, which is used for '{case}'; remove one"
    for what, paths in (("scans", images), ("label maps", labels)):
        if len(paths) > 1:
            listed = " and ".join(map(str, paths))
            download.problems[case] = (
                f"{len(paths)} different {what} with this name: {listed}; remove or rename all but one"
            )
            return
    if not images:
        download.problems[case] = f"{labels[0]}: label map without its scan {case}_0000{FILE_ENDING}"
    elif rule.group == "training" and not labels:
        download.problems[case] = f"{images[0]}: training scan without its label map {case}{FILE_ENDING}"
    else:
        label = labels[0] if labels and rule.group in ("training", "validation") else None
        pseudo = _one_each(case, files.pseudo, download)
        download.scans[case] = DownloadedScan(case, rule.group, images[0], label, rule.domain, pseudo)


def _one_each(case: str, found: Mapping[str, list[Path]], download: Download) -> dict[str, Path]:
    """The pseudo-label of each team; several that differ are listed, and none is taken."""
    chosen = {}
    for team, paths in found.items():
        distinct = _distinct(paths, download)
        if len(distinct) == 1:
            chosen[team] = distinct[0]
        for path in distinct if len(distinct) > 1 else ():
            download.unknown[path] = f"one of {len(distinct)} different pseudo-labels of '{case}' by {team}; keep one"
    return chosen


def _distinct(paths: list[Path], download: Download) -> list[Path]:
    """The files that are no copy of one before."""
    kept: list[Path] = []
    for path in paths:
        if any(is_same(path, other) for other in kept):
            download.copies += 1
        else:
            kept.append(path)
    return kept


def is_same(path: Path, other: Path) -> bool:
    """Whether two files are one, or equal byte by byte; a link to nothing is equal to none."""
    try:
        return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)
    except FileNotFoundError:
        return False
