"""What labelling says of one case in one round: a JSON file per case, whose presence says that the case is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnunet_flare.files import read_json, write_json

LABELLED = (
    {"failed": str},
    {
        "agreement": {str: (float, None)},
        "volume_mm3": {str: float},
        "members": int,
        "odd": [str],
        "label_sha256": str,
        "weights?": [str],
        "present?": {str: bool},
        "absent_pairs?": {str: float},
        "steady?": {str: (float, None)},
        "absent_copies?": {str: float},
        "change?": (float, None),
    },
)
"""What such a file looks like: the case was set aside, or labelled."""


@dataclass(frozen=True)
class LabelledCase:
    """One case in one round.

    Attributes:
        failed: why it has no label; the rest is empty then.
        agreement: what the round's rule judges by, of each organ; None with one member.
        present: whether any member found the organ.
        absent_pairs: share of the compared pairs of members that both lack the organ, and count 1 in ``agreement``.
        steady: mean Dice of each organ with the labels of the scan's changed copies, where the round's rule asks.
        absent_copies: share of the copies that lack the organ as the label does, and count 1 in ``steady``.
        volume_mm3: of each organ in the fused label.
        members: how many label maps there are.
        change: how much the label map changed since the round before, where the recipe asks for it.
        label_sha256: hash of the fused label on the network's grid.
        weights: digests of the checkpoints of a given model, which somebody may train again.
        odd: what is unusual about the scan, in words.
        seconds: time of labelling.
    """

    failed: str | None = None
    agreement: Mapping[str, float | None] = field(default_factory=dict)
    present: Mapping[str, bool] = field(default_factory=dict)
    absent_pairs: Mapping[str, float] = field(default_factory=dict)
    steady: Mapping[str, float | None] = field(default_factory=dict)
    absent_copies: Mapping[str, float] = field(default_factory=dict)
    volume_mm3: Mapping[str, float] = field(default_factory=dict)
    members: int = 0
    change: float | None = None
    label_sha256: str | None = None
    weights: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def lacking(self) -> list[str]:
        """Organs that its label does not have."""
        return [organ for organ, volume in self.volume_mm3.items() if not volume]

    def absence(self, organ: str) -> float:
        """Share of the pairs that both lack an organ; files of older versions say only whether anyone found it."""
        return self.absent_pairs.get(organ, 0.0 if self.present.get(organ, True) else 1.0)

    def steadiness(self, organ: str) -> float:
        """How steady an organ's label is; NaN where that was not measured."""
        value = self.steady.get(organ)
        return float("nan") if value is None else float(value)

    def value(self, organ: str) -> float:
        """Agreement of an organ; NaN where it is not known."""
        value = self.agreement[organ]
        return float("nan") if value is None else float(value)


def read_labelled_case(path: Path, *, remedy: str) -> LabelledCase:
    """Read a case's file; ``remedy`` is what to do where it is damaged.

    Raises:
        InputError: for a damaged file.
    """
    document: dict[str, Any] = read_json(path, LABELLED, remedy=remedy)
    known = {key: value for key, value in document.items() if key in LabelledCase.__dataclass_fields__}
    return LabelledCase(**{**known, **{key: tuple(known.get(key, ())) for key in ("odd", "weights")}})


def write_labelled_case(path: Path, case: str, number: int, labelled: LabelledCase) -> None:
    """Write the file of a case in round ``number``."""
    said = {"failed": labelled.failed} if labelled.failed is not None else asdict(labelled)
    if labelled.failed is None:
        del said["failed"]
    write_json(path, {"case": case, "round": number, **said})
