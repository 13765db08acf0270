"""DICOM: series in, segmentations and structure sets out."""
