"""The command for the hour with a GPU: the order of its commands, its budget, what it tells. Nothing is timed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import gpu as benchmark
import predict
import pytest
import train_step

from nnunet_flare.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"predict.py": predict, "train_step.py": train_step}


def step(name: str, program: str, least_s: float = 0) -> benchmark.Step:
    return benchmark.Step(name, least_s, (sys.executable, "-c", program))


def test_a_command_that_fails_or_hangs_costs_the_others_nothing_but_its_time(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    wanted = [
        step("good", "print('all well')"),
        step("bad", "import sys; print('so far', flush=True); sys.exit('went wrong')"),
        step("long", "print('begun', flush=True)\n" + child),
        step("late", "print('never')", least_s=30),
    ]
    begun = time.monotonic()
    rows = benchmark.run_within(6, wanted, tmp_path, {})
    assert time.monotonic() - begun < 30, "what a command started ends with it"
    found = read_json(tmp_path / "gpu.json")
    assert found["commands"] == rows and found["hardware"]["cores"] > 0
    assert [rows[name].get("exit_code") for name in ("good", "bad", "long")] == [0, 1, None]
    assert [rows[name]["last_line"] for name in ("good", "bad", "long")] == ["all well", "went wrong", "begun"]
    assert rows["late"] == {"left_out": "0 s were left, it needs 30"}
    assert "so far\nwent wrong" in (tmp_path / "gpu.txt").read_text()


def test_one_that_did_not_run_is_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "steps", lambda *given, **more: [step("good", ""), step("late", "", least_s=1e6)])
    words = ["-o", str(tmp_path), "-device", "cpu", "--tiny"]
    assert benchmark.main(words) == 1
    assert "late: " in capsys.readouterr().err
    monkeypatch.setattr(benchmark, "steps", lambda *given, **more: [step("good", "")])
    assert benchmark.main(words) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-device", "cuda"], "no CUDA device was found"),
        (["-device", "cpu"], "give --tiny too"),
        (["-device", "cpu", "--tiny", "--budget", "0"], "expected seconds above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(tmp_path, words, said, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([*words, "-o", str(tmp_path / "figures")])
    assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "figures").exists()


def test_every_file_with_a_test_for_a_gpu_is_run():
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    assert marked - {Path(__file__).resolve()} == {ROOT / path for path in benchmark.TESTS}


def test_figures_of_another_card_are_not_kept_beside_new_ones(tmp_path, capsys):
    record = {"hardware": {"gpu": "one", "cpu": "a"}, "same": {"small": 1}}
    write_json(tmp_path / "found.json", record)
    assert predict.kept(tmp_path / "found.json", {"gpu": "one", "cpu": "a"}) == record
    assert predict.kept(tmp_path / "found.json", {"gpu": "other", "cpu": "a"}) == {}
    assert "other hardware" in capsys.readouterr().out
    assert predict.kept(tmp_path / "missing.json", {}) == {}


@pytest.mark.parametrize("tiny", [False, True])
def test_its_commands_have_options_that_there_are_and_write_into_its_folder(tmp_path, tiny, monkeypatch, capsys):
    tests, *others = benchmark.steps("cuda", tmp_path, tiny=tiny)
    assert all((ROOT / path).is_file() for path in tests.command[-2:])
    for one in others:
        script, *words = one.command[1:]
        assert Path(words[words.index("--output") + 1]).parent == tmp_path
        monkeypatch.setattr(sys, "argv", [script, *words, "--help"])  # refused first where a word is unknown
        with pytest.raises(SystemExit) as ended:
            SCRIPTS[Path(script).name].main()
        assert ended.value.code == 0, capsys.readouterr().err
