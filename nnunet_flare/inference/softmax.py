"""From scores to probabilities, and how much they leave open."""

from __future__ import annotations

import numpy as np

TINY = np.finfo(np.float32).tiny
"""The logarithm of a probability of 0 is that of this, and 0 times it is 0."""


def softmax(scores: np.ndarray, axis: int) -> np.ndarray:
    """The softmax of float32 scores, in their own memory."""
    scores -= scores.max(axis=axis, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=axis, keepdims=True)
    return scores


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """The sigmoid of float32 scores."""
    with np.errstate(over="ignore"):  # exp gives infinity, and its inverse the 0 that is meant
        return np.asarray(1 / (1 + np.exp(-scores)), np.float32)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of probabilities (K, ...) that add up to 1, as a share of the most that K classes can have."""
    found = -(probabilities * np.log(np.maximum(probabilities, TINY))).sum(axis=0)
    return np.asarray(found / np.log(len(probabilities)), np.float32)


def region_entropy(probabilities: np.ndarray) -> np.ndarray:
    """The mean over regions (K, ...) of the entropy of being in it or not, as a share of one bit."""
    both = np.stack([probabilities, 1 - probabilities])
    return np.asarray(entropy(both).mean(axis=0), np.float32)
