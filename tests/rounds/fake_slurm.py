"""A fake Slurm: commands on PATH that note how they were called and keep a queue in a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

FAKE = """#!{python} -S
import json, os, sys
place = {place!r}
state = json.load(open(place))
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
state["calls"].append([name, *words])
code = 0
if name in state["broken"]:
    sys.stderr.write(name + ": error: out of order\\n"); code = 1
elif name == "sbatch":
    number = str(100 + len(state["jobs"]))
    options = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    array = options.get("array")
    size = int(array.split("-")[1]) + 1 if array else 1
    ids = [f"{{number}}_{{k}}" for k in range(size)] if array else [number]
    state["jobs"][number] = dict(options=options, script=open(words[-1]).read(), elements=dict.fromkeys(ids, "PENDING"))
    print(number)
elif name == "squeue":
    for job in state["jobs"].values():
        for element, status in job["elements"].items():
            if status:
                print(f"{{element}}|{{job['options']['job-name']}}|{{status}}|Dependency")
elif name == "scancel":
    for job in state["jobs"].values():
        for element in job["elements"]:
            if element in words:
                job["elements"][element] = None
elif name == "scontrol" and "show" in words:
    print(f"JobId={{words[-1]}} JobState=OUT_OF_MEMORY Reason=OutOfMemory ExitCode=0:125")
json.dump(state, open(place, "w"))
sys.exit(code)
"""


class FakeSlurm:
    """Commands on PATH that note how they were called and keep a queue in a file."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "slurm-state.json"
        self.write({"calls": [], "jobs": {}, "broken": []})
        self.commands = folder / "bin"
        self.commands.mkdir()
        for name in ("sbatch", "squeue", "scancel", "scontrol", "sacct"):
            (self.commands / name).write_text(FAKE.format(python=sys.executable, place=str(self.place)))
            (self.commands / name).chmod(0o755)

    def write(self, state: dict) -> None:
        self.place.write_text(json.dumps(state))

    @property
    def state(self) -> dict:
        return json.loads(self.place.read_text())

    @property
    def jobs(self) -> dict[str, dict]:
        return self.state["jobs"]

    def tasks(self, job: str) -> list[str]:
        line = next(line for line in self.jobs[job]["script"].splitlines() if line.startswith("tasks=("))
        return line[len("tasks=(") : -1].split()

    def set(self, **states: str | None) -> None:
        """Set the state of tasks in the queue; None: it left."""
        state = self.state
        for number, job in state["jobs"].items():
            for index, element in enumerate(job["elements"]):
                name = self.tasks(number)[index].replace("-", "_")
                if name in states:
                    job["elements"][element] = states[name]
        self.write(state)

    def break_down(self, *commands: str) -> None:
        self.write({**self.state, "broken": list(commands)})

    def called(self, name: str) -> list[list[str]]:
        return [call[1:] for call in self.state["calls"] if call[0] == name]


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.commands}{os.pathsep}{os.environ['PATH']}")
    return fake
