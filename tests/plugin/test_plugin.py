"""The seam in this process: which names are ours, what the wrapped lookup returns, and that it never gets in the way.

The mechanics are tested with a class of the standard library under our registry, the real names once each.
"""

from __future__ import annotations

import fractions
import importlib
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from nnunet_flare import plugin

STOCK_TRAINERS = "nnunetv2.training.nnUNetTrainer"


def stock_lookup(name: str, module: str) -> Any:
    """What ``nnUNetv2_train`` and ``nnUNetv2_plan_experiment`` do."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0], *module.split(".")[1:])
    return recursive_find_python_class(str(folder), name, module)


@pytest.fixture
def without_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """No finder of ours, and the wrapped module not imported yet; all put back afterwards."""
    utilities = importlib.import_module("nnunetv2.utilities")
    importlib.import_module(plugin.TARGET)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, plugin._Finder)])
    monkeypatch.delitem(sys.modules, plugin.TARGET)
    monkeypatch.delattr(utilities, "find_class_by_name")


@pytest.mark.parametrize("name", plugin.PLANNERS)
def test_stock_lookup_finds_our_planners(name: str) -> None:
    found = stock_lookup(name, "nnunetv2.experiment_planning")
    assert found is getattr(importlib.import_module(plugin.PLANNERS[name]), name)
    assert found.__name__ == name


@pytest.mark.parametrize("name", [*plugin.TRAINERS, *(f"{name}_7epochs" for name in plugin.TRAINERS)])
def test_stock_lookup_finds_our_trainers(name: str) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    found = recursive_find_trainer_class_by_name(name)
    assert found is getattr(importlib.import_module(found.__module__), name)
    assert found is recursive_find_trainer_class_by_name(name), "asked twice, the same class"
    assert found is pickle.loads(pickle.dumps(found))
    assert found.__name__ == name


def test_stock_names_are_found_as_before() -> None:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    assert stock_lookup("ExperimentPlanner", "nnunetv2.experiment_planning.experiment_planners") is ExperimentPlanner
    assert stock_lookup("NoSuchPlanner", "nnunetv2.experiment_planning.experiment_planners") is None


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerFlareST_0epochs",
        "nnUNetTrainerFlareST_007epochs",
        "nnUNetTrainerFlareST_epochs",
        "nnUNetTrainerFlareST_-5epochs",
        "nnUNetTrainerFlareST_²epochs",
        "nnUNetTrainerFlareST_5",
        "nnUNetTrainerFlareST_5epochs_6epochs",
        "nnUNetPlannerFlare_5epochs",
        "nnUNetTrainer",
        "nnUNetTrainer_5epochs",
        "epochs",
        "",
    ],
)
def test_names_that_are_not_ours(name: str) -> None:
    assert plugin.module_of(name) is None
    assert plugin.resolve(name) is None


@pytest.mark.parametrize("epochs", ["1", "100", "12345"])
def test_any_length_is_a_name_of_its_trainer(epochs: str) -> None:
    name = f"nnUNetTrainerFlareST_{epochs}epochs"
    assert plugin.module_of(name) == "nnunet_flare.trainers.self_training"


def test_lookups_outside_nnunet_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's folder in nnUNet_extTrainer is searched by stock nnU-Net even for a name of ours."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    monkeypatch.setitem(plugin.REGISTRY, "Fraction", "fractions")
    (tmp_path / "mine.py").write_text("class Fraction:\n    mine = True\n")
    found = recursive_find_python_class(
        str(tmp_path), "Fraction", None, base_folder=str(tmp_path), cleanup_imports_from_base_folder=True
    )
    assert found.mine
    assert stock_lookup("Fraction", STOCK_TRAINERS) is fractions.Fraction


def test_other_names_reach_stock_with_all_their_arguments() -> None:
    seen = []

    def stock(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs))
        return "stock's answer"

    answer = plugin._wrap(stock)("folder", "nnUNetTrainer", STOCK_TRAINERS, "base", True, cleanup=1)
    assert answer == "stock's answer"
    assert seen == [(("folder", "nnUNetTrainer", STOCK_TRAINERS, "base", True), {"cleanup": 1})]


def test_the_fallback_module_has_our_names_and_no_others() -> None:
    module = importlib.import_module("nnunet_flare.ext.flare_trainers")
    trainers = importlib.import_module("nnunet_flare.trainers.self_training")
    assert module.nnUNetTrainerFlareST is trainers.nnUNetTrainerFlareST
    assert not hasattr(module, "nnUNetTrainerUnknown")


def test_every_registered_name_starts_as_nnunets_own_and_says_flare() -> None:
    assert all(name.startswith("nnUNetTrainerFlare") for name in plugin.TRAINERS)
    assert all(name.startswith("nnUNetPlannerFlare") for name in plugin.PLANNERS)
    assert set(plugin.REGISTRY) == {*plugin.TRAINERS, *plugin.PLANNERS, *plugin.PREPROCESSING}


def test_what_a_trainer_learns_from_is_known_by_its_name_with_any_length() -> None:
    for name in ("nnUNetTrainerFlareAdversarial", "nnUNetTrainerFlareAdversarial_30epochs"):
        assert plugin.learns_from(name) == plugin.UNLABELLED
    assert plugin.learns_from("nnUNetTrainerFlarePartial_5epochs") == plugin.ANNOTATED_ORGANS
    assert plugin.learns_from("nnUNetTrainerFlareDistill") == plugin.TEACHER
    assert plugin.learns_from("nnUNetTrainer") is None and plugin.learns_from("nnUNetTrainerFlareST_epochs") is None


def test_a_module_imported_after_install_is_wrapped(without_plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugin.REGISTRY, "Fraction", "fractions")
    plugin.install()
    assert plugin.is_installed()
    assert stock_lookup("Fraction", STOCK_TRAINERS) is fractions.Fraction


def test_modules_imported_before_install_are_rebound(without_plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugin.REGISTRY, "Fraction", "fractions")
    user = types.ModuleType("nnunetv2.some_user_of_it")
    from nnunetv2.utilities import find_class_by_name

    user.recursive_find_python_class = find_class_by_name.recursive_find_python_class  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, user.__name__, user)
    stock = user.recursive_find_python_class
    plugin.install()
    assert user.recursive_find_python_class("", "Fraction", STOCK_TRAINERS) is fractions.Fraction
    assert find_class_by_name.recursive_find_python_class is user.recursive_find_python_class
    assert getattr(user.recursive_find_python_class, plugin.MARK) is stock


def test_installing_twice_wraps_once(without_plugin: None) -> None:
    plugin.install()
    plugin.install()
    assert sum(isinstance(finder, plugin._Finder) for finder in sys.meta_path) == 1
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    stock = getattr(recursive_find_python_class, plugin.MARK)
    assert not hasattr(stock, plugin.MARK)
    assert plugin._wrap(recursive_find_python_class) is recursive_find_python_class


@pytest.mark.parametrize("value", ["0", "false", "off", "No", " 0 "])
def test_the_off_switch(without_plugin: None, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NNUNET_FLARE_PLUGIN", value)
    monkeypatch.setitem(plugin.REGISTRY, "Fraction", "fractions")
    plugin.install()
    assert not plugin.is_installed()
    assert stock_lookup("Fraction", "nnunetv2.utilities") is None


@pytest.mark.parametrize("value", ["1", "", "yes"])
def test_other_values_leave_it_on(without_plugin: None, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NNUNET_FLARE_PLUGIN", value)
    plugin.install()
    assert plugin.is_installed()


def test_the_finder_reacts_to_one_module_only() -> None:
    finder = plugin._Finder()
    for name in ("nnunetv2", "nnunetv2.utilities", "nnunetv2.utilities.find_objects", "json", "no_such_module"):
        assert finder.find_spec(name) is None


def test_the_module_keeps_its_own_loader_and_source(without_plugin: None) -> None:
    """Tracebacks, ``inspect`` and coverage read the source through the loader."""
    plugin.install()
    module = importlib.import_module(plugin.TARGET)
    assert module.__spec__ is not None
    assert module.__spec__.origin == module.__file__
    assert "recursive_find_python_class" in module.__spec__.loader.get_source(plugin.TARGET)  # type: ignore[union-attr]


def test_missing_nnunet_is_the_usual_import_error(without_plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.install()
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if isinstance(f, plugin._Finder)])
    with pytest.raises(ModuleNotFoundError, match=plugin.TARGET):
        importlib.import_module(plugin.TARGET)


def test_an_nnunet_without_that_function_is_left_alone(
    without_plugin: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "find_class_by_name.py").write_text("VALUE = 1\n")
    import nnunetv2.utilities

    monkeypatch.setattr(nnunetv2.utilities, "__path__", [str(tmp_path)])
    plugin.install()
    module = importlib.import_module(plugin.TARGET)
    assert module.VALUE == 1
    assert not hasattr(module, plugin.FUNCTION)


def test_a_failing_install_is_one_line_and_no_exception(
    without_plugin: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> bool:
        raise RuntimeError("odd environment")

    monkeypatch.setattr(plugin, "is_enabled", broken)
    plugin.install()
    assert capsys.readouterr().err == "nnunet-flare: the nnU-Net plugin is off (RuntimeError: odd environment)\n"


def test_a_broken_module_of_ours_is_told_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugin.REGISTRY, "Gone", "nnunet_flare.no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        stock_lookup("Gone", STOCK_TRAINERS)
