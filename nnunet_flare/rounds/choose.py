"""Selecting a round's cases: the agreement table, the rule, and a record of why for every case."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import TaskError
from nnunet_flare.files import read_json, replacing, write_json
from nnunet_flare.rounds.decisions import Review, load_reviews
from nnunet_flare.rounds.labelling import round_members
from nnunet_flare.rounds.ledger import Entry, read_decisions, write_round
from nnunet_flare.rounds.loops import TrainingScan, round_organs, round_scans
from nnunet_flare.rounds.manifest import Run
from nnunet_flare.rounds.recipe_parts import RoundSelection
from nnunet_flare.selection.rules import Decision, accepted_organs, select

log = logging.getLogger(__name__)


def select_round(run: Run, number: int) -> dict[str, Any]:
    """Decide on every unlabelled case of a round and write the tables and the ledger.

    Raises:
        TaskError: when nothing is taken: it says which threshold kept out what, and what to change.
    """
    organs = list(round_organs(run, number))
    scans = round_scans(run, number)
    documents = {scan.case: read_json(run.paths.case(number, scan.case)) for scan in scans}
    roles = {scan.case: "partial" if isinstance(scan, TrainingScan) else "pseudo" for scan in scans}
    judged = [case for case, document in documents.items() if "failed" not in document]
    reviews = load_reviews(run)
    for case in judged:
        if case in reviews:
            documents[case]["agreement"].update(dict.fromkeys(reviews[case].organs, 0.0))
    table = np.array([[_value(documents[case], organ) for organ in organs] for case in judged]).reshape(-1, len(organs))
    rule = run.recipe.selection_of(number)
    for row, column in np.argwhere(np.isnan(table)):
        if rule.rule in ("all", "round-change") and documents[judged[row]]["members"] < 2:
            continue  # one member has no agreement, and these rules ask for none
        log.warning("%s: agreement of %s could not be computed; it counts as 0", judged[row], organs[column])
    eligible = [row for row, case in enumerate(judged) if rule.keep_odd or not documents[case]["odd"]]
    decisions: dict[str, Decision] = {}
    uncertain: dict[str, list[str]] = {}
    for rejected in (False, True):  # a rejected case has a score, but takes no other's place in a top fraction
        rows = [row for row in eligible if (judged[row] in reviews and reviews[judged[row]].is_rejected) == rejected]
        names = [judged[row] for row in rows]
        judged_by = _judged_table(run, number, names, table[rows], organs)
        lacking = {name: _lacking(documents[name]) for name in names} if rule.complete else None
        decided, missing = _decide(run, rule, names, *judged_by, lacking=lacking)
        decisions |= decided
        uncertain |= missing
    members = ",".join(f"{fold}:{checkpoint}" for fold, checkpoint in round_members(run, number))
    model = f"{run.model(number).name} [{members}]"
    known_of_all = {"round": number, "model": model, "recipe_hash": run.recipe.hash}
    entries = []
    for case, document in documents.items():
        known_of_case = {**known_of_all, "role": roles[case]}
        entry = _entry(known_of_case, case, document, decisions.get(case), uncertain.get(case, []))
        entries.append(_reviewed(entry, reviews.get(case)))
    write_scores(run.paths.scores(number), judged, table, organs, [documents[case]["members"] for case in judged])
    write_selection(run.paths.selection(number), [(e.case, e.decision == "taken", e.score, e.reason) for e in entries])
    write_round(run.paths, number, entries)
    taken = [entry for entry in entries if entry.decision == "taken"]
    if not taken:
        raise TaskError(_nothing_taken(run, number, table, organs, entries))
    _early_stop(run, number)
    known = table[~np.isnan(table)]
    mean = float(known.mean()) if known.size else None
    counts = {d: sum(e.decision == d for e in entries) for d in ("taken", "refused", "odd", "failed")}
    judgement = "no agreement" if mean is None else f"mean agreement {mean:.3f}"
    log.info("round %d: %s, %s", number, ", ".join(f"{n} {d}" for d, n in counts.items() if n), judgement)
    return {**counts, "mean_agreement": mean}


def _value(document: dict[str, Any], organ: str) -> float:
    value = document["agreement"][organ]
    return float("nan") if value is None else float(value)


def _judged_table(
    run: Run, number: int, cases: Sequence[str], agreement: np.ndarray, organs: Sequence[str]
) -> tuple[np.ndarray, Sequence[str]]:
    """What the round's rule judges by: the agreement of the organs, or the changes between the rounds so far."""
    if run.recipe.selection_of(number).rule != "round-change":
        return agreement, organs
    first = next(earlier for earlier in range(number, -1, -1) if run.recipe.starts(earlier))
    rounds = range(first + 1, number + 1)
    changes = [[_change(run, later, case) for later in rounds] for case in cases]
    return np.array(changes).reshape(-1, len(rounds)), [f"r{later - 1} to r{later}" for later in rounds]


def _change(run: Run, number: int, case: str) -> float:
    value = read_json(run.paths.case(number, case)).get("change")
    return float("nan") if value is None else float(value)


def _lacking(document: dict[str, Any]) -> list[str]:
    """Organs that a case's pseudo-label does not have."""
    return [organ for organ, volume in document["volume_mm3"].items() if not volume]


def _decide(
    run: Run,
    rule: RoundSelection,
    cases: Sequence[str],
    table: np.ndarray,
    organs: Sequence[str],
    *,
    lacking: Mapping[str, Sequence[str]] | None,
) -> tuple[dict[str, Decision], dict[str, list[str]]]:
    """Decisions by case and, with organ-wise acceptance, each case's uncertain organs."""
    if run.recipe.fusion.uncertain_organs == "drop-case":
        chosen = select(
            cases,
            table,
            organs=organs,
            rule=rule.rule,
            threshold=rule.threshold,
            top_fraction=rule.top_fraction,
            per_organ=rule.per_organ,
            missing=lacking,
        )
        return {decision.case: decision for decision in chosen}, {}
    own = {organs.index(organ): least for organ, least in rule.per_organ.items()}
    certain = accepted_organs(table, rule.threshold, own)
    least = run.recipe.fusion.min_certain_organs
    decisions, uncertain = {}, {}
    for row, case in enumerate(cases):
        share = float(certain[row].mean())
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


def _entry(
    known: dict[str, Any], case: str, document: dict[str, Any], decision: Decision | None, uncertain: Sequence[str]
) -> Entry:
    base = {**known, "case": case}
    if "failed" in document:
        return Entry(
            **base, decision="failed", reason=document["failed"], score=None, mean_organ=None, min_organ=None,
            agreement={}, ignored={}, label_sha256=None,
        )  # fmt: skip
    alone = document["members"] < 2
    values = np.nan_to_num([_value(document, organ) for organ in document["agreement"]])
    if decision is None:
        outcome, reason = "odd", f"{'; '.join(document['odd'])} (selection.keep_odd=true would judge it)"
    else:
        outcome, reason = ("taken" if decision.taken else "refused"), decision.reason
    return Entry(
        **base, decision=outcome, reason=reason, score=None if decision is None else decision.score,
        mean_organ=None if alone else float(values.mean()), min_organ=None if alone else float(values.min()),
        agreement={} if alone else document["agreement"],
        ignored=dict.fromkeys(uncertain, 0.0), label_sha256=document["label_sha256"],
    )  # fmt: skip


def _reviewed(entry: Entry, review: Review | None) -> Entry:
    """The entry with a person's decision in force; a case without a label stays failed."""
    if review is None or entry.decision == "failed":
        return entry
    decided = {"accept": "taken", "reject": "refused"}.get(review.decision, entry.decision)
    ignored = {} if review.decision == "accept" else entry.ignored
    return replace(entry, decision=decided, reason=f"{review.reason}; {entry.reason}", ignored=ignored)


def _nothing_taken(run: Run, number: int, table: np.ndarray, organs: Sequence[str], entries: Sequence[Entry]) -> str:
    rule = run.recipe.selection_of(number)
    failed = sum(entry.decision == "failed" for entry in entries)
    odd = sum(entry.decision == "odd" for entry in entries)
    best = max((entry.score for entry in entries if entry.score is not None), default=float("nan"))
    below = np.nan_to_num(table) < rule.threshold
    worst = [organs[i] for i in np.argsort(-below.sum(axis=0))[:3] if below.shape[0] and below[:, i].any()]
    if rule.rule in ("all", "round-change"):
        worst = []
    return (
        f"round {number}: none of {len(entries)} unlabelled cases was taken ({failed} failed, {odd} odd). "
        f"Rule {rule.rule} with threshold {rule.threshold:g}; the best case scored {best:.3f}"
        + (f"; most often below the threshold: {', '.join(worst)}" if worst else "")
        + f". See {run.paths.selection(number)}. Start a new run with a lower selection.threshold, another "
        "selection.rule (mean-organ, trimmed-min), selection.top_fraction, or fusion.uncertain_organs=ignore"
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
    best = int(np.argmax(means))
    if number - best >= patience:
        write_json(run.paths.stop, {"last_labelled_round": number, "mean_agreement": means})
        log.info("early stop: mean agreement has not risen since round %d (%s)", best, [round(m, 4) for m in means])


def write_scores(
    path: Path, cases: Sequence[str], table: np.ndarray, organs: Sequence[str], members: Sequence[int]
) -> None:
    """Write ``scores.csv``: case, one column per organ, mean_organ, min_organ, members; of one member no numbers."""
    rows = []
    for case, row, count in zip(cases, np.nan_to_num(table), members, strict=True):
        numbers = [*row, row.mean(), row.min()]
        rows.append([case, *(f"{v:.6f}" if count > 1 else "" for v in numbers), count])
    _write_csv(path, ["case", *organs, "mean_organ", "min_organ", "members"], rows)


def write_changes(path: Path, cases: Sequence[str], table: np.ndarray) -> None:
    """Write changes (cases, rounds - 1) as ``scores.csv``: case, ``1 to 2`` ..., mean_change, members; NaN empty."""
    rows = []
    for case, row in zip(cases, table, strict=True):
        rows.append([case, *("" if np.isnan(v) else f"{v:.6f}" for v in (*row, row.mean())), len(row) + 1])
    steps = [f"{number} to {number + 1}" for number in range(1, table.shape[1] + 1)]
    _write_csv(path, ["case", *steps, "mean_change", "members"], rows)


def write_selection(path: Path, decisions: Sequence[tuple[str, bool, float | None, str]]) -> None:
    """Write ``selection.csv``: case, taken (1 or 0), score (empty where it was not judged), reason."""
    rows = [
        [case, int(taken), "" if score is None else f"{score:.6f}", reason] for case, taken, score, reason in decisions
    ]
    _write_csv(path, ["case", "taken", "score", "reason"], rows)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
