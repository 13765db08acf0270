"""The FLARE downloads as data: which file belongs to what, by its name and the folders that it lies in.

| | FLARE22 | FLARE23 | task 1 of 24 to 26 | task 2 | task 3 |
|---|---|---|---|---|---|
| labelled | ``FLARE22_Tr_0001`` | ``FLARE23_0001`` ... 2200 | any name, ``train_label`` | FLARE22's | FLARE22's |
| unlabelled | ``Case_00001`` | ``FLARE23_2201`` ... | any, ``train_unlabel`` | FLARE22's | ``train_MRI_unlabeled`` |
| validation | ``FLARETs_0001`` | ``FLARE23Ts_0001`` | any, ``validation`` | the same | ``MRI_imagesVal`` |

A row is one download; a rule of it is asked before those below it. The forms in which archives were unpacked by hand
(``Train-Labeled``, ``FLARE22_LabeledCase50``) are rules as well. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from nnunet_flare.errors import InputError
from nnunet_flare.organs import FLARE22, FLARE23, LESION, Organ

Group = Literal["training", "unlabelled", "source", "validation", "healthy"]
"""``source``: unlabelled scans of the labelled scans' own modality, where the task is to adapt to others. ``healthy``:
scans that are known to have no lesion."""


@dataclass(frozen=True)
class Rule:
    """Files of one kind.

    Attributes:
        group: what they are.
        folder: searched in the lower-case folders, ``/download/below/`` with a slash on either side; empty: any.
        name: the whole name without channel and ending; empty: any.
        domain: modality of the scans.
        case: how the id is written, of the number that ``name`` has in parentheses; empty: as the file is called.
        spare: copies of scans, taken where they lie nowhere else.
    """

    group: Group
    folder: str = ""
    name: str = ""
    domain: str = "CT"
    case: str = ""
    spare: bool = False

    def case_of(self, name: str) -> str | None:
        """The case's id of a name, None for a name of something else."""
        match = re.fullmatch(self.name or ".+", name, re.DOTALL)
        if match is None:
            return None
        return self.case.format(int(match.group(1))) if self.case else name


@dataclass(frozen=True)
class Layout:
    """One download: a year's, or a year's task.

    Attributes:
        year: the option that names it, such as ``flare24``.
        task: 1 to 3; None for the years that had one.
        dataset_id: default of the dataset that is made of it.
        organs: ids and names in its label maps.
        example: what is told when no labelled scan is there.
        rules: asked in this order.
        expected: how many cases a group has when the download is complete, where that is known.
        signs: found in the lower-case path of some file of this download, and of no other one of another kind.
        partial: whether label maps leave out what nobody drew.
    """

    year: str
    task: int | None
    dataset_id: int
    organs: tuple[Organ, ...]
    example: str
    rules: tuple[Rule, ...]
    expected: Mapping[Group, int]
    signs: str
    partial: bool = False

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.year.upper() + ("" if self.task is None else f"Task{self.task}")

    @property
    def flags(self) -> str:
        """The options that ask for it."""
        return f"--{self.year} DIR" + ("" if self.task is None else f" --task {self.task}")

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The modalities of unlabelled scans, where they are not those of the labelled ones."""
        found = {rule.domain for rule in self.rules if rule.group == "unlabelled"}
        return tuple(sorted(found)) if any(rule.group == "source" for rule in self.rules) else ()


TEAMS = re.compile(r"aladdin\d*|blackbean")
"""Whose pseudo-labels were published, by a word in a folder's name."""

CASE = Rule("unlabelled", name=r"Case_?(\d{1,5})", case="Case_{:05d}")
"""FLARE22's unlabelled scans; one published set of pseudo-labels calls them ``Case1``."""

FLARE22_TRAINING = Rule("training", name=r"FLARE22_Tr_\d{4}")
VALIDATION = Rule("validation", folder=r"/(?:public)?validation[^/]*/")


def _modality(word: str) -> str:
    """A folder of that word, as in ``train_MRI_unlabeled``."""
    return rf"/(?:[^/]*[-_])?{word}(?:[-_][^/]*)?/"


def _of_target(domain: str, word: str) -> tuple[Rule, ...]:
    """The scans of a modality to adapt to."""
    folder = _modality(word)
    near = rf"/(?:public)?validation[^/]*(?:/[^/]*)*?{folder}|{folder}(?:[^/]*/)*(?:public)?validation"
    return (
        Rule("unlabelled", rf"/coreset[^/]*(?:/[^/]*)*?/{word}[-_]", domain=domain, spare=True),
        Rule("validation", rf"^(?!.*/coreset)(?:.*)(?:{near})", domain=domain),
        Rule("unlabelled", rf"/train[-_]{word}[-_]unlabell?ed/|/{word}/training/", domain=domain),
    )


TASK_1 = (
    Rule("healthy", r"/healthy[^/]*/"),
    VALIDATION,
    Rule("unlabelled", r"/train[-_]unlabel(?:l?ed)?/"),
    Rule("training", r"/train[-_]label(?:l?ed)?/"),
)
TASK_2 = (
    VALIDATION,
    Rule("training", r"/train_gt_label/"),
    FLARE22_TRAINING,
    replace(CASE, folder="/coreset", spare=True),
    CASE,
    Rule("validation", name=r"FLARETs_\d{4}"),
)
TASK_3 = (
    Rule("training", r"/train_ct_gt_label/"),
    FLARE22_TRAINING,
    replace(CASE, group="source"),
    *_of_target("PET", "pet"),
    *_of_target("MR", "mri?"),
)
TASK_3_2024 = (
    *TASK_3,
    Rule("unlabelled", r"/training/(?:amos_mr|lld-mmri)[^/]*/", domain="MR"),
    replace(VALIDATION, domain="MR"),
)
"""PET came in 2025; the first download says MR of its training folders alone."""

HUB_1 = r"/flare-task1-pancancer/"
SIGNS_2 = r"/flare-task2-laptopseg/|/flare2\d-task2/|/train_gt_label/|/train_pseudo_label/"
SIGNS_3 = r"/flare-task3-domainadaption/|/flare2\d-task3|/train_ct_|/train_(?:mri?|pet)_unlabel|/lld-mmri"

SIZES_2: Mapping[Group, int] = {"training": 50, "unlabelled": 2000}
SIZES_3: Mapping[Group, int] = {"training": 50, "source": 2000}
LABELLED_LESION = "<case>_0000.nii.gz in train_label"


def _organ_tasks(year: str, first_id: int, adaptation: tuple[Rule, ...], unlabelled: int) -> tuple[Layout, Layout]:
    """Tasks 2 and 3 of a year."""
    ct = "FLARE22_Tr_0001_0000.nii.gz"
    sizes: Mapping[Group, int] = {**SIZES_3, "unlabelled": unlabelled}
    return (
        Layout(year, 2, first_id + 2, FLARE22, ct, TASK_2, SIZES_2, SIGNS_2),
        Layout(year, 3, first_id + 3, FLARE22, ct, adaptation, sizes, SIGNS_3),
    )


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "flare22", None, 22, FLARE22, "FLARE22_Tr_0001_0000.nii.gz",
        (FLARE22_TRAINING, CASE, Rule("validation", name=r"FLARETs_\d{4}")),
        {"training": 50, "unlabelled": 2000, "validation": 50},
        r"/flare22_labeledcase|/flare_unlabeledcase|/flare22/(?:training|validation)/",
    ),
    Layout(
        "flare23", None, 23, FLARE23, "FLARE23_0001_0000.nii.gz",
        (
            Rule("unlabelled", "/[^/]+/(?:[^/]+/)*[^/]*unlab", r"FLARE23_\d{4}"),  # below the download
            Rule("training", name=r"FLARE23_(?:[01]\d{3}|2[01]\d{2}|2200)"),
            Rule("unlabelled", name=r"FLARE23_\d{4}"),
            Rule("validation", name=r"FLARE23Ts_\d{4}"),
        ),
        {"training": 2200, "unlabelled": 1800, "validation": 100},
        r"/flare23_\d{4}|/(?:images|labels)tr2200/|/unlabeledtr1800/", partial=True,
    ),
    Layout(
        "flare24", 1, 241, LESION, LABELLED_LESION, TASK_1, {"training": 5000, "unlabelled": 5000},
        rf"{HUB_1}|/flare24-task1/|/train-(?:un)?labeled/|/lesion-gts/", partial=True,
    ),
    *_organ_tasks("flare24", 240, TASK_3_2024, 4817),
    Layout("flare25", 1, 251, LESION, LABELLED_LESION, TASK_1, {}, HUB_1, partial=True),
    *_organ_tasks("flare25", 250, TASK_3, 5817),
    Layout(
        "flare26", 1, 261, LESION, LABELLED_LESION,
        (*TASK_1, Rule("training", r"/train_per_cancer_type/|/new_cancer_datasets[^/]*/")),
        {"healthy": 172}, r"/pancancerctseg/|/train_per_cancer_type/|/new_cancer_datasets", partial=True,
    ),
    *_organ_tasks("flare26", 260, TASK_3, 5817),
)  # fmt: skip
"""Every download that ``flare-pseudolabel prepare`` knows."""

YEARS = tuple(dict.fromkeys(layout.year for layout in LAYOUTS))


def layout_of(year: str, task: int | None = None) -> Layout:
    """The layout of a year, and of a task where the year has several.

    Raises:
        InputError: for a year without tasks that is asked for one, and the other way round.
    """
    of_year = {layout.task: layout for layout in LAYOUTS if layout.year == year}
    if task in of_year:
        return of_year[task]
    if None in of_year:
        raise InputError(f"--task {task}: {year.upper()} has one task; leave it out")
    raise InputError(
        f"--{year}: no task given; add --task 1 (pan-cancer lesions), --task 2 (organs, on a laptop) or --task 3 "
        "(organs in MR and PET)"
    )
