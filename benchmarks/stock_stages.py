"""Where stock nnU-Net's time goes: one scan, stage by stage, in one process without workers.

    python benchmarks/stock_stages.py -i scan_0000.nii.gz -m MODEL_FOLDER -o labels.nii.gz

The same windows as ours (step 0.9, no mirroring). Prints one JSON object: seconds per stage, in the order of the work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Clock:
    """Adds up seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block under a name; what stock prints goes to the standard error."""
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def predict(image: Path, model: Path, output: Path, fold: str) -> dict[str, float]:
    """Predict a scan as stock does and return the seconds of each stage."""
    clock = Clock()
    with clock.stage("imports"):
        import torch
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    class Timed(nnUNetPredictor):
        """Stock's, with the time of the network apart from that of the sums around it."""

        def _internal_maybe_mirror_and_predict(self, x: Any) -> Any:
            with clock.stage("network"):
                return super()._internal_maybe_mirror_and_predict(x)

    with clock.stage("model"):
        predictor = Timed(0.9, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), [fold if fold == "all" else int(fold)])
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    reader = plans.image_reader_writer_class()
    with clock.stage("read"):
        data, properties = reader.read_images([str(image)])
    with clock.stage("preprocess"):
        data, _, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
            data, None, properties, plans, configuration, predictor.dataset_json
        )
    with clock.stage("sums of windows"):
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu()
    clock.seconds["sums of windows"] -= clock.seconds["network"]
    with clock.stage("export"):
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans, configuration, predictor.label_manager, properties
        )
    with clock.stage("write"):
        reader.write_seg(labels, str(output), properties)
    return clock.seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--image", type=Path, required=True)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-f", "--fold", default="0")
    args = parser.parse_args()
    print(json.dumps(predict(args.image, args.model, args.output, args.fold)))


if __name__ == "__main__":
    main()
