"""The HTML report of a run: one folder that opens from disk, loads nothing from elsewhere and survives copying.

``index.html`` holds the overview; ``data.js`` the table's rows, which ``report.js`` draws as they scroll into view, so
that thousands of cases stay quick; ``pictures/r<k>/<case>.jpg`` one picture each of the cases worth looking at;
``volumes/r<k>/<case>.js`` what the 3-D view shows of them, where it is asked for.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_flare.drawing import colour
from nnunet_flare.errors import InputError
from nnunet_flare.files import write_text
from nnunet_flare.report.curves import HEIGHT, WIDTH, learning_curves
from nnunet_flare.report.gather import QUANTILES, Row, RunReport, gather, shown_as
from nnunet_flare.report.papers import paper_and_ours
from nnunet_flare.report.planes import DISAGREEMENT, MEMBER_COLOURS, draw_case, read_scene, write_picture
from nnunet_flare.report.rendering import environment, static_text
from nnunet_flare.report.viewer import viewer_files
from nnunet_flare.report.volumes import LONGEST, write_volumes
from nnunet_flare.rounds.run.home import token
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.wording import duration

log = logging.getLogger(__name__)

PICTURES = 24
"""Pictures per round unless told otherwise."""

STATIC = ("report.css", "report.js", "view3d.js")


def write_report(run: Run, *, pictures: int | None = PICTURES, view3d: bool = False) -> Path:
    """Write the report of a run as it stands; pictures and 3-D views that are there already are kept.

    Args:
        run: the run.
        pictures: at most this many per round, of the cases whose decision is most doubtful; None: of every case.
        view3d: make 3-D views of these cases as well.

    Returns:
        ``index.html``.

    Raises:
        InputError: for 3-D views where their viewer is not installed.
    """
    viewer = viewer_files() if view3d else {}
    report = gather(run)
    folder = run.paths.report
    _draw(report, folder, pictures, view3d)
    for name in STATIC:
        write_text(folder / name, static_text(name))
    for name, text in viewer.items() if (folder / "volumes").is_dir() else ():
        write_text(folder / name, text)
    write_text(folder / "data.js", f"window.FLARE_REPORT = {script_json(_document(report, folder))};\n")
    write_text(folder / "index.html", _render(report))
    return folder / "index.html"


def worth_looking_at(rows: Sequence[Row], count: int | None) -> list[Row]:
    """The rows of one round whose decision is most doubtful: by turns the taken case with the lowest score and the
    refused or odd one with the highest, at most ``count`` (None: all that have a label).
    """
    labelled = [row for row in rows if row.entry.decision != "failed"]
    if count is None or count >= len(labelled):
        return labelled

    def score(row: Row) -> float:
        return row.entry.score if row.entry.score is not None else row.mean or 0.0

    taken = sorted((r for r in labelled if r.entry.decision == "taken"), key=lambda r: (score(r), r.entry.case))
    others = sorted((r for r in labelled if r.entry.decision != "taken"), key=lambda r: (-score(r), r.entry.case))
    chosen: list[Row] = []
    while len(chosen) < count:
        for queue in (taken, others):
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen


def _draw(report: RunReport, folder: Path, count: int | None, view3d: bool) -> None:
    """Draw the pictures, and make the 3-D views, that are missing or older than what they were made from."""
    rows = [
        row
        for r in report.rounds
        if r.number < report.run.final.number  # a union of loops has no members to compare
        for row in worth_looking_at([row for row in report.rows if row.entry.round == r.number], count)
    ]
    missing = []
    for row in tqdm(rows, desc="pictures", disable=None, unit="case"):
        number, case = row.entry.round, row.entry.case
        made_from = report.run.paths.members(number, case), report.run.paths.decisions(number)
        picture, view = _picture(folder, number, case), _view(folder, number, case)
        draws, makes = not _is_current(picture, *made_from), view3d and not _is_current(view, *made_from)
        if not draws and not makes:
            continue
        try:
            scene = read_scene(report.run, number, case)
        except (OSError, ValueError, LookupError) as error:
            missing.append(f"{case}: {error}")
            continue
        organ = report.organs[row.least] if row.least else next(iter(report.organs.values()))
        if draws:
            write_picture(picture, draw_case(scene, organ))
        if makes:
            write_volumes(view, f"r{number}/{case}", scene, organ)
    if missing:
        log.warning("no picture of %d case(s), the first %s", len(missing), missing[0])


def _picture(folder: Path, number: int, case: str) -> Path:
    return folder / "pictures" / f"r{number}" / f"{case}.jpg"


def _view(folder: Path, number: int, case: str) -> Path:
    return folder / "volumes" / f"r{number}" / f"{case}.js"


def _is_current(path: Path, members: Path, decisions: Path) -> bool:
    """Whether a drawing is there and no older than the label maps that it shows, which ``clean`` may have removed, and
    the decisions, by which its organ was chosen.
    """
    if not path.is_file() or not members.is_file():
        return path.is_file()
    return path.stat().st_mtime >= max(of.stat().st_mtime for of in (members, decisions))


def script_json(document: Any) -> str:
    """JSON that may stand in a script: nothing in it can end the script or start a comment."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _document(report: RunReport, folder: Path) -> dict[str, Any]:
    """What ``report.js`` reads; a row is a list in the order of its ``columns``."""
    organs = list(report.organs)
    rows = []
    for row in report.rows:
        entry = row.entry
        rows.append(
            [
                entry.case,
                entry.round,
                shown_as(entry.decision),
                _rounded(entry.score),
                _rounded(row.mean),
                organs.index(row.least) if row.least in report.organs else -1,
                len(row.outside),
                entry.reason,
                [_rounded(entry.agreement.get(organ)) for organ in organs],
                [_rounded(row.volume_ml.get(organ), 1) for organ in organs],
                int(_picture(folder, entry.round, entry.case).is_file()),
                int(_view(folder, entry.round, entry.case).is_file()),
                [organs.index(organ) for organ in row.absent],
            ]
        )
    return {
        "id": token(report.run.root) or f"{report.run.settings.dataset}/{report.run.settings.name}",
        "name": report.run.settings.name,
        "organs": [
            {
                "id": report.drawn[name],
                "name": name,
                "colour": colour(report.drawn[name]),
                "range": [_rounded(v, 1) for v in report.ranges.get(name, ())],
            }
            for name in report.organs
        ],
        "rows": rows,
    }


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), digits)


def _render(report: RunReport) -> str:
    """``index.html``; every name is escaped."""
    total = sum(report.seconds.values())
    settings = report.run.settings
    return (
        environment()
        .get_template("index.html.j2")
        .render(
            report=report,
            run=report.run,
            settings=settings,
            recipe=report.run.recipe,
            compared=[r for r in report.rounds if r.agreement],
            measured=[r for r in report.rounds if r.held_out_organs],
            curves=learning_curves(report.run),
            panel=(WIDTH, HEIGHT),
            paper=paper_and_ours(report.run.recipe.name),
            changed=[row for row in report.settings if row[2] is not None],
            stages=[(stage, duration(s), s / total if total else 0.0) for stage, s in report.seconds.items()],
            total=duration(total),
            quantiles=QUANTILES,
            colours={name: colour(number) for name, number in report.drawn.items()},
            members=[
                MEMBER_COLOURS[i % len(MEMBER_COLOURS)] for i in range(max((r.members for r in report.rows), default=0))
            ],
            disagreement=DISAGREEMENT,
            longest=LONGEST,
            written=time.strftime("%Y-%m-%d %H:%M"),
        )
    )


def parse_pictures(text: str) -> int | None:
    """``all`` as None, else a number from 0 up.

    Raises:
        InputError: for anything else.
    """
    if text == "all":
        return None
    if not text.isdigit():
        raise InputError(f"--pictures {text}: expected 'all' or a number of cases per round")
    return int(text)
