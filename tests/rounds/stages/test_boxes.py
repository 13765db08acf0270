"""Part of a scan is preprocessed, and its label map comes back to the whole scan, however the scan is stored."""

from __future__ import annotations

import model_folders as models
import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_flare import plugin
from nnunet_flare.images import Volume, read_volume, write_volume
from nnunet_flare.images.orientation import turn_for_reader
from nnunet_flare.inference.export import labels_on_image_grid
from nnunet_flare.rounds.stages.boxes import preprocess_box, turned

SHAPE, BOX = (12, 16, 20), ((2, 9), (5, 15), (0, 13))
SPACING = (4.0, 1.7, 2.3)
ORIENTATIONS = {
    "LPS": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    "feet first": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal": (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient"])
@pytest.mark.parametrize("name", ["DefaultPreprocessor", "FlareFixedSizePreprocessor"])
def test_a_label_of_the_box_comes_back_to_its_place_in_the_scan(name, reader, orientation, tmp_path):
    labels = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
    scan = Volume(labels.astype(np.int16) * 100 + 1, SPACING, (-10.0, 20.0, 5.5), ORIENTATIONS[orientation])
    write_volume(tmp_path / "a_0000.nii.gz", scan)
    turn = turn_for_reader(reader, scan)
    box = turned(BOX, SHAPE, turn)
    plan = models.plans(reader=reader, normalisation="NoNormalization")
    configuration = plan["configurations"]["3d_fullres"]
    # on the grid that the scan has anyway, so that nothing is interpolated
    configuration |= {"spacing": [SPACING[axis] for axis in turn.axes], "patch_size": [b - a for a, b in box]}
    if name != "DefaultPreprocessor":
        configuration |= {"preprocessor_name": name, "median_image_size_in_voxels": configuration["patch_size"]}
    manager = PlansManager(plan)
    opened = manager.get_configuration("3d_fullres")
    preprocessor = plugin.resolve(name) or opened.preprocessor_class
    data, seg, properties = preprocess_box(
        preprocessor(verbose=False), [str(tmp_path / "a_0000.nii.gz")], box, manager, opened, models.dataset_json()
    )
    assert data.shape == seg.shape == (1, *(b - a for a, b in box))
    found = torch.from_numpy(np.round((data[0] - 1) / 100).astype(np.int64))
    scores = torch.nn.functional.one_hot(found, 4).permute(3, 0, 1, 2).float()
    label_manager = manager.get_label_manager(models.dataset_json())
    back = labels_on_image_grid(scores, properties, manager, opened, label_manager)
    manager.image_reader_writer_class().write_seg(back, str(tmp_path / "a.nii.gz"), properties)
    expected = np.zeros(SHAPE, np.uint8)
    inside = tuple(slice(low, high) for low, high in BOX)
    expected[inside] = labels[inside]
    stored = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(stored.array, expected)
    assert stored.direction == pytest.approx(scan.direction) and stored.origin == pytest.approx(scan.origin)
