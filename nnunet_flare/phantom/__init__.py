"""Synthetic abdominal CTs with the 13 FLARE organs: the data that the demo, the tests and the benchmarks run on.

A patient is a set of implicit shapes in millimetres (:mod:`~nnunet_flare.phantom.anatomy`,
:mod:`~nnunet_flare.phantom.surroundings`), bent by a smooth deformation, painted on any grid
(:mod:`~nnunet_flare.phantom.painting`) and scanned (:mod:`~nnunet_flare.phantom.scan`). What varies, and how much, is
a table (:mod:`~nnunet_flare.phantom.domains`). The data set around it is written by
:mod:`~nnunet_flare.phantom.dataset`.
"""

from nnunet_flare.phantom.dataset import DATASET, write_phantom
from nnunet_flare.phantom.scan import DEMO_SIZE, FIELD_OF_VIEW_MM, degrade, make_phantom

__all__ = ["DATASET", "DEMO_SIZE", "FIELD_OF_VIEW_MM", "degrade", "make_phantom", "write_phantom"]
