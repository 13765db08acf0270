"""Single stages of a run: ignored organs, clear stops, damaged files that are made anew, export, and GPUs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import FlareError, InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import Volume, read_labels, read_volume, to_sitk, write_volume
from nnunet_flare.rounds.do_task import TASK_VARIABLE, do_task
from nnunet_flare.rounds.executors import local
from nnunet_flare.rounds.export import export_dataset, export_stock_model
from nnunet_flare.rounds.run.dataset import organ_ids
from nnunet_flare.rounds.run.decisions import Review
from nnunet_flare.rounds.run.ledger import read_decisions, read_ledger
from nnunet_flare.rounds.run.manifest import Run, load_run
from nnunet_flare.rounds.run.tasks import Task, find_task, graph
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, read_list, shard, write_list
from nnunet_flare.rounds.stages.arrays import read_array, write_array
from nnunet_flare.rounds.stages.build import build_round
from nnunet_flare.rounds.stages.label import label_shard
from nnunet_flare.rounds.stages.label_maps import ignore_label
from nnunet_flare.rounds.stages.plan import plan_and_preprocess
from nnunet_flare.rounds.stages.preprocess import failure, odd, preprocess_unlabelled, state_file
from nnunet_flare.rounds.stages.select import select_round


@pytest.fixture
def run(tiny_loop, tmp_path, monkeypatch) -> Run:
    """A copy of the whole tiny run that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_loop.folder, folder, symlinks=True)
    for path in folder.glob("nnUNet_*/Dataset022_FLAREPhantom/**/*.json"):
        if str(tiny_loop.folder) in (text := path.read_text()):
            path.write_text(text.replace(str(tiny_loop.folder), str(folder)))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(folder / name))
    return load_run(folder / "nnUNet_results" / "Dataset022_FLAREPhantom" / "flare_tiny")


def select(run: Run) -> None:
    """Select round 0."""
    select_round(run, run.round(0))


def changed(run: Run, **parts: dict) -> Run:
    """The run with some keys of its recipe changed."""
    update = {name: getattr(run.recipe, name).model_copy(update=values) for name, values in parts.items()}
    return replace(run, recipe=run.recipe.model_copy(update=update))


def set_agreement(run: Run, case: str, **organs: float | None) -> None:
    path = run.paths.case(0, case)
    document = read_json(path)
    full, none = dict.fromkeys(document["agreement"], 1.0), dict.fromkeys(document["agreement"], 0.0)
    found = {"present": dict.fromkeys(full, True), "absent_pairs": none}  # both members have every organ
    write_json(path, {**document, **found, "agreement": {**full, **organs}})


def labelled_cases(run: Run) -> list[str]:
    return [c.case for c in read_list(run.paths.unlabelled) if "failed" not in read_json(run.paths.case(0, c.case))]


# ------------------------------------------------------------------ a person's decisions


def test_a_rejected_case_takes_no_other_cases_place_in_the_top_fraction(run):
    cases = labelled_cases(run)
    for rank, case in enumerate(cases):
        set_agreement(run, case, **dict.fromkeys(organ_ids(run), 0.9 - 0.1 * rank))
    best = changed(run, selection={"rule": "mean-organ", "threshold": 0.0, "top_fraction": 1 / len(cases)})
    write_json(run.paths.reviews, {"version": 1, "cases": [asdict(Review(cases[0], "reject", (), "stent"))]})
    select_round(best, best.round(0))
    decided = {entry.case: entry for entry in read_decisions(run.paths, 0)}
    assert [case for case in cases if decided[case].decision == "taken"] == [cases[1]]
    assert decided[cases[0]].decision == "refused" and decided[cases[0]].score == pytest.approx(0.9)
    assert "reviewed: rejected (stent)" in decided[cases[0]].reason


# ------------------------------------------------------------------ organ-wise acceptance


def test_uncertain_organs_become_ignore_in_the_rounds_data_and_nowhere_else(run):
    case, other, poor = labelled_cases(run)[:3]
    set_agreement(run, case, liver=0.3, spleen=0.5)
    set_agreement(run, other)
    set_agreement(run, poor, **dict.fromkeys(list(organ_ids(run))[:10], 0.1))
    organwise = changed(run, fusion={"uncertain_organs": "ignore"}, selection={"threshold": 0.9})
    select_round(organwise, organwise.round(0))
    decided = {entry.case: entry for entry in read_decisions(run.paths, 0)}
    assert decided[case].decision == "taken" and set(decided[case].ignored) == {"liver", "spleen"}
    assert decided[other].decision == "taken" and decided[other].ignored == {}
    assert decided[poor].decision == "refused" and "3 of 13 organs certain" in decided[poor].reason
    build_round(organwise, organwise.round(1))
    organs, ignored = organ_ids(run), ignore_label(run)
    assert ignored == 14
    label = read_array(run.round(1).data / f"{case}_seg.b2nd")[0]
    fused = read_array(run.paths.training_label(0, case))[0]
    members = read_array(run.paths.members(0, case))
    union = np.isin(fused, [organs["liver"], organs["spleen"]])
    union |= np.isin(members, [organs["liver"], organs["spleen"]]).any(axis=0)
    np.testing.assert_array_equal(label == ignored, union)
    np.testing.assert_array_equal(label[~union], fused[~union])
    shares = {entry.case: entry for entry in read_ledger(run.paths)}[case].ignored
    assert shares["liver"] == pytest.approx(
        (np.isin(fused, [organs["liver"]]) | (members == organs["liver"]).any(axis=0)).mean()
    )
    assert "ignore" not in read_json(run.raw / "dataset.json")["labels"]
    configuration = read_json(run.plans_file)["configurations"][run.round(1).configuration]
    assert configuration["flare"]["ignore_label"] == 14


def test_training_with_ignored_voxels_runs_and_its_export_declares_them(run):
    from nnunetv2.run.run_training import get_trainer_from_args

    for case in labelled_cases(run):
        set_agreement(run, case, liver=0.3)
    organwise = changed(run, fusion={"uncertain_organs": "ignore"})
    organwise = changed(organwise, selection={"threshold": 0.9})
    select_round(organwise, organwise.round(0))
    build_round(organwise, organwise.round(1))
    configuration = run.round(1).configuration
    trainer = get_trainer_from_args("22", configuration, "all", run.recipe.trainer, run.settings.plans_name,
                                    device=torch.device("cpu"))  # fmt: skip
    trainer.initialize()
    batches, _ = trainer.get_dataloaders()
    seen = set()
    for _ in range(12):
        batch = next(batches)
        seen |= set(torch.unique(batch["target"][0]).tolist())
        assert np.isfinite(trainer.train_step(batch)["loss"])
    assert 14 in seen
    target = export_dataset(organwise, 1, 501)
    document = read_json(target / "dataset.json")
    assert document["labels"]["ignore"] == 14
    exported = read_labels(target / "labelsTr" / f"{labelled_cases(run)[0]}.nii.gz").array
    assert (exported == 14).any() and not (exported == 1).any()


# ------------------------------------------------------------------ clear stops


def test_when_nothing_is_taken_the_stop_names_the_threshold_and_what_to_change(run):
    with pytest.raises(TaskError) as caught:
        select(changed(run, selection={"threshold": 0.99999, "rule": "min-organ", "top_fraction": None}))
    message = str(caught.value)
    assert "none of 7 unlabelled cases" in message and "0.99999" in message and "top_fraction" in message
    assert all(e.reason for e in read_ledger(run.paths))


def test_agreement_that_could_not_be_computed_counts_as_zero_and_is_logged(run, caplog):
    case, other = labelled_cases(run)[:2]
    set_agreement(run, case, pancreas=None)
    set_agreement(run, other)
    select(changed(run, selection={"rule": "min-organ", "threshold": 0.01, "top_fraction": None}))
    entry = {e.case: e for e in read_ledger(run.paths)}[case]
    assert entry.decision == "refused" and entry.min_organ == 0.0
    assert f"{case}: agreement of pancreas could not be computed" in caplog.text


def test_odd_scans_are_kept_out_unless_asked(run):
    case = labelled_cases(run)[0]
    document = read_json(run.paths.case(0, case))
    write_json(run.paths.case(0, case), {**document, "odd": ["spacing (z, y, x) (20, 1, 1) mm"]})
    everything = changed(run, selection={"rule": "all", "threshold": 0.0, "top_fraction": None})
    select_round(everything, everything.round(0))
    entry = {e.case: e for e in read_ledger(run.paths)}[case]
    assert entry.decision == "odd" and "spacing" in entry.reason
    select(changed(everything, selection={"keep_odd": True}))
    assert {e.case: e for e in read_ledger(run.paths)}[case].decision == "taken"


def test_fewer_cases_than_folds_is_said_before_training(run):
    (run.preprocessed / "splits_final.json").unlink()
    with pytest.raises(InputError, match=r"4 labelled cases, fewer than members.count=5"):
        plan_and_preprocess(changed(run, members={"count": 5}))


def test_a_split_file_with_too_few_folds_is_named(run):
    with pytest.raises(InputError, match=r"has 2 folds, members.count is 3"):
        plan_and_preprocess(changed(run, members={"count": 3}))


def test_plans_made_anew_stop_the_run(run):
    plans = read_json(run.plans_file)
    plans["configurations"][run.recipe.configuration]["patch_size"] = [8, 8, 8]
    write_json(run.plans_file, plans)
    with pytest.raises(TaskError, match="planned anew"):
        build_round(run, run.round(1))


def test_early_stop_ends_the_rounds_when_agreement_no_longer_rises(run):
    patient = changed(run, stop={"patience": 1})
    patient = replace(patient, recipe=patient.recipe.model_copy(update={"rounds": 4}))
    for number in (0, 1):
        if number == 1:
            shutil.copytree(run.paths.round(0), run.paths.round(1))
            for path in run.paths.round(1).glob("cases/*.json"):
                document = read_json(path)
                if "agreement" in document:
                    write_json(path, {**document, "agreement": dict.fromkeys(document["agreement"], 0.01)})
        select_round(patient, patient.round(number))
    assert (
        patient.final.number == 4 and patient.current().final.number == 2
    )  # rounds 0 and 1 were labelled, 2 is the final training
    assert read_json(run.paths.stop)["last_labelled_round"] == 1


def test_a_dataset_without_a_labelled_case_is_refused(run, capsys):
    for folder in ("imagesTr", "labelsTr"):
        for path in (run.raw / folder).iterdir():
            path.unlink()
    code = main(["run", "-d", "22", "-u", run.settings.unlabelled_dir, "--recipe", "demo", "--name", "none", "-device",
                 "cpu"])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2 and "imagesTr: no image named" in error


def test_bad_and_odd_scans_are_set_aside_or_flagged_one_by_one(run, monkeypatch):
    monkeypatch.setattr("nnunet_flare.inference.preprocessing.MAX_NETWORK_VOXELS", 10**6)
    good = read_volume(Path(read_list(run.paths.unlabelled)[0].images[0]))
    folder = run.raw / "imagesUn"
    hu = good.array.astype(np.float32)
    makers = {
        "nan": lambda p: write_volume(p, good.with_array(np.where(hu > 0, np.nan, hu).astype(np.float32))),
        "infinite": lambda p: write_volume(p, good.with_array(np.where(hu > 200, np.inf, hu).astype(np.float32))),
        "constant": lambda p: write_volume(p, good.with_array(np.zeros_like(good.array))),
        "one_slice": lambda p: write_volume(p, Volume(good.array[:1], good.spacing_mm)),
        "empty_file": lambda p: p.write_bytes(b""),
        "missing": lambda p: None,
        "flat": lambda p: sitk.WriteImage(sitk.GetImageFromArray(good.array[0]), str(p)),
        "series": lambda p: sitk.WriteImage(sitk.JoinSeries([to_sitk(good), to_sitk(good)]), str(p)),
        "picture": lambda p: write_volume(p, good.with_array(np.clip(good.array, 0, 255).astype(np.uint8))),
        "coarse": lambda p: write_volume(p, Volume(good.array, (40.0, 5.0, 5.0))),
        "shifted": lambda p: write_volume(p, good.with_array((good.array + 1024).astype(np.int16))),
        "scores": lambda p: write_volume(p, good.with_array((hu - hu.mean()) / hu.std())),
        "unit": lambda p: write_volume(p, good.with_array(hu / 2000)),
        "far_too_long": lambda p: write_volume(p, Volume(good.array, (900.0, 5.0, 5.0))),
        "huge": lambda p: write_volume(p, Volume(good.array, (77.0, 52.0, 39.0))),
    }
    cases = []
    for name, make in makers.items():
        path = folder / f"{name}_0000.nii.gz"
        make(path)
        cases.append(UnlabelledCase(name, str(path), (str(path),), 1))
    write_list(run.paths.unlabelled, cases)
    assert preprocess_unlabelled(run) == {"ready": 5, "failed": 10}
    reasons = {name: failure(run.unlabelled_data, name) for name in makers}
    said = {"nan": "NaN", "infinite": "infinite", "constant": "empty", "one_slice": "fewer than 2 voxels"}
    said |= {"empty_file": "0 bytes", "missing": "no such file", "flat": "dimensions", "series": "4"}
    said |= {"far_too_long": "the spacing is wrong", "huge": "cannot be predicted; check the spacing"}
    for name, word in said.items():
        assert word in reasons[name] and f"{name}_0000.nii.gz" in reasons[name], (name, reasons[name])
    assert reasons["picture"] is None and "8-bit picture" in odd(run.unlabelled_data, "picture")[0]
    for name, word in (("shifted", "rescale intercept"), ("scores", "a few units"), ("unit", "a few units")):
        assert reasons[name] is None and word in odd(run.unlabelled_data, name)[0], name
    assert reasons["coarse"] is None and "spacing" in odd(run.unlabelled_data, "coarse")[0]


def test_a_given_model_labels_in_round_0_when_it_expects_the_same_input_and_is_refused_else(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(run.round(0).model, model)
    given = Run(tmp_path / "given", replace(run.settings, init_model=str(model), init_folds=("0", "1")), run.recipe)
    given.root.mkdir()
    shutil.copyfile(run.paths.unlabelled, given.paths.unlabelled)
    assert "train-r0-f0" not in graph(given) and "label-r0-p0" in graph(given)
    case = labelled_cases(run)[0]
    assert label_shard(given, given.round(0), 0, 1) == {"labelled": 6, "failed": 1}
    assert read_json(given.paths.case(0, case))["label_sha256"] == read_json(run.paths.case(0, case))["label_sha256"]
    plans = read_json(model / "plans.json")
    plans["configurations"][run.recipe.configuration]["spacing"] = [3.0, 1.0, 1.0]
    write_json(model / "plans.json", plans)
    given.paths.case(0, case).unlink()
    with pytest.raises(TaskError, match=r"expects other input .*spacing \[3.0, 1.0, 1.0\] there"):
        label_shard(given, given.round(0), 0, 1)


# ------------------------------------------------------------------ damaged files


def test_a_label_that_changed_after_it_was_judged_is_never_trained_on(run):
    taken = next(e.case for e in read_ledger(run.paths) if e.decision == "taken")
    path = run.paths.training_label(0, taken)
    label = read_array(path)
    path.unlink()
    write_array(path, np.where(label == 1, 2, label).astype(np.int16), [16, 32, 32])
    with pytest.raises(TaskError, match=taken):
        build_round(run, run.round(1))
    assert not run.paths.case(0, taken).is_file() and not run.paths.done("label-r0-p0").is_file()


def test_a_truncated_label_array_is_found_and_made_anew(run):
    taken = next(e.case for e in read_ledger(run.paths) if e.decision == "taken")
    path = run.paths.training_label(0, taken)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TaskError, match="label them anew"):
        build_round(run, run.round(1))
    assert not run.paths.case(0, taken).is_file()


def test_a_scan_that_was_mended_takes_part_after_retry(run, capsys):
    assert "damaged" in failure(run.unlabelled_data, "truncated")
    good = read_list(run.paths.unlabelled)[0]
    target = run.raw / "imagesUn" / "truncated_0000.nii.gz"
    target.unlink()
    shutil.copyfile(good.images[0], target)
    local.forget_failures(run)
    assert not state_file(run.unlabelled_data, "truncated").is_file()
    assert preprocess_unlabelled(run) == {"ready": 7, "failed": 0}


# ------------------------------------------------------------------ what leaves a run


def test_a_round_is_exported_as_a_dataset_that_stock_nnunet_accepts(run):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    target = export_dataset(run, 1, 77)
    verify_dataset_integrity(str(target), 1)
    assert target.name == "Dataset077_FLAREPhantom_tiny_r1"
    document = read_json(target / "dataset.json")
    assert document["numTraining"] == 7 and document["labels"] == read_json(run.raw / "dataset.json")["labels"]
    roles = {case: entry["role"] for case, entry in read_json(target / "flare_cases.json")["cases"].items()}
    assert sorted(roles.values()) == ["labelled"] * 4 + ["pseudo"] * 3
    with pytest.raises(InputError, match="there already"):
        export_dataset(run, 1, 77)
    with pytest.raises(InputError, match="expected 1 to 1"):
        export_dataset(run, 5, 78)


def test_the_final_model_is_exported_for_machines_without_this_package(run, tmp_path):
    folder = export_stock_model(run, tmp_path / "model")
    code = (
        "import sys, torch\n"
        "sys.modules['nnunet_flare'] = None\n"
        "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor\n"
        "p = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False)\n"
        f"p.initialize_from_trained_model_folder({str(folder)!r}, ('all',))\n"
        "print('stock trainer', p.trainer_name)\n"
    )
    environment = {**os.environ, "NNUNET_FLARE_PLUGIN": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "stock trainer nnUNetTrainer" in done.stdout, done.stderr
    assert "flare" not in read_json(folder / "plans.json")["configurations"][run.round(1).configuration]


def test_the_ledger_is_exported_as_csv(run, tmp_path, capsys):
    assert main(["export", "-o", str(run.root), "--ledger", str(tmp_path / "ledger.csv")]) == 0
    lines = (tmp_path / "ledger.csv").read_text().splitlines()
    assert len(lines) == 1 + 7 and lines[0].startswith("round,case,role,decision,reason") and "liver" in lines[0]


def test_export_without_a_target_says_what_to_give(run, capsys):
    assert main(["export", "-o", str(run.root)]) == 2
    assert "--dataset" in capsys.readouterr().err


# ------------------------------------------------------------------ tasks and executors


def test_shards_cover_every_case_once_and_are_of_like_size():
    rng = np.random.default_rng(0)
    cases = [UnlabelledCase(f"c{i}", "", (), int(rng.integers(1, 1000))) for i in range(41)]
    parts = [shard(cases, part, 4) for part in range(4)]
    assert sorted(c.case for part in parts for c in part) == sorted(c.case for c in cases)
    sizes = [sum(c.size_bytes for c in part) for part in parts]
    assert max(sizes) - min(sizes) <= max(c.size_bytes for c in cases)


def test_a_task_before_its_time_and_an_unknown_one_are_refused(run, capsys):
    run.paths.done("select-r0").unlink()
    run.paths.done("build-r1").unlink()
    assert main(["task", "-o", str(run.root), "build-r1"]) == 2
    assert "needs select-r0 first" in capsys.readouterr().err
    assert main(["task", "-o", str(run.root), "build-r9"]) == 2
    assert "build-r1" in capsys.readouterr().err


def test_workers_that_a_task_forks_end_at_once_when_nnunet_asks_them_to(run):
    code = (
        "import os, signal\n"
        "from nnunet_flare.cli.pseudolabel import main\n"
        f"main(['task', '-o', {str(run.root)!r}, 'plan'])\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(3 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 4)\n"
        "print('worker', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "worker 3" in done.stdout


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["status", "-o", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert main(["status", "-o", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_process_left_over_from_a_killed_task_is_ended_before_the_task_starts_again(run, caplog):
    task = find_task(run, "build-r1")
    environment = {**os.environ, TASK_VARIABLE: f"{run.root.resolve()}:build-r1"}
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                             env={**environment, TASK_VARIABLE: f"{run.root.resolve()}:build-r0"})  # fmt: skip
    try:
        run.paths.done("build-r1").unlink()
        do_task(run, task)
        assert not psutil.pid_exists(orphan.pid) and other.poll() is None
        assert f"ending process {orphan.pid}" in caplog.text
        assert run.paths.done("build-r1").is_file()
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()


class _Fake:
    """A run of four GPU tasks whose commands note when they held which GPU."""

    def __init__(self, folder, log, fail=()):
        self.root, self.log, self.fail = folder, log, fail
        from nnunet_flare.rounds.run.paths import RunPaths

        self.paths = RunPaths(folder)
        (folder / "tasks").mkdir(parents=True)

    def current(self):
        return self

    def environment(self):
        return dict(os.environ)

    def graph(self):
        return {f"work-{i}": Task(f"work-{i}", "label", (), 0, part=i, gpus=1) for i in range(4)}

    def command(self, name):
        end = "sys.exit(7)" if name in self.fail else f"open({str(self.paths.done(name))!r}, 'w').write('{{}}')"
        return [sys.executable, "-c", (
            "import os, sys, time\n"
            "a = time.time(); time.sleep(0.25); b = time.time()\n"
            f"open({str(self.log)!r}, 'a').write(f\"{{os.environ['CUDA_VISIBLE_DEVICES']}} {{a}} {{b}}\\n\")\n"
            f"{end}\n"
        )]  # fmt: skip


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "graph", lambda run: run.graph())
    monkeypatch.setattr(Task, "command", lambda task, run: run.command(task.name))
    monkeypatch.setattr(local, "gpu_lock", lambda gpu: tmp_path / "machine" / f"gpu-{gpu}.lock")
    return tmp_path


def test_two_drivers_never_put_two_tasks_on_one_gpu(fakes):
    log = fakes / "log.txt"
    runs = [_Fake(fakes / name, log) for name in ("one", "two")]
    threads = [threading.Thread(target=local.run_local, args=(run, [0, 1])) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    held = [line.split() for line in log.read_text().splitlines()]
    assert len(held) == 8 and {gpu for gpu, _, _ in held} == {"0", "1"}
    for gpu in ("0", "1"):
        times = sorted((float(a), float(b)) for g, a, b in held if g == gpu)
        assert all(b <= a for (_, b), (a, _) in itertools.pairwise(times))


def test_a_failed_task_is_reported_with_its_exit_code_and_the_others_go_on(fakes):
    run = _Fake(fakes / "one", fakes / "log.txt", fail=("work-2",))
    with pytest.raises(FlareError, match="work-2 failed with exit code 7"):
        local.run_local(run, [0])
    assert all(run.paths.done(f"work-{i}").is_file() for i in (0, 1, 3))
    assert json.loads(run.paths.failed("work-2").read_text())["exit_code"] == 7
    run.fail = ()
    started = time.time()
    local.run_local(run, [0])  # only the failed one runs again
    assert run.paths.done("work-2").is_file() and not run.paths.failed("work-2").is_file()
    assert len([line for line in (fakes / "log.txt").read_text().splitlines() if float(line.split()[1]) > started]) == 1
