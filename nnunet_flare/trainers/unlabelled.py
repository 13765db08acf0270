"""A stream of unlabelled scans beside the labelled batches: what the trainers share that learn from both at once.

The scans are the arrays of ``<data_identifier>_un``, which ``flare-pseudolabel preprocess -u`` makes: those that the
case table calls ``unlabelled``, or all of them where it names none. They come in turn, shuffled anew for every pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import join
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_flare.errors import InputError
from nnunet_flare.trainers.sampling import CyclingDataLoader, start_augmenter, stop_augmenter, workers_of
from nnunet_flare.trainers.seeding import derived_seed
from nnunet_flare.trainers.self_training import nnUNetTrainerFlareST
from nnunet_flare.trainers.settings import StreamSettings

ROLE = "unlabelled"
"""Of the scans in the case table, and of their random streams."""


class LearnsFromUnlabelled(nnUNetTrainerFlareST):
    """Self-training with ``dataloader_unlabelled``, whose batches have ``data`` and ``keys``.

    A trainer sets ``stream`` from its settings in :meth:`take_settings`.
    """

    stream: StreamSettings
    dataloader_unlabelled: Any = None

    def initialize(self) -> None:
        """As for self-training.

        Raises:
            InputError: for the second stage of a cascade: no first stage labelled the unlabelled scans.
        """
        if self.is_cascaded:
            raise InputError(
                f"{self.plans_manager.plans_name}.json, configuration '{self.configuration_name}': is the second stage "
                f"of a cascade, but {type(self).__name__} has no labels of the first for unlabelled scans; train "
                "another configuration"
            )
        super().initialize()

    def batches_taken(self, epochs: int) -> int:
        """Batches of the stream that the first ``epochs`` epochs take: where a resumed training goes on."""
        return epochs * self.num_iterations_per_epoch

    @property
    def unlabelled_folder(self) -> Path:
        """The arrays of the unlabelled scans."""
        name = self.stream.unlabelled or f"{self.configuration_manager.data_identifier}_un"
        return Path(join(self.preprocessed_dataset_folder_base, name))

    @property
    def unlabelled_batch_size(self) -> int:
        """Of one process; by default half the labelled batch (S4: 1 beside 2 on each GPU)."""
        return self.stream.unlabelled_batch_size or max(1, self.batch_size // 2)

    def unlabelled_cases(self) -> list[str]:
        """Ids of the unlabelled scans of this training.

        Raises:
            InputError: when there is none, or one that the case table names is not preprocessed.
        """
        folder = self.unlabelled_folder
        present = sorted(path.stem for path in folder.glob("*.pkl"))
        table = self.case_table()
        named = table.with_role(sorted(table.cases), ROLE)
        absent = sorted(set(named) - set(present))
        if absent or not present:
            found = f"lacks {', '.join(absent[:5])}" if absent else "holds no unlabelled scan"
            raise InputError(
                f"{folder}: {found}, and {type(self).__name__} learns from them; preprocess the unlabelled scans with "
                "flare-pseudolabel preprocess -d DATASET -u FOLDER"
            )
        return named or present

    def get_dataloaders(self) -> tuple[Any, Any]:
        """The loaders of labelled cases; that of the unlabelled ones is started beside them."""
        cases = self.unlabelled_cases()
        loaders: tuple[Any, Any] = super().get_dataloaders()
        self.print_to_log_file(
            f"Unlabelled: {len(cases)} scans of {self.unlabelled_folder}, in batches of {self.unlabelled_batch_size}."
        )
        loader = self._unlabelled_loader(cases)
        self.dataloader_unlabelled = start_augmenter(
            loader,
            processes=self._workers(ROLE),
            cached=max(3, self._workers(ROLE) // 2),
            pin_memory=self.device.type == "cuda",
        )
        return loaders

    def _unlabelled_loader(self, cases: list[str]) -> CyclingDataLoader:
        folder = str(self.unlabelled_folder)
        before = self.batches_taken(self.current_epoch)
        loader = self._loader(
            infer_dataset_class(folder)(folder, cases),
            self._region([ROLE], self._geometry),
            self.unlabelled_chain(),
            probabilities=None,
            purpose=ROLE,
            batch_size=self.unlabelled_batch_size,
            loader_class=CyclingDataLoader,
            batches_before=before,
        )
        if not isinstance(loader, CyclingDataLoader):
            raise TypeError(type(loader))
        loader.has_ignore = False  # nothing is annotated in these scans, so that no patch has to lie where something is
        loader.next_batch = before
        loader.order = derived_seed(self.settings.seed or 0, self.fold, self.local_rank)
        return loader

    def unlabelled_chain(self) -> BasicTransform:
        """How the unlabelled scans are augmented; their label maps, of nothing, are not made smaller."""
        return self._chain(ROLE, self._geometry, self.get_validation_transforms(None, **self._label_arguments()))

    def _workers(self, purpose: str) -> int:
        """As in stock; the unlabelled scans share the workers of the training by the size of their batches."""
        found = super()._workers(purpose)
        if purpose not in ("training", ROLE):
            return found
        sizes = {"training": self.batch_size, ROLE: self.unlabelled_batch_size}
        return workers_of(super()._workers("training"), sizes)[purpose]

    def _augmentation_of(self, role: str) -> str:
        return self.stream.augmentation if role == ROLE else super()._augmentation_of(role)

    def on_train_end(self) -> None:
        stop_augmenter(self.dataloader_unlabelled)
        super().on_train_end()
