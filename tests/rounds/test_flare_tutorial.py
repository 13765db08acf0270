"""The README and the pages on FLARE's downloads, typed line by line on downloads of a few tiny scans."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_loop import TINY
from typed_pages import DOCS, blocks, type_line

from nnunet_flare.cases import read_table
from nnunet_flare.images import Volume, read_labels, read_volume, write_labels, write_volume
from nnunet_flare.phantom import make_phantom
from nnunet_flare.rounds.run.manifest import FOLDERS

SIZE, SPACING_MM = (20, 32, 32), (14.0, 13.0, 13.0)
SHORT = [*TINY, "rounds=1", "selection.threshold=0", "selection.rule=mean-organ", "plan.spacing_mm=[14, 13, 13]"]
"""The recipe's own settings take days."""


def write_case(folder: Path, case: str, seed: int, labels_folder: Path | None, *, turned: bool = False) -> None:
    scan, labels = make_phantom(seed, domain="wide", size=SIZE, spacing_mm=SPACING_MM)
    if turned:  # stored from left to right, as some scanners do
        scan = Volume(scan.array[:, :, ::-1].copy(), scan.spacing_mm, scan.origin, (-1, 0, 0, 0, 1, 0, 0, 0, 1))
        labels = labels[:, :, ::-1]
    write_volume(folder / f"{case}_0000.nii.gz", scan)
    if labels_folder is not None:
        write_labels(labels_folder / f"{case}.nii.gz", labels, scan)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """An empty folder to type in, no variable set."""
    for name in (*FOLDERS, "UNLABELLED", "RUN", "DATASET", "MODELS", "MODEL"):
        monkeypatch.setenv(name, "")  # set by the page; this puts them back
    for name, value in {"PWD": str(tmp_path), "nnUNet_n_proc_DA": "0", "NNUNET_FLARE_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def flare22(desk, monkeypatch) -> Path:
    """An unpacked download and a checkout's ``docker`` folder on the desk."""
    training = desk / "FLARE22" / "Training"
    labelled = training / "FLARE22_LabeledCase50"
    for number in range(1, 6):
        write_case(labelled / "images", f"FLARE22_Tr_{number:04d}", number, labelled / "labels", turned=number == 2)
    for number, part in ((1, "1-1000"), (1001, "1001-2000")):
        write_case(training / f"FLARE_UnlabeledCase{part}", f"Case_{number:05d}", number, None, turned=number == 1)
    validation = desk / "FLARE22" / "Validation"
    write_case(validation, "FLARETs_0001", 9, validation / "labels")
    shutil.copytree(DOCS.parent / "docker", desk / "docker")
    programs = desk / "programs"
    programs.mkdir()
    shutil.copy(Path(__file__).with_name("fake_docker.py"), programs / "docker")
    (programs / "docker").chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    return desk


@pytest.mark.timeout(1200)
def test_the_readme_and_then_the_tutorial_lead_to_a_container_on_a_machine_without_a_gpu(flare22, monkeypatch, capsys):
    """The tutorial's first commands are the README's; those are typed once."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    desk = flare22
    typed = type_readme(capsys)
    assert (desk / "results" / "Dataset022_FLARE22" / "flare_uncertainty" / "report" / "index.html").is_file()
    again = []
    for line in "".join(blocks("tutorial-flare.md")).splitlines():
        line = line.replace("_uncertainty_r4", "_uncertainty_r1")
        if line.startswith("MODEL="):  # smaller plans have another name
            (model,) = desk.glob("results/Dataset022_FLARE22/nnUNetTrainerFlareST__*__3d_fullres_uncertainty_r1")
            assert line.endswith("/nnUNetTrainerFlareST__nnUNetPlansFlare__3d_fullres_uncertainty_r1")
            line = f"MODEL={model}"
        if relative(line, desk) in typed:
            again.append(line)
        else:
            type_line(line, small)
    assert len(again) == 4, "prepare, preprocess, the estimate and the run are the README's"
    rows = list(csv.DictReader((desk / "scores.csv").open()))
    assert [row["Name"] for row in rows] == ["FLARETs_0001.nii.gz"]
    assert (desk / "efficiency.csv").is_file() and (desk / "myteam.tar.gz").stat().st_size > 0
    assert (desk / os.environ["RUN"] / "report" / "niivue").is_dir()
    scan = read_volume(desk / "raw" / "Dataset022_FLARE22" / "imagesVal" / "FLARETs_0001_0000.nii.gz")
    by_container, by_hand = (read_labels(desk / folder / "FLARETs_0001.nii.gz") for folder in ("outputs", "cleaned"))
    assert by_container.array.shape == scan.array.shape
    # The exported weights are half; a network after so few steps is undecided in more voxels than a trained one.
    assert (by_container.array != by_hand.array).mean() < 0.05


def type_readme(capsys) -> set[str]:
    """Type the README's installation and quick start; the lines of the quick start."""
    install, quick_start = blocks("../README.md")
    if (DOCS.parent / ".git").exists():
        lines = install.replace("git clone ADDRESS", f"git clone -q --depth 1 file://{DOCS.parent}")
        # The rest of the installation is tests/plugin/test_release.py; what this finds is a checkout pip cannot build.
        lines = lines.replace("pip install .", "test -f pyproject.toml && test -f nnunet_flare/__init__.py")
        subprocess.run(["sh", "-ec", lines], check=True)
    *first, preprocess, dry_run, run = quick_start.splitlines()
    assert dry_run == f"{run} --dry-run"
    for line in first:
        type_line(line, small)
    (recommended,) = re.findall(r"^next: (.+)$", capsys.readouterr().out, re.M)
    for line in (recommended, dry_run):
        type_line(line, lambda words: words)
        said = capsys.readouterr().out
        assert "This is an estimate" in said and "next: flare-pseudolabel preprocess -d Dataset022_FLARE22 -u " in said
    type_line(preprocess, small)
    type_line(dry_run, lambda words: [*words, "--set", *SHORT])
    assert "next: flare-pseudolabel preprocess" not in capsys.readouterr().out, "it was preprocessed by then"
    type_line(run, small)
    assert "final model: " in capsys.readouterr().out
    return set(quick_start.splitlines())


def relative(line: str, desk: Path) -> str:
    """A line with its variables' values, relative to the folder that it is typed in."""
    return os.path.expandvars(line).replace(f"{desk}/", "")


def small(words: list[str]) -> list[str]:
    if words[0] == "preprocess":
        return [*words, "--set", *SHORT]
    return [*words, "-device", "cpu", "--set", *SHORT] if words[0] == "run" else words


def test_the_commands_of_the_page_on_partial_labels_work(desk, monkeypatch, capsys):
    for number, ids in ((7, (1, 2, 3, 4, 13)), (31, (14,))):
        case = f"FLARE23_{number:04d}"
        scan, labels = make_phantom(number, domain="wide", size=SIZE, spacing_mm=SPACING_MM, lesions=True)
        write_volume(desk / "FLARE23" / "imagesTr2200" / f"{case}_0000.nii.gz", scan)
        drawn = np.where(np.isin(labels, ids), labels, 0).astype(np.uint8)
        drawn[0, 0, 0] = ids[0]  # whatever this patient has
        write_labels(desk / "FLARE23" / "labelsTr2200" / f"{case}.nii.gz", drawn, scan)
    for name in FOLDERS:
        (desk / name).mkdir()
        monkeypatch.setenv(name, str(desk / name))
    for line in "".join(blocks("howto-partial.md")).splitlines():
        type_line(line, small)
    page = (DOCS / "howto-partial.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^```text\n(case,annotated\n.*?)^```", page, re.M | re.S)
    (desk / "annotated.csv").write_text(table)
    (line,) = (line for line in page.splitlines() if line.endswith("--annotated annotated.csv"))
    type_line(line, small)
    cases = read_table(desk / "nnUNet_raw" / "Dataset023_FLARE23" / "flare_cases.json").cases
    assert cases["FLARE23_0007"].annotated == (1, 2, 3, 4, 9, 13) and cases["FLARE23_0031"].annotated == (14,)
    assert "  gallbladder                1\n" in capsys.readouterr().out
