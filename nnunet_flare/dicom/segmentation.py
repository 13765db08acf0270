"""A label map of a DICOM series as a DICOM segmentation (SEG) of that series; needs the extra ``dicom``.

Segments are numbered from 1 in the order of the label ids, as the standard asks, and named as in dataset.json; where
the ids are 1 to N, which they are in nnU-Net, number and id are the same.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare import __version__
from nnunet_flare.dicom.series import ordered_files
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import replacing

SUFFIX = ".dcm"

ANATOMY: tuple[tuple[str, str], ...] = (
    ("lesion|tumou?r", "Lesion"),  # first, as it may be an organ's
    ("liver", "Liver"),
    ("adrenal", "AdrenalGland"),
    ("kidney", "Kidney"),
    ("spleen", "Spleen"),
    ("pancreas", "Pancreas"),
    ("aorta", "Aorta"),
    ("vena.?cava|postcava", "InferiorVenaCava"),
    ("gall.?bladder", "Gallbladder"),
    ("esophagus", "Esophagus"),
    ("stomach", "Stomach"),
    ("duodenum", "Duodenum"),
)
"""A pattern in a label's name and the SNOMED CT concept of its segment; any other label is an ``Organ``."""

SERIES_NUMBER = 900
"""Far above a scanner's own series."""

MODEL_NAME = "nnunet-flare"

UTF_8 = "ISO_IR 192"
"""The character set where labels have other names than the series' own set may hold."""


def check_installed(option: str = "--dicom_seg") -> None:
    """Refuse to start where the extra is missing, which an option needs.

    Raises:
        InputError: with the command that installs it.
    """
    if importlib.util.find_spec("highdicom") is None or importlib.util.find_spec("pydicom") is None:
        raise InputError(f"{option} needs highdicom and pydicom: pip install 'nnunet-flare[dicom]'")


def write_dicom_seg(
    path: Path,
    labels: np.ndarray,
    series: Path,
    names: Mapping[int, str],
    case: str,
    parts: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Write a label map (Z, Y, X), as ``read_series`` orders the series, as a DICOM SEG, by rename.

    Args:
        path: the file to write.
        labels: ids among those of ``names``, and 0.
        series: the folder of the series.
        names: of the label ids, as :func:`nnunet_flare.labels.label_names` gives them.
        case: for the error's text.
        parts: what a region holds, as :func:`nnunet_flare.labels.drawn_parts`; without it each id stands alone.
            Segments overlap where regions do.

    Raises:
        CaseError: when the series lacks what a segmentation must refer to.
    """
    import highdicom
    import pydicom

    files = ordered_files(series, case)
    sources = [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in files]
    try:
        document = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=_segments(labels, list(names), parts),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_description(at, name) for at, name in enumerate(names.values(), start=1)],
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer=MODEL_NAME,
            manufacturer_model_name=MODEL_NAME,
            software_versions=__version__,
            device_serial_number="0",
            content_label="SEGMENTATION",
            series_description="Automatic segmentation",
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CaseError(case, f"{series}: a DICOM segmentation cannot refer to it ({error})") from error
    if not "".join(names.values()).isascii():
        document.SpecificCharacterSet = UTF_8
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        document.save_as(temporary)


def _segments(labels: np.ndarray, ids: Sequence[int], parts: Mapping[int, Sequence[int]] | None) -> np.ndarray:
    """Numbers of segments (Z, Y, X), or a mask of each (Z, Y, X, segments) where regions hold several ids."""
    if parts is None or all(len(parts[label]) == 1 for label in ids):
        number = np.zeros(256, np.uint8)
        number[list(ids)] = np.arange(1, len(ids) + 1)
        return number[labels]
    return np.stack([np.isin(labels, list(parts[label])) for label in ids], axis=-1).astype(np.uint8)


def _description(number: int, name: str) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    concept = next((concept for pattern, concept in ANATOMY if re.search(pattern, name.lower())), "Organ")
    abnormal = concept == "Lesion"
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure
        if abnormal
        else codes.SCT.AnatomicalStructure,
        segmented_property_type=getattr(codes.SCT, concept),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=MODEL_NAME, version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
