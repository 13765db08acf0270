"""Semi-supervised abdominal CT segmentation on stock nnU-Net v2.

Importing this package is cheap: every start of Python does so (see :mod:`nnunet_flare.plugin`), so nothing but the
standard library may be imported here.
"""

__version__ = "0.2.0"
