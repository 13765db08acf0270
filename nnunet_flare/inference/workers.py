"""Work on the parts of an array, shared by our own threads, each with single-threaded matrix products.

The threads of a BLAS library wait for each other in busy loops: products of a slice's size take four times the CPU
time with two of them, and longer on the clock wherever another program wants a CPU too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

from nnunet_flare.inference.cpus import thread_count

Part = TypeVar("Part")

WORTH_A_THREAD = 1 << 19
"""Values of which sums and quotients take longer than starting a thread does."""

_lock = threading.Lock()
_holders = 0
_before: list[tuple[Any, int]] = []


def in_parallel(work: Callable[[Part], None], parts: Sequence[Part]) -> None:
    """Call a function for every part, on as many threads as this process may use; the first error is raised."""
    if len(parts) == 1:
        with one_blas_thread():
            work(parts[0])
        return
    with one_blas_thread(), ThreadPoolExecutor(max(1, min(thread_count(), len(parts))), "flare-part") as pool:
        for _ in pool.map(work, parts):
            pass


def split(count: int, values: int) -> list[slice]:
    """Equal parts of ``count`` things that hold so many values: one a thread, a single one where threads cost more."""
    threads = max(1, min(thread_count(), count, values // WORTH_A_THREAD))
    bounds = [count * part // threads for part in range(threads + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, matrix products are computed on the thread that asks for them, in the whole process.

    The first one in notes what was set, the last one out restores it.
    """
    global _holders, _before
    with _lock:
        if _holders == 0:
            _before = [(library, library.num_threads) for library in _libraries()]
            for library, _ in _before:
                library.set_num_threads(1)
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                for library, threads in _before:
                    library.set_num_threads(threads)


@lru_cache(maxsize=1)
def _libraries() -> list[Any]:
    """The BLAS libraries that are loaded, NumPy's among them."""
    from threadpoolctl import ThreadpoolController

    return list(ThreadpoolController().select(user_api="blas").lib_controllers)
