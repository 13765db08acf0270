"""Domains of unlabelled scans: by table, by name, and scans of which neither knows one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.recipes.parts import Domains
from nnunet_flare.rounds.run.domains import domains_of, read_domains


def table(folder: Path, text: str) -> str:
    path = folder / "domains.csv"
    path.write_text(text)
    return str(path)


def test_the_table_goes_before_the_names(tmp_path: Path) -> None:
    given = Domains(
        table=table(tmp_path, "case,note,domain\namos_0507,x,mr\nodd_mr_1,y,pet\n"),
        names={"mr": "_mr_", "pet": "(?i)pet"},
    )
    cases = ["amos_0507", "odd_mr_1", "a_mr_7", "PET12"]
    assert domains_of(cases, given) == {"amos_0507": "mr", "odd_mr_1": "pet", "a_mr_7": "mr", "PET12": "pet"}
    assert domains_of(cases, Domains()) == {}, "a recipe that asks for none"


def test_scans_of_unknown_or_two_domains_are_all_named() -> None:
    given = Domains(names={"mr": "mr", "pet": "pet"})
    with pytest.raises(InputError) as caught:
        domains_of(["mr_1", "strange_1", "mrpet_2", "strange_2"], given)
    text = str(caught.value)
    assert "patterns of two domains fit 1 scan(s): mrpet_2 (mr and pet)" in text
    assert "no domain is known for 2 scan(s): strange_1, strange_2. Searched: mr: mr; pet: pet" in text
    with pytest.raises(InputError, match=r"no domain is known for 13 scan\(s\): .* and 3 more"):
        domains_of([f"case_{n}" for n in range(13)], given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"found the columns \(none\), expected case, domain"),
        ("name,domain\na,mr\n", "found the columns name, domain, expected case, domain"),
        ("case,domain\na,mr\nb\n,pet\n", r"2 problem\(s\):\n  line 3: .*\n  line 4"),
        ("case,domain\na,mr\na,pet\n", "line 3: a is pet here and mr before"),
    ],
)
def test_a_table_that_cannot_be_used_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_domains(Path(table(tmp_path, text)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": "{}"}, "domains: found None, but selection.per_domain is true; expected a table or names"),
        ({"selection.top_fraction": "null"}, "selection.top_fraction: found None, but selection.per_domain"),
        ({"fusion.uncertain_organs": "ignore"}, "fusion.uncertain_organs: found 'ignore'"),
        ({"domains.names": "{mr: '('}"}, "domains.names.mr: found '.', which is not a regular expression"),
    ],
)
def test_what_selection_by_domain_needs_is_asked_of_the_recipe(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("adaptation", settings)


def test_the_shipped_patterns_know_modalities_by_their_words() -> None:
    given = load_recipe("adaptation").domains
    cases = {"FLAREPhantom_Un_mr_0001": "mr", "MRI-22": "mr", "case_MR0007": "mr", "pet_3": "pet", "FDG-PET-1": "pet"}
    assert domains_of(cases, given) == cases
    for case in ("petra_1", "amr_2", "CT_1"):
        with pytest.raises(InputError, match="no domain is known"):
            domains_of([case], given)
