"""The challenge's efficiency figures of a recorded command or container: official sums, true integrals, tolerances.

The official scripts (FLARE22/23 ``Efficiency.py``, ``load_json.py``) multiply the sum of samples by a nominal 0.1 s,
though their true period is longer; both that sum and the integral over the true time stamps are given. Where another
period was asked for, that is the nominal one. Memory is in MiB. From FLARE24 on the table has the maxima alone, as
``MaxGPU_Mem``, ``MaxCPU_Utilization`` and ``MaxRAM``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_flare.documents import load_rows
from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.plots import curves, draw
from nnunet_flare.evaluation.sampling import Recording, Sample
from nnunet_flare.files import read_json, write_csv, write_json

STABLE_SHARE = 0.02
"""FLARE22's maximum GPU memory is the largest value that more than this share of the samples has."""

TOLERANCE_MB = {"2022": 2048, "2023": 4096}
"""GPU memory that the challenges did not count."""

TOLERANCE_2023_S = 15.0
"""Running time that FLARE23 did not tell apart."""

OFFICIAL_COLUMNS: tuple[str, ...] = (
    "Name",
    "Time",
    "GPU_Mem",
    "AUC_GPU_Time",
    "CPU_Utilization",
    "AUC_CPU_Time",
    "RAM",
    "AUC_RAM_Time",
)

EXTRA_COLUMNS: tuple[str, ...] = (
    "MaxGPU_Mem",
    "GPU_Mem_Over_Baseline",
    "Integral_GPU_Time",
    "Integral_CPU_Time",
    "Integral_RAM_Time",
    "Excess_AUC_GPU_2022",
    "Excess_AUC_GPU_2023",
    "Time_2023",
    "Tree_GPU_Mem",
    "Integral_Tree_GPU_Time",
    "Tree_CPU_Seconds",
    "Tree_RAM",
    "Integral_Tree_RAM_Time",
    "MaxCPU_Utilization",
    "MaxRAM",
    "Samples",
    "Exit_Code",
)


def figures(name: str, recording: Recording) -> dict[str, str | float | None]:
    """One row of the efficiency table by column; None (an empty cell) where there was no GPU to ask or tree to see.

    A sample without GPU value, from a driver that did not answer in time, is left out of the GPU's figures.
    """
    samples = recording.samples
    gpu = [s.gpu_mb for s in samples if s.gpu_mb is not None]
    cpu, ram = [s.cpu_percent for s in samples], [s.ram_mb for s in samples]
    tree_ram = [s.tree_ram_mb for s in samples if s.tree_ram_mb is not None]
    tree_gpu = [s.tree_gpu_mb for s in samples if s.tree_gpu_mb is not None]
    baseline = recording.baseline_gpu_mb
    return {
        "Name": name,
        "Time": _round(recording.seconds, 2),
        "GPU_Mem": _round(stable_maximum(gpu), 0) if gpu else None,
        "AUC_GPU_Time": _round(official_sum(gpu, recording.interval_s), 0) if gpu else None,
        "CPU_Utilization": _round(max(cpu), 2),
        "AUC_CPU_Time": _round(official_sum(cpu, recording.interval_s), 2),
        "RAM": _round(max(ram), 2),
        "AUC_RAM_Time": _round(official_sum(ram, recording.interval_s), 0),
        "MaxGPU_Mem": _round(max(gpu), 0) if gpu else None,
        "GPU_Mem_Over_Baseline": _round(max(gpu) - baseline, 0) if gpu and baseline is not None else None,
        "Integral_GPU_Time": _integral(recording, "gpu_mb"),
        "Integral_CPU_Time": _integral(recording, "cpu_percent"),
        "Integral_RAM_Time": _integral(recording, "ram_mb"),
        **{
            f"Excess_AUC_GPU_{year}": _round(official_sum([max(0.0, m - limit) for m in gpu], recording.interval_s), 0)
            if gpu
            else None
            for year, limit in TOLERANCE_MB.items()
        },
        "Time_2023": _round(max(recording.seconds, TOLERANCE_2023_S), 2),
        "Tree_GPU_Mem": _round(max(tree_gpu), 0) if tree_gpu else None,
        "Integral_Tree_GPU_Time": _integral(recording, "tree_gpu_mb"),
        "Tree_CPU_Seconds": None if recording.cpu_seconds is None else _round(recording.cpu_seconds, 2),
        "Tree_RAM": _round(max(tree_ram), 2) if tree_ram else None,
        "Integral_Tree_RAM_Time": _integral(recording, "tree_ram_mb"),
        "Samples": len(samples),
        "Exit_Code": recording.exit_code,
        "MaxCPU_Utilization": _round(max(cpu), 2),
        "MaxRAM": _round(max(ram), 2),
    }


def official_sum(values: Sequence[float], interval_s: float) -> float:
    """The official area under a curve: the sum of the samples times the nominal time between them."""
    return interval_s * float(np.sum(values))


def stable_maximum(values: Sequence[float]) -> float:
    """The largest value that more than 2 % of the samples have; of short recordings without one, the maximum."""
    counts = Counter(values)
    stable = [value for value, count in counts.items() if count > STABLE_SHARE * len(values)]
    return max(stable or counts)


def _integral(recording: Recording, quantity: str) -> float | None:
    points = [(s.seconds, getattr(s, quantity)) for s in recording.samples if getattr(s, quantity) is not None]
    if not points:
        return None
    seconds, values = (np.array(column) for column in zip(*points, strict=True))
    return _round(true_integral(seconds, values, recording.seconds), 2)


def true_integral(seconds: np.ndarray, values: np.ndarray, end_s: float) -> float:
    """Trapezoid integral over true time stamps; the first value holds from 0 on, the last one until ``end_s``."""
    times = np.concatenate([[0.0], seconds, [max(end_s, seconds[-1])]])
    held = np.concatenate([values[:1], values, values[-1:]])
    return float(np.sum(np.diff(times) * (held[1:] + held[:-1]) / 2))


def _round(value: float, decimals: int) -> float:
    return float(np.round(value, decimals))


def check_table(path: Path) -> list[list[str]]:
    """The rows of an efficiency table; none where the file does not exist yet.

    Raises:
        InputError: when the file exists and is no table of these columns.
    """
    if not path.exists():
        return []
    try:
        lines = [cells for _, cells in load_rows(path)]
    except InputError as error:
        raise InputError(f"{error}; choose another name") from error
    if not lines or lines[0] != [*OFFICIAL_COLUMNS, *EXTRA_COLUMNS]:
        raise InputError(f"{path}: exists and is not a table of efficiency figures; choose another name")
    return lines[1:]


def add_row(path: Path, row: dict[str, str | float | None]) -> None:
    """Add a row to a table by rename; a row of the same name is replaced, the others are kept."""
    columns = (*OFFICIAL_COLUMNS, *EXTRA_COLUMNS)
    others = [line for line in check_table(path) if line[0] != row["Name"]]
    write_csv(path, [columns, *others, [row[column] for column in columns]])


def check_curves(stem: Path, name: str) -> None:
    """Refuse to write the samples of a row over those of another one, as of another table whose names join likewise.

    Raises:
        InputError: naming the file and whose samples it holds.
    """
    path = stem.with_name(stem.name + ".json")
    if not path.exists():
        return
    found = read_json(path, {"name": str}, remedy="remove it, or choose another name").get("name")
    if found != name:
        raise InputError(f"{path}: holds the samples of {found!r}, not of {name!r}; choose another name or another -o")


def write_curves(recording: Recording, stem: Path, *, name: str, command: Sequence[str]) -> None:
    """Write the samples to ``<stem>.json`` and their curves to ``<stem>.png``, both by rename."""
    samples = recording.samples
    series = {key: [getattr(s, key) for s in samples] for key in Sample.__dataclass_fields__}
    document = {**recording.__dict__, "name": name, "command": list(command), "samples": series}
    write_json(stem.with_name(stem.name + ".json"), document)
    panels = {
        "CPU [%]": {"machine (100 = all cores)": series["cpu_percent"]},
        "process tree CPU [%]": {"100 = one core": series["tree_cpu_percent"]},
        "RAM [MiB]": {"machine": series["ram_mb"], "process tree": series["tree_ram_mb"]},
        "GPU memory [MiB]": {"device": series["gpu_mb"], "process tree": series["tree_gpu_mb"]},
    }
    panels = {
        unit: lines
        for unit, lines in panels.items()
        if any(value is not None for values in lines.values() for value in values)
    }
    picture = stem.with_name(stem.name + ".png")
    draw(lambda: curves(series["seconds"], panels, f"{name}: {recording.seconds:.1f} s", picture), picture)
