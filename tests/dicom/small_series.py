"""Small scans written as DICOM series, one file a slice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_flare.images import Volume, to_sitk


def write_series(folder: Path, volume: Volume, *, uid: str = "1.2.3.4", prefix: str = "IM", skip: int | None = None):
    """One file a slice, named so that the order of names is not that of positions."""
    folder.mkdir(parents=True, exist_ok=True)
    image = to_sitk(volume)
    direction = image.GetDirection()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    count = image.GetSize()[2]
    for z in range(count):
        if z == skip:
            continue
        plane = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        orientation = [direction[i] for i in (0, 3, 6, 1, 4, 7)]
        tags = {
            "0008|0060": "CT",
            "0008|0018": f"{uid}.{z}",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0020|0013": str(count - z),
            "0020|0032": "\\".join(f"{p:.6f}" for p in position),
            "0020|0037": "\\".join(f"{o:.6f}" for o in orientation),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            plane.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{prefix}{(z * 7) % count:03d}.dcm"))
        writer.Execute(plane)


def write_patient_series(folder: Path, volume: Volume) -> Path:
    """A CT series with all that a scanner writes of patient, study and frame of reference; file names in no order."""
    import pydicom

    folder.mkdir(parents=True)
    study, series, frame = pydicom.uid.generate_uid(), pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    direction = np.reshape(volume.direction, (3, 3))
    for z, plane in enumerate(volume.array):
        slice_ = pydicom.Dataset()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        slice_.file_meta.MediaStorageSOPClassUID = slice_.SOPClassUID = pydicom.uid.CTImageStorage
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID = pydicom.uid.generate_uid()
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = study, series, frame
        slice_.PatientID, slice_.PatientName, slice_.PatientSex, slice_.PatientBirthDate = "7", "P^Q", "O", ""
        slice_.StudyID, slice_.StudyDate, slice_.StudyTime, slice_.AccessionNumber = "1", "20200101", "120000", ""
        slice_.ReferringPhysicianName, slice_.PositionReferenceIndicator = "", ""
        slice_.Modality, slice_.SeriesNumber, slice_.InstanceNumber = "CT", 1, z + 1
        slice_.ImageOrientationPatient = [f"{v:.6f}" for v in (*direction[:, 0], *direction[:, 1])]
        at = np.asarray(volume.origin) + direction[:, 2] * z * volume.spacing_mm[0]
        slice_.ImagePositionPatient = [f"{v:.6f}" for v in at]
        slice_.PixelSpacing, slice_.SliceThickness = list(volume.spacing_mm[1:]), volume.spacing_mm[0]
        slice_.Rows, slice_.Columns = plane.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 1
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.RescaleIntercept, slice_.RescaleSlope = 15, 0, 1
        slice_.PixelData = plane.astype("<i2").tobytes()
        slice_.save_as(folder / f"IM{(z * 5) % len(volume.array):03d}.dcm", enforce_file_format=True)
    return folder
