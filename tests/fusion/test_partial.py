"""Merging label maps: the paper's five merges, consensus, and the promise that the ground truth always wins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_flare.errors import InputError
from nnunet_flare.fusion.ids import load_id_map, shipped_id_maps
from nnunet_flare.fusion.partial import Source, complete, consensus, merge, union
from nnunet_flare.organs import FLARE22

IGNORE = 15
LABELS = arrays(np.uint8, (2, 3, 4), elements=st.integers(0, 4))
"""Small label maps of four organs."""


def row(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(1, 1, -1)


def flat(labels: np.ndarray) -> list[int]:
    return labels.ravel().tolist()


# ---------------------------------------------------------------------------------------------- the paper's merges


def test_add_tumor_puts_the_annotation_over_the_pseudo_label() -> None:
    merged = merge([Source(row(1, 1, 2, 0))], truth=row(0, 14, 0, 14), annotated=[14], ignore_label=IGNORE)
    assert flat(merged.labels) == [1, 14, 2, 14]
    assert merged.from_truth == 2


def test_a_claim_of_an_annotated_organ_elsewhere_is_removed() -> None:
    """The paper's scripts keep it; but the annotation is complete for its organ."""
    merged = merge([Source(row(14, 14, 2, 0))], truth=row(0, 14, 0, 0), annotated=[14], ignore_label=IGNORE)
    assert flat(merged.labels) == [0, 14, 2, 0]


def test_tumour_over_organ() -> None:
    assert flat(union([Source(row(1, 1, 0, 2)), Source(row(1, 14, 14, 0))], [14])) == [1, 14, 14, 2]


def test_per_class_union_adds_listed_organs_and_removes_none() -> None:
    """ensembleV2: model B writes its voxels of the listed classes over model A's."""
    labels = union([Source(row(5, 5, 0, 1, 6)), Source(row(0, 6, 6, 2, 11))], [5, 6, 11])
    assert flat(labels) == [5, 6, 6, 1, 11]


def test_consensus_of_two_teachers_with_zero_is_the_papers() -> None:
    merged = merge(
        [Source(row(1, 2, 3, 0)), Source(row(1, 3, 3, 4))],
        truth=row(0, 0, 0, 14),
        annotated=[14],
        on_disagree="zero",
        ignore_label=IGNORE,
    )
    assert flat(merged.labels) == [1, 0, 3, 14]
    assert merged.disagreeing == 2


def test_a_constant_map_is_known_as_such() -> None:
    assert merge([Source(row(1, 2)), Source(row(2, 1))], on_disagree="zero", ignore_label=IGNORE).is_constant
    assert not merge([Source(row(1, 0))], ignore_label=IGNORE).is_constant


# ---------------------------------------------------------------------------------------------- consensus


@pytest.mark.parametrize(("choice", "expected"), [("ignore", IGNORE), ("zero", 0), ("first", 2)])
def test_what_becomes_of_a_disagreement(choice: str, expected: int) -> None:
    labels, count = consensus([Source(row(1, 2)), Source(row(1, 3))], on_disagree=choice, ignore_label=IGNORE)  # type: ignore[arg-type]
    assert flat(labels) == [1, expected]
    assert count == 1


def test_a_teacher_has_no_vote_on_an_organ_that_it_does_not_know() -> None:
    """BTCV has no duodenum (12): its background there means nothing, but its stomach (11) does."""
    btcv = Source(row(0, 11, 0, 11), frozenset(range(1, 12)) | {13})
    labels, count = consensus([Source(row(12, 12, 11, 11)), btcv], on_disagree="ignore", ignore_label=IGNORE)
    assert flat(labels) == [12, IGNORE, IGNORE, 11]
    assert count == 2


def test_protected_ids_need_one_source_only_and_a_later_one_wins() -> None:
    sources = [Source(row(1, 14, 0, 9)), Source(row(1, 1, 9, 14))]
    merged = merge(sources, ignore_label=IGNORE, protect=[9, 14])
    assert flat(merged.labels) == [1, 14, 9, 14]


def test_the_ground_truth_overrules_a_protected_id() -> None:
    merged = merge(
        [Source(row(14, 14)), Source(row(0, 14))],
        truth=row(1, 0),
        annotated=[1],
        ignore_label=IGNORE,
        protect=[14],
    )
    assert flat(merged.labels) == [1, 14]


@given(st.lists(LABELS, min_size=1, max_size=4), st.randoms(), st.sampled_from(["ignore", "zero"]), st.data())
def test_the_order_of_the_sources_does_not_matter(maps, random, choice, data) -> None:
    some = st.none() | st.frozensets(st.integers(1, 4))
    sources = [Source(labels, data.draw(some)) for labels in maps]
    shuffled = list(sources)
    random.shuffle(shuffled)
    settings = {"on_disagree": choice, "ignore_label": 5, "protect": [4]}
    one, two = (merge(order, **settings) for order in (sources, shuffled))
    assert np.array_equal(one.labels, two.labels)
    assert one.disagreeing == two.disagreeing


@given(
    st.lists(LABELS, min_size=1, max_size=3),
    LABELS,
    st.sets(st.integers(1, 4), min_size=1),
    st.sampled_from(["ignore", "zero", "first"]),
    st.lists(st.integers(1, 4), unique=True),
    st.lists(st.integers(1, 4), unique=True),
)
def test_the_ground_truth_always_wins(maps, truth, annotated, choice, protect, union_of) -> None:
    truth = np.where(np.isin(truth, list(annotated)), truth, 0).astype(np.uint8)
    merged = merge(
        [Source(labels) for labels in maps],
        truth=truth,
        annotated=annotated,
        union_of=union_of,
        on_disagree=choice,
        ignore_label=5,
        protect=protect,
    )
    for organ in annotated:
        assert np.array_equal(merged.labels == organ, truth == organ)


@given(LABELS, st.sampled_from(["ignore", "zero", "first"]))
def test_sources_that_agree_are_kept_as_they_are(labels, choice) -> None:
    merged = merge([Source(labels)] * 3, on_disagree=choice, ignore_label=5)
    assert np.array_equal(merged.labels, labels)
    assert merged.disagreeing == 0


@given(st.lists(LABELS, min_size=2, max_size=3))
def test_the_inputs_stay_as_they_are(maps) -> None:
    before = [labels.copy() for labels in maps]
    sources = [Source(labels) for labels in maps]
    merge(sources, truth=maps[0], annotated=[1, 2, 3, 4], ignore_label=5, protect=[1])
    merge(sources, union_of=[1, 2], ignore_label=5)
    for labels, old in zip(maps, before, strict=True):
        assert np.array_equal(labels, old)


# ---------------------------------------------------------------------------------------------- id maps


@pytest.mark.parametrize("name", shipped_id_maps())
def test_shipped_id_maps_reach_each_organ_once(name: str) -> None:
    found = load_id_map(name)
    missing = {organ.id for organ in FLARE22} - found.knows
    assert missing == ({12} if name == "btcv" else set())
    targets = [own for own in found.ids.values() if own]
    assert len(targets) == len(set(targets))


def test_the_ids_are_mapped() -> None:
    assert flat(load_id_map("btcv").apply(row(0, 6, 10, 13))) == [0, 1, 0, 8]
    assert flat(load_id_map("amos").apply(row(6, 13, 15))) == [1, 12, 0]
    assert flat(load_id_map("totalsegmentator").apply(row(5, 52, 63, 117))) == [1, 5, 6, 0]


def test_an_unlisted_id_is_refused_where_the_map_says_so() -> None:
    with pytest.raises(ValueError, match=r"\[99\]"):
        load_id_map("amos").apply(row(1, 99))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nids: {1: 2}\n", "expected the keys"),
        ("name: x\nids: {0: 2}\nothers: refuse\n", "expected an id above 0"),
        ("name: x\nids: {1: 300}\nothers: refuse\n", "from 0 to 255"),
        ("name: x\nids: {1: 2}\nothers: keep\n", "expected refuse or background"),
        ("name: x\nids: []\nothers: refuse\n", "foreign id: our id"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_id_map_is_refused_with_its_reason(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_id_map(str(path))


def test_unknown_names_and_files_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="there are amos, btcv, totalsegmentator"):
        load_id_map("word")
    with pytest.raises(InputError, match="no such file"):
        load_id_map(str(tmp_path / "none.yaml"))


@given(arrays(np.int8, (2, 3, 4), elements=st.integers(-1, 4)), arrays(np.int8, (2, 3, 4), elements=st.integers(-1, 4)))
def test_a_completed_label_is_the_annotation_with_only_missing_organs_filled_in(truth, pseudo):
    annotated = [1, 2]
    truth[truth > 2] = 0
    labels = complete(truth, pseudo, annotated=annotated)
    for organ in annotated:
        np.testing.assert_array_equal(labels == organ, truth == organ)
    for organ in (3, 4):
        np.testing.assert_array_equal(labels == organ, (pseudo == organ) & (truth <= 0))
    background = labels <= 0
    np.testing.assert_array_equal(labels[background], truth[background])  # -1 outside the crop stays
