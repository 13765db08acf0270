"""Loading recipes: a YAML file of this folder or the user's own, changed by ``--set``, with located errors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nnunet_flare.documents import load_yaml, parse_yaml
from nnunet_flare.errors import InputError
from nnunet_flare.recipes.checks import check_recipe
from nnunet_flare.recipes.recipe import Recipe, explain
from nnunet_flare.wording import did_you_mean


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("nnunet_flare.recipes")
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, settings: Mapping[str, str] | None = None) -> Recipe:
    """Load a shipped recipe by name or your own by path, and apply ``--set`` values.

    Args:
        name_or_path: name of a shipped recipe, or a ``.yaml`` file.
        settings: dotted key to text; the text is read as YAML, so ``0.9``, ``[4, 1.2, 1.2]`` and ``null`` work.

    Raises:
        InputError: for an unknown recipe or key or a wrong value, each with its path.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"recipe {path}: no such file")
        where = str(path)
        document = load_yaml(path)
    elif name_or_path in shipped_recipes():
        where = f"recipe {name_or_path}"
        file = resources.files("nnunet_flare.recipes").joinpath(f"{name_or_path}.yaml")
        document = parse_yaml(file.read_text(encoding="utf-8"), where)
    else:
        hint = did_you_mean(name_or_path, shipped_recipes())
        raise InputError(
            f"no recipe '{name_or_path}'{hint or ';'} there are {', '.join(shipped_recipes())}, or give a YAML file"
        )
    if not isinstance(document, dict):
        raise InputError(f"{where}: expected keys and values, found {type(document).__name__}")
    for key, value in (settings or {}).items():
        _set(document, key, value)
    return recipe_from(document, where)


def recipe_from(document: Mapping[str, Any], where: str) -> Recipe:
    """Validate a recipe document; ``where`` is named in errors."""
    try:
        recipe = Recipe.model_validate(document)
        check_recipe(recipe)
    except ValidationError as error:
        problems = explain(error, model=Recipe)
        raise InputError(f"{where}: {len(problems)} problem(s): {'; '.join(problems)}") from error
    except ValueError as error:
        raise InputError(f"{where}: 1 problem(s): {error}") from error
    return recipe


def _set(document: dict[str, Any], key: str, text: str) -> None:
    value = parse_yaml(text, f"--set {key}={text}")
    place = document
    *parents, last = key.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InputError(f"--set {key}: '{parent}' has no keys below it")
    place[last] = value
