"""What ``flare-predict`` does where nothing is said: an exported model's own defaults, else the command's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_flare.inference.exported import StoredPostprocessing

STEP_SIZE, TTA, NONE = 0.9, "none", "none"


def fill_in(args: argparse.Namespace, folder: Path, dataset: dict[str, Any]) -> StoredPostprocessing | None:
    """Set what the user did not give: step size, augmentation, coarse model and post-processing.

    Returns:
        The post-processing that lies in an exported model and is wanted.

    Raises:
        InputError: when the exported model is damaged or newer than this program.
    """
    manifest: dict[str, Any] = {"step_size": STEP_SIZE, "tta": TTA, "roi": None, "postprocess": None}
    if (folder / "exported.json").is_file():
        from nnunet_flare.inference.exported import Exported

        manifest = Exported.read(folder).manifest
    if args.step_size is None:
        args.step_size = manifest["step_size"]
    if args.tta is None:
        args.tta = NONE if args.disable_tta else manifest["tta"]
    if args.roi is None:
        args.roi = NONE
        if manifest["roi"] is not None:
            from nnunet_flare.inference.exported import COARSE

            args.roi = str(folder / COARSE)
            args.roi_rule = args.roi_rule or manifest["roi"]["rule"]
            args.roi_margin = manifest["roi"]["margin_mm"] if args.roi_margin is None else args.roi_margin
    if args.postprocess is None:
        args.postprocess = NONE
        if manifest["postprocess"] is not None:
            from nnunet_flare.inference.exported import StoredPostprocessing

            return StoredPostprocessing(manifest["postprocess"], dataset["labels"])
    return None
