"""``nnUNetTrainerFlareST``: nnU-Net's trainer for labelled, partial and pseudo-labelled cases.

What it does beyond stock is said by the case roles of ``flare_cases.json`` and by the settings under ``"flare"`` in the
configuration (:mod:`nnunet_flare.trainers.settings`). Without either it trains like ``nnUNetTrainer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.evaluation.evaluate_predictions import load_summary_json, save_summary_json
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from torch import distributed as dist

from nnunet_flare.errors import InputError
from nnunet_flare.inference.torch_arrays import upload
from nnunet_flare.labels import Group
from nnunet_flare.trainers import losses
from nnunet_flare.trainers.by_role import CasesByRole
from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.ignored import DiceCEOfKnown, WeightedCrossEntropy
from nnunet_flare.trainers.lengths import class_with_length
from nnunet_flare.trainers.resolutions import samples_of
from nnunet_flare.trainers.soft_dice import SoftDiceCE, SquaredSoftDice
from nnunet_flare.trainers.validation import is_annotated, without_unannotated

PSEUDO_SHARE = "pseudo_share"
LABELLED_LOSS = "labelled_loss"
PSEUDO_LOSS = "pseudo_loss"
"""Curves: the share of the epoch's training samples that were drawn from pseudo cases, and the loss on the labels of
the other samples (labelled and partial) and of those; no numbers where none was drawn."""
WATCH_EVERY = 10
"""Of batches with both kinds the curves have the losses of one in ten."""


class nnUNetTrainerFlareST(CasesByRole):
    """Self-training: roles decide who trains, who validates, how often a case is drawn and how it is augmented."""

    curves: ClassVar[tuple[str, ...]] = (PSEUDO_SHARE, LABELLED_LOSS, PSEUDO_LOSS)

    def take_settings(self) -> None:
        super().take_settings()
        self._samples: dict[str, int] = {}

    def _build_loss(self) -> torch.nn.Module:
        loss = self.stock_loss()
        weights = self.class_weights()
        if weights is None:
            return loss
        inner: Any = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
        inner.ce = WeightedCrossEntropy(weights, ignore_index=inner.ce.ignore_index)
        return loss.to(self.device)

    @property
    def heads(self) -> Heads:
        """What the network's outputs stand for."""
        return Heads.of(self.label_manager)

    def stock_loss(self) -> torch.nn.Module:
        """Dice and cross-entropy, with deep supervision in the wrapper that weighs the resolutions.

        Stock's cross-entropy of regions is a mean over voxels and regions, but where voxels can be ignored the regions'
        sum: a label that this trainer alone ignores must not make it that much larger.
        """
        loss: Any = super()._build_loss()
        is_deep = isinstance(loss, DeepSupervisionWrapper)
        inner: Any = loss.loss if is_deep else loss
        if self.label_manager.has_regions and self.label_manager.ignore_label != self.data_label_manager.ignore_label:
            inner.weight_ce = 1 / self.label_manager.num_segmentation_heads
        if not isinstance(inner, DC_and_CE_loss) or inner.ignore_label is None:
            return loss
        if not is_deep:
            return DiceCEOfKnown(inner)
        loss.loss = DiceCEOfKnown(inner)
        return loss

    def soft_dice(self) -> torch.nn.Module:
        """The papers' soft Dice, for trainers that have it alone; ``class_weights`` add a cross-entropy."""
        weights = self.class_weights()
        dice: Any = SquaredSoftDice(self.heads)
        if self._do_i_compile():  # as stock compiles its Dice
            dice = torch.compile(dice)
        return dice if weights is None else SoftDiceCE(dice, weights, ignore_label=self.heads.ignore).to(self.device)

    def class_weights(self) -> torch.Tensor | None:
        """(classes,) weights of the cross-entropy, background first; None where the settings have none.

        Raises:
            InputError: for regions, or weights that do not fit the classes.
        """
        if self.settings.class_weights is None:
            return None
        if self.label_manager.has_regions:
            raise InputError(
                "flare.class_weights: region-based training has no cross-entropy over classes; leave it out"
            )
        n_classes = self.label_manager.num_segmentation_heads
        if isinstance(self.settings.class_weights, tuple):
            weights = np.asarray(self.settings.class_weights)
            if len(weights) != n_classes:
                raise InputError(
                    f"flare.class_weights: found {len(weights)} weights, expected {n_classes} (background first)"
                )
        else:
            weights = losses.inverse_sqrt_frequency(self._frequencies(n_classes))
        self.print_to_log_file(f"Weights of the classes in the cross-entropy: {np.round(weights, 3).tolist()}")
        return torch.as_tensor(weights, dtype=torch.float32)

    def _frequencies(self, n_classes: int) -> np.ndarray:
        """Share of each class among the voxels of the true labels, each organ where it is annotated."""
        training = self.fold_cases().training
        table = self.case_table()
        true_cases = table.with_role(training, "labelled", "partial")
        dataset = self._dataset(losses.evenly_spaced(true_cases or training, losses.MAX_CASES_COUNTED))
        counts = [losses.count_labels([dataset.load_case(case)[1][:]], n_classes) for case in dataset.identifiers]
        known = [None if table[case].is_complete else table[case].annotated for case in dataset.identifiers]
        return losses.frequencies(counts, known)

    # ------------------------------------------------------------------ steps

    def learn(self, batch: dict) -> dict[str, Any]:
        """One optimizer step, as stock's; counts how often each case is drawn."""
        for case in batch.get("keys", ()):
            self._samples[str(case)] = self._samples.get(str(case), 0) + 1
        return super().learn(batch)

    def watched(self, output: Any, target: Any, batch: dict, loss: torch.Tensor) -> dict[str, Any]:
        """The loss on the labels of labelled and partial samples, and of pseudo-labelled ones.

        Where a batch has both, it is computed again for either, in one iteration of :data:`WATCH_EVERY`; never where
        processes would have to wait for each other (batch Dice on several GPUs). ``loss`` is that on all labels.
        """
        is_pseudo = torch.tensor([self._table[str(case)].role == "pseudo" for case in batch["keys"]])
        values: dict[str, Any] = {LABELLED_LOSS: float("nan"), PSEUDO_LOSS: float("nan")}
        for curve, samples in ((LABELLED_LOSS, ~is_pseudo), (PSEUDO_LOSS, is_pseudo)):
            chosen = torch.nonzero(samples).flatten().tolist()
            if len(chosen) == len(samples):
                values[curve] = loss
            elif chosen and self._watches():
                part = {"keys": [batch["keys"][index] for index in chosen]}
                with torch.no_grad(), self._autocast():
                    values[curve] = self.loss_on_labels(samples_of(output, chosen), samples_of(target, chosen), part)
        return values

    def _watches(self) -> bool:
        """Whether this iteration computes losses a second time, for the curves alone."""
        waits = self.is_ddp and self.configuration_manager.batch_dice
        return not waits and (self._iteration - 1) % WATCH_EVERY == 0

    def validation_step(self, batch: dict) -> dict:
        """Loss and voxel counts of a batch, as stock's; of a partial case only its annotated organs count."""
        batch = self.on_device(batch)
        target = batch["target"]
        with self._autocast():
            output = self._forward(batch["data"])
            loss = self.compute_loss(output, target, batch)
        if self.enable_deep_supervision:
            output, target = output[0], target[0]
        manager = self.label_manager
        mask = None
        if manager.has_regions:
            predicted = (torch.sigmoid(output) > 0.5).long()
            if manager.has_ignore_label:
                mask = (~target[:, -1:].bool()).float()
                target = target[:, :-1]
        else:
            predicted = torch.zeros(output.shape, device=output.device, dtype=torch.float16)
            predicted.scatter_(1, output.argmax(1)[:, None], 1)
            if manager.has_ignore_label:
                mask = (target != manager.ignore_label).float()
                target = torch.where(target == manager.ignore_label, 0, target)
        counts = get_tp_fp_fn_tn(predicted, target, axes=list(range(2, output.ndim)), mask=mask)[:3]
        first = self.heads.first_organ
        validated = self._organs_of(batch.get("keys", ()), "validated")
        counted = None if validated is None else upload(validated, output.device).float()
        tp, fp, fn = (
            (count[:, first:] if counted is None else count[:, first:] * counted).sum(0).cpu().numpy()
            for count in counts
        )
        return {"loss": loss.detach().cpu().numpy(), "tp_hard": tp, "fp_hard": fp, "fn_hard": fn}

    def _organs_of(
        self,
        cases: Any,
        what: Literal["annotated", "validated", "positive"],
        *,
        organs: Sequence[Group] | None = None,
    ) -> np.ndarray | None:
        """(B, organs) bool: whether an organ of a case is annotated (or validated, positive); None where all are.

        ``organs`` are label ids, or tuples of several; by default those that the network's outputs stand for.
        """
        found = [self._table[str(case)] for case in cases]
        if all(case.is_complete for case in found):
            return None
        manager = self.label_manager
        if organs is None:
            organs = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        known = [None if case.is_complete else getattr(case, what) for case in found]
        rows = [[is_annotated(organ, labels) for organ in organs] for labels in known]
        return np.array(rows, bool)

    # ------------------------------------------------------------------ course of a training

    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        self._samples = {}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        table = self._table
        drawn = sum(self._samples.values())
        pseudo = sum(count for case, count in self._samples.items() if table[case].role == "pseudo")
        self.logger.log(PSEUDO_SHARE, pseudo / drawn if drawn else 0.0, self.current_epoch)
        self.log_means(train_outputs, LABELLED_LOSS, PSEUDO_LOSS)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Logs the loss and, where the fold has validation cases, the Dice; says which organs were never predicted."""
        self._say_what_is_never_predicted(val_outputs)
        if self.reports_dice:
            super().on_validation_epoch_end(val_outputs)
            self._average_known_dice()
            return
        values = [float(np.mean([output["loss"] for output in val_outputs]))]
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, values[0])
            values = gathered
        organs = len(val_outputs[0]["tp_hard"])
        self.logger.log("mean_fg_dice", float("nan"), self.current_epoch)
        self.logger.log("dice_per_class_or_region", [float("nan")] * organs, self.current_epoch)
        self.logger.log("val_losses", float(np.mean(values)), self.current_epoch)

    def _average_known_dice(self) -> None:
        """An epoch without a Dice (no organ there, none predicted) changes no moving average; stock's is NaN then."""
        logged = self.logger.local_logger.my_fantastic_logging
        moving, dice = logged["ema_fg_dice"], logged["mean_fg_dice"][-1]
        if np.isnan(moving[-1]):
            moving[-1] = moving[-2] if np.isnan(dice) and len(moving) > 1 else dice

    def _say_what_is_never_predicted(self, val_outputs: list[dict]) -> None:
        counts = {
            key: np.sum([output[key] for output in val_outputs], axis=0) for key in ("tp_hard", "fp_hard", "fn_hard")
        }
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, counts)
            counts = {key: np.sum([part[key] for part in gathered], axis=0) for key in counts}
        missed = (counts["tp_hard"] + counts["fp_hard"] == 0) & (counts["fn_hard"] > 0)
        if missed.any():
            manager = self.label_manager
            organs = manager.foreground_regions if manager.has_regions else manager.foreground_labels
            names = {_as_key(value): name for name, value in self.dataset_json["labels"].items()}
            found = [
                names.get(_as_key(organ), str(organ))
                for organ, is_missed in zip(organs, missed, strict=True)
                if is_missed
            ]
            self.print_to_log_file(
                f"Organs that this epoch's validation never predicted although they are there: {', '.join(found)}"
            )

    # ------------------------------------------------------------------ final validation

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock's validation of the fold's labelled and partial cases, the latter on their annotated organs."""
        _, validation = self.do_split()
        if not validation or not self.settings.final_validation:
            why = "the settings say so" if validation else "this fold has no labelled or partial validation case"
            self.print_to_log_file(f"Final validation skipped: {why}.")
            return
        super().perform_actual_validation(save_probabilities)
        table = self.case_table()
        annotated = {case: table[case].validated for case in table.with_role(validation, "partial")}
        if not annotated or self.local_rank != 0:
            return
        summary_file = join(self.output_folder, "validation", "summary.json")
        summary = without_unannotated(load_summary_json(summary_file), annotated)
        save_summary_json(summary, summary_file)
        for label, means in summary["mean"].items():
            self.logger.log_summary(f"final_val/class_{label}_dice", means["Dice"])
        dice = summary["foreground_mean"]["Dice"]
        self.logger.log_summary("final_val/foreground_dice", dice)
        self.print_to_log_file(f"Mean Validation Dice over the annotated organs of partial cases: {dice}")


def _as_key(label: Any) -> Any:
    """A label of dataset.json, or a region, in a form that can be compared."""
    return tuple(label) if isinstance(label, (list, tuple)) else label


def __getattr__(name: str) -> type:
    return class_with_length(name, globals())
