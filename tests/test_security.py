"""What SECURITY.md says: no code out of files, no shell strings, no network, nothing written outside named folders."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnunet_flare
from nnunet_flare.datasets import check_dataset
from nnunet_flare.rounds.run.unlabelled import safe_id

PACKAGE = Path(nnunet_flare.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

CODE_FROM_FILES = {
    "checkpoints.py: torch.load": "with --trust-checkpoint only; weights_only before that",
    "trainers/checkpoints.py: torch.load": "a training's own checkpoints, to resume it",
    "rounds/stages/arrays.py: pickle.load": "nnU-Net's pickles in nnUNet_preprocessed",
    "documents.py: yaml.load": "with SafeLoader or BaseLoader",
}
"""Every place that could run what a file holds, and why it may be there; each is a line of SECURITY.md."""

DANGEROUS = {
    "pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec",
    "numpy.load", "np.load", "joblib.load", "marshal.load", "shelve.open", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip

NETWORK = {"urllib", "http", "requests", "ftplib", "smtplib", "httpx", "aiohttp", "xmlrpc", "telnetlib", "boto3"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_files_are_opened_as_code_only_where_it_is_said() -> None:
    found = set()
    for path in SOURCES:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            is_safe = name == "torch.load" and any(
                k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
                for k in call.keywords
            )
            if name in DANGEROUS and not is_safe:
                found.add(f"{path.relative_to(PACKAGE).as_posix()}: {name}")
    assert found == set(CODE_FROM_FILES)


def test_no_command_goes_through_a_shell() -> None:
    for path in SOURCES:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            shells = [k for k in call.keywords if k.arg == "shell"]
            assert not shells, f"{path}, line {call.lineno}: {name}(shell=...)"


def test_nothing_opens_a_network_connection() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & NETWORK, f"{path}: {names}"
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"socket\.(?!gethostname)", text), f"{path}: uses sockets"


# ------------------------------------------------------------------ names that lead elsewhere


@pytest.mark.parametrize("case", ["../evil", "a/b", "/etc/evil", "..", ".hidden", "a\\b", "", "x/../../y"])
def test_a_case_id_of_dataset_json_that_leads_elsewhere_is_refused(tmp_path: Path, case: str) -> None:
    document = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
        "dataset": {case: {"images": ["a.nii.gz"], "label": "b.nii.gz"}},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    assert any("is no file name" in line for line in check_dataset(tmp_path))


@pytest.mark.parametrize("case", ["../evil", "/etc/evil", ".."])
def test_a_case_id_of_flare_cases_that_leads_elsewhere_is_refused(tmp_path: Path, case: str) -> None:
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "numTraining": 0}
    (tmp_path / "dataset.json").write_text(json.dumps({**document, "file_ending": ".nii.gz"}))
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    (tmp_path / "flare_cases.json").write_text(json.dumps({"version": 1, "cases": {case: {"role": "labelled"}}}))
    assert any("are not in the dataset" in line for line in check_dataset(tmp_path))


@given(st.text(max_size=40))
def test_the_id_of_an_unlabelled_scan_is_a_plain_name(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?", safe_id(name))


def test_ids_of_reviews_must_be_cases_of_the_run(tmp_path: Path) -> None:
    from nnunet_flare.errors import InputError
    from nnunet_flare.rounds.run.decisions import read_reviews

    (tmp_path / "d.csv").write_text("case,decision\n../../evil,accept\n")
    with pytest.raises(InputError, match="is no unlabelled case"):
        read_reviews(tmp_path / "d.csv", ["a"], ["liver"])
