"""Files from anywhere: whatever they hold, a reader returns, or refuses them with an error that names the file.

Three kinds of nonsense: any bytes, any JSON (or YAML) value, and good files with one thing changed, which get furthest.
``FLARE_FUZZ_EXAMPLES`` says how many of each (default 30); ``make soak`` uses more.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_flare.cases import read_table
from nnunet_flare.cli.common import parse_settings
from nnunet_flare.datasets import check_dataset
from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.structures import read_structures, structures_of
from nnunet_flare.evaluation.table import read_csv
from nnunet_flare.fusion.ids import load_id_map
from nnunet_flare.organs import FLARE22
from nnunet_flare.postprocessing.labelset import label_set
from nnunet_flare.postprocessing.pipeline import load_pipeline
from nnunet_flare.recipes.load import load_recipe, shipped_recipes
from nnunet_flare.rounds.by_hand import score_folders, select_from_scores
from nnunet_flare.rounds.executors.slurm_options import parse_options
from nnunet_flare.rounds.run.decisions import read_reviews
from nnunet_flare.rounds.run.manifest import load_run
from nnunet_flare.trainers.settings import read_settings

EXAMPLES = int(os.environ.get("FLARE_FUZZ_EXAMPLES", "30"))
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=SLOW)

ORGANS = [organ.name for organ in FLARE22]
LABELS = {"background": 0, **{organ.name: organ.id for organ in FLARE22}}


def check_folder(path: Path) -> None:
    """A dataset.json through the check of a data set, which lists problems instead of raising."""
    problems = check_dataset(path.parent)
    assert all(isinstance(line, str) and line for line in problems)


@dataclass(frozen=True)
class Reader:
    """A file that users give: its name, what reads it, and a good one as a document or as text."""

    name: str
    read: Callable[[Path], Any]
    good: Any
    is_located: bool = True


def table(header: list[str], *rows: list[str]) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows([header, *rows])
    return stream.getvalue()


def shipped(package: str, name: str) -> Any:
    return yaml.safe_load(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


def member_folder(path: Path) -> None:
    """``score`` takes the organs' names from the dataset.json of a member's folder."""
    other = path.parent / "other"
    other.mkdir(exist_ok=True)
    score_folders([path.parent, other], path.parent / "scores.csv")


CASES = {
    "version": 1,
    "cases": {"a": {"role": "partial", "annotated": [1, 2], "round": 1, "weight": 0.5}, "b": {"role": "labelled"}},
}
DATASET = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 1, "file_ending": ".nii.gz"}
SCORES = [*("0.9" for _ in ORGANS), "0.91", "0.8", "5"]
OFFICIAL = ["Name", *(f"{organ.short}_{measure}" for measure in ("DSC", "NSD") for organ in FLARE22)]

READERS = [
    Reader("flare_cases.json", lambda path: read_table(path, labels=LABELS), CASES),
    Reader("dataset.json", check_folder, DATASET, is_located=False),
    Reader("dataset.json ", lambda path: read_structures(str(path)), DATASET),
    Reader("dataset.json  ", lambda path: label_set(str(path)), DATASET),
    Reader("dataset.json   ", member_folder, DATASET),
    Reader("recipe.yaml", lambda path: load_recipe(str(path)), shipped("nnunet_flare.recipes", "uncertainty.yaml")),
    Reader("other.yaml", lambda path: load_recipe(str(path)), shipped("nnunet_flare.recipes", "demo.yaml")),
    Reader("pipeline.yaml", load_pipeline, shipped("nnunet_flare.postprocessing", "pipelines/flare22.yaml")),
    Reader("ids.yaml", lambda path: load_id_map(str(path)), shipped("nnunet_flare.fusion", "id_maps/btcv.yaml")),
    Reader(
        "slurm.yaml",
        lambda path: parse_options([str(path)]),
        {"all": {"partition": "gpu", "time": "4:00:00", "cpus": 4}, "train": {"gres": "gpu:1", "extra": "--qos=x"}},
    ),
    Reader(
        "scores.csv",
        lambda path: select_from_scores(
            path, path.with_suffix(".out"), rule="min-organ", threshold=0.5, top_fraction=None
        ),
        table(["case", *ORGANS, "mean_organ", "min_organ", "members"], ["a", *SCORES], ["b", *SCORES]),
    ),
    Reader(
        "decisions.csv",
        lambda path: read_reviews(path, ["a", "b"], ORGANS),
        table(["case", "decision", "organ", "comment"], ["a", "accept", "", ""], ["b", "organ-wrong", "liver", "x"]),
    ),
    Reader(
        "official.csv",
        lambda path: read_csv(path, structures_of(FLARE22)),
        table(OFFICIAL, ["a.nii.gz", *("0.5" for _ in OFFICIAL[1:])]),
    ),
]
"""Spaces at the end only tell readers of one file name apart."""

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from([0, -1, 2**70, "", "\0", "../../x", "1e400", "2001-01-01", "!!python/object:os.system", "NaN"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=8), st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(document: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry of a document."""
    if isinstance(document, dict):
        below = document.items()
    elif isinstance(document, list):
        below = enumerate(document)
    else:
        return [above]
    return [above, *(place for key, value in below for place in places(value, (*above, key)))]


def changed(document: Any, place: tuple[Any, ...], value: Any, how: str) -> Any:
    """A copy with one entry replaced, removed, or a new one beside it."""
    if not place:
        return value
    document = copy.deepcopy(document)
    inside = document
    for key in place[:-1]:
        inside = inside[key]
    if how == "remove":
        del inside[place[-1]]
    elif how == "add" and isinstance(inside, dict):
        inside[value if isinstance(value, (str, int)) else "new"] = value
    else:
        inside[place[-1]] = value
    return document


def as_text(reader: Reader, document: Any) -> str:
    if isinstance(document, str):
        return document
    if reader.name.strip().endswith(".json"):
        return json.dumps(document)
    return yaml.safe_dump(document)


def reads_or_refuses(reader: Reader, folder: Path, content: bytes) -> None:
    path = folder / reader.name.strip()
    path.write_bytes(content)
    try:
        reader.read(path)
    except InputError as error:
        assert len(str(error)) > 15 and "Traceback" not in str(error)
        assert not reader.is_located or path.name in str(error) or str(folder) in str(error), f"not located: {error}"


every_reader = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name.replace(" ", "_"))


@every_reader
def test_a_good_file_is_taken(reader: Reader, tmp_path: Path) -> None:
    """Else the changes below would not get past the first check."""
    path = tmp_path / reader.name.strip()
    path.write_text(as_text(reader, reader.good))
    if reader.read is member_folder:
        with pytest.raises(InputError, match="no label map"):
            reader.read(path)
    else:
        reader.read(path)


@every_reader
@fuzzed
@given(content=st.binary(max_size=200))
def test_any_bytes(reader: Reader, content: bytes, tmp_path: Path) -> None:
    reads_or_refuses(reader, tmp_path, content)


@every_reader
@fuzzed
@given(document=values)
def test_any_value(reader: Reader, document: Any, tmp_path: Path) -> None:
    text = json.dumps(document) if reader.name.strip().endswith(".json") else yaml.safe_dump(document)
    reads_or_refuses(reader, tmp_path, text.encode("utf-8", "replace"))


@every_reader
@fuzzed
@given(data=st.data())
def test_a_good_file_with_one_thing_changed(reader: Reader, data: st.DataObject, tmp_path: Path) -> None:
    if isinstance(reader.good, str):
        rows = list(csv.reader(io.StringIO(reader.good)))
        row = data.draw(st.integers(0, len(rows) - 1))
        cell = data.draw(st.integers(0, len(rows[row]) - 1))
        how = data.draw(st.sampled_from(["replace", "remove", "add", "double", "swap"]))
        text = data.draw(st.one_of(st.text(max_size=6), st.sampled_from(["nan", "inf", "-1", "1e999", '"', "a", "\0"])))
        if how == "replace":
            rows[row][cell] = text
        elif how == "remove":
            del rows[row][cell]
        elif how == "add":
            rows[row].insert(cell, text)
        elif how == "double":
            rows.append(rows[row])
        else:
            rows.reverse()
        stream = io.StringIO()
        csv.writer(stream, escapechar="\\").writerows(rows)
        content = stream.getvalue()
    else:
        place = data.draw(st.sampled_from(places(reader.good)))
        how = data.draw(st.sampled_from(["replace", "remove", "add"]))
        content = as_text(reader, changed(reader.good, place, data.draw(values), how))
    reads_or_refuses(reader, tmp_path, content.encode("utf-8", "replace"))


@every_reader
@fuzzed
@given(data=st.data())
def test_a_good_file_with_a_byte_changed_or_cut(reader: Reader, data: st.DataObject, tmp_path: Path) -> None:
    content = as_text(reader, reader.good).encode()
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content = content[:place] + data.draw(st.binary(min_size=1, max_size=3)) + content[place + 1 :]
    reads_or_refuses(reader, tmp_path, content)


# ------------------------------------------------------------------ words of the command line


KEYS = [
    "rounds", "plan.spacing_mm", "members.count", "members.kind", "members.at", "selection.threshold", "selection.rule",
    "selection.per_organ", "training.num_epochs", "training", "predict.tta", "final.num_epochs", "seed", "planner",
    "nonsense",
]  # fmt: skip


a_word = st.one_of(st.text(max_size=20), st.builds("{}={}".format, st.sampled_from(KEYS), scalars))


@fuzzed
@given(name=st.sampled_from(shipped_recipes()), words=st.lists(a_word, max_size=3))
def test_any_set(name: str, words: list[str]) -> None:
    try:
        load_recipe(name, parse_settings(words))
    except InputError as error:
        assert len(str(error)) > 15


@fuzzed
@given(words=st.lists(st.from_regex(r"((partition|time|cpus|mem|extra)=)?.{0,8}"), max_size=3))
def test_any_slurm_option(words: list[str]) -> None:
    try:
        parse_options(words)
    except InputError as error:
        assert "--slurm" in str(error)


@fuzzed
@given(document=st.dictionaries(st.sampled_from(["flare", "other"]), values))
def test_any_settings_of_a_configuration(document: dict[str, Any]) -> None:
    try:
        read_settings(document, where="plans.json, configuration x")
    except InputError as error:
        assert "plans.json, configuration x" in str(error)


@fuzzed
@given(content=st.one_of(st.binary(max_size=100), values.map(lambda value: json.dumps(value).encode())))
def test_any_run_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=r"run\.json"):
        load_run(tmp_path)
