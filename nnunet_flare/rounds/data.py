"""A round's training data: hard links to arrays that exist already, and the new labels of the pseudo cases.

Nothing is preprocessed again. The folder is built under another name beside its place and renamed whole, because
nnU-Net takes every file in a data folder for a case and a half-built folder for a data set.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.cases import Case, table_name, write_table
from nnunet_flare.errors import TaskError
from nnunet_flare.files import link_or_copy, temporary_prefix
from nnunet_flare.fusion.members import class_locations, ignore_uncertain
from nnunet_flare.rounds.arrays import ENDINGS, label_hash, read_array, read_properties, write_array, write_properties
from nnunet_flare.rounds.decisions import load_reviews
from nnunet_flare.rounds.label_maps import ignore_label
from nnunet_flare.rounds.labelling import organ_ids, round_members
from nnunet_flare.rounds.ledger import Entry, read_decisions, write_round
from nnunet_flare.rounds.manifest import Base, Run
from nnunet_flare.rounds.other_plans import cases_folder, has_same_arrays, prepare_cases
from nnunet_flare.rounds.passes import iterations_of_pass, pass_of_round
from nnunet_flare.rounds.plans import base_configuration, base_table, raw_cases, write_configuration
from nnunet_flare.rounds.preprocess import failure, odd, remove_scratch
from nnunet_flare.rounds.recipe import DISTILLING_TRAINER
from nnunet_flare.rounds.unlabelled import read_list

log = logging.getLogger(__name__)


def build_round(run: Run, number: int) -> dict[str, Any]:
    """Make everything that trains round ``number``: its data, its table of cases and its configuration.

    Round 0 and a fine-tuning train on the labelled cases as they are. Round ``n`` adds the cases that round ``n`` - 1
    took.
    """
    if number == 0 or number > run.last_round:
        result = build_training(run, run.configuration(number), number, [])
        del result["ignored"], result["failed"]
        return result
    entries = read_decisions(run.paths, number - 1)
    taken = [entry for entry in entries if entry.decision == "taken"]
    result = build_training(run, run.configuration(number), number, taken)
    shares, failed = result.pop("ignored"), result.pop("failed")
    if shares or failed:
        known = [replace(entry, ignored=shares.get(entry.case, entry.ignored)) for entry in entries]
        known = [
            replace(entry, decision="failed", reason=f"{failed[entry.case]}; {entry.reason}") if entry.case in failed
            else entry for entry in known
        ]  # fmt: skip
        write_round(run.paths, number - 1, known)
    return result


def build_training(run: Run, name: str, number: int, taken: Sequence[Entry]) -> dict[str, Any]:
    """Make a configuration that trains on the labelled cases and the pseudo-labels ``taken`` in round ``number`` - 1.

    Args:
        run: the run.
        name: name of the configuration; its data folder is ``<plans>_<name>``, or the base's without pseudo-labels.
        number: the round whose training settings it gets.
        taken: the pseudo-labelled cases.

    Returns:
        Numbers of cases and of files by how they were made; under ``ignored`` the shares of ignored voxels, under
        ``failed`` why cases were left out that the plans of the final model could not preprocess.
    """
    table = base_table(run)
    cases = {case: table[case] for case in raw_cases(run)}
    if not any(case.role in ("labelled", "partial") for case in cases.values()):
        raise TaskError(f"{run.settings.dataset}: no labelled case; at least one labelled or partial case is needed")
    links: Counter[str] = Counter()
    shares: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    identifier = None
    if taken:
        check_labels(run, number - 1, taken)
        base = run.base_of(number)
        identifier = f"{base.plans_name}_{name}"
        target = run.preprocessed / identifier
        is_prepared = not has_same_arrays(run.base, base)
        if is_prepared:
            failed = prepare_cases(run, base, target, number - 1, taken)
            taken = [entry for entry in taken if entry.case not in failed]
            if not taken:
                case, reason = next(iter(failed.items()))
                raise TaskError(f"none of the taken cases could be preprocessed for the final model; {case}: {reason}")
            shares = {e.case: _with_ignore(run, number - 1, e)[1] for e in taken if e.ignored}
        shares |= _build_folder(run, base, target, list(cases), number - 1, taken, links, is_prepared=is_prepared)
        remove_scratch(cases_folder(target))
        cases |= {entry.case: Case("pseudo", round=number) for entry in taken}
    stream = _stream(run) if run.recipe.is_online else []
    cases |= {case: Case("unlabelled") for case in stream}
    write_table(run.preprocessed / table_name(name), cases)
    ignored = ignore_label(run) if any(entry.ignored for entry in taken) else None
    settings = run.recipe.settings(
        run.recipe_number(number),
        run=run.settings.name,
        stored_round=number,
        ignore_label=ignored,
        init_from=initial_weights(run, number),
        iterations=_iterations_of_pass(run, number, cases),
        unlabelled=run.unlabelled_data.name if stream else None,
        teacher=_teacher(run, number),
    )
    write_configuration(run, name, number, data_identifier=identifier, training=settings.to_json())
    counts = {"cases": len(cases), "pseudo": len(taken), "unlabelled": len(stream)}
    return {**counts, **links, "ignored": shares, "failed": failed}


def _iterations_of_pass(run: Run, number: int, cases: Mapping[str, Case]) -> int | None:
    """Iterations of an epoch of a round that trains on some cases, where the recipe counts passes."""
    if not run.recipe.counts_passes:
        return None
    roles = Counter(case.role for case in cases.values())
    batch = base_configuration(run.base_of(number))["batch_size"]
    samples = pass_of_round(run, number, roles["labelled"] + roles["partial"], roles["pseudo"])
    return iterations_of_pass(samples, batch)


def _stream(run: Run) -> list[str]:
    """The unlabelled cases that an online training learns from: those that could be read, are not odd (unless they are
    to be kept) and that no person rejected.
    """
    folder, reviews = run.unlabelled_data, load_reviews(run)
    ready = [case.case for case in read_list(run.paths.unlabelled) if failure(folder, case.case) is None]
    kept = [case for case in ready if run.recipe.selection.keep_odd or not odd(folder, case)]
    kept = [case for case in kept if case not in reviews or not reviews[case].is_rejected]
    log.info("%d of %d unlabelled scans take part in the training", len(kept), len(read_list(run.paths.unlabelled)))
    if not kept:
        raise TaskError(
            f"{folder}: of {len(ready)} unlabelled scans that could be read none takes part, the others being odd or "
            "rejected. flare-pseudolabel status names them; --set selection.keep_odd=true takes odd ones"
        )
    return kept


def _teacher(run: Run, number: int) -> dict[str, Any] | None:
    """The given model, where the round's trainer learns from a teacher."""
    if run.settings.init_model is None or not run.trainer(number).startswith(DISTILLING_TRAINER):
        return None
    fold = run.settings.init_folds[0]
    return {"folder": run.settings.init_model, "fold": fold if fold == "all" else int(fold)}


def initial_weights(run: Run, number: int) -> str | None:
    """The checkpoint that a round's training starts from: the final model for its fine-tuning, a member for the final
    training where ``final.start`` says so.
    """
    if number > run.last_round:
        return str(run.model(run.last_round) / "fold_all" / "checkpoint_final.pth")
    if number == run.last_round and run.recipe.final.start == "member":
        fold, checkpoint = round_members(run, number - 1)[0]
        return str(run.model(number - 1) / f"fold_{fold}" / checkpoint)
    return None


def check_labels(run: Run, number: int, taken: Sequence[Entry]) -> None:
    """Every taken label must be the one that was judged; a damaged one is removed and made anew by the next try."""
    damaged = []
    for entry in taken:
        try:
            label = read_array(run.paths.training_label(number, entry.case))[0]
            read_properties(run.paths.properties(number, entry.case))
            intact = label_hash(np.maximum(label, 0)) == entry.label_sha256
        except OSError:
            intact = False
        if not intact:
            damaged.append(entry.case)
    if damaged:
        for case in damaged:
            run.paths.case(number, case).unlink(missing_ok=True)
        for path in run.paths.root.glob(f"tasks/label-r{number}-*.done.json"):
            path.unlink()
        run.paths.done(f"select-r{number}").unlink(missing_ok=True)
        raise TaskError(
            f"round {number}: the labels of {len(damaged)} cases are damaged or not the ones that were judged "
            f"({', '.join(damaged[:5])}). They were removed; run the same command again to label them anew"
        )


def _build_folder(
    run: Run,
    base: Base,
    target: Path,
    base_cases: Sequence[str],
    number: int,
    taken: Sequence[Entry],
    links: Counter[str],
    *,
    is_prepared: bool,
) -> dict[str, dict[str, float]]:
    """Build ``target`` whole; returns the shares of ignored voxels by case and organ, where there are any.

    ``is_prepared``: the pseudo cases were preprocessed by the plans of ``base`` and only have to be linked.
    """
    scratch = target.with_name(f"{temporary_prefix()}{target.name}")
    for left in target.parent.glob(f".tmp-*-{target.name}"):
        remove_scratch(left)
    scratch.mkdir(parents=True)
    shares: dict[str, dict[str, float]] = {}
    for case in base_cases:
        for ending in ENDINGS:
            links[link_or_copy(base.data / f"{case}{ending}", scratch / f"{case}{ending}")] += 1
    for entry in taken:
        case = entry.case
        if is_prepared:
            for ending in ENDINGS:
                links[link_or_copy(cases_folder(target) / f"{case}{ending}", scratch / f"{case}{ending}")] += 1
            continue
        links[link_or_copy(run.unlabelled_data / f"{case}.b2nd", scratch / f"{case}.b2nd")] += 1
        if entry.ignored:
            shares[case] = _write_with_ignore(run, number, entry, scratch)
        else:
            links[link_or_copy(run.paths.training_label(number, case), scratch / f"{case}_seg.b2nd")] += 1
            links[link_or_copy(run.paths.properties(number, case), scratch / f"{case}.pkl")] += 1
    remove_scratch(target)
    os.replace(scratch, target)
    return shares


def _write_with_ignore(run: Run, number: int, entry: Entry, folder: Path) -> dict[str, float]:
    label, shares = _with_ignore(run, number, entry)
    properties = read_properties(run.paths.properties(number, entry.case))
    located = class_locations(label, list(organ_ids(run).values()))
    write_array(folder / f"{entry.case}_seg.b2nd", label[None], base_configuration(run.base)["patch_size"])
    write_properties(folder / f"{entry.case}.pkl", {**properties, "class_locations": located})
    return shares


def _with_ignore(run: Run, number: int, entry: Entry) -> tuple[np.ndarray, dict[str, float]]:
    """The training label of a case with its uncertain organs ignored, and their shares of the voxels by name."""
    organs = organ_ids(run)
    label = read_array(run.paths.training_label(number, entry.case))[0]
    members = read_array(run.paths.members(number, entry.case))
    uncertain = [organs[name] for name in entry.ignored]
    label, shares = ignore_uncertain(label, list(members), uncertain, ignore_label(run))
    names = {organ: name for name, organ in organs.items()}
    return label, {names[organ]: share for organ, share in shares.items()}
