"""Predicting a folder overlaps what can be overlapped: reading, preparing, building networks, writing."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_flare.errors import DeviceError, InputError
from nnunet_flare.images import Volume, read_labels, write_volume
from nnunet_flare.inference.folder import PredictionReport, check_writable, predict_cases
from nnunet_flare.inference.inputs import InputCase

PATIENCE_S = 30


class Meeting:
    """A segmenter whose steps wait for one another: what must go on at the same time, and does not, times out."""

    channels = 1

    def __init__(self) -> None:
        self.preparing = threading.Event()
        self.loaded = threading.Event()
        self.prepared: list[str] = []
        self.first_is_with_network = threading.Event()

    def load(self) -> None:
        assert self.preparing.wait(PATIENCE_S), "the first case was not prepared while the network was built"
        self.loaded.set()

    def prepare(self, volumes, case="image"):
        self.preparing.set()
        assert self.loaded.wait(PATIENCE_S)
        if self.prepared:
            assert self.first_is_with_network.wait(PATIENCE_S)
        self.prepared.append(case)
        return SimpleNamespace(grid=volumes[0], oddities=(), name=case)

    def windows(self, scan) -> int:
        return 1

    def segment(self, scan, *, members=False, progress=None):
        self.first_is_with_network.set()
        return (scan.grid.array > 0).astype(np.uint8), []


def written(folder, names):
    cases = []
    for number, name in enumerate(names):
        path = folder / f"{name}_0000.nii.gz"
        array = np.zeros((3, 4, 5), np.int16)
        array[0, 0, : number + 1] = 40
        write_volume(path, Volume(array, (1.0, 1.0, 1.0)))
        cases.append(InputCase(name, (path,), ".nii.gz"))
    return cases


def test_the_first_case_is_prepared_while_the_network_is_built(tmp_path):
    cases = written(tmp_path / "in", ["a", "b", "c"])
    report = predict_cases(cases, tmp_path / "out", Meeting)
    assert list(report.written) == ["a", "b", "c"] and not report.failed
    for number, case in enumerate(cases):
        assert read_labels(tmp_path / "out" / f"{case.name}.nii.gz").array.sum() == number + 1


def test_a_network_that_cannot_be_built_stops_the_command(tmp_path):
    class Broken(Meeting):
        def load(self) -> None:
            self.loaded.set()
            raise InputError("checkpoint_final.pth: holds the weights of another network")

    with pytest.raises(InputError, match="another network"):
        predict_cases(written(tmp_path / "in", ["a", "b"]), tmp_path / "out", Broken)
    assert not list((tmp_path / "out").iterdir())


class BreaksTheGpu(Meeting):
    """Fails at the second scan, and at all after it where the GPU is then lost."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []

    def segment(self, scan, *, members=False, progress=None):
        self.begun.append(scan.name)
        if scan.name == "b":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors ...")
        return super().segment(scan)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_scan_that_makes_the_gpu_unusable_is_set_aside_and_no_other_one(tmp_path, monkeypatch, is_lost):
    """CUDA then fails in every later call of the process: the next scans would all be called bad."""

    def synchronize(number: int) -> None:
        if is_lost and segmenter.begun[-1] != "a":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors ...")

    torch = pytest.importorskip("torch")
    answers = {"is_initialized": True, "device_count": 1, "memory_reserved": 1 << 20}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    segmenter, report = BreaksTheGpu(), PredictionReport()
    cases = written(tmp_path / "in", ["a", "b", "c", "d"])
    if is_lost:
        with pytest.raises(
            DeviceError, match=r"b: set aside; the GPU cannot .* \(CUDA error: an illegal memory access"
        ):
            predict_cases(cases, tmp_path / "out", lambda: segmenter, report=report)
    else:
        predict_cases(cases, tmp_path / "out", lambda: segmenter, report=report)
    assert list(report.failed) == ["b"]
    assert list(report.written) == (["a"] if is_lost else ["a", "c", "d"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{one}.nii.gz" for one in report.written]


def test_no_scan_is_held_longer_than_until_the_next_one(tmp_path):
    """A scan on the network's grid may be all that a GPU has room for; the first one must not stay to the end."""

    class Scan(SimpleNamespace):
        """Can be looked after from afar."""

    class Lasting(Meeting):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[weakref.ref[Scan]] = []
            self.held: list[int] = []

        def load(self) -> None:
            pass

        def prepare(self, volumes, case="image"):
            scan = Scan(grid=volumes[0], oddities=(), name=case)
            self.made.append(weakref.ref(scan))
            return scan

        def segment(self, scan, *, members=False, progress=None):
            at = [one() for one in self.made].index(scan)
            self.held.append(sum(one() is not None for one in self.made[:at]))
            return super().segment(scan)

    segmenter = Lasting()
    predict_cases(written(tmp_path / "in", ["a", "b", "c", "d"]), tmp_path / "out", lambda: segmenter)
    assert segmenter.held == [0, 0, 0, 0]


def test_parts_that_start_together_do_not_tell_each_other_that_the_folder_cannot_be_written(tmp_path):
    def ask() -> None:
        for _ in range(400):
            check_writable(tmp_path / "out")

    with ThreadPoolExecutor(4) as pool:
        for part in [pool.submit(ask) for _ in range(4)]:
            part.result()
    assert list((tmp_path / "out").iterdir()) == []
