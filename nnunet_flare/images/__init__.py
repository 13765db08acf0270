"""Scans and label maps: reading, checking and writing them, geometry carried exactly.

Arrays are ``(Z, Y, X)`` as stored in the file (no reorientation), spacings ``(z, y, x)`` in mm; origin and direction
stay in SimpleITK's ``(x, y, z)`` order and are only ever copied.
"""

from nnunet_flare.images.checks import check_values, oddities
from nnunet_flare.images.file_names import NIFTI_SUFFIXES, SUFFIXES, find_cases, stem_of, suffix_of
from nnunet_flare.images.read import from_sitk, read_labels, read_labels_alone, read_volume
from nnunet_flare.images.volume import Volume, geometry_difference, rounding_difference
from nnunet_flare.images.write import to_sitk, write_labels, write_volume

__all__ = [
    "NIFTI_SUFFIXES",
    "SUFFIXES",
    "Volume",
    "check_values",
    "find_cases",
    "from_sitk",
    "geometry_difference",
    "oddities",
    "read_labels",
    "read_labels_alone",
    "read_volume",
    "rounding_difference",
    "stem_of",
    "suffix_of",
    "to_sitk",
    "write_labels",
    "write_volume",
]
