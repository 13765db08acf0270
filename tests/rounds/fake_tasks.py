"""Runs whose tasks are short stand-ins, so that executors are tested without any training.

A run made here is a real one to every part of the package, but its folder of settings comes from the test, and each
stage only does what ``fake.json`` says: sleep, fail, or train in a child process that counts on from its checkpoint.
Processes of tasks find the stand-ins through a ``sitecustomize.py`` on their ``PYTHONPATH``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunet_flare.cases import table_name, write_table
from nnunet_flare.files import write_json
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.recipes.recipe import Recipe
from nnunet_flare.rounds.run.manifest import Run, create_run
from nnunet_flare.rounds.run.settings import RunSettings

SITE = '''
import sys

if "nnunet_flare.cli.pseudolabel" in sys.orig_argv and "task" in sys.orig_argv:
    import json, os, time
    from nnunet_flare.errors import TaskError
    from nnunet_flare.rounds import do_task as work

    TRAINER = """
import json, os, sys, time
path, ends = sys.argv[1], int(sys.argv[2])
done = int(open(path).read()) if os.path.exists(path) else 0
while done < ends:
    time.sleep(0.1)
    done += 1
    open(path + ".tmp", "w").write(str(done))
    os.replace(path + ".tmp", path)
"""

    def fake(run, task):
        plan = json.loads((run.root / "fake.json").read_text()).get(task.name, {})
        note(run, task, "start")
        time.sleep(plan.get("seconds", 0))
        if plan.get("fail"):
            print("the scanner is on fire", flush=True)
            raise TaskError("as the test asked")
        if plan.get("epochs"):
            path = str(run.root / (task.name + ".checkpoint"))
            code = work.run_child([sys.executable, "-S", "-c", TRAINER, path, str(plan["epochs"])])
            if code:
                raise TaskError(f"trainer ended with {code}")
        note(run, task, "end")
        return {}

    def note(run, task, what):
        names = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME")
        line = {"task": task.name, "what": what, "time": time.time(), **{n: os.environ.get(n) for n in names}}
        with open(run.root / "fake.log", "a") as stream:
            stream.write(json.dumps(line) + "\\n")

    work.STAGES = dict.fromkeys(work.STAGES, fake)
'''


def make_run(folder: Path, *, device: str = "cuda", shards: int = 2, root: Path | None = None, **recipe: str) -> Run:
    """A run on a data set that does not exist: one round, two members."""
    loaded = load_recipe("uncertainty", {"rounds": "1", "members.count": "2", **recipe})
    return run_of(folder, loaded, device=device, shards=shards, root=root)


def run_of(
    folder: Path, loaded: Recipe, *, device: str = "cuda", shards: int = 2, root: Path | None = None, **settings: Any
) -> Run:
    """The same of any recipe."""
    folders = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    settings = RunSettings(
        name="fake", dataset="Dataset001_Fake", plans_name="nnUNetPlans", unlabelled_dir=str(folder),
        recipe=loaded.model_dump(mode="json"), folders=folders, device=device, shards=shards, **settings,
    )  # fmt: skip
    run = create_run(root or folder / "run", settings, loaded)
    plan_tasks(run, {})
    _planned(run)
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    return run


def _planned(run: Run) -> None:
    """What the stand-ins of ``plan`` and ``build`` do not write: a dataset, plans and tables of no case."""
    labels = {"background": 0, "liver": 1}
    if not (run.raw / "dataset.json").is_file():
        write_json(run.raw / "dataset.json", {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"})
    (run.raw / "labelsTr").mkdir(exist_ok=True)
    plans: dict[Path, dict[str, Any]] = {}
    for number in range(len(run.rounds)):
        base, name = run.round(number).base, run.round(number).configuration
        plans.setdefault(base.plans_file, {})[name] = {"inherits_from": base.configuration}
        write_table(run.preprocessed / table_name(name), {})
        if run.round(number).learns_from is not None:
            run.round(number).data.mkdir(parents=True, exist_ok=True)
    if run.coarse_base is not None:
        plans[run.coarse_base.plans_file] = {run.coarse_configuration: {}}
        write_table(run.preprocessed / table_name(run.coarse_configuration), {})
    for path, configurations in plans.items():
        if not path.is_file():
            write_json(path, {"configurations": configurations})


def plan_tasks(run: Run, plan: dict[str, dict[str, Any]]) -> None:
    write_json(run.root / "fake.json", plan)


def notes(run: Run, what: str = "start") -> list[dict[str, Any]]:
    """What the tasks noted, in order of time."""
    path = run.root / "fake.log"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if line["what"] == what]


def finish(run: Run, *names: str) -> None:
    """Mark tasks as done."""
    for name in names:
        write_json(run.paths.done(name), {"task": name, "started": 0.0, "seconds": 1.0, "result": {}})
