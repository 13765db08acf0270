"""Training data of a recipe with loops over different organs (HKUST, FLARE23): of their rounds, and of the final model.

In a round, what is annotated holds and pseudo-labels fill only organs that nobody annotated. Organs of other loops are
left open: they are not among the annotated ones, so that the marginal loss merges them with the background.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_flare.cases import Case, table_name, write_table
from nnunet_flare.errors import TaskError
from nnunet_flare.files import link_or_copy, temporary_prefix
from nnunet_flare.fusion.members import class_locations
from nnunet_flare.fusion.partial import complete
from nnunet_flare.rounds.arrays import ENDINGS, read_array, read_properties, write_array, write_properties
from nnunet_flare.rounds.data import check_labels
from nnunet_flare.rounds.ledger import Entry, read_decisions, write_round
from nnunet_flare.rounds.loops import annotated_of, organ_ids, round_organs, true_cases
from nnunet_flare.rounds.manifest import Run
from nnunet_flare.rounds.other_plans import cases_folder
from nnunet_flare.rounds.plans import base_configuration, raw_cases, write_configuration
from nnunet_flare.rounds.preprocess import remove_scratch
from nnunet_flare.rounds.union import make_union

log = logging.getLogger(__name__)

CONSTANT = "the label map has one value only"


@dataclass(frozen=True)
class Known:
    """What pseudo-labels say about a case: organs wholly, and organs of which only the marked voxels are meant."""

    taught: tuple[int, ...] = ()
    positive: tuple[int, ...] = ()

    def of_pseudo(self, organs: Sequence[int], number: int) -> Case:
        """The entry of a case that has no annotation among ``organs``."""
        everything = set(self.taught) == set(organs)
        return Case("pseudo", None if everything else self.taught, number, positive=self.positive)

    def of_partial(self, annotated: Sequence[int], number: int) -> Case:
        """The entry of a case whose annotation these labels complete."""
        filled = tuple(organ for organ in self.taught if organ not in annotated)
        positive = tuple(organ for organ in self.positive if organ not in annotated)
        together = tuple(sorted({*annotated, *filled}))
        return Case("partial", together, number, filled=filled, positive=positive)


def build_loop_round(run: Run, number: int) -> dict[str, Any]:
    """Make everything that trains round ``number``: its data, its table of cases and its configuration.

    Raises:
        TaskError: when no case has an organ of the loop annotated, or a label map is damaged.
    """
    if number == run.last_round:
        return _build_final(run)
    organs = tuple(round_organs(run, number).values())
    known = {case: annotated_of(entry, organs) for case, entry in true_cases(run).items()}
    if not any(known.values()):
        loop = run.recipe.loop_of(number)
        name = loop.name if loop else ""
        raise TaskError(f"loop {name}: no labelled or partial case has one of its organs annotated")
    taken = [] if run.recipe.starts(number) else _taken(run, number - 1)
    cases = _loop_table(run, number, known, taken)
    links: Counter[str] = Counter()
    identifier = None
    if taken:
        identifier = run.data(number).name
        _build_folder(run, number, known, taken, cases, links)
    _write(run, number, cases, identifier, ignored=None)
    counts = Counter(case.role for case in cases.values())
    return {"cases": len(cases) - counts["unlabelled"], "pseudo": counts["pseudo"], **links}


def _taken(run: Run, number: int) -> list[Entry]:
    """The cases that a round took, without those whose map is constant, which are listed in the ledger."""
    entries = read_decisions(run.paths, number)
    taken = [entry for entry in entries if entry.decision == "taken"]
    check_labels(run, number, taken)
    constant = {e.case for e in taken if not (read_array(run.paths.training_label(number, e.case)) > 0).any()}
    if constant:
        log.info("round %d: %d label maps have one value only and are dropped", number, len(constant))
        judged = [
            replace(entry, decision="refused", reason=f"{CONSTANT}; {entry.reason}")
            if entry.case in constant
            else entry
            for entry in entries
        ]
        write_round(run.paths, number, judged)
    return [entry for entry in taken if entry.case not in constant]


def _loop_table(run: Run, number: int, known: Mapping[str, tuple[int, ...]], taken: Sequence[Entry]) -> dict[str, Case]:
    """Every case of the round: annotated organs are those of the loop, and cases that have none are left out."""
    organs, everything = tuple(round_organs(run, number).values()), tuple(organ_ids(run).values())
    loop = run.recipe.loop_of(number)
    is_open = loop is not None and loop.absence == "open"
    pseudo = Known((), organs) if is_open else Known(organs)
    cases = {case: Case("unlabelled") for case in raw_cases(run)}
    cases |= {case: Case("partial", annotated) for case, annotated in known.items() if annotated}
    for entry in taken:
        annotated = known.get(entry.case, ())
        of_case = pseudo.of_partial(annotated, number) if annotated else pseudo.of_pseudo(everything, number)
        cases[entry.case] = of_case
    return cases


def _build_folder(
    run: Run,
    number: int,
    known: Mapping[str, tuple[int, ...]],
    taken: Sequence[Entry],
    cases: Mapping[str, Case],
    links: Counter[str],
) -> None:
    """Build the round's data folder whole: links, and new labels of partial cases that pseudo-labels complete."""
    target = run.data(number)
    scratch = _scratch(target)
    labelled = {entry.case for entry in taken}
    for case in known:
        if case not in labelled and cases[case].role == "partial":
            for ending in ENDINGS:
                links[link_or_copy(run.base_data / f"{case}{ending}", scratch / f"{case}{ending}")] += 1
    patch = base_configuration(run.base)["patch_size"]
    for entry in taken:
        case = entry.case
        images = run.base_data if case in known else run.unlabelled_data
        links[link_or_copy(images / f"{case}.b2nd", scratch / f"{case}.b2nd")] += 1
        label, properties = run.paths.training_label(number - 1, case), run.paths.properties(number - 1, case)
        if not known.get(case):
            links[link_or_copy(label, scratch / f"{case}_seg.b2nd")] += 1
            links[link_or_copy(properties, scratch / f"{case}.pkl")] += 1
            continue
        truth = read_array(run.base_data / f"{case}_seg.b2nd")[0]
        merged = complete(truth, read_array(label)[0], annotated=known[case])
        write_array(scratch / f"{case}_seg.b2nd", merged[None], patch)
        located = class_locations(merged, list(round_organs(run, number).values()))
        write_properties(scratch / f"{case}.pkl", {**read_properties(properties), "class_locations": located})
    remove_scratch(target)
    os.replace(scratch, target)
    for case in [case for case, entry in cases.items() if entry.role == "unlabelled"]:
        log.debug("%s: no organ of the loop is annotated; left out of round %d", case, number)


def _build_final(run: Run) -> dict[str, Any]:
    """The final model trains on every annotation, completed by the union of the loops' last labels."""
    number = run.last_round
    base = run.final_base
    target = run.data(number)
    union = make_union(run, target)
    truth = true_cases(run)
    everything = tuple(organ_ids(run).values())
    cases = {case: truth.get(case, Case("unlabelled")) for case in raw_cases(run)}
    for case, merged in union.cases.items():
        known = Known(merged.taught, merged.positive)
        annotated = annotated_of(truth[case], everything) if case in truth else ()
        cases[case] = known.of_partial(annotated, number) if annotated else known.of_pseudo(everything, number)
    scratch = _scratch(target)
    links: Counter[str] = Counter()
    for case in cases:
        folder = cases_folder(target) if case in union.cases else base.data
        for ending in ENDINGS:
            links[link_or_copy(folder / f"{case}{ending}", scratch / f"{case}{ending}")] += 1
    remove_scratch(target)
    os.replace(scratch, target)
    remove_scratch(cases_folder(target))
    write_round(run.paths, number, union.entries)
    ignored = max(everything) + 1 if any(merged.ignored for merged in union.cases.values()) else None
    _write(run, number, cases, target.name, ignored=ignored)
    counts = Counter(case.role for case in cases.values())
    dropped = [entry.case for entry in union.entries if entry.decision != "taken"]
    return {"cases": len(cases), "pseudo": counts["pseudo"], "dropped": dropped, **links}


def _write(run: Run, number: int, cases: Mapping[str, Case], identifier: str | None, *, ignored: int | None) -> None:
    """Write the round's table and configuration."""
    name = run.configuration(number)
    write_table(run.preprocessed / table_name(name), dict(cases))
    settings = run.recipe.settings(
        run.recipe_number(number), run=run.settings.name, stored_round=number, ignore_label=ignored
    )
    write_configuration(run, name, number, data_identifier=identifier, training=settings.to_json())


def _scratch(target: Path) -> Path:
    """A fresh folder beside ``target``; those of builds that were killed are removed."""
    for left in target.parent.glob(f".tmp-*-{target.name}"):
        remove_scratch(left)
    scratch = target.with_name(f"{temporary_prefix()}{target.name}")
    scratch.mkdir(parents=True)
    return scratch
