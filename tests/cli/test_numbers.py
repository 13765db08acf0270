"""Numbers without bounds are refused where they are read, and the message has the range."""

from __future__ import annotations

import importlib

import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.executors.slurm_options import parse_options
from nnunet_flare.trainers.lengths import PATTERN
from nnunet_flare.trainers.settings import ITERATIONS_VARIABLE, TrainingSettings, with_environment

RUN = ["run", "-d", "1", "-u", "DIR"]
OPTIONS = [
    ("pseudolabel", [*RUN, "--task_timeout"], ["nan", "-1", "0", "inf", "1e300", "soon"], "above 0"),
    ("pseudolabel", ["retry", "-o", "DIR", "--task_timeout"], ["nan", "-1", "0", "-inf"], "above 0"),
    ("pseudolabel", [*RUN, "--shards"], ["0", "-1", "1e3", "100000000000000000000"], "from 1 to 10000"),
    ("pseudolabel", [*RUN, "-num_gpus"], ["-1", "99999", "nan"], "from 0 to 1024"),
    ("pseudolabel", ["demo", "--seed"], ["-1", "99999999999999999999"], "from 0 to 4294967295"),
    ("pseudolabel", ["phantom", "-o", "DIR", "--labelled"], ["-1", "1000000000"], "from 0 to 100000"),
    ("pseudolabel", ["phantom", "-o", "DIR", "--size", "9", "9"], ["0", "-5", "1000000"], "from 1 to 4096"),
    ("pseudolabel", ["select", "-i", "A", "-o", "B", "--threshold"], ["nan", "1.5", "-0.1", "inf"], "from 0"),
    ("pseudolabel", ["select", "-i", "A", "-o", "B", "--top_fraction"], ["nan", "0", "2"], "above 0"),
    ("pseudolabel", ["export", "-o", "DIR", "--dataset"], ["0", "1000", "x"], "from 1 to 999"),
    ("pseudolabel", ["merge", "-o", "A", "--base", "B", "-np"], ["0", "-3", "100000"], "from 1 to 4096"),
    ("pseudolabel", ["merge", "-o", "A", "--base", "B", "--protect"], ["0", "-1", "256"], "from 1 to 255"),
    ("pseudolabel", ["prepare", "--flare22", "A", "-d"], ["0", "1000"], "from 1 to 999"),
    ("predict", ["-i", "A", "-o", "B", "-step_size"], ["nan", "0", "-1", "1.5", "inf"], "above 0"),
    ("predict", ["-i", "A", "-o", "B", "--roi_margin"], ["nan", "-1", "inf"], "from 0"),
    ("predict", ["-i", "A", "-o", "B", "--max_memory"], ["nan", "0", "-1", "inf"], "above 0"),
    ("predict", ["-i", "A", "-o", "B", "--gpu_memory"], ["nan", "0", "-1", "inf"], "above 0"),
    ("predict", ["-i", "A", "-o", "B", "-num_parts"], ["0", "-1", "nan"], "from 1"),
    ("evaluate", ["-o", "o.csv", "-np"], ["0", "-1", "99999"], "from 1 to 4096"),
    ("evaluate", ["-o", "o.csv", "--tolerance_mm"], ["nan", "-1", "inf"], "from 0"),
    ("evaluate", ["efficiency", "-o", "o.csv", "--interval"], ["nan", "0", "1e9"], "from 0.01"),
    ("evaluate", ["efficiency", "-o", "o.csv", "--gpu"], ["-1", "99999"], "from 0 to 1023"),
    ("postprocess", ["-i", "A", "-o", "B", "-np"], ["0", "-1"], "from 1 to 4096"),
    ("postprocess", ["learn", "-i", "A", "-o", "B", "--fraction"], ["nan", "0", "1.5"], "above 0"),
    ("postprocess", ["tune", "-i", "A", "-ref", "B", "-o", "C", "--max_loss"], ["nan", "-1", "2"], "from 0"),
]


@pytest.mark.parametrize(("command", "words", "values", "range_"), OPTIONS)
def test_an_option_out_of_bounds_is_refused_with_its_range(command, words, values, range_, capsys):
    main = importlib.import_module(f"nnunet_flare.cli.{command}").main
    for value in values:
        with pytest.raises(SystemExit) as ended:
            main([*words[:-1], f"{words[-1]}={value}"] if words[-1].startswith("--") else [*words, value])
        error = capsys.readouterr().err
        assert ended.value.code == 2
        if "expected one argument" not in error:  # argparse takes -1 after a short option for another option
            assert repr(value) in error and range_ in error, error


@pytest.mark.parametrize(
    "key",
    [
        "rounds", "training.num_epochs", "training.iterations_per_epoch", "training.save_every", "training.num_gpus",
        "final.num_epochs", "members.count", "plan.batch_size", "plan.patch_size", "plan.stages", "plan.base_features",
        "training.initial_lr", "training.weight_decay", "training.seed", "seed", "stop.patience", "plan.spacing_mm",
        "final.finetune.num_epochs", "fusion.min_component_mm3", "roi.margin_mm", "selection.threshold",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["100000000000000000000", "1.0e+20", "-1", ".nan", ".inf", "[.nan]"])
def test_a_number_of_a_recipe_without_bounds_is_refused(key, value):
    if key in ("plan.patch_size", "plan.spacing_mm"):
        value = f"[{value}, 1, 1]"
    with pytest.raises(InputError, match=key.split(".")[-1]):
        load_recipe("uncertainty", {key: value})


def test_the_largest_numbers_are_taken():
    recipe = load_recipe("uncertainty", {"training.num_epochs": "1000000", "members.count": "100"})
    assert recipe.num_epochs(0) == 1_000_000


def test_other_places_where_numbers_are_read():
    with pytest.raises(InputError, match="cpus: Input should be less than or equal to 10000"):
        parse_options(["cpus=100000000000"])
    for text in ("\u00b2", "1" * 25, "0", "-1", "nan"):
        with pytest.raises(InputError, match=r">= 1, at most 1000000000"):
            with_environment(TrainingSettings(), {ITERATIONS_VARIABLE: text})
    assert PATTERN.fullmatch("nnUNetTrainerFlare_999999epochs") and not PATTERN.fullmatch("T_10000000000epochs")
