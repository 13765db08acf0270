"""The templates and files that come with the package."""

from __future__ import annotations

from importlib import resources
from typing import Any


def environment() -> Any:
    """The templates; every name in them is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("nnunet_flare.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def static_text(name: str) -> str:
    """A file of the folder ``static``."""
    return resources.files("nnunet_flare.report").joinpath("static").joinpath(name).read_text(encoding="utf-8")
