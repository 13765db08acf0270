"""Hours of a run's trainings by arithmetic, where no iteration can be timed: no plans yet, or no GPU here.

nnU-Net's developers publish how long its own trainings of 1000 epochs take on one NVIDIA A100 (their page on the
residual encoder presets). Another network takes as much longer as it computes more: its floating point operations are
counted on PyTorch's ``meta`` device, which computes nothing. Loading and augmentation are in nnU-Net's figures. GPUs
differ by a factor of two or more, and so does this estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from nnunet_flare.errors import FlareError
from nnunet_flare.rounds.iteration_time import VALIDATION_COST, iteration_cost
from nnunet_flare.rounds.run.configurations import check_names
from nnunet_flare.rounds.run.dataset import dataset_json
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base

GPU = "an NVIDIA A100"
HOURS = {
    "ExperimentPlanner": 9.0,
    "nnUNetPlannerResEncM": 12.0,
    "nnUNetPlannerResEncL": 35.0,
    "nnUNetPlannerResEncXL": 66.0,
}
"""nnU-Net's own figures, by planner."""
ITERATIONS = 1000 * (250 + VALIDATION_COST * 50)
"""Of such a training, validation counted as what it costs."""
STOCK_PATCH = (128, 128, 128)
"""What stock plans for abdominal CT, with a batch of 2: the network that :data:`HOURS` is counted against."""


def expected_seconds(run: Run, base: Base) -> float | None:
    """Seconds of one training iteration of a network on :data:`GPU`; None where only the data decide its network."""
    from nnunet_flare.planners.expected import expected_configuration
    from nnunet_flare.recipes.recipe import GIVEN_MODEL
    from nnunet_flare.rounds.stages.plan import planner_class

    if base.plans_file.is_file():
        configuration = check_names(run, base)
    elif base.planner == GIVEN_MODEL:
        return None
    else:
        expected = expected_configuration(planner_class(base.planner), base.configuration, _changes(base))
        if expected is None:
            is_stock = base.planner in HOURS and not base.changes
            return HOURS[base.planner] * 3600 / ITERATIONS if is_stock else None
        configuration = expected
    dataset = dataset_json(run)
    try:
        operations = iteration_cost(run, base, configuration, dataset, "meta", _count)
    except (NotImplementedError, FlareError):  # an operation that knows no meta device: the network alone
        operations = iteration_cost(run, None, configuration, dataset, "meta", _count)
    return HOURS["ExperimentPlanner"] * 3600 / ITERATIONS * operations / _stock_operations(run)


def _changes(base: Base) -> dict[str, Any]:
    """The recipe's changes to a plan that name numbers; the network of given weights is not known before."""
    return {key: value for key, value in base.changes.items() if key != "network"}


def _stock_operations(run: Run) -> float:
    from nnunet_flare.planners.expected import stock_configuration

    document = dataset_json(run)
    return _operations_of_stock(len(document["channel_names"]), len(document["labels"]), stock_configuration)


@cache
def _operations_of_stock(channels: int, classes: int, stock: Callable[..., dict[str, Any]]) -> float:
    dataset = {
        "channel_names": {str(number): "CT" for number in range(channels)},
        "labels": {f"label {number}": number for number in range(classes)},
    }
    return iteration_cost(None, None, stock(STOCK_PATCH), dataset, "meta", _count)


def _count(step: Callable[[], None]) -> float:
    """Floating point operations of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())
