"""A full disk, a quota or a disk for reading only, under its own name.

The writers of torch, ITK and blosc2 lose the system's error and raise one of their own ("unexpected pos 1876928").
Where one of them fails, the disk itself is asked by writing a little to it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from nnunet_flare.errors import FlareError

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})
"""What ends a piece of work over many cases, because the next case would meet it too."""

PROBE_BYTES = 1 << 20
"""A writer fails when its buffer no longer fits; what is free then is less than this."""


def concerns_disk(error: BaseException) -> bool:
    """Whether an error says that a disk cannot be written, whatever is being written."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def trouble(folder: Path) -> OSError | None:
    """What keeps a folder from being written, found by writing to it; None where it can be."""
    probe = folder / f".tmp-{uuid4().hex[:12]}-probe"
    try:
        with open(probe, "wb") as stream:
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error if error.errno in DISK_ERRORS else None
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """A block that writes a file: an error that a disk caused becomes the system's own, with the file's name.

    Raises:
        OSError: with the system's number and words.
    """
    try:
        yield
    except FlareError:
        raise
    except Exception as error:
        cause = error if isinstance(error, OSError) and error.errno is not None else trouble(path.parent)
        if cause is None or not concerns_disk(cause):
            raise
        raise OSError(cause.errno, os.strerror(cause.errno or 0), str(path)) from error
