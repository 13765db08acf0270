"""File names that every library can open.

A name on disk is any row of bytes. Python carries those that are no text as surrogates; SimpleITK ends the whole
process when it is given one. So a library gets a link with a plain name instead, and nothing else changes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from nnunet_flare.files import scratch_folder

META_DATA_FILE = re.compile(rb"(?m)^(ElementDataFile\s*=\s*)(.*?)[ \t]*\r?$")
"""The line of a MetaImage header that names the file of its voxels."""


def is_plain(path: Path | str) -> bool:
    """Whether the name is text, and the same bytes on disk as in UTF-8, as C++ libraries take it."""
    try:
        return os.fsencode(path) == str(path).encode("utf-8")
    except UnicodeError:
        return False


@contextmanager
def readable(path: Path) -> Iterator[str]:
    """A plain name of a file, under which any library can read it: its own, or that of a link."""
    if is_plain(path):
        yield str(path)
        return
    with plain_folder() as folder:
        link = folder / f"image{''.join(path.suffixes[-2:]) if path.name.lower().endswith('.gz') else path.suffix}"
        if not is_plain(link):
            link = folder / "image"
        if path.name.lower().endswith(".mhd"):
            _link_meta_header(path, link)
        else:
            link.symlink_to(path.absolute())
        yield str(link)


@contextmanager
def all_readable(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Plain names of several files, in their order."""
    with ExitStack() as stack:
        yield [stack.enter_context(readable(path)) for path in paths]


@contextmanager
def plain_folder(beside: Path | None = None) -> Iterator[Path]:
    """A temporary folder with a plain name. Given ``beside``, its files lie on the same disk as that folder's.

    It is made in the system's folder for such files only where the name of ``beside`` is not plain: a container may
    have no other folder that can be written than that of the results.
    """
    if beside is not None and is_plain(beside.absolute()):
        with scratch_folder(beside) as folder:
            yield folder
        return
    with TemporaryDirectory(prefix="flare-", dir=None if is_plain(gettempdir()) else "/tmp") as own:
        if beside is None:
            yield Path(own)
            return
        with scratch_folder(beside) as inner:
            link = Path(own) / "there"
            link.symlink_to(inner.absolute())
            yield link


def _link_meta_header(path: Path, link: Path) -> None:
    """A copy of a MetaImage header that names a link to the voxels beside it."""
    text = path.read_bytes()
    match = META_DATA_FILE.search(text)
    if match is not None and match.group(2) not in (b"LOCAL", b"LIST"):
        voxels = link.with_name(f"voxels{'.zraw' if match.group(2).endswith(b'.zraw') else '.raw'}")
        voxels.symlink_to((path.parent / os.fsdecode(match.group(2))).absolute())
        text = text[: match.start(2)] + voxels.name.encode() + text[match.end(2) :]
    link.write_bytes(text)
