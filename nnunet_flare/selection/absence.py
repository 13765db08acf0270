"""What it is worth that members agree on an organ's absence.

Two members that both miss an organ agree on it as perfectly as two that draw it alike, and with the papers' rule (a
pair without the organ counts 1) an organ that bad members miss makes a case look good. So there are other ways:

- ``one``: the papers' rule;
- ``skip``: such pairs do not count; an organ that nobody found is left out of the case's score;
- ``zero``: such pairs count 0;
- ``expected``: such a pair counts as much as the absence is likely, by the labelled cases
  (:mod:`nnunet_flare.selection.anatomy`).
"""

from __future__ import annotations

import numpy as np

from nnunet_flare.selection.rule import Absent


def with_absence(
    agreement: np.ndarray, absent: np.ndarray, how: Absent, *, presence: np.ndarray | None = None
) -> np.ndarray:
    """(cases, organs) agreement in which the pairs that both lack an organ count as ``how`` says.

    Args:
        agreement: (cases, organs) mean Dice over pairs, in which such pairs counted 1; NaN stays NaN.
        absent: (cases, organs) share of such pairs, 0 to 1.
        how: what they count.
        presence: (cases, organs) probability that the organ is there, for ``expected``.

    Returns:
        The table; with ``skip``, NaN where no pair is left.

    Raises:
        ValueError: for ``expected`` without ``presence``.
    """
    if how == "one":
        return np.asarray(agreement, dtype=float)
    found = np.asarray(agreement, dtype=float) - absent
    if how == "zero":
        return found
    if how == "skip":
        left = 1.0 - np.asarray(absent, dtype=float)
        return np.where(left > 0, found / np.where(left > 0, left, 1.0), np.nan)
    if presence is None:
        raise ValueError("absent 'expected' needs the probability that each organ is present")
    return np.asarray(found + absent * (1.0 - presence))
