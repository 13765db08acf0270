"""Checks of a recipe with loops against its data, before anything is planned or trained; all problems at once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_flare.cases import FILE_NAME, Case, read_table
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.fusion.ids import IdMap
from nnunet_flare.images import read_labels
from nnunet_flare.labels import label_ids, organs_of
from nnunet_flare.parallel import Workers, num_processes
from nnunet_flare.recipes.recipe import Recipe
from nnunet_flare.rounds.run.loops import annotated_of
from nnunet_flare.rounds.stages.case_maps import teacher_ids
from nnunet_flare.rounds.stages.union import teacher_maps

log = logging.getLogger(__name__)

SHOWN = 5
"""Problems of one teacher's label maps that are listed."""


def roles_of(raw: Path, cases: Sequence[str], labels: Mapping[str, Any]) -> dict[str, Case]:
    """The roles of the cases with labels; says in the log where none is fully labelled.

    Raises:
        InputError: for a table that is not valid.
    """
    path = raw / FILE_NAME
    table = read_table(path, labels=labels) if path.is_file() else None
    roles = {case: Case() if table is None else table[case] for case in cases}
    found = [case.role for case in roles.values()]
    if "partial" in found and "labelled" not in found:
        log.info("%s: no fully labelled case; only the %d partial cases train", raw.name, found.count("partial"))
    return roles


def check_loop_data(
    recipe: Recipe, roles: Mapping[str, Case], labels: Mapping[str, Any], scans: Collection[str]
) -> None:
    """Compare the loops and teachers of a recipe with a dataset.

    Args:
        recipe: the recipe; nothing is checked where it has no loops.
        roles: the cases with labels.
        labels: ids by name, of dataset.json.
        scans: ids of the unlabelled scans.

    Raises:
        InputError: all problems at once.
    """
    if not recipe.loops:
        return
    organs = label_ids(labels)
    problems: list[str] = []
    owner: dict[int, str] = {}
    for loop in recipe.loops:
        unknown = sorted({*loop.organs, *loop.all_but} - set(organs))
        if unknown:
            problems.append(f"loop {loop.name}: labels {unknown} are not in dataset.json, which has {list(organs)}")
        ids = loop.ids(organs)
        shared = [i for i in ids if i in owner]
        if shared:
            problems.append(f"loop {loop.name}: labels {shared} also belong to loop {owner[shared[0]]}")
        owner |= dict.fromkeys(ids, loop.name)
        parted = [f"{n} {list(r)}" for n, r in organs_of(labels).items() if set(r) & set(ids) and set(r) - set(ids)]
        if parted:
            problems.append(
                f"loop {loop.name}: has some labels of region {', '.join(parted)} and not the others; a loop learns "
                "whole regions: give it all of their labels, or none"
            )
        if ids and not any(annotated_of(case, ids) for case in roles.values() if case.role in ("labelled", "partial")):
            problems.append(
                f"loop {loop.name}: no labelled or partial case has one of its labels {list(ids)} annotated"
            )
    problems += _teacher_problems(recipe, organs, {*roles, *scans})
    if problems:
        raise InputError(f"recipe {recipe.name}: {len(problems)} problem(s):\n  " + "\n  ".join(problems))


def _teacher_problems(recipe: Recipe, organs: Sequence[int], cases: Collection[str]) -> list[str]:
    """Every teacher's label maps of the run's cases are opened once: files, and ids that are not the dataset's."""
    problems = []
    try:
        id_maps = teacher_ids(recipe.fusion.id_maps, len(recipe.fusion.teachers))
    except InputError as error:
        return [f"fusion.id_maps: {error}"]
    for name, id_map in zip(recipe.fusion.teachers, id_maps, strict=True):
        folder = Path(name)
        if not folder.is_dir():
            problems.append(f"fusion.teachers: {folder}: no such folder; expected label maps <case>.nii.gz")
            continue
        try:
            maps = {case: path for case, path in teacher_maps(folder).items() if case in cases}
        except InputError as error:
            problems.append(str(error))
            continue
        if not maps:
            problems.append(f"fusion.teachers: {folder}: has no label map of any case of this run")
            continue
        found: list[str] = []
        check = partial(_check_map, organs=tuple(organs), id_map=id_map)
        with Workers(num_processes(len(maps))) as workers:
            for item, outcome in workers.each_case(check, sorted(maps.items()), description=f"teacher {folder.name}"):
                if isinstance(outcome, CaseError):
                    found.append(f"fusion.teachers: {item[0]}: {outcome.reason}")
        problems += sorted(found)[:SHOWN]
        if len(found) > SHOWN:
            problems.append(f"fusion.teachers: {folder}: and {len(found) - SHOWN} more")
    return problems


def _check_map(item: tuple[str, Path], *, organs: Sequence[int], id_map: IdMap | None) -> None:
    case, path = item
    volume = read_labels(path, case, allowed=[0, *organs] if id_map is None else None)
    if id_map is not None:
        try:
            mapped = id_map.apply(volume.array)
        except ValueError as error:
            raise CaseError(case, f"{path}: {error}") from error
        foreign = sorted(set(mapped[mapped > 0].tolist()) - set(organs))
        if foreign:
            raise CaseError(case, f"{path}: holds the ids {foreign} after the id map, the dataset has {list(organs)}")
