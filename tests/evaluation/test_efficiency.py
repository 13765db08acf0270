"""Efficiency figures: the official sums by hand, and real commands whose use of the machine is known."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.evaluation import efficiency, sampling
from nnunet_flare.evaluation.gpu import GpuReading, open_gpu
from nnunet_flare.evaluation.sampling import Recording, Sample, record
from nnunet_flare.signals import handling

SMI = """#!/bin/sh
case "$*" in
  *memory.total*) echo "81920, $((81920 - 3000))" ;;
  *) echo "12, 500"; echo "%d, 900"; echo "77, 100" ;;
esac
"""


def sample(seconds, gpu_mb=None, cpu=50.0, ram=1000.0):
    return Sample(seconds, cpu, ram, 80.0, 200.0, gpu_mb, None if gpu_mb is None else gpu_mb / 2)


def recording(samples, seconds=1.0, **others):
    known = Recording(seconds, 0.8, 0, tuple(samples), 900.0, None)
    return replace(known, **others)


def test_areas_are_the_official_sums_over_a_nominal_tenth_of_a_second_and_true_integrals():
    samples = [sample(0.0, 1000.0), sample(0.2, 3000.0), sample(0.4, 5000.0)]
    row = efficiency.figures("case", recording(samples, seconds=0.5, baseline_gpu_mb=400.0))
    assert row["AUC_GPU_Time"] == round(0.1 * 9000)
    assert row["Integral_GPU_Time"] == pytest.approx(0.2 * 2000 + 0.2 * 4000 + 0.1 * 5000)
    assert row["Excess_AUC_GPU_2022"] == round(0.1 * ((3000 - 2048) + (5000 - 2048)))
    assert row["Excess_AUC_GPU_2023"] == round(0.1 * (5000 - 4096))
    assert (row["MaxGPU_Mem"], row["GPU_Mem_Over_Baseline"], row["Tree_GPU_Mem"]) == (5000, 4600, 2500)
    assert row["AUC_CPU_Time"] == pytest.approx(15.0)
    assert row["AUC_RAM_Time"] == 300


def test_the_areas_do_not_shrink_where_samples_are_further_apart():
    """``--interval 1`` for a long command."""

    class Busy:
        def read(self, pids):
            return GpuReading(5000.0, None)

    rows = [
        efficiency.figures("case", record(["sleep", "2"], gpu=Busy(), interval_s=interval)) for interval in (0.1, 0.5)
    ]
    for column in ("AUC_GPU_Time", "AUC_RAM_Time", "Excess_AUC_GPU_2022", "Excess_AUC_GPU_2023"):
        assert rows[1][column] == pytest.approx(rows[0][column], rel=0.5)


@pytest.mark.parametrize("seconds, counted", [(3.21, 15.0), (42.17, 42.17)])
def test_the_tolerance_of_2023_counts_short_runs_as_fifteen_seconds(seconds, counted):
    row = efficiency.figures("case", recording([sample(0.0)], seconds=seconds))
    assert (row["Time"], row["Time_2023"]) == (seconds, counted)


def test_the_stable_maximum_of_2022_ignores_values_of_few_samples():
    values = [1000.0] * 60 + [2000.0] * 38 + [9000.0] * 2
    assert efficiency.stable_maximum(values) == 2000.0
    assert efficiency.stable_maximum([*values, 9000.0]) == 9000.0
    assert efficiency.stable_maximum(list(np.arange(100.0))) == 99.0  # no value is stable: the plain maximum


def test_without_a_gpu_its_columns_are_empty_and_not_zero(tmp_path):
    path = tmp_path / "eff.csv"
    efficiency.add_row(path, efficiency.figures("case_1.nii.gz", recording([sample(0.0)])))
    with open(path, newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert {name for name, cell in row.items() if cell == ""} == {name for name in row if "GPU" in name}
    official = "Name,Time,GPU_Mem,AUC_GPU_Time,CPU_Utilization,AUC_CPU_Time,RAM,AUC_RAM_Time"
    assert path.read_text().startswith(official)


def test_a_table_grows_by_one_row_a_case_and_replaces_a_case_measured_again(tmp_path):
    path = tmp_path / "eff.csv"
    for name, seconds in [("a", 1.0), ("b", 2.0), ("a", 3.0)]:
        efficiency.add_row(path, efficiency.figures(name, recording([sample(0.0)], seconds=seconds)))
    with open(path, newline="") as stream:
        assert [(row["Name"], row["Time"]) for row in csv.DictReader(stream)] == [("b", "2.0"), ("a", "3.0")]


def test_a_file_that_is_no_efficiency_table_is_never_overwritten(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("my,notes\n")
    with pytest.raises(InputError, match=r"notes\.csv"):
        efficiency.add_row(path, efficiency.figures("a", recording([sample(0.0)])))
    assert path.read_text() == "my,notes\n"


def test_curves_are_written_as_json_and_picture(tmp_path):
    samples = [sample(0.1 * i, 1000.0 + i, cpu=50.0 + i) for i in range(10)]
    efficiency.write_curves(recording(samples), tmp_path / "eff_case", name="case", command=["true"])
    assert (tmp_path / "eff_case.png").read_bytes().startswith(b"\x89PNG")
    assert '"gpu_mb"' in (tmp_path / "eff_case.json").read_text()


HUNGRY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import time
block = bytearray(b"x") * (150 << 20)
end = time.process_time() + 0.6
while time.process_time() < end: pass
time.sleep(0.4)
'''])
child.wait()
"""


def test_the_children_of_a_command_count():
    found = record([sys.executable, "-c", HUNGRY], gpu=None, interval_s=0.05)
    assert found.exit_code == 0
    assert max(s.tree_ram_mb for s in found.samples) > 150
    assert found.cpu_seconds > 0.6
    steps = zip(found.samples, found.samples[1:], strict=False)
    sampled = sum(two.tree_cpu_percent / 100 * (two.seconds - one.seconds) for one, two in steps)
    assert 0.5 * found.cpu_seconds < sampled < 1.2 * found.cpu_seconds, "100 is one core, on a machine however busy"
    assert found.seconds > 1.0


def test_time_stamps_are_true_and_ascend():
    found = record(["sleep", "0.5"], gpu=None, interval_s=0.1)
    stamps = [s.seconds for s in found.samples]
    assert stamps[0] >= 0 and stamps == sorted(stamps) and stamps[-1] <= found.seconds
    assert found.seconds >= 0.5


def test_the_exit_code_of_the_command_is_kept():
    assert record([sys.executable, "-c", "raise SystemExit(3)"], gpu=None).exit_code == 3


def test_a_command_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="no-such-command-here"):
        record(["no-such-command-here"], gpu=None)


class FakeGpu:
    """A GPU whose device memory grows with every question."""

    def __init__(self):
        self.asked = 0

    def read(self, pids):
        self.asked += 1
        if self.asked % 5 == 0:
            raise TimeoutError("the driver is busy")
        return GpuReading(1000.0 + self.asked, 10.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_before_the_first_sample_ends_the_command_too(monkeypatch, number):
    """It ran on, and whoever waited for its output waited for its end."""
    started, begin = [], sampling._Sampler.start

    def interrupted(sampler):
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        begin(sampler)

    def popen(*words, **options):
        started.append(subprocess.Popen(*words, **options))
        return started[0]

    monkeypatch.setattr(sampling._Sampler, "start", interrupted)
    monkeypatch.setattr(sampling, "subprocess", SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired))
    with handling(signal.default_int_handler, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        record([sys.executable, "-c", "import time; time.sleep(60)"], gpu=None)
    assert started[0].poll() is not None
    assert not any(isinstance(thread, sampling._Sampler) for thread in threading.enumerate())


def test_a_gpu_is_sampled_beside_the_machine_and_survives_failed_questions():
    found = record(["sleep", "0.6"], gpu=FakeGpu(), interval_s=0.05)
    known = [s.gpu_mb for s in found.samples if s.gpu_mb is not None]
    assert found.baseline_gpu_mb == 1001.0
    assert len(known) >= 2 and max(known) > min(known)


def test_nvidia_smi_tells_device_and_process_memory(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(SMI % os.getpid())
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = open_gpu(0)
    assert gpu.read([os.getpid(), 12]) == GpuReading(3000.0, 1400.0)


def test_nvml_tells_device_and_process_memory(monkeypatch):
    class Nvml:
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
        nvmlDeviceGetMemoryInfo = staticmethod(lambda handle: type("M", (), {"total": 8 << 30, "free": 6 << 30}))
        nvmlDeviceGetComputeRunningProcesses = staticmethod(
            lambda handle: [
                type("P", (), {"pid": 5, "usedGpuMemory": 1 << 30}),
                type("P", (), {"pid": 6, "usedGpuMemory": None}),
            ]
        )

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    assert open_gpu(0).read([5]) == GpuReading(2048.0, 1024.0)
    assert open_gpu(0).read([5, 6]) == GpuReading(2048.0, None)  # the driver hides it: unknown, not zero


def test_no_driver_means_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert open_gpu(0) is None
