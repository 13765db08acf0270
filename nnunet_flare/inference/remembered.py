"""Trained models that are opened without PyTorch and nnU-Net, because their networks were converted before.

Importing both and reading a checkpoint takes longer than a small scan's prediction. So the cache notes, under the
digests of the checkpoint and of its model's documents, which converted network is theirs and what prediction needs of
the plans. Such a model then computes what it computed before, as an exported one does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare.digests import file_digest
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.inference.cache import NETWORKS, cache_folder, cached, find, key_of, made_by
from nnunet_flare.inference.cpus import limit_torch_threads
from nnunet_flare.inference.exported import NETWORK
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.opened import Execution, Runtime
from nnunet_flare.inference.plain_plans import (
    SHAPE,
    PlainConfiguration,
    PlainModel,
    PlainPlans,
    check_plain,
    plain_plans,
)
from nnunet_flare.wording import first_line

if TYPE_CHECKING:
    from nnunet_flare.inference.model import Model

log = logging.getLogger(__name__)

KIND = "models"

NOTE = "model.json"

FORMAT = 2
"""Counts up when what is noted, or what is refused of a model, changes."""

OF_NOTE: dict[str, Any] = {
    "network": str,
    "configuration": str,
    "mirroring_axes": (None, [int]),
    "plans": SHAPE,
    "dataset": dict,
}
"""What a note looks like; ``network`` is the name of its entry among the converted networks."""


@dataclass(frozen=True, eq=False)
class RememberedModel(PlainModel):
    """A member whose network was converted before, see :class:`nnunet_flare.inference.opened.Opened`."""

    member: Member
    network: Path
    trusted: bool

    def __str__(self) -> str:
        return str(self.member)

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return Path(self.member.folder)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that makes the model."""
        return self.member.files

    def runtime(self, how: Execution) -> Runtime:
        """OpenVINO's; where it does not run the network, what the model is without the cache."""
        from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

        try:
            return OpenVinoRuntime(self.network, precision=how.precision, two_d=how.two_d)
        except (RuntimeError, ImportError) as error:
            log.info("%s: the converted network cannot be used (%s)", self, first_line(error))
        from nnunet_flare.inference.model import open_model

        limit_torch_threads()
        return open_model(self.member, trust_checkpoint=self.trusted, second_stage=True).runtime(how)


def remember(model: Model, network: Path) -> None:
    """Note that a model's network lies converted in an entry of the cache, if it needs nothing of nnU-Net besides."""
    plans, configuration = model.plans_manager, model.configuration_manager
    try:
        check_plain(plans.plans, configuration, str(model))
    except InputError:
        return
    note = {
        "network": network.parent.name,
        "configuration": model.configuration_name,
        "mirroring_axes": None if model.mirroring_axes is None else list(model.mirroring_axes),
        "plans": plain_plans(plans, configuration.configuration, model.configuration_name),
        "dataset": model.dataset_json,
    }
    key = _key(model.member, trusted=model.trusted)
    if key is not None and model.stamps == model.member.stamps():  # else the files are others than those that were read
        cached(cache_folder(KIND), key, lambda folder: write_json(folder / NOTE, note))


def recall(members: Sequence[Member], *, trusted: bool) -> list[RememberedModel] | None:
    """The members, if the network of each was converted before; else None."""
    found = []
    for member in members:
        model = _recall(member, trusted=trusted)
        if model is None:
            return None
        found.append(model)
    return found


def _recall(member: Member, *, trusted: bool) -> RememberedModel | None:
    notes, networks = cache_folder(KIND), cache_folder(NETWORKS)
    key = None if notes is None or not any(notes.iterdir()) else _key(member, trusted=trusted)
    entry = None if key is None else find(notes, key)
    if entry is None:
        return None
    note = read_json(entry / NOTE, OF_NOTE)
    network = find(networks, note["network"])
    if network is None:
        return None
    axes = note["mirroring_axes"]
    return RememberedModel(
        PlainPlans(note["plans"]),
        PlainConfiguration(note["plans"]["configurations"][note["configuration"]]),
        note["dataset"],
        None if axes is None else tuple(axes),
        member=member,
        network=network / NETWORK,
        trusted=trusted,
    )


def _key(member: Member, *, trusted: bool) -> str | None:
    """A name that changes with all that makes the model; None where a file cannot be read, which opening it says."""
    try:
        digests = [file_digest(path) for path in member.files]
    except OSError:
        return None
    return key_of(FORMAT, *made_by(), digests, trusted)
