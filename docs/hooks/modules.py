"""MkDocs hook: one page per room of the package, made of its docstrings and signatures; nothing is imported."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "nnunet_flare"
LEFT_OUT = ("cli", "ext", "recipes")
"""Commands have a page of their own; the others hold no modules to call."""
SECTIONS = ("Args", "Returns", "Raises", "Yields")

Definition = ast.FunctionDef | ast.ClassDef


def on_config(config: Any) -> Any:
    """Enter the pages into the menu, under *Reference*."""
    sections = {title: entry for item in config["nav"] for title, entry in item.items()}
    sections["Reference"].append({"Modules": [{room: f"modules-{room}.md"} for room in rooms()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to MkDocs' files."""
    from mkdocs.structure.files import File

    for room, modules in rooms().items():
        files.append(File.generated(config, f"modules-{room}.md", content=page(room, modules)))
    return files


def rooms(package: Path = PACKAGE) -> dict[str, list[Path]]:
    """The modules of each subpackage, and of the package itself as ``shared``."""
    found = {"shared": _modules(package)}
    for folder in sorted(path for path in package.iterdir() if (path / "__init__.py").is_file()):
        if folder.name not in LEFT_OUT:
            found[folder.name] = [path for part in (folder, *_subfolders(folder)) for path in _modules(part)]
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file())


def _modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def page(room: str, modules: list[Path]) -> str:
    """Markdown of all modules of a room."""
    parts = [f"# {'Shared modules' if room == 'shared' else f'nnunet_flare.{room}'}\n"]
    for path in modules:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        parts += [f"## {name}\n", docstring(ast.get_docstring(tree))]
        parts += [text for node in tree.body if isinstance(node, Definition) for text in _definition(node)]
    return "\n".join(parts)


def _definition(node: Definition) -> Iterator[str]:
    """Signature and docstring of a public function, or of a public class and its public methods."""
    if node.name.startswith("_"):
        return
    yield f"### {node.name}\n"
    yield _signature(node)
    yield docstring(ast.get_docstring(node))
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                yield _signature(method, f"{node.name}.")
                yield docstring(ast.get_docstring(method))


def _signature(node: Definition, owner: str = "") -> str:
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        return f"```python\nclass {node.name}{bases}\n```\n"
    names = [word.id for word in node.decorator_list if isinstance(word, ast.Name)]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if "property" in names:
        return f"```python\n{owner}{node.name}{returns}\n```\n"
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
    return f"```python\n{owner}{node.name}({arguments}){returns}\n```\n"


def docstring(text: str | None) -> str:
    """A docstring as Markdown: roles and double backticks as code, argument lists as lists."""
    if not text:
        return ""
    text = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", inspect.cleandoc(text))
    pieces = re.split(r"(``[^`]+``|`[^`]+`)", text)
    text = "".join(
        f"`{piece.strip('`')}`" if index % 2 else piece.replace("<", "&lt;") for index, piece in enumerate(pieces)
    )
    lines: list[str] = []
    section = False
    for line in text.splitlines():
        if re.fullmatch(rf"({'|'.join(SECTIONS)}):", line):
            lines += ["", f"**{line[:-1]}**", ""]
            section = True
        elif section and (item := re.match(r" {4}(\S[^:]*): (.*)", line)):
            lines.append(f"- {_code(item.group(1))}: {item.group(2)}")
        elif section and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line.strip()
            lines.append(line)
    return "\n".join(lines) + "\n"


def _code(name: str) -> str:
    return name if "`" in name else f"`{name}`"
