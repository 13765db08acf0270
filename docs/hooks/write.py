"""Write the whole site as plain files, for a builder that runs no MkDocs hooks: ``python docs/hooks/write.py FOLDER``.

The folder gets ``docs`` with every page, also those that are made when the site is built, and a ``mkdocs.yml`` whose
menu names them all. ``zensical build`` takes it as it is.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import modules  # noqa: E402
import reference  # noqa: E402

import benchmarks  # noqa: E402


def generated_pages() -> Iterator[tuple[str, str]]:
    """File name and Markdown of every page that is no file of ``docs``."""
    yield "commands.md", reference.commands_page()
    yield "benchmarks.md", benchmarks.benchmarks_page()
    for room, found in modules.rooms().items():
        yield f"modules-{room}.md", modules.page(room, found)


def write(folder: Path) -> None:
    """Write ``docs`` and ``mkdocs.yml`` into a folder."""
    pages = folder / "docs"
    shutil.copytree(HERE.parent, pages, ignore=shutil.ignore_patterns("hooks", "__pycache__"), dirs_exist_ok=True)
    config: dict[str, Any] = yaml.safe_load((HERE.parents[1] / "mkdocs.yml").read_text(encoding="utf-8"))
    config["docs_dir"] = str(pages)  # the menu is made of the pages that are there
    config = modules.on_config(reference.on_config(config))
    config["docs_dir"] = "docs"
    del config["hooks"], config["exclude_docs"]
    for name, text in generated_pages():
        (pages / name).write_text(text, encoding="utf-8")
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
