"""What a recipe may not ask for although each of its keys is valid alone; every refusal says what was expected."""

from __future__ import annotations

from typing import get_args

from nnunet_flare import plugin
from nnunet_flare.recipes.parts import Final, Fusion, Members, Part, Selection, Stop
from nnunet_flare.recipes.recipe import GIVEN_MODEL, Recipe
from nnunet_flare.trainers.settings import MAX_EPOCHS, InitPart, stream_key


def check_recipe(recipe: Recipe) -> None:
    """Check what a recipe's keys ask for together, and the training settings of every round.

    Raises:
        ValueError: naming the key, what was found and what was expected.
    """
    epochs = recipe.training.get("num_epochs", 1000)
    each = epochs if isinstance(epochs, list) else [epochs]
    if not each or not all(type(n) is int and 0 < n <= MAX_EPOCHS for n in each):
        raise ValueError(
            f"training.num_epochs: found {epochs!r}, expected a whole number from 1 to {MAX_EPOCHS}, or one per round"
        )
    gpus = recipe.training.get("num_gpus", 1)
    if type(gpus) is not int or not 1 <= gpus <= 1024:
        raise ValueError(f"training.num_gpus: found {gpus!r}, expected a whole number from 1 to 1024")
    check_dimensions(recipe)
    check_pretrained_keys(recipe)
    check_domains(recipe)
    if recipe.is_online:
        check_online(recipe)
    if recipe.loops:
        check_loops(recipe)
    elif recipe.fusion.teachers:
        raise ValueError(
            "fusion.teachers: only the union of several loops uses teachers, and this recipe has no 'loops'; leave it "
            "out"
        )
    for number in range(recipe.final_round + 2):  # the final training and its fine-tuning too
        recipe.settings(number, run=None)
    for number in range(recipe.final_round):
        check_selection(recipe, number)
        check_checkpoints(recipe, number)
    if recipe.selection.absent is not None and not any(map(recipe.judges_agreement, range(recipe.final_round))):
        raise ValueError(
            f"selection.absent: found {recipe.selection.absent!r}, but no round compares members organ by organ; "
            "leave out the key"
        )
    if recipe.members.start == "member":
        check_going_on(recipe)
    if recipe.final.start == "member":
        check_start(recipe)
    if recipe.roi is not None:
        recipe.coarse_settings(run=None)


def check_dimensions(recipe: Recipe) -> None:
    """Spacings and patches have as many numbers as the configuration has axes: stock's ``2d`` two, all others three."""
    plans = {"plan": (recipe.configuration, recipe.plan)}
    plans["final.plan"] = (recipe.final.configuration or recipe.configuration, recipe.final.plan)
    if recipe.roi is not None:
        plans["roi.plan"] = (recipe.roi.configuration, recipe.roi.plan)
    for name, (configuration, plan) in plans.items():
        axes = 2 if configuration == "2d" else 3
        for key, numbers in (("spacing_mm", plan.spacing_mm), ("patch_size", plan.patch_size)):
            if numbers is not None and len(numbers) != axes:
                raise ValueError(
                    f"{name}.{key}: found {list(numbers)}, expected {axes} numbers for configuration {configuration}"
                )


def check_pretrained_keys(recipe: Recipe) -> None:
    """Keys about weights that trainings start from, and plans with their network."""
    weights, part = recipe.training.get("pretrained_weights"), recipe.training.get("pretrained_part")
    if weights is not None and (not isinstance(weights, str) or not weights):
        raise ValueError(f"training.pretrained_weights: found {weights!r}, expected the path of a checkpoint")
    if part is not None and part not in get_args(InitPart):
        raise ValueError(f"training.pretrained_part: found {part!r}, expected one of {', '.join(get_args(InitPart))}")
    if part is not None and weights is None:
        raise ValueError(f"training.pretrained_part: found {part!r} without training.pretrained_weights; give both")
    if part is not None and plugin.learns_from(recipe.trainer) is None:
        raise ValueError(
            f"training.pretrained_part: found {part!r}, but {recipe.trainer} is a stock trainer, which always takes "
            "all but the heads; leave it out"
        )
    others = {"final.plan": recipe.final.plan, **({} if recipe.roi is None else {"roi.plan": recipe.roi.plan})}
    for key, plan in others.items():
        if plan.network is not None:
            raise ValueError(f"{key}.network: only the rounds start from given weights; expected plan.network")
    if recipe.plan.network is None:
        return
    if weights is None:
        raise ValueError("plan.network: found 'pretrained' without training.pretrained_weights; give both")
    if recipe.planner == GIVEN_MODEL:
        raise ValueError(
            f"plan.network: found 'pretrained', but planner {GIVEN_MODEL} takes the network of the given model"
        )


def check_domains(recipe: Recipe) -> None:
    """Selection domain by domain needs domains, and a share of each that is taken."""
    if not recipe.selection.per_domain:
        return
    fractions = [recipe.selection_of(number).top_fraction for number in range(recipe.final_round)]
    for key, given, fits, needed in (
        ("domains", None, bool(recipe.domains), "a table or names"),
        ("selection.top_fraction", recipe.selection.top_fraction, any(fractions), "the share of each domain"),
        ("loops", [loop.name for loop in recipe.loops], not recipe.loops, "none"),
        (
            "fusion.uncertain_organs",
            recipe.fusion.uncertain_organs,
            recipe.fusion.uncertain_organs == "drop-case",
            "drop-case",
        ),
    ):
        if not fits:
            raise ValueError(f"{key}: found {given!r}, but selection.per_domain is true; expected {needed}")


def check_online(recipe: Recipe) -> None:
    """Keys of rounds that an online recipe does not have."""
    needed: dict[str, Part] = {
        "members": Members(count=1),
        "selection": Selection(rule="all", keep_odd=recipe.selection.keep_odd),
        "fusion": Fusion(),
        "final": Final(),
        "stop": Stop(),
    }
    values = [("rounds", recipe.rounds, 1)]
    for name, part in needed.items():
        given = getattr(recipe, name)
        values += [(f"{name}.{key}", getattr(given, key), getattr(part, key)) for key in type(part).model_fields]
    for key, found, expected in values:
        if found != expected:
            raise ValueError(
                f"{key}: found {found!r}, but trainer {recipe.trainer} learns from the unlabelled scans directly, "
                f"without labelling them; expected {expected!r}"
            )
    stream = stream_key(recipe.trainer)
    if "unlabelled" in (recipe.training.get(str(stream)) or {}):
        raise ValueError(f"training.{stream}.unlabelled: is set by the loop and cannot be set here")


def check_loops(recipe: Recipe) -> None:
    """Loops over different organs: a loss that allows for it, and nothing that spans them."""
    fusion, teachers = recipe.fusion, len(recipe.fusion.teachers)
    names = [loop.name for loop in recipe.loops]
    for key, given, fits, needed in (
        ("loops", names, len(set(names)) == len(names), "different names"),
        *(
            (
                key,
                trainer,
                plugin.learns_from(trainer) == plugin.ANNOTATED_ORGANS,
                "nnUNetTrainerFlarePartial, whose loss is marginal",
            )
            for key, trainer in (("trainer", recipe.trainer), ("final.trainer", recipe.final.trainer or recipe.trainer))
        ),
        ("stop.patience", recipe.stop.patience, recipe.stop.patience is None, "none"),
        ("roi", recipe.roi, recipe.roi is None, "none"),
        ("training.epoch", recipe.training.get("epoch"), not recipe.counts_passes, "iterations"),
        ("final.finetune", recipe.final.finetune, recipe.final.finetune is None, "none"),
        ("fusion.uncertain_organs", fusion.uncertain_organs, fusion.uncertain_organs == "drop-case", "drop-case"),
        (
            "fusion.id_maps",
            list(fusion.id_maps),
            len(fusion.id_maps) in (0, 1, teachers),
            "none, one for all teachers, or one each",
        ),
    ):
        if not fits:
            raise ValueError(f"{key}: found {given!r}, expected {needed} in a recipe with loops")


def check_checkpoints(recipe: Recipe, number: int) -> None:
    """Members that are checkpoints of one training must be different ones."""
    if recipe.members.kind == "checkpoints" and len(set(recipe.checkpoint_epochs(number))) < 2:
        raise ValueError(
            f"members.at {list(recipe.members.at)} gives fewer than two different checkpoints in a training of "
            f"{recipe.num_epochs(number)} epochs (round {number})"
        )
    if recipe.members.kind != "checkpoints" and recipe.fusion.method == "last":
        raise ValueError(
            f"fusion.method: found 'last', which is the last checkpoint of one training, but members.kind is "
            f"'{recipe.members.kind}'; expected 'checkpoints', or fusion.method=mean-softmax"
        )


def check_selection(recipe: Recipe, number: int) -> None:
    """A round's rule needs members, or an earlier round, to compare."""
    rule = recipe.selection_of(number).rule
    if rule.needs == "checkpoints" and recipe.members.kind != "checkpoints":
        raise ValueError(
            f"selection.rule: found '{rule.name}', which compares the checkpoints of one training, but members.kind "
            f"is '{recipe.members.kind}'; expected members.kind=checkpoints"
        )
    if recipe.selection.complete and recipe.fusion.uncertain_organs == "ignore":
        raise ValueError(
            "selection.complete: refuses cases that lack an organ, but fusion.uncertain_organs is 'ignore', which "
            "judges organ by organ; use only one of the two"
        )
    fraction = recipe.selection_of(number).top_fraction
    if fraction is not None and recipe.fusion.uncertain_organs == "ignore":
        raise ValueError(
            f"selection.top_fraction: found {fraction:g} in round {number}, the best share of the cases, but "
            "fusion.uncertain_organs is 'ignore', which judges organ by organ; expected selection.top_fraction=null"
        )
    if rule.needs == "rounds":
        _check_round_change(recipe, number)
    if not recipe.has_one_member(number):
        return
    for key, given, needed in (
        ("selection.rule", rule.name, "all" if rule.judges_agreement else rule.name),
        ("selection.per_organ", recipe.selection.per_organ, {}),
        ("fusion.uncertain_organs", recipe.fusion.uncertain_organs, "drop-case"),
        ("stop.patience", recipe.stop.patience, None),
    ):
        if given != needed:
            raise ValueError(
                f"{key}: found {given!r}, but with members.count=1 there is no agreement to judge by "
                f"in round {number}; expected {needed!r}, or more members"
            )


def _check_round_change(recipe: Recipe, number: int) -> None:
    if recipe.starts(number):
        raise ValueError(
            f"selection.rule: found 'round-change' for round {number}, but it compares the label maps of "
            "consecutive rounds; give another rule for it, for example [all, round-change]"
        )
    for key, given, needed in (
        ("selection.per_organ", recipe.selection.per_organ, {}),
        ("fusion.uncertain_organs", recipe.fusion.uncertain_organs, "drop-case"),
    ):
        if given != needed:
            raise ValueError(
                f"{key}: found {given!r}, but rule 'round-change' of round {number} judges whole cases; expected "
                f"{needed!r}, or another rule"
            )


def check_start(recipe: Recipe) -> None:
    """A final training that starts from a member's weights must have its network."""
    final = recipe.final
    for key, given, fits in (
        ("loops", [loop.name for loop in recipe.loops], not recipe.loops),
        ("final.planner", final.planner, final.planner is None),
        ("final.configuration", final.configuration, final.configuration is None),
        ("final.plan", final.plan.changes(), not final.plan.changes()),
    ):
        if not fits:
            raise ValueError(
                f"{key}: found {given!r}, but with final.start=member the final training has the member's network; "
                "expected none, or final.start=scratch"
            )


def check_going_on(recipe: Recipe) -> None:
    """Rounds that go on from the weights of the round before have one member each."""
    several = [number for number in range(recipe.final_round) if not recipe.has_one_member(number)]
    if several:
        raise ValueError(
            f"members.start: found 'member', but round {several[0]} has several members, which would agree because "
            "they all started from the same network; expected members.count=1, or members.start=scratch"
        )
    if recipe.loops:
        raise ValueError("members.start: found 'member', but each loop trains other organs; expected 'scratch'")
