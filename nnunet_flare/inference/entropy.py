"""How much probabilities leave open."""

from __future__ import annotations

import numpy as np

TINY = np.finfo(np.float32).tiny
"""The logarithm of a probability of 0 is that of this, and 0 times it is 0."""


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of probabilities (K, ...) that add up to 1, as a share of the most that K classes can have."""
    found = -(probabilities * np.log(np.maximum(probabilities, TINY))).sum(axis=0)
    return np.asarray(found / np.log(len(probabilities)), np.float32)


def region_entropy(probabilities: np.ndarray) -> np.ndarray:
    """The mean over regions (K, ...) of the entropy of being in it or not, as a share of one bit."""
    both = np.stack([probabilities, 1 - probabilities])
    return np.asarray(entropy(both).mean(axis=0), np.float32)
