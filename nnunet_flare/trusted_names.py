"""The one list of what names in plans.json, dataset.json and a checkpoint may stand for.

nnU-Net finds networks, layers, preprocessors and readers by name, and looking a name up imports modules and calls what
it finds: ``network_class_name: torch.hub.load`` runs a file. So every name is checked before it is looked up. Networks
and layers come from the packages below and are ``nn.Module`` classes; every other kind is a class of that kind that
nnU-Net's own search finds in nnU-Net or in our plugin. ``trusted`` admits any network, as ``--trust-checkpoint`` says.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare import plugin
from nnunet_flare.errors import InputError

NETWORKS = ("dynamic_network_architectures", "nnunet_flare.networks", "nnunetv2")
"""Packages whose networks are built."""

LAYERS = ("torch.nn", "dynamic_network_architectures", "nnunet_flare.networks")
"""Packages whose layers plans may name in a network's arguments."""

LAYER_KEYS = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""Arguments that some trainers look up whether or not ``_kw_requires_import`` lists them."""


@dataclass(frozen=True)
class Kind:
    """What nnU-Net looks up by a short name: where it searches, what it must find, and names that need no search."""

    folder: str
    module: str
    base: str
    stock: tuple[str, ...]


KINDS = {
    "preprocessor": Kind(
        "preprocessing",
        "nnunetv2.preprocessing.preprocessors.default_preprocessor",
        "DefaultPreprocessor",
        ("DefaultPreprocessor",),
    ),
    "normalisation": Kind(
        "preprocessing/normalization",
        "nnunetv2.preprocessing.normalization.default_normalization_schemes",
        "ImageNormalization",
        (
            "CTNormalization",
            "NoNormalization",
            "RGBTo01Normalization",
            "RescaleTo01Normalization",
            "ZScoreNormalization",
        ),
    ),
    "reader": Kind(
        "imageio",
        "nnunetv2.imageio.base_reader_writer",
        "BaseReaderWriter",
        (
            "NaturalImage2DIO",
            "NibabelIO",
            "NibabelIOWithReorient",
            "SimpleITKIO",
            "SimpleITKIOWithReorient",
            "Tiff3DIO",
        ),
    ),
    "label manager": Kind(
        "utilities/label_handling",
        "nnunetv2.utilities.label_handling.label_handling",
        "LabelManager",
        ("LabelManager",),
    ),
    "planner": Kind(
        "experiment_planning",
        "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner",
        "ExperimentPlanner",
        ("ExperimentPlanner", "ResEncUNetPlanner", "nnUNetPlannerResEncM", "nnUNetPlannerResEncL"),
    ),
}

RESAMPLINGS = (
    "no_resampling_hack",
    "resample_data_or_seg_to_shape",
    "resample_data_or_seg_to_spacing",
    "resample_torch_fornnunet",
    "resample_torch_simple",
)


def check_plans(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], where: Path | str, *, trusted: bool = False
) -> None:
    """Refuse plans with a name that could run what is not nnU-Net's or ours.

    Args:
        plans: the plans.
        configuration: one of their configurations, with what it inherits.
        where: the file, for messages.
        trusted: whether the user trusts the file; then its network may be any.

    Raises:
        InputError: naming the file, the name, and what is admitted.
    """
    if not trusted:
        check_network(configuration, where)
    _word(plans.get("experiment_planner_used", "ExperimentPlanner"), f"{where}: experiment_planner_used")
    check_name("label manager", plans.get("label_manager", "LabelManager"), f"{where}: label_manager")
    check_name("reader", plans.get("image_reader_writer", "SimpleITKIO"), f"{where}: image_reader_writer")
    check_name(
        "preprocessor", configuration.get("preprocessor_name", "DefaultPreprocessor"), f"{where}: preprocessor_name"
    )
    schemes = configuration.get("normalization_schemes", [])
    for scheme in schemes if isinstance(schemes, (list, tuple)) else [schemes]:
        check_name("normalisation", scheme, f"{where}: normalization_schemes")
    for key in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        if key in configuration:
            _check_resampling(configuration[key], f"{where}: {key}")


def check_network(configuration: Mapping[str, Any], where: Path | str) -> None:
    """Refuse a configuration whose network or layers are not of the packages above, or no ``nn.Module`` classes.

    Raises:
        InputError: naming the class and the flag that admits it.
    """
    architecture = configuration.get("architecture")
    if architecture is None:  # plans of older versions, for which nnU-Net itself fills in the network
        return
    arguments = architecture.get("arch_kwargs") if isinstance(architecture, dict) else None
    imported = architecture.get("_kw_requires_import", []) if isinstance(architecture, dict) else None
    if not isinstance(arguments, dict) or not isinstance(imported, (list, tuple)):
        raise InputError(f"{where}: architecture: expected network_class_name, arch_kwargs and _kw_requires_import")
    _module_class(architecture.get("network_class_name"), NETWORKS, where, "network_class_name", is_network=True)
    for key in imported:
        if key not in arguments:
            raise InputError(
                f"{where}: architecture: _kw_requires_import lists {key!r}, which arch_kwargs does not have"
            )
    for key, value in arguments.items():
        if value is not None and (key in imported or (key in LAYER_KEYS and isinstance(value, str))):
            _module_class(value, LAYERS, where, key)


def check_name(kind: str, name: Any, where: str) -> Any:
    """Refuse a short name that nnU-Net's search would not resolve to a class of this kind of its own or ours.

    Returns the class where it was searched, None for a stock name, which needs no search.

    Raises:
        InputError: naming it and what is known.
    """
    known = KINDS[kind]
    if isinstance(name, str) and name in known.stock:
        return None
    found = _search(name, known.folder, where)
    base = getattr(importlib.import_module(known.module), known.base)
    if found is None:
        raise InputError(f"{where}: no {kind} named {name} is installed here; nnU-Net has {', '.join(known.stock)}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{where}: {name} is not a {kind} ({known.base}); nnU-Net has {', '.join(known.stock)}")
    return found


def check_trainer(name: Any, where: str) -> None:
    """Refuse a trainer's name that is no plain name; the search of nnU-Net then finds nnU-Net's, ours or the user's.

    Raises:
        InputError: naming it.
    """
    _word(name, f"{where}: trainer_name")


def check_plans_name(name: Any, where: Path | str) -> str:
    """A plans name, which becomes part of the names of files and folders.

    Raises:
        InputError: when it could lead elsewhere.
    """
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name)):
        raise InputError(f"{where}: plans_name is {name!r}, expected letters, digits, _, - and .")
    return name


def _check_resampling(name: Any, where: str) -> None:
    if isinstance(name, str) and name in RESAMPLINGS:
        return
    found = _search(name, "preprocessing/resampling", where)
    if not str(getattr(found, "__module__", "")).startswith("nnunetv2.preprocessing.resampling."):
        raise InputError(f"{where}: no resampling named {name} is installed here; nnU-Net has {', '.join(RESAMPLINGS)}")


def _search(name: Any, folder: str, where: str) -> Any:
    """What nnU-Net's search finds in one of its folders; only nnU-Net's and our modules are imported by it."""
    import nnunetv2
    from nnunetv2.utilities import find_class_by_name

    if plugin.module_of(_word(name, where)) is not None:
        return plugin.resolve(name)
    path = f"{nnunetv2.__path__[0]}/{folder}"
    return find_class_by_name.recursive_find_python_class(path, name, f"nnunetv2.{folder.replace('/', '.')}")


def _word(name: Any, where: str) -> str:
    """A name that nnU-Net's search takes: one word."""
    if not (isinstance(name, str) and name.isidentifier()):
        raise InputError(f"{where}: found {name!r}, expected the plain name of a class")
    return name


def _module_class(
    name: Any, packages: tuple[str, ...], where: Path | str, key: str, *, is_network: bool = False
) -> type:
    """The class of a dotted name, as nnU-Net would find it, imported only if it lies in one of ``packages``."""
    import pydoc

    from torch import nn

    if not (isinstance(name, str) and name.startswith(tuple(f"{package}." for package in packages))):
        raise InputError(
            f"{where}: {key} names {name!r}, which is not in {', '.join(packages)}; building it runs code from "
            "elsewhere. If you know and trust it, use --trust-checkpoint"
        )
    if not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"{where}: {key} is {name!r}, expected the dotted name of a class")
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"{where}: {key}: {name} cannot be imported ({error.value})") from error
    if found is None and is_network:  # as nnU-Net: classes that moved are still found by their own name
        found = _moved(name.rpartition(".")[2])
    if found is None:
        raise InputError(f"{where}: {key}: there is no {name} in the installed version")
    home = str(getattr(found, "__module__", ""))
    if not (isinstance(found, type) and issubclass(found, nn.Module) and f"{home}.".startswith(_dotted(packages))):
        raise InputError(
            f"{where}: {key}: {name} is not a network or layer class of {', '.join(packages)}. If you know and trust "
            "it, use --trust-checkpoint"
        )
    return found


def _moved(name: str) -> Any:
    import dynamic_network_architectures
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    package = "dynamic_network_architectures.architectures"
    folder = f"{dynamic_network_architectures.__path__[0]}/architectures"
    try:
        return recursive_find_python_class(folder, name, package)
    except Exception:  # the search imports every architecture, also those whose own requirements are missing here
        return None


def _dotted(packages: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{package}." for package in packages)
