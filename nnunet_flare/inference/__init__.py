"""From a trained model and a scan to a label map on the scan's grid."""
