"""What a recipe's page says about its paper: the table of both sides, from the one place where it stands.

The pages are written for the documentation (``docs/recipes-*.md``); the wheel carries them as package data.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from markupsafe import Markup, escape

PAGES = resources.files("nnunet_flare.recipes") / "pages"
CHECKOUT = Path(__file__).resolve().parents[2] / "docs"


def paper_and_ours(recipe: str) -> list[list[Markup]]:
    """The rows of a recipe's table of paper and deviations, head first, as HTML; empty where its page has none."""
    page = _page(recipe)
    if page is None:
        return []
    for table in re.findall(r"(?:^\|.*\|\n)+", page + "\n", re.M):
        head, _, *rows = (_cells(line) for line in table.splitlines())
        if "ours" in head:
            return [[_inline(cell) for cell in cells] for cells in (head, *rows)]
    return []


def _page(recipe: str) -> str | None:
    name = f"recipes-{recipe.replace('_', '-')}.md"
    found = (page.read_text(encoding="utf-8") for page in (PAGES / name, CHECKOUT / name) if page.is_file())
    return next(found, None)


def _cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _inline(text: str) -> Markup:
    """Markdown of a cell: code and bold; of a link its text."""
    html = str(escape(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)))
    html = re.sub(r"`([^`]*)`", r"<code>\1</code>", html)
    return Markup(re.sub(r"\*\*([^*]*)\*\*", r"<b>\1</b>", html))
