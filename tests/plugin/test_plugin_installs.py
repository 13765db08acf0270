"""The plugin in real environments: regular and editable installs, spawned workers, switches, and after uninstalling."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fresh_environment import NO_ISOLATION, REPOSITORY, SITE, Environment, build_wheel

import nnunet_flare

IS_ACTIVE = "import sys; print([type(f).__module__ for f in sys.meta_path].count('nnunet_flare.plugin'))"

STAND_IN = """
import fractions, nnunet_flare.plugin
nnunet_flare.plugin.REGISTRY["Fraction"] = "fractions"
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
assert find("", "Fraction", "nnunetv2.training") is fractions.Fraction
"""
"""A cheap lookup: a class of the standard library under our registry."""

REAL_NAMES_IN_MAIN_AND_WORKER = """
import multiprocessing, pickle
NAMES = ["nnUNetTrainerFlareST", "nnUNetTrainerFlareST_7epochs"]

def look_up(names):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    return [recursive_find_trainer_class_by_name(name) for name in names]

def same_in_worker(pickled):
    return [a is b for a, b in zip(pickle.loads(pickled), look_up(NAMES), strict=True)]

if __name__ == "__main__":
    found = look_up(NAMES)
    import nnunet_flare.trainers.self_training as ours
    assert found == [getattr(ours, name) for name in NAMES]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(same_in_worker, [pickle.dumps(found)]) == [True, True]
    print("same")
"""

PLANNER = """
import tempfile
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
print(find(tempfile.mkdtemp(), "nnUNetPlannerFlare", "nnunetv2.experiment_planning"))
"""
"""Stock's search in an empty folder: what is found there comes from the plugin."""

WITHOUT_STOCK_TRAINERS = """
import os, pkgutil
everything = pkgutil.iter_modules
stock = os.path.join("nnunetv2", "training", "nnUNetTrainer")
pkgutil.iter_modules = lambda paths=None, prefix="": (
    iter(()) if paths and paths[0].endswith(stock) else everything(paths, prefix)
)
"""
"""Stock's search imports all of its trainers, which takes long and changes nothing here."""

STOCK_TRAINER_LOOKUP = f"""
{WITHOUT_STOCK_TRAINERS}
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
print(recursive_find_trainer_class_by_name("nnUNetTrainerFlareST_7epochs"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with nnU-Net and without this package."""
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def regular(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("regular"))
    environment.pip("install", "--ignore-installed", "--no-deps", "--no-index", str(wheel))
    return environment


@pytest.fixture
def uninstalled(bare: Environment, wheel: Path) -> Iterator[Environment]:
    """An environment in which this package was and is no more."""
    bare.pip("install", "--ignore-installed", "--no-deps", "--no-index", str(wheel))
    assert bare.call(IS_ACTIVE).stdout == "1\n"
    bare.pip("uninstall", "-y", "nnunet-flare")
    yield bare


def test_the_wheel_holds_the_start_up_files_and_nothing_of_nnunet(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        start_up = {name: archive.read(name).decode() for name in names if name.endswith((".pth", ".start"))}
    assert set(start_up) == {"nnunet_flare_plugin.pth", "nnunet_flare_plugin.start"}
    assert start_up["nnunet_flare_plugin.pth"].splitlines() == [
        "import nnunet_flare.plugin; nnunet_flare.plugin.install()"
    ]
    assert start_up["nnunet_flare_plugin.start"].strip() == "nnunet_flare.plugin:install"
    assert {name.split("/")[0] for name in names if "/" in name} == {
        "nnunet_flare", f"nnunet_flare-{nnunet_flare.__version__}.dist-info"
    }  # fmt: skip
    assert "nnunet_flare/ext/flare_trainers.py" in names
    assert "nnunet_flare/py.typed" in names
    assert any(name.startswith("nnunet_flare/recipes/") and name.endswith(".yaml") for name in names)


def test_regular_install_is_found_in_the_main_process_and_in_spawned_workers(
    regular: Environment, tmp_path: Path
) -> None:
    script = tmp_path / "look_up.py"
    script.write_text(REAL_NAMES_IN_MAIN_AND_WORKER)
    done = regular.run(str(script), OMP_NUM_THREADS="1")
    assert done.stdout.splitlines()[-1:] == ["same"], done.stderr


def test_editable_install_is_found_and_stays_live(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.pip("install", "--ignore-installed", "--no-deps", *NO_ISOLATION, "-e", str(REPOSITORY))
    environment.call(STAND_IN)
    where = environment.call("import nnunet_flare; print(nnunet_flare.__file__)").stdout.strip()
    assert Path(where) == REPOSITORY / "nnunet_flare" / "__init__.py"
    assert environment.call(IS_ACTIVE).stdout == "1\n"


def test_python_with_other_flags_has_the_plugin_too(regular: Environment) -> None:
    for flag in ("-I", "-E", "-s", "-O"):
        assert regular.call(IS_ACTIVE, flag).stdout == "1\n", flag


def test_start_up_imports_nothing_heavy(regular: Environment, bare: Environment) -> None:
    """Every Python of the environment pays for the start-up file, so it loads the seam and what the seam names."""
    listing = "import sys; print(*sys.modules, sep='\\n')"
    more = set(regular.call(listing).stdout.split()) - set(bare.call(listing).stdout.split())
    assert {name for name in more if name.startswith("nnunet_flare")} == {"nnunet_flare", "nnunet_flare.plugin"}
    packages = {name.partition(".")[0] for name in more}
    assert packages <= {"nnunet_flare", "__future__", "importlib", "warnings"}


def test_off_switch_in_a_new_process(regular: Environment) -> None:
    assert regular.call(IS_ACTIVE, NNUNET_FLARE_PLUGIN="0").stdout == "0\n"
    assert regular.call(PLANNER, NNUNET_FLARE_PLUGIN="0").stdout == "None\n"


def test_broken_nnunet_never_stops_python(regular: Environment, tmp_path: Path) -> None:
    broken = tmp_path / "nnunetv2" / "utilities"
    broken.mkdir(parents=True)
    for name in (broken.parent / "__init__.py", broken / "__init__.py"):
        name.write_text("")
    (broken / "find_class_by_name.py").write_text("def oops(:\n")
    done = regular.call("print('alive')", PYTHONPATH=str(tmp_path))
    assert (done.stdout, done.stderr) == ("alive\n", "")
    done = regular.run("-c", "import nnunetv2.utilities.find_class_by_name", PYTHONPATH=str(tmp_path))
    assert "SyntaxError" in done.stderr


def test_fallback_without_start_up_files(regular: Environment) -> None:
    """``python -S`` runs no start-up file; nnU-Net's own variable finds the trainers, and workers can unpickle them."""
    extension = regular.site / "nnunet_flare" / "ext"
    code = f"""
import pickle, sys
{WITHOUT_STOCK_TRAINERS}
sys.path += {[str(regular.site), *map(str, SITE)]!r}
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
assert not [f for f in sys.meta_path if type(f).__module__ == "nnunet_flare.plugin"]
from nnunet_flare.diagnosis import check_plugin
assert "not active: this Python runs without start-up files" in check_plugin()[0].text, check_plugin()
found = find("nnUNetTrainerFlareST_7epochs")
import nnunet_flare.trainers.self_training as ours
assert found is ours.nnUNetTrainerFlareST_7epochs
assert pickle.loads(pickle.dumps(found)) is found
try:
    find("nnUNetTrainerUnknown")
except RuntimeError as error:
    assert "Could not find requested nnunet trainer nnUNetTrainerUnknown" in str(error)
    print("fallback works")
"""
    done = regular.call(code, "-S", nnUNet_extTrainer=str(extension), OMP_NUM_THREADS="1")
    assert done.stdout.endswith("fallback works\n")


def test_doctor_explains_a_target_install(bare: Environment, wheel: Path, tmp_path: Path) -> None:
    """Python runs no start-up files of a folder on PYTHONPATH; the doctor says so and how to go on."""
    bare.pip("install", "--target", str(tmp_path), "--no-deps", "--no-index", str(wheel))
    code = "from nnunet_flare.diagnosis import check_plugin as check; [print(f.level, f.text) for f in check()]"
    lines = bare.call(code, PYTHONPATH=str(tmp_path)).stdout.splitlines()
    assert lines[0].startswith(f"problem the plugin is not active: {tmp_path} is not a site folder of this Python")
    assert lines[1].endswith(f"export nnUNet_extTrainer={tmp_path / 'nnunet_flare' / 'ext'}")
    assert (tmp_path / "nnunet_flare" / "ext" / "flare_trainers.py").is_file()


def test_uninstalling_leaves_nnunet_as_it_was(uninstalled: Environment) -> None:
    assert not [p.name for p in uninstalled.site.iterdir() if "flare" in p.name]
    silent = uninstalled.call("print('hello')")
    assert (silent.stdout, silent.stderr) == ("hello\n", "")
    assert uninstalled.call(IS_ACTIVE).stdout == "0\n"
    assert uninstalled.call(PLANNER).stdout == "None\n"
    done = uninstalled.run("-c", STOCK_TRAINER_LOOKUP, OMP_NUM_THREADS="1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: Could not find requested nnunet trainer nnUNetTrainerFlareST_7epochs")
    assert "nnunet_flare" not in done.stderr
