"""``nnUNetTrainerFlareST``: nnU-Net's trainer for labelled, partial and pseudo-labelled cases.

What it does beyond stock is said by the case roles of ``flare_cases.json`` and by the settings under ``"flare"`` in the
configuration (:mod:`nnunet_flare.trainers.settings`). Without either it trains like ``nnUNetTrainer``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join, load_pickle
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.evaluation.evaluate_predictions import load_summary_json, save_summary_json
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed as dist

from nnunet_flare.cases import CaseTable, find_table
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.planners.fixed_size import NORMALISATIONS, WINDOWS_KEY
from nnunet_flare.trainers import losses
from nnunet_flare.trainers.augmentation import (
    Geometry,
    jitter_transforms,
    shift_transforms,
    strong_transforms,
    weak_transforms,
    with_tail,
    without_timing,
)
from nnunet_flare.trainers.base import FlareTrainer
from nnunet_flare.trainers.lengths import class_with_length
from nnunet_flare.trainers.sampling import (
    BatchStreams,
    FlareDataLoader,
    PerCaseTransforms,
    sampling_probabilities,
    start_augmenter,
    stop_augmenter,
)
from nnunet_flare.trainers.splits import FoldCases, fold_cases, new_splits
from nnunet_flare.trainers.transforms.elastic import with_elastic
from nnunet_flare.trainers.transforms.window import Window, channel_windows, common_windows
from nnunet_flare.trainers.validation import is_annotated, without_unannotated

PSEUDO_SHARE = "pseudo_share"
LABELLED_LOSS = "labelled_loss"
PSEUDO_LOSS = "pseudo_loss"
"""Curves: the share of the epoch's training samples that were drawn from pseudo cases, and the loss on the labels of
the other samples (labelled and partial) and of those; no numbers where none was drawn."""


class nnUNetTrainerFlareST(FlareTrainer):
    """Self-training: roles decide who trains, who validates, how often a case is drawn and how it is augmented."""

    curves: ClassVar[tuple[str, ...]] = (PSEUDO_SHARE, LABELLED_LOSS, PSEUDO_LOSS)
    loss_is_of_labels: ClassVar[bool] = True
    """Whether the training loss has no other part than :meth:`loss_on_labels`."""
    partial_note: ClassVar[str] = (
        "This trainer takes the organs that partial cases have no annotation of for background."
    )
    """What the log says where partial cases train."""

    def take_settings(self) -> None:
        super().take_settings()
        self._table = CaseTable()
        self._samples: dict[str, int] = {}

    def _build_loss(self) -> torch.nn.Module:
        loss: torch.nn.Module = super()._build_loss()
        if self.settings.class_weights is None:
            return loss
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
            weights = losses.inverse_sqrt_frequency(self._count_voxels(n_classes))
        inner: Any = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
        inner.ce.weight = torch.as_tensor(weights, dtype=torch.float32)
        self.print_to_log_file(f"Weights of the classes in the cross-entropy: {np.round(weights, 3).tolist()}")
        return loss.to(self.device)

    def _count_voxels(self, n_classes: int) -> np.ndarray:
        training = self.fold_cases().training
        table = self.case_table()
        true_cases = table.with_role(training, "labelled", "partial")
        dataset = self._dataset(losses.evenly_spaced(true_cases or training, losses.MAX_CASES_COUNTED))
        return losses.count_labels((dataset.load_case(case)[1][:] for case in dataset.identifiers), n_classes)

    # ------------------------------------------------------------------ cases

    def case_table(self) -> CaseTable:
        """Roles of the cases of this configuration.

        Raises:
            InputError: for an invalid table, or raw and preprocessed tables that differ.
        """
        preprocessed = Path(self.preprocessed_dataset_folder_base)
        return find_table(
            preprocessed,
            Path(str(nnUNet_raw), preprocessed.name) if nnUNet_raw.is_set() else None,
            self.configuration_name,
            is_round=self.settings.round is not None,
            labels=self.dataset_json["labels"],
        )

    def fold_cases(self) -> FoldCases:
        """Training and validation cases of this fold; writes ``splits_final.json`` where it is missing."""
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        present = sorted(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
        table = self.case_table()
        true_cases = table.with_role(present, "labelled", "partial")
        splits = None
        if self.fold != "all" and true_cases:
            splits_file = Path(self.preprocessed_dataset_folder_base, "splits_final.json")
            if not splits_file.is_file():
                write_json(splits_file, new_splits(true_cases))
            splits = read_json(splits_file)
        return fold_cases(
            self.fold,
            splits,
            true_cases=true_cases,
            pseudo_cases=table.with_role(present, "pseudo"),
            pseudo_folds=self.settings.pseudo_folds,
        )

    def do_split(self) -> tuple[list[str], list[str]]:
        """Training and validation ids; pseudo cases never validate, unlabelled ones take no part."""
        cases = self.fold_cases()
        if not cases.training:
            raise InputError(
                f"{self.preprocessed_dataset_folder}: no labelled, partial or pseudo case to train fold {self.fold} on"
            )
        return list(cases.training), list(cases.validation)

    def _dataset(self, cases: list[str]) -> nnUNetBaseDataset:
        return self.dataset_class(
            self.preprocessed_dataset_folder,
            list(cases),
            folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage,
        )

    def get_tr_and_val_datasets(self) -> tuple[nnUNetBaseDataset, nnUNetBaseDataset]:
        """Datasets of the fold. Without a validation case the online validation draws from the training cases."""
        training, validation = self.do_split()
        table = self._table = self.case_table()
        self.reports_dice = bool(validation)
        self.print_to_log_file(
            f"Training on {_in_words(table.counts(training))}; validating on {_in_words(table.counts(validation))}."
        )
        if table.counts(training).get("partial"):
            self.print_to_log_file(self.partial_note)
        if not validation:
            self.print_to_log_file(
                "No labelled or partial case validates this fold: the validation loss is that of training patches, no "
                "Dice is reported and the final validation is skipped."
            )
        elif set(validation) & set(training):
            self.print_to_log_file("Validation cases are training cases too: their figures flatter.")
        return self._dataset(training), self._dataset(validation or training)

    # ------------------------------------------------------------------ loaders

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, Any]:
        """Stock's geometry; without mirroring neither the training nor inference mirrors."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.settings.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Stock's loaders, with augmentation by role, sampling by role and weight, and separate random streams."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        patch_size = self.configuration_manager.patch_size
        geometry = Geometry(
            tuple(int(edge) for edge in patch_size),
            tuple(int(edge) for edge in initial_patch_size),
            rotation,
            mirror_axes,
            dummy_2d,
        )
        self._geometry = geometry
        tail = self.get_validation_transforms(self._get_deep_supervision_scales(), **self._label_arguments())
        training, validation = self.get_tr_and_val_datasets()
        table = self.case_table()
        roles: dict[str, str] = {case: table[case].role for case in training.identifiers}
        chains = {str(role): self._chain(role, geometry, tail) for role in sorted(set(roles.values()))}
        loaders = (
            self._loader(
                training,
                geometry.initial_patch_size,
                PerCaseTransforms(chains, roles),
                probabilities=sampling_probabilities(training.identifiers, table, self.settings.labelled_to_pseudo),
                purpose="training",
            ),
            self._loader(validation, geometry.patch_size, tail, probabilities=None, purpose="validation"),
        )
        processes = get_allowed_n_proc_DA()
        pin_memory = self.device.type == "cuda"
        return (
            start_augmenter(loaders[0], processes=processes, cached=max(6, processes // 2), pin_memory=pin_memory),
            start_augmenter(
                loaders[1],
                processes=min(processes, max(1, processes // 2)),
                cached=max(3, processes // 4),
                pin_memory=pin_memory,
            ),
        )

    def _label_arguments(self) -> dict[str, Any]:
        manager = self.label_manager
        return {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": manager.foreground_labels,
            "regions": manager.foreground_regions if manager.has_regions else None,
            "ignore_label": manager.ignore_label,
        }

    def _augmentation_of(self, role: str) -> str:
        kind: str = getattr(self.settings.augmentation, role)
        return kind

    def _chain(self, role: str, geometry: Geometry, tail: BasicTransform) -> BasicTransform:
        """The augmentation of a role, up to the targets of deep supervision."""
        kind = self._augmentation_of(role)
        use_mask = self.configuration_manager.use_mask_for_norm
        if kind in ("stock", "elastic"):
            stock = self.get_training_transforms(
                self.configuration_manager.patch_size,
                geometry.rotation,
                self._get_deep_supervision_scales(),
                geometry.mirror_axes,
                geometry.dummy_2d,
                use_mask_for_norm=use_mask,
                **self._label_arguments(),
            )
            return with_elastic(stock) if kind == "elastic" else stock
        windows = self._windows()
        make = {
            "weak": weak_transforms,
            "jitter": jitter_transforms,
            "strong": strong_transforms,
            "shift": shift_transforms,
        }[kind]
        labels = [label for label in self.data_label_manager.all_labels if label > 0]
        return with_tail(make(geometry, labels, windows), tail, use_mask)

    def _windows(self) -> tuple[Window | None, ...]:
        """The window of each channel: of the plans, or of the training cases where each is normalised by itself."""
        schemes = self.configuration_manager.normalization_schemes
        if not NORMALISATIONS.keys() & set(schemes):
            return channel_windows(schemes, self.plans_manager.foreground_intensity_properties_per_channel)
        noted = []
        for case in self.fold_cases().training:
            path = join(self.preprocessed_dataset_folder, f"{case}.pkl")
            properties = load_pickle(path)
            if WINDOWS_KEY not in properties:
                raise InputError(f"{path}: no '{WINDOWS_KEY}'; an older version preprocessed it, do so again")
            noted.append(properties[WINDOWS_KEY])
        return common_windows(noted)

    def _loader(
        self,
        dataset: nnUNetBaseDataset,
        patch_size: tuple[int, ...],
        transforms: BasicTransform,
        *,
        probabilities: np.ndarray | None,
        purpose: str,
        batch_size: int | None = None,
        loader_class: type[FlareDataLoader] = FlareDataLoader,
        batches_before: int | None = None,
    ) -> FlareDataLoader:
        """A loader; ``batches_before`` are those that an earlier part of the training took, by default all epochs'."""
        # With the labels of dataset.json, not this trainer's: a declared ignore label makes the loader ask for
        # class_locations that only a preprocessing with that label has written.
        loader = loader_class(
            dataset,
            self.batch_size if batch_size is None else batch_size,
            patch_size,
            self.configuration_manager.patch_size,
            self.data_label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            sampling_probabilities=probabilities,
            pad_sides=None,
            probabilistic_oversampling=self.probabilistic_oversampling,
            transforms=transforms,
        )
        loader.without_label = self.settings.ignore_label
        table = self.case_table()
        found = {case: table[case] for case in dataset.identifiers}
        loader.centred_on = {
            name: (*(case.annotated or ()), *case.positive) for name, case in found.items() if not case.is_complete
        }
        if self.settings.seed is not None:
            batches = self.num_val_iterations_per_epoch if purpose == "validation" else self.num_iterations_per_epoch
            before = self.current_epoch * batches if batches_before is None else batches_before
            parts = (self.settings.round, self.fold, purpose, self.local_rank)
            loader.streams = BatchStreams(self.settings.seed, parts, batches, before)
            without_timing(transforms)
        return loader

    # ------------------------------------------------------------------ steps

    def train_step(self, batch: dict) -> dict:
        """One optimizer step, as stock's; counts how often each case is drawn."""
        for case in batch.get("keys", ()):
            self._samples[str(case)] = self._samples.get(str(case), 0) + 1
        result: dict = super().train_step(batch)
        return result

    def watched(self, output: Any, target: Any, batch: dict, loss: torch.Tensor) -> dict[str, float]:
        """The loss on the labels of labelled and partial samples, and of pseudo-labelled ones.

        It is computed again where a batch has both, or the loss has more parts than labels; not where processes would
        have to wait for each other (batch Dice on several GPUs).
        """
        is_pseudo = torch.tensor([self._table[str(case)].role == "pseudo" for case in batch["keys"]])
        values = {LABELLED_LOSS: float("nan"), PSEUDO_LOSS: float("nan")}
        for curve, samples in ((LABELLED_LOSS, ~is_pseudo), (PSEUDO_LOSS, is_pseudo)):
            chosen = torch.nonzero(samples).flatten().tolist()
            if len(chosen) == len(samples) and self.loss_is_of_labels:
                values[curve] = float(loss)
            elif chosen and not (self.is_ddp and self.configuration_manager.batch_dice):
                part = {"keys": [batch["keys"][index] for index in chosen]}
                with torch.no_grad(), self._autocast():
                    values[curve] = float(self.loss_on_labels(_of(output, chosen), _of(target, chosen), part))
        return values

    def validation_step(self, batch: dict) -> dict:
        """Loss and voxel counts of a batch, as stock's; of a partial case only its annotated organs count."""
        data, target = self._to_device(batch)
        with self._autocast():
            output = self._forward(data)
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
        first = 0 if manager.has_regions else 1
        counted = self._organs_of(batch.get("keys", ()), output.device, "validated")
        tp, fp, fn = (
            (count[:, first:] if counted is None else count[:, first:] * counted).sum(0).cpu().numpy()
            for count in counts
        )
        return {"loss": loss.detach().cpu().numpy(), "tp_hard": tp, "fp_hard": fp, "fn_hard": fn}

    def _organs_of(
        self, cases: Any, device: torch.device, what: Literal["annotated", "validated", "positive"]
    ) -> torch.Tensor | None:
        """(B, organs): 1 where an organ of a case is annotated (or validated, positive); None where all are."""
        found = [self._table[str(case)] for case in cases]
        if all(case.is_complete for case in found):
            return None
        manager = self.label_manager
        organs = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        known = [None if case.is_complete else getattr(case, what) for case in found]
        rows = [[is_annotated(organ, labels) for organ in organs] for labels in known]
        return torch.tensor(rows, device=device, dtype=torch.float32)

    # ------------------------------------------------------------------ course of a training

    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        self._samples = {}

    def on_train_end(self) -> None:
        for augmenter in (self.dataloader_train, self.dataloader_val):
            stop_augmenter(augmenter)
        super().on_train_end()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        table = self._table
        drawn = sum(self._samples.values())
        pseudo = sum(count for case, count in self._samples.items() if table[case].role == "pseudo")
        self.logger.log(PSEUDO_SHARE, pseudo / drawn if drawn else 0.0, self.current_epoch)
        self.log_means(train_outputs, LABELLED_LOSS, PSEUDO_LOSS)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Logs the loss and, where the fold has validation cases, the Dice."""
        if self.reports_dice:
            super().on_validation_epoch_end(val_outputs)
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

    # ------------------------------------------------------------------ final validation

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock's validation of the fold's labelled and partial cases, the latter on their annotated organs."""
        _, validation = self.do_split()
        if not validation or not self.settings.final_validation:
            why = "the settings say so" if validation else "no labelled or partial case validates this fold"
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
        dice = summary["foreground_mean"]["Dice"]
        self.logger.log_summary("final_val/foreground_dice", dice)
        self.print_to_log_file(f"Mean Validation Dice over the annotated organs of partial cases: {dice}")


def _of(parts: Any, samples: list[int]) -> Any:
    """Some samples of a batch, or of each resolution of it."""
    return [part[samples] for part in parts] if isinstance(parts, (list, tuple)) else parts[samples]


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {role}" for role, count in counts.items()) + " cases" if counts else "no case"


def __getattr__(name: str) -> type:
    return class_with_length(name, globals())
