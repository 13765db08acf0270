"""Selecting a round's cases: the agreement table, the rule, and a record of why for every case."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np

from nnunet_flare.errors import TaskError
from nnunet_flare.files import write_json
from nnunet_flare.recipes.parts import RoundSelection
from nnunet_flare.rounds.run.decisions import Review, load_reviews
from nnunet_flare.rounds.run.labelled_case import LabelledCase
from nnunet_flare.rounds.run.ledger import DECISIONS, Entry, read_decisions
from nnunet_flare.rounds.run.loops import TrainingScan, round_organs, round_scans
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.stages.judge import Judgement, judge
from nnunet_flare.rounds.stages.label import read_labelled
from nnunet_flare.rounds.stages.score_tables import write_decisions, write_scores
from nnunet_flare.selection.choose import Decision, accepted_organs, select

log = logging.getLogger(__name__)


def select_round(run: Run, of: Round) -> dict[str, Any]:
    """Decide on every unlabelled case of a round and write the tables and the ledger.

    Raises:
        TaskError: when nothing is taken: it says which threshold kept out what, and what to change.
    """
    number = of.number
    ids = round_organs(run, of)
    organs = list(ids)
    scans = round_scans(run, of)
    documents = {scan.case: read_labelled(run, number, scan.case) for scan in scans}
    roles = {scan.case: "partial" if isinstance(scan, TrainingScan) else "pseudo" for scan in scans}
    judged = [case for case, document in documents.items() if document.failed is None]
    _check_weights(run, of, [documents[case] for case in judged])
    reviews = load_reviews(run)
    for case in judged:
        if case in reviews:
            documents[case] = _with_wrong_organs(documents[case], reviews[case].organs)
    rule = run.recipe.selection_of(number)
    judgement = judge(run, [documents[case] for case in judged], ids, rule)
    table = judgement.values
    for row, column in np.argwhere(np.isnan(table) & ~judgement.skipped):
        if not rule.rule.judges_agreement and documents[judged[row]].members < 2:
            continue  # one member has no agreement, and these rules ask for none
        log.warning("%s: the agreement of %s could not be computed and counts as 0", judged[row], organs[column])
    eligible = [row for row, case in enumerate(judged) if rule.keep_odd or not documents[case].odd]
    decisions: dict[str, Decision] = {}
    uncertain: dict[str, list[str]] = {}
    for rejected in (False, True):  # a rejected case has a score, but takes no other's place in a top fraction
        rows = [row for row in eligible if (judged[row] in reviews and reviews[judged[row]].is_rejected) == rejected]
        names = [judged[row] for row in rows]
        judged_by = _judged_table(run, number, names, judgement.rows(rows), organs)
        lacking = {name: documents[name].lacking for name in names} if rule.complete else None
        domains = {scan.case: str(scan.domain) for scan in scans} if rule.per_domain else None
        decided, missing = _decide(run, rule, names, *judged_by, lacking=lacking, domains=domains)
        decisions |= decided
        uncertain |= missing
    members = ",".join(f"{fold}:{checkpoint}" for fold, checkpoint in of.members)
    model = f"{of.model.name} [{members}]"
    known_of_all = {"round": number, "model": model, "recipe_hash": run.recipe.hash}
    entries = []
    rows_of = {case: row for row, case in enumerate(judged)}
    for case, document in documents.items():
        known_of_case = {**known_of_all, "role": roles[case]}
        values = _values_of(judgement, rows_of[case], organs) if case in rows_of else {}
        entry = _entry(known_of_case, case, document, decisions.get(case), uncertain.get(case, []), values)
        entries.append(_reviewed(entry, reviews.get(case)))
    wrong = {case: set(review.organs) & set(organs) for case, review in reviews.items()}
    _say_what_trains_though_wrong(run, number, entries, wrong)
    counts_of_members = [documents[case].members for case in judged]
    write_scores(run.paths.scores(number), judged, table, organs, counts_of_members, skipped=judgement.skipped)
    write_decisions(run.paths, number, entries)
    taken = [entry for entry in entries if entry.decision == "taken"]
    if not taken:
        raise TaskError(_nothing_taken(run, number, judgement, organs, entries))
    _early_stop(run, number)
    means = [entry.mean_organ for entry in entries if entry.mean_organ is not None]
    mean = float(np.mean(means)) if means else None
    counts = {d: sum(e.decision == d for e in entries) for d in DECISIONS}
    agreed = "no agreement" if mean is None else f"mean agreement {mean:.3f}"
    log.info("round %d: %s, %s", number, ", ".join(f"{n} {d}" for d, n in counts.items() if n), agreed)
    for domain in dict.fromkeys(scan.domain for scan in scans if scan.domain is not None):
        mine = {scan.case for scan in scans if scan.domain == domain}
        of_domain = sum(entry.case in mine for entry in taken)
        log.info("round %d, domain %s: %d of %d scans taken", number, domain, of_domain, len(mine))
    return {**counts, "mean_agreement": mean}


def _check_weights(run: Run, of: Round, documents: Sequence[LabelledCase]) -> None:
    if len({document.weights for document in documents if document.weights}) > 1:
        raise TaskError(
            f"round {of.number}: {of.model} changed while it labelled the scans, so that their labels are of different "
            "weights; start a new run, and leave the model alone until it has labelled"
        )


def _with_wrong_organs(labelled: LabelledCase, wrong: Sequence[str]) -> LabelledCase:
    """A case in which a person called the labels of some organs wrong: all that they are judged by is 0, also an
    absence.
    """
    nothing = dict.fromkeys(wrong, 0.0)
    return replace(
        labelled,
        agreement={**labelled.agreement, **nothing},
        absent_pairs={**{organ: labelled.absence(organ) for organ in labelled.agreement}, **nothing},
        steady={**labelled.steady, **nothing} if labelled.steady else {},
        absent_copies={**labelled.absent_copies, **nothing},
    )


def _say_what_trains_though_wrong(
    run: Run, number: int, entries: Sequence[Entry], wrong: Mapping[str, Set[str]]
) -> None:
    """An organ that a person called wrong is trained on where the round's rule takes its case all the same."""
    trained = {e.case: wrong.get(e.case, set()) - set(e.ignored) for e in entries if e.decision == "taken"}
    cases = [f"{case} ({', '.join(sorted(organs))})" for case, organs in trained.items() if organs]
    if cases:
        log.warning(
            "round %d: rule %s takes %d case(s) with organs that were called wrong, and trains on these: %s. Reject "
            "the cases, or start a run with fusion.uncertain_organs=ignore",
            number, run.recipe.selection_of(number).rule.name, len(cases), "; ".join(cases[:5]),
        )  # fmt: skip


def _judged_table(
    run: Run, number: int, cases: Sequence[str], judgement: Judgement, organs: Sequence[str]
) -> tuple[Judgement, Sequence[str]]:
    """What the round's rule judges by: the organs, or the changes between the rounds so far."""
    if run.recipe.selection_of(number).rule.table != "rounds":
        return judgement, organs
    first = next(earlier for earlier in range(number, -1, -1) if run.recipe.starts(earlier))
    rounds = range(first + 1, number + 1)
    changes = [[_change(run, later, case) for later in rounds] for case in cases]
    table = np.array(changes, dtype=float).reshape(-1, len(rounds))
    return Judgement(table, np.zeros(table.shape, dtype=bool)), [f"r{later - 1} to r{later}" for later in rounds]


def _change(run: Run, number: int, case: str) -> float:
    value = read_labelled(run, number, case).change
    return float("nan") if value is None else float(value)


def _decide(
    run: Run,
    rule: RoundSelection,
    cases: Sequence[str],
    judgement: Judgement,
    organs: Sequence[str],
    *,
    lacking: Mapping[str, Sequence[str]] | None,
    domains: Mapping[str, str] | None,
) -> tuple[dict[str, Decision], dict[str, list[str]]]:
    """Decisions by case and, with organ-wise acceptance, each case's uncertain organs."""
    if run.recipe.fusion.uncertain_organs == "drop-case":
        chosen = select(
            cases,
            judgement.values,
            organs=organs,
            rule=rule.rule.name,
            threshold=rule.threshold,
            top_fraction=rule.top_fraction,
            per_organ=rule.per_organ,
            missing=lacking,
            skipped=judgement.skipped,
            domains=domains,
        )
        return {decision.case: decision for decision in chosen}, {}
    own = {organs.index(organ): least for organ, least in rule.per_organ.items()}
    certain = accepted_organs(judgement.values, rule.threshold, own) | judgement.skipped
    least = run.recipe.fusion.min_certain_organs
    decisions, uncertain = {}, {}
    for row, case in enumerate(cases):
        share = float(certain[row][~judgement.skipped[row]].mean()) if not judgement.skipped[row].all() else 0.0
        missing = [organ for organ, ok in zip(organs, certain[row], strict=True) if not ok]
        taken = share >= least and share > 0
        reason = (
            f"{certain[row].sum()} of {len(organs)} organs certain, {'at least' if taken else 'fewer than'} {least:.0%}"
        )
        if taken and missing:
            reason += f"; ignored: {', '.join(missing)}"
        decisions[case] = Decision(case, taken, share, reason)
        uncertain[case] = missing if taken else []
    return decisions, uncertain


def _values_of(judgement: Judgement, row: int, organs: Sequence[str]) -> dict[str, float | None]:
    """What a case's organs were judged by, by name; None where an organ does not count."""
    values = zip(organs, judgement.values[row], judgement.skipped[row], strict=True)
    return {organ: None if skipped else float(np.nan_to_num(value)) for organ, value, skipped in values}


def _entry(
    known: dict[str, Any],
    case: str,
    labelled: LabelledCase,
    decision: Decision | None,
    uncertain: Sequence[str],
    judged: Mapping[str, float | None],
) -> Entry:
    base = {**known, "case": case}
    if labelled.failed is not None:
        return Entry(
            **base, decision="failed", reason=labelled.failed, score=None, mean_organ=None, min_organ=None,
            agreement={}, ignored={}, present={}, label_sha256=None,
        )  # fmt: skip
    alone = labelled.members < 2
    values = [value for value in judged.values() if value is not None]
    has_none = alone or not values
    if decision is None:
        outcome, reason = "odd", f"{'; '.join(labelled.odd)} (selection.keep_odd=true would judge it)"
    else:
        outcome, reason = ("taken" if decision.taken else "refused"), decision.reason
    return Entry(
        **base, decision=outcome, reason=reason, score=None if decision is None else decision.score,
        mean_organ=None if has_none else float(np.mean(values)), min_organ=None if has_none else float(min(values)),
        agreement={} if alone else dict(judged), present={} if alone else dict(labelled.present),
        ignored=dict.fromkeys(uncertain, 0.0), label_sha256=labelled.label_sha256,
    )  # fmt: skip


def _reviewed(entry: Entry, review: Review | None) -> Entry:
    """The entry with a person's decision in force; a case without a label stays failed."""
    if review is None or entry.decision == "failed":
        return entry
    decided = {"accept": "taken", "reject": "refused"}.get(review.decision, entry.decision)
    ignored = {} if review.decision == "accept" else entry.ignored
    return replace(entry, decision=decided, reason=f"{review.reason}; {entry.reason}", ignored=ignored)


def _nothing_taken(run: Run, number: int, judgement: Judgement, organs: Sequence[str], entries: Sequence[Entry]) -> str:
    rule = run.recipe.selection_of(number)
    failed = sum(entry.decision == "failed" for entry in entries)
    odd = sum(entry.decision == "odd" for entry in entries)
    scores = [entry.score for entry in entries if entry.score is not None]
    keep = "selection.keep_odd=true, which judges odd scans too"
    if not scores:  # no rule and no threshold would take one
        return (
            f"round {number}: none of {len(entries)} unlabelled cases was judged ({failed} failed, {odd} odd). See "
            f"{run.paths.selection(number)} for the reasons{f'. Start a new run with {keep}' if odd else ''}"
        )
    below = (np.nan_to_num(judgement.values) < rule.threshold) & ~judgement.skipped
    worst = [organs[i] for i in np.argsort(-below.sum(axis=0))[:3] if below.shape[0] and below[:, i].any()]
    if not rule.rule.judges_agreement:
        worst = []
    return (
        f"round {number}: none of {len(entries)} unlabelled cases was taken ({failed} failed, {odd} odd). "
        f"Rule {rule.rule.name} with threshold {rule.threshold:g}; the best case scored {max(scores):.3f}"
        + (f"; most often below the threshold: {', '.join(worst)}" if worst else "")
        + f". See {run.paths.selection(number)}. Start a new run with a lower selection.threshold, another "
        "selection.rule (mean-organ, trimmed-min), selection.top_fraction, or fusion.uncertain_organs=ignore"
        + (f"; or with {keep}" if odd else "")
    )


def _early_stop(run: Run, number: int) -> None:
    """End the labelling after ``stop.patience`` rounds without a gain of the mean agreement."""
    patience = run.recipe.stop.patience
    if patience is None or number == 0 or number + 1 >= run.recipe.final_round:
        return
    means = []
    for earlier in range(number + 1):
        values = [e.mean_organ for e in read_decisions(run.paths, earlier) if e.mean_organ is not None]
        means.append(float(np.mean(values)) if values else 0.0)
    best, shown = int(np.argmax(means)), [round(mean, 4) for mean in means]
    if number - best >= patience:
        write_json(run.paths.stop, {"last_labelled_round": number, "mean_agreement": means})
        log.info("early stop: mean agreement has not risen since round %d (%s)", best, shown)
    elif run.current().stopped_after == number:  # the round was decided before, otherwise
        run.paths.stop.unlink()
        log.info("no early stop after round %d any more: mean agreement has risen (%s)", number, shown)
