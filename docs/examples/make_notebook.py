"""Write ``predict_and_compare.ipynb`` from the script beside it: a cell from each ``# %%``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("predict_and_compare.py")


def notebook(script: str) -> dict[str, Any]:
    """The notebook's document; the script's docstring is left out."""
    _, *parts = re.split(r"^# %%(.*)\n", script, flags=re.M)
    cells = []
    for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        is_text = kind.strip() == "[markdown]"
        source = re.sub(r"^# ?", "", text, flags=re.M) if is_text else text
        cell = {"id": f"cell-{number}", "metadata": {}, "source": source.strip().splitlines(keepends=True)}
        cells.append(
            {"cell_type": "markdown", **cell}
            if is_text
            else {"cell_type": "code", **cell, "execution_count": None, "outputs": []}
        )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    text = json.dumps(notebook(SCRIPT.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
    SCRIPT.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")
