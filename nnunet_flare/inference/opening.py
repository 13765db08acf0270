"""Opening the checkpoints of trained models: from the cache where that is wanted and possible, else with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_flare.errors import InputError
from nnunet_flare.inference.devices import open_device
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.opened import Opened, check_intensities, check_stands_alone
from nnunet_flare.inference.remembered import recall
from nnunet_flare.inference.runtimes import choose_backend
from nnunet_flare.inference.settings import PredictionSettings


def open_members(members: Sequence[Member], settings: PredictionSettings, *, second_stage: bool) -> Sequence[Opened]:
    """Open some members; ``second_stage`` says whether they may be that of a cascade.

    Raises:
        InputError: when something is missing, damaged or unknown, or PyTorch is needed and not installed.
    """
    trust = settings.trust_checkpoint
    if settings.from_cache and choose_backend(settings.backend, open_device(settings.device)) == "openvino":
        known = recall(members, trusted=trust)
        if known is not None:
            for model in () if second_stage else known:
                check_stands_alone(model)
            return known
    try:
        from nnunet_flare.inference.model import open_model
    except ImportError as error:
        raise InputError(
            f"{members[0].folder}: a trained model's folder needs PyTorch and nnU-Net, which are not installed here "
            f"({error}); expected a folder that flare-export wrote (with exported.json)"
        ) from error
    models = [open_model(member, trust_checkpoint=trust, second_stage=second_stage) for member in members]
    for opened in models:
        check_intensities(opened)
    return models
