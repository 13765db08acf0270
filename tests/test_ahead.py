"""Working on one item while the next one is made ready."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nnunet_flare.ahead import each_ahead


def test_the_next_item_is_made_ready_while_one_is_worked_on_and_no_more() -> None:
    begun = {item: threading.Event() for item in "abc"}

    def load(item: str) -> str:
        begun[item].set()
        return item.upper()

    with ThreadPoolExecutor(1) as loader:
        seen = []
        for item, loading in each_ahead("abc", load, loader):
            seen.append((item, loading.result()))
            if item == "a":
                assert begun["b"].wait(10) and not begun["c"].is_set()
    assert seen == [("a", "A"), ("b", "B"), ("c", "C")]


def test_the_first_item_is_made_ready_before_anybody_asks() -> None:
    begun = threading.Event()
    with ThreadPoolExecutor(1) as loader:
        each_ahead("a", lambda item: begun.set(), loader)
        assert begun.wait(10)


def test_an_item_that_cannot_be_made_ready_leaves_the_others() -> None:
    def load(item: int) -> float:
        return 1 / item

    with ThreadPoolExecutor(1) as loader:
        found = dict(each_ahead([0, 2], load, loader))
    with pytest.raises(ZeroDivisionError):
        found[0].result()
    assert found[2].result() == 0.5
