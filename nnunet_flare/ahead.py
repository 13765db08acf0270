"""Working on one item while the next one is made ready by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def each_ahead(items: Sequence[T], load: Callable[[T], R], loader: ThreadPoolExecutor) -> Iterator[tuple[T, Future[R]]]:
    """Each item with its loading, the next one's already under way. The first loading starts at once.

    Args:
        items: one or more.
        load: what makes an item ready.
        loader: has one thread, and is shut down by the caller.
    """

    def following(current: Future[R]) -> Iterator[tuple[T, Future[R]]]:
        for item, after in zip(items, [*items[1:], None], strict=True):
            current.exception()  # one item waits at a time, no more
            ahead = None if after is None else loader.submit(load, after)
            yield item, current
            if ahead is not None:
                current = ahead

    return following(loader.submit(load, items[0]))
