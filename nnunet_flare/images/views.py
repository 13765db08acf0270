"""What a library makes of an image's header."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_flare.images.geometry import TO_OTHER_WORLD, matrix_of
from nnunet_flare.images.nifti_header import Header

LAST_CODE = 4
"""The last code of a space that every version of nibabel knows."""


@dataclass(frozen=True)
class View:
    """What a library makes of a header: spacing (z, y, x) in mm, origin and direction (LPS), slope and intercept.

    ``affine`` is nibabel's matrix (16 numbers, row-major, RAS), which may be sheared; None for SimpleITK. ``refusal``
    says why stock nnU-Net's reader refuses the file, although what it holds is clear.
    """

    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    slope: float = 1.0
    intercept: float = 0.0
    affine: tuple[float, ...] | None = None
    refusal: str | None = None

    @property
    def matrix(self) -> np.ndarray:
        """From voxel indices to LPS, see :mod:`nnunet_flare.images.geometry`."""
        if self.affine is not None:
            return TO_OTHER_WORLD @ np.reshape(self.affine, (4, 4))
        return matrix_of(self.spacing_mm, self.origin, self.direction)


def numbers(header: Header, offset: int, kind: str, count: int) -> tuple[float, ...]:
    """Numbers of a header from a byte on, in the file's byte order; ``kind`` as NumPy writes it (``f4``)."""
    order = "<" if int.from_bytes(header.raw[:4], "little") == len(header.raw) else ">"
    return tuple(np.frombuffer(header.raw, order + kind, count, offset).astype(float).tolist())


def last_line(error: Exception) -> str:
    """What a library's error says, without where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Reason:")]  # errno of some earlier call
    return lines[-1] if lines else type(error).__name__
