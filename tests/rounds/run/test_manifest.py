"""A run's manifest and list of scans as an earlier version wrote them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_tasks import make_run

from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.run.manifest import create_run, load_run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.run.unlabelled import read_list


def test_a_run_from_before_some_keys_existed_goes_on_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path, device="cpu", shards=1)
    scan = {"case": "a", "source": "a.nii.gz", "images": ["a_0000.nii.gz"], "size_bytes": 1}
    write_json(run.paths.unlabelled, {"version": 1, "cases": [scan]})
    document = read_json(run.paths.manifest)
    recipe = document["settings"]["recipe"]
    del recipe["domains"], recipe["selection"]["per_domain"]
    write_json(run.paths.manifest, document)
    for resumed in (load_run(run.root), create_run(run.root, run.settings, run.recipe)):
        assert not resumed.recipe.domains and not resumed.recipe.selection_of(0).per_domain
        assert graph(resumed) == graph(run)
        assert [known.domain for known in read_list(resumed.paths.unlabelled)] == [None]
    selection = {**run.settings.recipe["selection"], "per_domain": True}
    other = replace(run.settings, recipe={**run.settings.recipe, "selection": selection})
    with pytest.raises(InputError, match="per_domain: False there, True now"):
        create_run(run.root, other, run.recipe)
