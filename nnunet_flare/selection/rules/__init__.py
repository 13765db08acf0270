"""The selection rules, one a file: a module of this folder that defines a ``RULE`` is all it takes to add one."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from nnunet_flare.selection.rule import Rule

RULES: dict[str, Rule] = {
    rule.name: rule for module in iter_modules(__path__) for rule in [import_module(f"{__name__}.{module.name}").RULE]
}
"""Every rule by name."""
