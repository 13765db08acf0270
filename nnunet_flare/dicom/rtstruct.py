"""A label map of a DICOM series as an RT structure set (RTSTRUCT) of that series; needs the extra ``dicom``.

Written with pydicom alone; rt-utils, which does the same, brings OpenCV for its contours.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare import __version__
from nnunet_flare.dicom.contours import outlines
from nnunet_flare.dicom.segmentation import MODEL_NAME, UTF_8
from nnunet_flare.dicom.series import ordered_files
from nnunet_flare.drawing import colour, rgb
from nnunet_flare.errors import CaseError
from nnunet_flare.files import replacing

FOLDER, SUFFIX = "rtstruct", ".dcm"

SERIES_NUMBER = 901
"""Beside that of the segmentation, far above a scanner's own series."""

PATIENT_AND_STUDY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
    "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName", "SpecificCharacterSet",
    "PositionReferenceIndicator",
)  # fmt: skip
"""What the structure set takes over from the series."""

REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
            "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")  # fmt: skip

DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"
"""The class of the study that a frame of reference belongs to (retired, and still expected)."""


def write_rtstruct(
    path: Path,
    labels: np.ndarray,
    series: Path,
    names: Mapping[int, str],
    case: str,
    parts: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Write a label map (Z, Y, X), as ``read_series`` orders the series, as closed contours in its slices, by rename.

    Args:
        path: the file to write.
        labels: ids among those of ``names``, and 0.
        series: the folder of the series.
        names: of the label ids. Each is a region of interest, also where it is empty.
        case: for the error's text.
        parts: what a region holds, as :func:`nnunet_flare.labels.drawn_parts`; without it each id stands alone.

    Raises:
        CaseError: when the series lacks what a structure set must refer to.
    """
    import pydicom

    files = ordered_files(series, case)
    sources = [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in files]
    for file, source in zip(files, sources, strict=True):
        missing = [name for name in REQUIRED if not source.get(name)]
        if missing:
            raise CaseError(case, f"{file}: has no {', '.join(missing)}, but a structure set must refer to it")
    document = _document(sources)
    if not "".join(names.values()).isascii():
        document.SpecificCharacterSet = UTF_8
    for number, (label, name) in enumerate(names.items(), start=1):
        document.StructureSetROISequence.append(_roi(number, name, sources[0].FrameOfReferenceUID))
        held = [label] if parts is None else list(parts[label])
        region = labels if held == [label] else np.where(np.isin(labels, held), np.uint8(label), np.uint8(0))
        document.ROIContourSequence.append(_contours(number, label, region, sources))
        document.RTROIObservationsSequence.append(_observation(number))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        document.save_as(temporary, enforce_file_format=True)


def is_kept_rtstruct(path: Path) -> bool:
    """Whether a structure set was written whole."""
    import pydicom

    try:
        document = pydicom.dcmread(path)
        return len(document.StructureSetROISequence) == len(document.RTROIObservationsSequence) > 0
    except Exception:  # a damaged file can raise anything
        return False


def _document(sources: Sequence[Any]) -> Any:
    """A structure set without regions."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid

    first, now = sources[0], datetime.datetime.now()
    document = Dataset()
    document.file_meta = FileMetaDataset()
    document.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # explicit, no contour may pass 64 kB
    document.file_meta.MediaStorageSOPClassUID = document.SOPClassUID = RTStructureSetStorage
    document.file_meta.MediaStorageSOPInstanceUID = document.SOPInstanceUID = generate_uid()
    for name in PATIENT_AND_STUDY:
        if name in first:
            document[name] = first[name]
        elif name not in ("SpecificCharacterSet", "StudyDescription"):  # may be empty, must be there
            setattr(document, name, "")
    document.Modality, document.SeriesInstanceUID = "RTSTRUCT", generate_uid()
    document.SeriesNumber, document.InstanceNumber = SERIES_NUMBER, 1
    document.SeriesDescription = "Automatic segmentation"
    document.Manufacturer = document.ManufacturerModelName = MODEL_NAME
    document.SoftwareVersions, document.OperatorsName = __version__, ""
    document.StructureSetLabel = "Segmentation"
    document.StructureSetDate, document.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    document.ApprovalStatus = "UNAPPROVED"
    document.FrameOfReferenceUID = first.FrameOfReferenceUID
    document.ReferencedFrameOfReferenceSequence = [_frame(sources)]
    document.StructureSetROISequence, document.ROIContourSequence = [], []
    document.RTROIObservationsSequence = []
    return document


def _frame(sources: Sequence[Any]) -> Any:
    """The frame of reference with the study, the series and its images."""
    from pydicom.dataset import Dataset

    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = sources[0].SeriesInstanceUID
    series.ContourImageSequence = [_image(source) for source in sources]
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = DETACHED_STUDY, sources[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = sources[0].FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _image(source: Any) -> Any:
    from pydicom.dataset import Dataset

    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    return image


def _roi(number: int, name: str, frame: str) -> Any:
    from pydicom.dataset import Dataset

    roi = Dataset()
    roi.ROINumber, roi.ReferencedFrameOfReferenceUID, roi.ROIName = number, frame, name[:64]
    roi.ROIGenerationAlgorithm, roi.ROIGenerationDescription = "AUTOMATIC", f"{MODEL_NAME} {__version__}"
    return roi


def _observation(number: int) -> Any:
    from pydicom.dataset import Dataset

    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = number
    observation.RTROIInterpretedType, observation.ROIInterpreter = "ORGAN", ""
    return observation


def _contours(number: int, label: int, labels: np.ndarray, sources: Sequence[Any]) -> Any:
    from pydicom.dataset import Dataset

    region = Dataset()
    region.ReferencedROINumber = number
    region.ROIDisplayColor = [round(255 * part) for part in rgb(colour(label))]
    region.ContourSequence = []
    for source, places in _places(label, labels, sources):
        contour = Dataset()
        contour.ContourImageSequence = [_image(source)]
        contour.ContourGeometricType = "CLOSED_PLANAR"
        contour.NumberOfContourPoints = len(places)
        contour.ContourData = [f"{value:.4f}" for value in places.ravel()]
        region.ContourSequence.append(contour)
    return region


def _places(label: int, labels: np.ndarray, sources: Sequence[Any]) -> Iterator[tuple[Any, np.ndarray]]:
    """Each polygon (n, 3) in the patient's mm, with its slice."""
    for plane, source in zip(labels, sources, strict=True):
        along_row, along_column = np.reshape(np.asarray(source.ImageOrientationPatient, float), (2, 3))
        origin = np.asarray(source.ImagePositionPatient, float)
        between_rows, between_columns = (float(mm) for mm in source.PixelSpacing)
        for polygon in outlines(plane == label):
            rows, columns = polygon[:, :1], polygon[:, 1:]
            yield source, origin + columns * between_columns * along_row + rows * between_rows * along_column
