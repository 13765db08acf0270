"""What the checks of MetaImage and NRRD find in a file, before a reader repairs it in silence; NIfTI is read by us."""

from __future__ import annotations

from pathlib import Path

from nnunet_flare.images.metaimage import check_metaimage
from nnunet_flare.images.nrrd import check_nrrd
from nnunet_flare.images.payload import Unpacked

CHECKS = {
    (".mha", ".mhd"): check_metaimage,
    (".nrrd", ".nhdr"): check_nrrd,
}
"""File name endings, small letters, and the check of the format."""


def check_format(path: Path, case: str) -> Unpacked | None:
    """Refuse a file that a reader would take only by changing it; of other formats nothing is known.

    Returns:
        Its voxels where they had to be unpacked for that.

    Raises:
        CaseError: with what was found.
    """
    name = path.name.lower()
    for endings, check in CHECKS.items():
        if name.endswith(endings):
            return check(path, case)
    return None
