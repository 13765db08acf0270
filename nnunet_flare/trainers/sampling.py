"""Which case a sample is drawn from, how it is augmented, and on which random stream."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_flare.cases import CaseTable
from nnunet_flare.errors import InputError
from nnunet_flare.trainers.seeding import Part, derived_seed, seed_from_system, temporary_seed
from nnunet_flare.trainers.validation import is_annotated


def sampling_probabilities(
    cases: Sequence[str], table: CaseTable, labelled_to_pseudo: tuple[float, float] | None
) -> np.ndarray | None:
    """Probability of each case to be drawn for a sample; None where all are alike, as in stock nnU-Net.

    A case counts as its weight. With ``labelled_to_pseudo`` the labelled and partial cases together have the first
    share and the pseudo cases the second; where one of the two groups has no case, the other has all.

    Raises:
        InputError: when the shares and weights leave nothing to draw.
    """
    weights = np.array([table[case].weight for case in cases], dtype=np.float64)
    if labelled_to_pseudo is not None:
        is_pseudo = np.array([table[case].role == "pseudo" for case in cases], dtype=bool)
        totals = weights[~is_pseudo].sum(), weights[is_pseudo].sum()
        if all(total > 0 for total in totals):
            for group, share, total in zip((~is_pseudo, is_pseudo), labelled_to_pseudo, totals, strict=True):
                weights[group] *= share / total
    if weights.sum() <= 0:
        raise InputError(
            f"{table.source or 'flare_cases.json'}: all {len(cases)} training cases have weight 0; expected at "
            "least one weight above 0"
        )
    if labelled_to_pseudo is None and np.all(weights == weights[0]):
        return None
    return np.asarray(weights / weights.sum())


class PerCaseTransforms(BasicTransform):
    """Applies to each sample the chain of its case's role; the loader says beforehand which cases come."""

    def __init__(self, chains: Mapping[str, BasicTransform], roles: Mapping[str, str]) -> None:
        super().__init__()
        self.chains = dict(chains)
        self.roles = dict(roles)
        self._coming: deque[str] = deque()

    def expect(self, cases: Sequence[str]) -> None:
        """Note the cases of the next batch, in the order of its samples."""
        self._coming = deque(cases)

    def __call__(self, **sample: Any) -> dict:
        case = self._coming.popleft()
        transformed: dict = self.chains[self.roles[case]](**sample)
        return transformed

    def __repr__(self) -> str:
        return f"PerCaseTransforms({self.chains})"


@dataclass
class BatchStreams:
    """One random stream per batch of a training, named by epoch and position, however many workers there are.

    ``next_batch`` counts the batches of the whole training; a resumed training starts it where it left off.
    """

    seed: int
    parts: tuple[Part, ...]
    batches_per_epoch: int
    next_batch: int
    step: int = 1

    def take(self) -> int:
        """The seed of the next batch."""
        epoch, position = divmod(self.next_batch, self.batches_per_epoch)
        self.next_batch += self.step
        return derived_seed(self.seed, *self.parts, epoch, position)


class FlareDataLoader(nnUNetDataLoader):
    """nnU-Net's loader with augmentation by role and random streams that workers do not share.

    Set after construction:
        streams: None draws from the process's own streams; otherwise each batch has its own.
        without_label: a label that no patch is centred on (the value that the loss ignores).
        centred_on: of cases that do not supervise all organs, the labels that a patch may be centred on.
    """

    streams: BatchStreams | None = None
    without_label: int | None = None
    centred_on: Mapping[str, Sequence[int]] = MappingProxyType({})
    _drawn: deque[str] = deque()

    def share_among(self, processes: int) -> None:
        """Called before the loader is copied to that many workers, which take every so many-th batch each."""
        if self.streams is not None:
            self.streams.step = processes

    def set_thread_id(self, thread_id: int) -> None:
        """Called once in each worker process, before its first batch."""
        super().set_thread_id(thread_id)
        torch.set_num_threads(1)  # stock's ordered augmenter, unlike its unordered one, leaves all threads to a worker
        if self.streams is None:
            seed_from_system()
        else:
            self.streams.next_batch += thread_id

    def get_indices(self) -> np.ndarray:
        cases: np.ndarray = super().get_indices()
        if isinstance(self.transforms, PerCaseTransforms):
            self.transforms.expect([str(case) for case in cases])
        self._drawn = deque(str(case) for case in cases)
        return cases

    def get_bbox(
        self, data_shape: np.ndarray, force_fg: bool, class_locations: dict | None, *args: Any, **kwargs: Any
    ) -> tuple[list[int], list[int]]:
        allowed = self.centred_on.get(self._drawn.popleft()) if self._drawn else None
        if class_locations and allowed is not None:
            class_locations = {
                key: where
                for key, where in class_locations.items()
                if key == self.annotated_classes_key or is_annotated(key, allowed)
            }
        if class_locations and self.without_label in class_locations:
            class_locations = {key: where for key, where in class_locations.items() if key != self.without_label}
        box: tuple[list[int], list[int]] = super().get_bbox(data_shape, force_fg, class_locations, *args, **kwargs)
        return box

    def generate_train_batch(self) -> dict:
        if self.streams is None:
            batch: dict = super().generate_train_batch()
            return batch
        with temporary_seed(self.streams.take()):
            return dict(super().generate_train_batch())


class CyclingDataLoader(FlareDataLoader):
    """Takes its cases in turn instead of at random, in an order that is shuffled anew for every pass.

    Set after construction:
        next_batch: counts the batches of the whole training; a resumed training starts it where it left off.
        order: what the orders are derived from.
    """

    next_batch: int = 0
    order: int = 0
    step: int = 1

    def share_among(self, processes: int) -> None:
        super().share_among(processes)
        self.step = processes

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        self.next_batch += thread_id

    def get_indices(self) -> np.ndarray:
        first = self.next_batch * self.batch_size
        self.next_batch += self.step
        return np.array([self._in_turn(first + sample) for sample in range(self.batch_size)])

    def _in_turn(self, position: int) -> str:
        turn, place = divmod(position, len(self.indices))
        order = np.random.default_rng([self.order, turn]).permutation(len(self.indices))
        return str(self.indices[order[place]])


def workers_of(processes: int, batch_sizes: Mapping[str, int]) -> dict[str, int]:
    """Workers of several loaders that share ``processes`` by the size of their batches, each at least one (or none)."""
    if processes == 0:
        return dict.fromkeys(batch_sizes, 0)
    samples = sum(batch_sizes.values())
    shares = {name: max(1, processes * size // samples) for name, size in batch_sizes.items()}
    largest = max(batch_sizes, key=lambda name: batch_sizes[name])
    shares[largest] += max(0, processes - sum(shares.values()))
    return shares


PAUSE_S = 0.2
"""Time for a batch that is on its way from a worker to arrive, before the workers end."""


def stop_augmenter(augmenter: Any) -> None:
    """End an augmenter's workers, if it has any.

    batchgenerators ends them while a thread may still be receiving a batch, which then fails with a traceback in the
    log; here the workers pause first.
    """
    if not hasattr(augmenter, "_finish"):
        return
    if getattr(augmenter, "pause_event", None) is not None:
        augmenter.pause_event.set()
        time.sleep(PAUSE_S)
    augmenter._finish()


def start_augmenter(loader: FlareDataLoader, *, processes: int, cached: int, pin_memory: bool) -> Any:
    """nnU-Net's augmenter for a loader: in this process (``processes`` 0), or in workers that start at once.

    With the loader's own streams the batches come in a fixed order, without them as they get ready, as in stock.
    """
    if processes == 0:
        return SingleThreadedAugmenter(loader, None)
    loader.share_among(processes)
    if loader.streams is None:
        augmenter: Any = NonDetMultiThreadedAugmenter(
            loader, None, processes, num_cached=cached, seeds=None, pin_memory=pin_memory, wait_time=0.002
        )
    else:
        augmenter = MultiThreadedAugmenter(
            loader, None, processes, num_cached_per_queue=2, seeds=None, pin_memory=pin_memory, wait_time=0.002
        )
    augmenter._start()  # stock draws and throws away a batch for this, which would shift the seeded ones
    return augmenter
