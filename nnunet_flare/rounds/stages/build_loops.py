"""Training data of a recipe with loops over different organs (HKUST, FLARE23): of their rounds, and of the final model.

In a round, what is annotated holds and pseudo-labels fill only organs that nobody annotated. Organs of other loops are
left open: they are not among the annotated ones, so that the marginal loss merges them with the background.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nnunet_flare.cases import Case, table_name, write_table
from nnunet_flare.errors import TaskError
from nnunet_flare.files import remove_scratch
from nnunet_flare.fusion.partial import complete
from nnunet_flare.labels import sampled_groups
from nnunet_flare.rounds.run.configurations import base_configuration, write_configuration
from nnunet_flare.rounds.run.dataset import dataset_json, foreground_ids, raw_cases
from nnunet_flare.rounds.run.ledger import Entry, read_decisions
from nnunet_flare.rounds.run.loops import annotated_of, round_labels, round_organs, true_cases
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.stages.arrays import read_array, read_properties
from nnunet_flare.rounds.stages.build import check_labels, check_planned, initial_weights
from nnunet_flare.rounds.stages.data_folder import building
from nnunet_flare.rounds.stages.replanned import cases_folder
from nnunet_flare.rounds.stages.score_tables import write_decisions
from nnunet_flare.rounds.stages.union import make_union

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


def build_loop_round(run: Run, of: Round) -> dict[str, Any]:
    """Make everything that trains a round: its data, its table of cases and its configuration.

    Raises:
        TaskError: when no case has an organ of the loop annotated, or a label map is damaged.
    """
    check_planned(run, of.base, raw_cases(run))
    if of.kind == "final":
        return _build_final(run, of)
    organs = round_labels(run, of)
    known = {case: annotated_of(entry, organs) for case, entry in true_cases(run).items()}
    if not any(known.values()):
        name = of.loop.name if of.loop else ""
        raise TaskError(f"loop {name}: no labelled or partial case has one of its organs annotated")
    taken = [] if of.learns_from is None else _taken(run, of.learns_from)
    cases = _loop_table(run, of, known, taken)
    links: dict[str, int] = {}
    identifier = None
    if taken:
        identifier = of.data.name
        links = _build_folder(run, of, known, taken, cases)
    _write(run, of, cases, identifier, ignored=None)
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
        write_decisions(run.paths, number, judged)
    return [entry for entry in taken if entry.case not in constant]


def _loop_table(run: Run, of: Round, known: Mapping[str, tuple[int, ...]], taken: Sequence[Entry]) -> dict[str, Case]:
    """Every case of the round: annotated organs are those of the loop, and cases that have none are left out."""
    organs, everything = round_labels(run, of), foreground_ids(run)
    is_open = of.loop is not None and of.loop.absence == "open"
    pseudo = Known((), organs) if is_open else Known(organs)
    cases = {case: Case("unlabelled") for case in raw_cases(run)}
    cases |= {case: Case("partial", annotated) for case, annotated in known.items() if annotated}
    for entry in taken:
        annotated = known.get(entry.case, ())
        of_case = pseudo.of_partial(annotated, of.number) if annotated else pseudo.of_pseudo(everything, of.number)
        cases[entry.case] = of_case
    return cases


def _build_folder(
    run: Run, of: Round, known: Mapping[str, tuple[int, ...]], taken: Sequence[Entry], cases: Mapping[str, Case]
) -> dict[str, int]:
    """Build the round's data folder: links, and new labels of partial cases that pseudo-labels complete."""
    labelled, before = {entry.case for entry in taken}, of.number - 1
    patch = base_configuration(run.base)["patch_size"]
    groups = sampled_groups(dataset_json(run)["labels"], round_organs(run, of))
    with building(of.data) as folder:
        for case in known:
            if case not in labelled and cases[case].role == "partial":
                folder.link_case(run.base_data, case)
        for entry in taken:
            case = entry.case
            images = run.base_data if case in known else run.unlabelled_data
            folder.link(images / f"{case}.b2nd", f"{case}.b2nd")
            label, properties = run.paths.training_label(before, case), run.paths.properties(before, case)
            if not known.get(case):
                folder.link(label, f"{case}_seg.b2nd")
                folder.link(properties, f"{case}.pkl")
                continue
            truth = read_array(run.base_data / f"{case}_seg.b2nd")[0]
            merged = complete(truth, read_array(label)[0], annotated=known[case])
            folder.write_label(case, merged, read_properties(properties), groups=groups, patch=patch)
    for case in [case for case, entry in cases.items() if entry.role == "unlabelled"]:
        log.debug("%s: no organ of the loop is annotated; left out of round %d", case, of.number)
    return dict(folder.links)


def _build_final(run: Run, of: Round) -> dict[str, Any]:
    """The final model trains on every annotation, completed by the union of the loops' last labels."""
    number, base, target = of.number, of.base, of.data
    for last in run.recipe.last_rounds():
        check_labels(run, last, [entry for entry in read_decisions(run.paths, last) if entry.decision == "taken"])
    union = make_union(run, target)
    truth = true_cases(run)
    everything = foreground_ids(run)
    cases = {case: truth.get(case, Case("unlabelled")) for case in raw_cases(run)}
    for case, merged in union.cases.items():
        known = Known(merged.taught, merged.positive)
        annotated = annotated_of(truth[case], everything) if case in truth else ()
        cases[case] = known.of_partial(annotated, number) if annotated else known.of_pseudo(everything, number)
    with building(target) as folder:
        for case in cases:
            folder.link_case(cases_folder(target) if case in union.cases else base.data, case)
    remove_scratch(cases_folder(target))
    write_decisions(run.paths, number, union.entries)
    ignored = max(everything) + 1 if any(merged.ignored for merged in union.cases.values()) else None
    _write(run, of, cases, target.name, ignored=ignored)
    counts = Counter(case.role for case in cases.values())
    dropped = [entry.case for entry in union.entries if entry.decision != "taken"]
    return {"cases": len(cases), "pseudo": counts["pseudo"], "dropped": dropped, **folder.links}


def _write(run: Run, of: Round, cases: Mapping[str, Case], identifier: str | None, *, ignored: int | None) -> None:
    """Write the round's table and configuration."""
    name = of.configuration
    write_table(run.preprocessed / table_name(name), dict(cases))
    settings = run.recipe.settings(
        of.planned,
        run=run.settings.name,
        stored_round=of.number,
        ignore_label=ignored,
        references=run.unlabelled_data.name if run.recipe.matches_histograms(of.planned) else None,
        **initial_weights(run, of),
    )
    write_configuration(run, name, of, data_identifier=identifier, training=settings.to_json())
