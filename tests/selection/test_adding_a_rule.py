"""A new selection rule is one file: recipes, commands and the selection know it as soon as it lies in the folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEDIAN = '''"""``median-organ``: the median over organs."""
from nnunet_flare.selection.rule import Rule

def median(table):
    import numpy as np
    return np.median(table, axis=1)

RULE = Rule("median-organ", "the organs' median agreement", "members", "pairs", median)
'''

USES = """
import importlib.util, sys
import nnunet_flare.selection
spec = importlib.util.find_spec("nnunet_flare.selection.rules")
spec.submodule_search_locations.append(sys.argv[1])  # as if the file lay in the folder
rules = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)
from nnunet_flare.cli.pseudolabel import _parser
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.selection.choose import select

given = _parser().parse_args(["select", "-i", "a", "-o", "b", "--rule", "median-organ"])
assert given.rule == "median-organ"
recipe = load_recipe("demo", {"selection.rule": "median-organ", "selection.threshold": "0.5"})
assert recipe.selection_of(0).rule.summary == "the organs' median agreement"
import numpy as np
table = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, 1.0]])
taken = select(["a", "b"], table, organs=["x", "y", "z"], rule="median-organ", threshold=0.5)
print([(d.case, d.taken, d.score) for d in taken])
"""


def test_a_rule_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "median_organ.py").write_text(MEDIAN)
    done = subprocess.run(
        [sys.executable, "-c", USES, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('a', True, 0.8), ('b', False, 0.3)]"


def test_listing_the_rules_imports_no_numpy() -> None:
    script = "import sys; import nnunet_flare.selection.rules as r; assert r.RULES; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
