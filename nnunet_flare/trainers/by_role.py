"""Which cases a fold trains and validates on, and the loaders that draw and augment them, by their roles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join, load_pickle
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_flare.cases import CaseTable, find_table
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.planners.fixed_size import NORMALISATIONS, WINDOWS_KEY
from nnunet_flare.shapes import SPLITS
from nnunet_flare.trainers.augmentation import (
    Geometry,
    jitter_transforms,
    modality_transforms,
    region_of,
    shift_transforms,
    strong_transforms,
    weak_transforms,
    with_tail,
    without_timing,
)
from nnunet_flare.trainers.base import FlareTrainer
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
from nnunet_flare.trainers.transforms.histogram import landmarks
from nnunet_flare.trainers.transforms.window import Window, channel_windows, common_windows

MAX_REFERENCES = 50
"""Scans whose histograms are matched, evenly from all; each is read once at the start."""


class CasesByRole(FlareTrainer):
    """A trainer that reads ``flare_cases.json``: who trains, who validates, what is drawn and augmented how."""

    partial_note: ClassVar[str] = "This trainer treats organs that a partial case does not annotate as background."
    """What the log says where partial cases train."""

    def take_settings(self) -> None:
        super().take_settings()
        self._table = CaseTable()

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
            splits = read_json(splits_file, SPLITS, remedy="remove it, then it is made again")
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
                "This fold has no labelled or partial validation case: the validation loss comes from training "
                "patches, no Dice is reported and the final validation is skipped."
            )
        elif set(validation) & set(training):
            self.print_to_log_file("The validation cases are training cases too, so their Dice is too high.")
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
                self._region(sorted(set(roles.values())), geometry),
                PerCaseTransforms(chains, roles),
                probabilities=sampling_probabilities(training.identifiers, table, self.settings.labelled_to_pseudo),
                purpose="training",
            ),
            self._loader(validation, geometry.patch_size, tail, probabilities=None, purpose="validation"),
        )
        training_workers, validation_workers = self._workers("training"), self._workers("validation")
        pin_memory = self.device.type == "cuda"
        return (
            start_augmenter(
                loaders[0], processes=training_workers, cached=max(6, training_workers // 2), pin_memory=pin_memory
            ),
            start_augmenter(
                loaders[1], processes=validation_workers, cached=max(3, validation_workers // 2), pin_memory=pin_memory
            ),
        )

    def _workers(self, purpose: str) -> int:
        """Augmenting processes of a loader, as in stock: all that are allowed in training, half of them beside."""
        allowed: int = get_allowed_n_proc_DA()
        return allowed if purpose == "training" else min(allowed, max(1, allowed // 2))

    def _region(self, roles: Sequence[str], geometry: Geometry) -> tuple[int, ...]:
        """The region that is loaded of a scan for one patch: no larger than the augmentation of these roles reaches."""
        regions = [region_of(self._augmentation_of(role), geometry) for role in roles]
        return tuple(max(edges) for edges in zip(*regions, strict=True))

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
        if kind == "modality":
            return with_tail(modality_transforms(geometry, windows, self._references()), tail, use_mask)
        make = {
            "weak": weak_transforms,
            "jitter": jitter_transforms,
            "strong": strong_transforms,
            "shift": shift_transforms,
        }[kind]
        labels = [label for label in self.data_label_manager.all_labels if label > 0]
        return with_tail(make(geometry, labels, windows), tail, use_mask)

    def _references(self) -> list[torch.Tensor]:
        """The grey values of the scans that histograms are matched to: of some from all of their folder."""
        name = self.settings.references
        if name is None:
            return []
        folder = join(self.preprocessed_dataset_folder_base, name)
        reader = infer_dataset_class(self.preprocessed_dataset_folder)
        cases = sorted(reader.get_identifiers(folder)) if Path(folder).is_dir() else []
        if not cases:
            raise InputError(f"flare.references: {folder} has no preprocessed scan to match histograms to")
        scans = reader(folder, cases[:: -(-len(cases) // MAX_REFERENCES)])
        arrays = (torch.from_numpy(np.asarray(scans.load_case(case)[0], np.float32)) for case in scans.identifiers)
        return [torch.stack([landmarks(channel) for channel in array]) for array in arrays]

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
                raise InputError(
                    f"{path}: no '{WINDOWS_KEY}'; an older version preprocessed this case, preprocess it again"
                )
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

    def on_train_end(self) -> None:
        for augmenter in (self.dataloader_train, self.dataloader_val):
            stop_augmenter(augmenter)
        super().on_train_end()


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {role}" for role, count in counts.items()) + " cases" if counts else "no case"
