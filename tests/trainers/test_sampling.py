"""Which cases are drawn, how each is augmented, and which random stream a worker uses."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_flare.cases import Case, CaseTable
from nnunet_flare.errors import InputError
from nnunet_flare.trainers.sampling import (
    BatchStreams,
    FlareDataLoader,
    PerCaseTransforms,
    sampling_probabilities,
    start_augmenter,
    stop_augmenter,
)

PATCH = (8, 16, 16)


def table(**roles: str) -> CaseTable:
    return CaseTable({case: Case(role) for case, role in roles.items()})  # type: ignore[arg-type]


def test_without_ratio_and_weights_cases_are_drawn_as_stock_draws_them() -> None:
    assert sampling_probabilities(["a", "b"], table(b="pseudo"), None) is None


def test_the_ratio_shares_samples_between_the_groups() -> None:
    cases = ["l1", "l2", "part", "p1", "p2", "p3", "p4", "p5"]
    roles = table(part="partial", **{case: "pseudo" for case in cases if case[:1] == "p" and case != "part"})
    probabilities = sampling_probabilities(cases, roles, (1, 3))
    assert probabilities is not None
    assert probabilities[:3] == pytest.approx([0.25 / 3] * 3)
    assert probabilities[3:] == pytest.approx([0.75 / 5] * 5)


def test_a_weight_multiplies_a_cases_share_within_its_group() -> None:
    weighted = CaseTable({"a": Case(weight=3.0), "b": Case(), "c": Case("pseudo"), "d": Case("pseudo", weight=0.0)})
    assert sampling_probabilities(list("abcd"), weighted, None) == pytest.approx([0.6, 0.2, 0.2, 0])
    assert sampling_probabilities(list("abcd"), weighted, (1, 1)) == pytest.approx([0.375, 0.125, 0.5, 0])


def test_a_group_without_cases_leaves_all_to_the_other() -> None:
    assert sampling_probabilities(["a", "b"], table(), (1, 1)) == pytest.approx([0.5, 0.5])
    assert sampling_probabilities(["a", "b"], table(a="pseudo", b="pseudo"), (5, 1)) == pytest.approx([0.5, 0.5])


def test_weights_that_leave_nothing_to_draw_are_refused() -> None:
    with pytest.raises(InputError, match="all 1 training cases have weight 0"):
        sampling_probabilities(["a"], CaseTable({"a": Case(weight=0.0)}), None)


@given(
    weights=st.lists(st.tuples(st.booleans(), st.floats(0.01, 10)), min_size=1, max_size=20),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
def test_probabilities_sum_to_one_and_keep_the_ratio(
    weights: list[tuple[bool, float]], ratio: tuple[float, float]
) -> None:
    cases = {f"c{k}": Case("pseudo" if pseudo else "labelled", weight=w) for k, (pseudo, w) in enumerate(weights)}
    probabilities = sampling_probabilities(list(cases), CaseTable(cases), ratio)
    assert probabilities is not None
    assert probabilities.sum() == pytest.approx(1)
    pseudo = np.array([case.role == "pseudo" for case in cases.values()])
    if 0 < pseudo.sum() < len(pseudo):
        assert probabilities[pseudo].sum() / probabilities[~pseudo].sum() == pytest.approx(ratio[1] / ratio[0])


class Stamp(BasicTransform):
    """Writes its number into the image, so that a batch shows which chain a sample went through."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return torch.full_like(img, self.number)

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params: Any) -> torch.Tensor:
        return segmentation


class RandomStamp(Stamp):
    """Writes one draw from torch's and one from NumPy's global stream into the image."""

    def get_parameters(self, **data_dict: Any) -> dict:
        return {"values": (torch.rand(1).item(), np.random.uniform())}  # noqa: NPY002

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        img = torch.zeros_like(img)
        img[0, 0, 0, :2] = torch.tensor(params["values"])
        return img


ROLES = {"a": "labelled", "b": "labelled", "p": "pseudo", "q": "pseudo"}


def loader(tiny: Any, transforms: BasicTransform, *, batch_size: int = 2, **keywords: Any) -> FlareDataLoader:
    tiny.add(*(case for case in ROLES if not (tiny.data / f"{case}.b2nd").exists()))
    manager = PlansManager(tiny.plans).get_label_manager(tiny.dataset_json)
    dataset = nnUNetDatasetBlosc2(str(tiny.data), sorted(ROLES))
    return FlareDataLoader(dataset, batch_size, PATCH, PATCH, manager, 0.33, transforms=transforms, **keywords)


def test_each_sample_gets_the_augmentation_of_its_cases_role(tiny: Any) -> None:
    chains = {"labelled": Stamp(1.0), "pseudo": Stamp(2.0)}
    drawn = loader(tiny, PerCaseTransforms(chains, ROLES), batch_size=4)
    seen = set()
    for _ in range(20):
        batch = next(drawn)
        for case, sample in zip(batch["keys"], batch["data"], strict=True):
            assert float(sample.max()) == {"labelled": 1.0, "pseudo": 2.0}[ROLES[case]]
            seen.add(str(case))
    assert seen == set(ROLES)


def test_drawn_cases_have_the_shares_of_the_probabilities(tiny: Any) -> None:
    probabilities = sampling_probabilities(sorted(ROLES), table(p="pseudo", q="pseudo"), (1, 3))
    drawn = loader(tiny, Stamp(0.0), batch_size=8, sampling_probabilities=probabilities)
    counts = Counter(ROLES[str(case)] for _ in range(60) for case in drawn.get_indices())
    assert counts["pseudo"] / counts.total() == pytest.approx(0.75, abs=0.08)


def test_no_patch_is_centred_on_the_ignored_value(tiny: Any) -> None:
    drawn = loader(tiny, Stamp(0.0))
    corner, centre = np.array([[0, 0, 0, 0]]), np.array([[0, 5, 10, 10]])
    locations = {1: centre, 3: corner}
    drawn.without_label = 3
    boxes = [drawn.get_bbox(np.array([10, 20, 20]), True, locations)[0] for _ in range(20)]
    assert boxes == [[1, 2, 2]] * 20


def test_a_patch_without_an_organ_lies_where_something_is_annotated(tiny: Any) -> None:
    """Of a partial case with an ignore label too, whose organs may not all be centred on."""
    drawn = loader(tiny, Stamp(0.0))
    drawn.has_ignore, drawn.centred_on = True, {"a": (1,)}
    locations = {2: np.array([[0, 0, 0, 0]]), drawn.annotated_classes_key: np.array([[0, 5, 10, 10]])}
    for _ in range(20):
        drawn._drawn.append("a")
        assert drawn.get_bbox(np.array([10, 20, 20]), False, locations)[0] == [1, 2, 2]


@pytest.fixture
def augmenters() -> Iterator[list[Any]]:
    """Augmenters that a test started; their workers end with it."""
    started: list[Any] = []
    yield started
    for augmenter in started:
        stop_augmenter(augmenter)


def stamps(augmenter: Any, count: int) -> list[tuple[float, float]]:
    found = []
    for _ in range(count):
        values = next(augmenter)["data"][0, 0, 0, 0, :2]
        found.append((float(values[0]), float(values[1])))
    return found


def test_workers_have_random_streams_of_their_own(tiny: Any, augmenters: list[Any]) -> None:
    """Stock's workers share torch's stream: half of the torch draws of two workers would be repetitions."""
    augmenters.append(start_augmenter(loader(tiny, RandomStamp(0)), processes=2, cached=2, pin_memory=False))
    found = stamps(augmenters[0], 12)
    assert len({from_torch for from_torch, _ in found}) == 12
    assert len({from_numpy for _, from_numpy in found}) == 12


def test_seeded_batches_are_the_same_with_any_number_of_workers(tiny: Any, augmenters: list[Any]) -> None:
    for processes in (0, 1, 2):
        drawn = loader(tiny, RandomStamp(0))
        drawn.streams = BatchStreams(5, (1, 0, "training"), batches_per_epoch=3, next_batch=0)
        augmenters.append(start_augmenter(drawn, processes=processes, cached=2, pin_memory=False))
    alone, one, two = (stamps(augmenter, 7) for augmenter in augmenters)
    assert alone == one == two
    assert len(set(alone)) == 7


def test_a_later_start_continues_the_seeded_batches(tiny: Any) -> None:
    whole = loader(tiny, RandomStamp(0))
    whole.streams = BatchStreams(5, (), batches_per_epoch=3, next_batch=0)
    resumed = loader(tiny, RandomStamp(0))
    resumed.streams = BatchStreams(5, (), batches_per_epoch=3, next_batch=3)
    assert stamps(whole, 6)[3:] == stamps(resumed, 3)


def test_seeded_batches_leave_the_process_streams_alone(tiny: Any) -> None:
    drawn = loader(tiny, RandomStamp(0))
    drawn.streams = BatchStreams(5, (), batches_per_epoch=3, next_batch=0)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1).item(), np.random.uniform()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    next(drawn)
    assert (torch.rand(1).item(), np.random.uniform()) == expected  # noqa: NPY002


def test_a_loader_can_be_sent_to_a_spawned_worker(tiny: Any) -> None:
    drawn = loader(tiny, PerCaseTransforms({"labelled": Stamp(1.0), "pseudo": Stamp(2.0)}, ROLES))
    drawn.streams = BatchStreams(5, (), batches_per_epoch=3, next_batch=0)
    batch, copied = next(drawn), pickle.loads(pickle.dumps(drawn))
    assert type(copied) is FlareDataLoader
    assert torch.equal(next(copied)["data"], next(drawn)["data"])
    assert batch["data"].shape == (2, 1, *PATCH)
