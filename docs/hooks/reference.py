"""MkDocs hooks: ``commands.md`` is made from the commands' own ``--help``, and every recipe's page enters the menu."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from pathlib import Path
from typing import Any

PROGRAMS = {
    "flare-pseudolabel": "pseudolabel",
    "flare-predict": "predict",
    "flare-export": "export",
    "flare-postprocess": "postprocess",
    "flare-evaluate": "evaluate",
    "flare-doctor": "doctor",
}
SUBCOMMANDS = {"flare-postprocess": ("learn", "tune"), "flare-evaluate": ("efficiency",)}


def on_config(config: Any) -> Any:
    """Fill the menu: *Recipes* with the pages ``recipes-*.md``, the default one first, *Parts* with pages left over."""
    menu: list[dict[str, Any]] = config["nav"]
    sections = {title: entry for item in menu for title, entry in item.items()}
    pages = sorted(path.name for path in Path(config["docs_dir"]).glob("*.md"))
    recipes = [name for name in pages if name.startswith("recipes-")]
    sections["Recipes"] += sorted(recipes, key=lambda name: name != "recipes-uncertainty.md")
    listed = {name for entry in sections.values() for name in _names(entry)}
    sections["Parts"] += [name for name in pages if name not in listed]
    return config


def _names(entry: Any) -> list[str]:
    """File names in a menu entry."""
    if isinstance(entry, str):
        return [entry]
    return [name for item in (entry.values() if isinstance(entry, dict) else entry) for name in _names(item)]


def on_files(files: Any, config: Any) -> Any:
    """Add the page to MkDocs' files."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def commands_page() -> str:
    """Markdown with the help of every command and subcommand."""
    lines = [
        "# Commands",
        "",
        "This page has the `--help` of each command. Exit codes: 0 all done; 1 some cases or tasks",
    ]
    lines += [
        "failed and are listed; 2 wrong usage or input. `--save_members` may be typed `--save-members`.",
        "",
    ]
    lines += [
        "`flare-pseudolabel --print-completion bash` (or `zsh`, `tcsh`) prints a script that completes options at the"
    ]
    lines += ["TAB key, if the extra `completion` is installed. The other commands do the same.", ""]
    for program, module in PROGRAMS.items():
        lines += [f"## {program}", "", "```text", help_text(module), "```", ""]
        for name in (*subcommands(module), *SUBCOMMANDS.get(program, ())):
            lines += [f"### {program} {name}", "", "```text", help_text(module, name), "```", ""]
    return "\n".join(lines)


def help_text(module: str, *words: str) -> str:
    """What a command prints for ``--help``, at a fixed width."""
    main = importlib.import_module(f"nnunet_flare.cli.{module}").main
    out, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "78"  # what a page shows without scrolling
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width
    return out.getvalue().rstrip()


def subcommands(module: str) -> list[str]:
    """Names of the subcommands that argparse knows."""
    source = importlib.import_module(f"nnunet_flare.cli.{module}")
    parser = getattr(source, "_parser", None)
    actions = parser()._actions if parser else []
    return [name for action in actions for name in (action.choices or {}) if hasattr(action, "add_parser")]
