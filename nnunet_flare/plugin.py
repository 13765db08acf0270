"""The one seam between stock nnU-Net and this package.

Stock nnU-Net looks up trainers, planners, preprocessors and normalisation schemes by walking its own folders with
``nnunetv2.utilities.find_class_by_name.recursive_find_python_class``. The start-up files of our wheel call
:func:`install`, which adds one finder to ``sys.meta_path``. It reacts to exactly that module, lets the other finders
load it, and wraps that function, so that the names of :data:`REGISTRY` resolve to our classes while every other name
goes to the stock search untouched. Spawned workers start Python anew and therefore have it too.

It also gives Python 3.10 the variable ``PYTHONSAFEPATH`` of later versions, which our commands set for their children.

This module runs at every start of Python: standard library only, a few milliseconds, and it never raises.
"""

from __future__ import annotations

import importlib
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TARGET = "nnunetv2.utilities.find_class_by_name"
FUNCTION = "recursive_find_python_class"
SWITCH = "NNUNET_FLARE_PLUGIN"
MARK = "_nnunet_flare_stock"

LABELS, ANNOTATED_ORGANS, TEACHER, UNLABELLED = "labels", "annotated organs", "a teacher's scores", "unlabelled scans"
TRAINERS = {
    "nnUNetTrainerFlareST": ("nnunet_flare.trainers.self_training", LABELS),
    "nnUNetTrainerFlarePartial": ("nnunet_flare.trainers.partial_labels", ANNOTATED_ORGANS),
    "nnUNetTrainerFlareDistill": ("nnunet_flare.trainers.distillation", TEACHER),
    "nnUNetTrainerFlareAdversarial": ("nnunet_flare.trainers.adversarial", UNLABELLED),
    "nnUNetTrainerFlareMeanTeacher": ("nnunet_flare.trainers.mean_teacher", UNLABELLED),
    "nnUNetTrainerFlareSelective": ("nnunet_flare.trainers.selective", LABELS),
}
"""Our trainers: the module of each, and what it learns from, which says what a recipe may ask of it."""
PLANNERS = {
    "nnUNetPlannerFlare": "nnunet_flare.planners.flare",
    "nnUNetPlannerFlareSmall": "nnunet_flare.planners.flare",
    "nnUNetPlannerFlareNoisyStudent": "nnunet_flare.planners.flare",
    "nnUNetPlannerFlareBig": "nnunet_flare.planners.flare",
    "nnUNetPlannerFlareTiny": "nnunet_flare.planners.flare",
    "nnUNetPlannerFlareModality": "nnunet_flare.planners.modality",
    "nnUNetPlannerFlareCoarse": "nnunet_flare.planners.whole_volume",
    "nnUNetPlannerFlareFine": "nnunet_flare.planners.whole_volume",
}
PREPROCESSING = {
    "FlareFixedSizePreprocessor": "nnunet_flare.planners.fixed_size",
    "FlareWholeVolumePreprocessor": "nnunet_flare.planners.fixed_size",
    "FlareClip500Normalization": "nnunet_flare.planners.fixed_size",
    "FlareClip325Normalization": "nnunet_flare.planners.fixed_size",
    "FlareModalityNormalization": "nnunet_flare.planners.modality",
}
REGISTRY = {**{name: module for name, (module, _) in TRAINERS.items()}, **PLANNERS, **PREPROCESSING}


def module_of(class_name: str) -> str | None:
    """The module that defines ``class_name``, or None. ``<trainer>_<N>epochs`` belongs to its trainer's module."""
    return REGISTRY.get(without_epochs(class_name))


def learns_from(trainer: str) -> str | None:
    """What one of our trainers learns from, also as ``<trainer>_<N>epochs``; None for a trainer that is not ours."""
    found = TRAINERS.get(without_epochs(trainer))
    return None if found is None else found[1]


def without_epochs(class_name: str) -> str:
    """The trainer's own name of ``<trainer>_<N>epochs``; any other name as it is."""
    base, _, suffix = class_name.rpartition("_")
    number = suffix[: -len("epochs")]
    if base in TRAINERS and suffix == number + "epochs" and number.isascii() and number.isdigit() and number[0] != "0":
        return base
    return class_name


def resolve(class_name: str) -> Any:
    """Our class of that name, or None when the name is not ours. Import errors of our own modules are raised."""
    module = module_of(class_name)
    return None if module is None else getattr(importlib.import_module(module), class_name)


def _wrap(stock: Any) -> Any:
    if hasattr(stock, MARK):
        return stock

    def recursive_find_python_class(
        folder: str, class_name: str, current_module: str | None, *args: Any, **kwargs: Any
    ) -> Any:
        if str(current_module).startswith("nnunetv2"):
            found = resolve(class_name)
            if found is not None:
                return found
        return stock(folder, class_name, current_module, *args, **kwargs)

    recursive_find_python_class.__doc__ = stock.__doc__
    setattr(recursive_find_python_class, MARK, stock)
    return recursive_find_python_class


def _rebind(stock: Any, wrapped: Any) -> None:
    """Give modules that did ``from ... import`` before us the wrapped function."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nnunetv2") and getattr(module, FUNCTION, None) is stock:
            setattr(module, FUNCTION, wrapped)


class _Loader:
    """Runs the real loader, then wraps the one function."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        stock = getattr(module, FUNCTION, None)
        if stock is not None:
            setattr(module, FUNCTION, _wrap(stock))


class _Finder:
    """A meta path finder for :data:`TARGET` alone; it delegates to all other finders."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != TARGET:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec: Any = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _PathGuard:
    """``PYTHONSAFEPATH`` for Python 3.10: takes the current folder off the path before the first import looks there.

    When start-up files run, Python has not yet put it in front; ``before`` is the first entry until then.
    """

    def __init__(self, before: str | None) -> None:
        self._before = before

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        first = sys.path[0] if sys.path else None
        if first != self._before:
            sys.meta_path.remove(self)
            if first in ("", os.getcwd()):
                del sys.path[0]


def _guard_path() -> None:
    if sys.version_info < (3, 11) and os.environ.get("PYTHONSAFEPATH"):
        sys.meta_path.insert(0, _PathGuard(sys.path[0] if sys.path else None))


def is_enabled() -> bool:
    """False when the user turned the plugin off with ``NNUNET_FLARE_PLUGIN=0``."""
    return os.environ.get(SWITCH, "1").strip().lower() not in ("0", "false", "off", "no")


def is_installed() -> bool:
    """True when our finder stands in ``sys.meta_path``, that is, when stock commands find our classes."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Make our names known to stock nnU-Net in this process. Safe to call again and after nnU-Net's import."""
    try:
        if not is_enabled() or is_installed():
            return
        sys.meta_path.insert(0, _Finder())
        _guard_path()
        module = sys.modules.get(TARGET)
        stock = getattr(module, FUNCTION, None)
        if stock is not None:
            wrapped = _wrap(stock)
            setattr(module, FUNCTION, wrapped)
            _rebind(stock, wrapped)
    except Exception as error:  # a start-up file must never stop Python
        sys.stderr.write(f"nnunet-flare: the nnU-Net plugin is off ({type(error).__name__}: {error})\n")
