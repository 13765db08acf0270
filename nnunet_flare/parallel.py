"""Doing the same to many cases in worker processes, where a bad case is set aside and the others go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from types import TracebackType
from typing import TypeVar

from nnunet_flare.errors import CaseError, FlareError, InputError

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Worker processes that are started once and used for several passes over the cases.

    Args:
        processes: how many; default one per core. One works in this process. Never more than cases are started.
        progress: False shows no progress bars; otherwise they are shown on terminals.
    """

    def __init__(self, processes: int | None = None, *, progress: bool = True) -> None:
        self._processes = processes or os.cpu_count() or 1
        self._progress = progress
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each_case(
        self, function: Callable[[T], R], cases: Sequence[T], *, description: str
    ) -> Iterator[tuple[T, R | CaseError]]:
        """Yield each case with the function's result, or the :class:`CaseError` that it raised, as they are done.

        With several processes the function and the cases must be picklable.

        Raises:
            FlareError: when a worker dies.
        """
        from tqdm import tqdm

        work = partial(_guarded, function)
        workers = min(self._processes, len(cases))
        with tqdm(total=len(cases), desc=description, unit="case", disable=None if self._progress else True) as bar:
            if workers <= 1:
                for case in cases:
                    yield case, work(case)
                    bar.update()
                return
            if self._pool is None:
                self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
            jobs = {self._pool.submit(work, case): case for case in cases}
            for job in as_completed(jobs):
                try:
                    result = job.result()
                except BrokenProcessPool as error:
                    raise FlareError(
                        f"{description}: a worker process died, perhaps it ran out of memory; use fewer with -np 1"
                    ) from error
                yield jobs[job], result
                bar.update()


def _guarded(function: Callable[[T], R], case: T) -> R | CaseError:
    try:
        return function(case)
    except CaseError as error:
        return error


def num_processes(cases: int) -> int:
    """Worker processes for preprocessing: nnU-Net's own variable, never more than cores or cases."""
    text = os.environ.get("nnUNet_def_n_proc", "8").strip()  # noqa: SIM112 (nnU-Net spells it so)
    if not text.isdecimal() or not 1 <= len(text.lstrip("0")) <= 4:
        raise InputError(
            f"environment variable nnUNet_def_n_proc: found {text[:40]!r}, expected a number from 1 to 9999"
        )
    return max(1, min(int(text), os.cpu_count() or 1, cases))
