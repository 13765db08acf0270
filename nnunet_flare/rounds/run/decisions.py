"""A person's decisions on pseudo-labels: the CSV that the report's buttons write, read by ``run --decisions``.

Columns ``case,decision,organ,comment``; ``decision`` is ``accept``, ``reject`` or ``organ-wrong`` (one row per organ).
They are kept in the run's folder and hold for every round that is selected from then on. A later file replaces what an
earlier one said about the same case.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunet_flare.documents import load_rows
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.run.dataset import organ_ids
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import is_marked
from nnunet_flare.rounds.run.unlabelled import read_list

log = logging.getLogger(__name__)

COLUMNS = ("case", "decision", "organ", "comment")
WORDS = ("accept", "reject", "organ-wrong")
REVIEWS = {"cases": [{"case": str, "decision": set(WORDS), "organs": [str], "comment": str}]}


@dataclass(frozen=True)
class Review:
    """What a person decided on a case: ``accept``, ``reject``, or that the labels of ``organs`` are wrong."""

    case: str
    decision: str
    organs: tuple[str, ...] = ()
    comment: str = ""

    @property
    def is_rejected(self) -> bool:
        """Whether the case must not be trained on."""
        return self.decision == "reject"

    @property
    def reason(self) -> str:
        """The decision in the words of the ledger."""
        what = {"accept": "accepted", "reject": "rejected"}.get(self.decision, f"{', '.join(self.organs)} wrong")
        return f"reviewed: {what}" + (f" ({self.comment})" if self.comment else "")


def read_reviews(path: Path, cases: Collection[str], organs: Collection[str]) -> list[Review]:
    """Read a decisions CSV, one review per case.

    Args:
        path: the file.
        cases: ids of the run's unlabelled cases.
        organs: names of the dataset's organs.

    Raises:
        InputError: all problems at once, each with its line.
    """
    try:
        (_, header), *lines = load_rows(path) or [(1, [])]
    except InputError as error:
        raise InputError(f"--decisions {error}") from error
    missing = [name for name in COLUMNS[:2] if name not in header]
    if missing:
        raise InputError(f"{path}, line 1: no column {', '.join(missing)}; expected the columns {','.join(COLUMNS)}")
    rows = []
    for number, cells in lines:
        row = dict(zip(header, cells, strict=False))
        rows.append((number, {column: row.get(column, "").strip() for column in COLUMNS}))
    problems: list[str] = []
    reviews: dict[str, Review] = {}
    for line, row in rows:
        word = row["decision"].lower().replace(" ", "-").replace("_", "-")
        earlier = reviews.get(row["case"])
        problem = _problem(row, word, earlier, cases, organs)
        if problem is not None:
            problems.append(f"line {line}: {problem}")
        elif earlier is not None:
            comment = "; ".join(dict.fromkeys(text for text in (earlier.comment, row["comment"]) if text))
            named = tuple(dict.fromkeys((*earlier.organs, row["organ"])))
            reviews[row["case"]] = Review(row["case"], word, named, comment)
        else:
            named = (row["organ"],) if word == "organ-wrong" else ()
            reviews[row["case"]] = Review(row["case"], word, named, row["comment"])
    if problems:
        raise InputError(f"--decisions {path}: {len(problems)} problem(s):\n  " + "\n  ".join(problems))
    return list(reviews.values())


def _problem(
    row: dict[str, str], word: str, earlier: Review | None, cases: Collection[str], organs: Collection[str]
) -> str | None:
    """What is wrong with a row, or None."""
    if row["case"] not in cases:
        return f"'{row['case']}' is not an unlabelled case of this run"
    if word not in WORDS:
        return f"{row['case']}: decision '{row['decision']}', expected one of {', '.join(WORDS)}"
    if word == "organ-wrong" and row["organ"] not in organs:
        return f"{row['case']}: organ '{row['organ']}', expected one of {', '.join(organs)}"
    if earlier is not None and not (word == earlier.decision == "organ-wrong"):
        return f"{row['case']}: decided twice ({earlier.decision} and {word}); only organ-wrong may have several rows"
    return None


def keep_reviews(run: Run, path: Path) -> int:
    """Read a decisions CSV and keep it with the run; returns how many cases now have a decision.

    Raises:
        InputError: as :func:`read_reviews`.
    """
    cases = {case.case for case in read_list(run.paths.unlabelled)}
    new = {review.case: review for review in read_reviews(path, cases, organ_ids(run))}
    merged = {**load_reviews(run), **new}
    write_json(run.paths.reviews, {"version": 1, "cases": [asdict(review) for review in merged.values()]})
    left = [
        each.number
        for each in run.rounds
        if each.labels_cases and not is_marked(run.paths.done(f"select-r{each.number}"))
    ]
    if run.recipe.is_online and not is_marked(run.paths.done("build-r0")):
        log.info("decisions on %d cases: the training leaves out the rejected ones", len(new))
    elif left:
        log.info("decisions on %d cases, applied from round %d on", len(new), left[0])
    else:
        log.warning("decisions on %d cases are kept, but this run has no selection left", len(new))
    return len(merged)


def load_reviews(run: Run) -> dict[str, Review]:
    """The decisions kept with a run, by case."""
    if not run.paths.reviews.is_file():
        return {}
    entries = read_json(run.paths.reviews, REVIEWS, remedy="remove it and give --decisions again")["cases"]
    return {e["case"]: Review(e["case"], e["decision"], tuple(e["organs"]), e["comment"]) for e in entries}
