"""A folder of this user for converted networks.

It is used only when it belongs to this user and nobody else may write to it, because what lies there is executed.
Entries are made under a temporary name and renamed, and what a killed process left of one goes. The oldest go when
there are more than :data:`KEPT_ENTRIES`. An entry says what its files hold (:data:`CHECKSUMS`); one that holds anything
else is made anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any

from nnunet_flare.digests import file_digest
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, remove_leftovers, temporary_prefix, write_json

log = logging.getLogger(__name__)

VARIABLE = "NNUNET_FLARE_CACHE"
"""Environment variable that names another folder; empty turns the cache off."""

KEPT_ENTRIES = 16

NETWORKS = "openvino"
"""The kind of entries that are converted networks."""

MADE_BY = ("nnunet-flare", "nnunetv2", "dynamic-network-architectures", "torch", "openvino")
"""Packages of which another version may make another network, or refuse the model."""

CHECKSUMS = "checksums.json"
"""The digest of each of an entry's files."""


def cache_folder(kind: str) -> Path | None:
    """The cache's folder for one kind of entry, made where it is missing; None where there can be no safe one."""
    setting = os.environ.get(VARIABLE)
    if setting == "":
        return None
    try:
        base = Path(setting) if setting else Path(os.environ.get("XDG_CACHE_HOME") or _home_cache())
        folder = base / kind if setting else base / "nnunet-flare" / kind
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        log.info("no cache for %s: %s; set %s to a folder that you own", kind, error, VARIABLE)
        return None
    if not hasattr(os, "getuid"):  # Windows tells neither owner nor mode so
        return folder
    if found.st_uid != os.getuid():
        log.warning("cache not used: %s belongs to another user", folder)
        return None
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning("cache not used: other users may write to %s (chmod go-w)", folder)
        return None
    return folder


def _home_cache() -> Path:
    """``~/.cache``; of a user without a home (a container's nameless one) a folder of this user among temporary files.

    Raises:
        OSError: when that folder cannot be made, or another user made it.
    """
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        if not hasattr(os, "getuid"):
            raise FileNotFoundError(errno.ENOENT, "this user has no home folder") from None
        folder = Path(gettempdir()) / f"nnunet-flare-{os.getuid()}"
        log.info("this user has no home folder (HOME is not set); the cache lies in %s", folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "belongs to another user", str(folder))
    return folder


def key_of(*parts: Any) -> str:
    """A name for an entry that changes with any of the parts (JSON values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def made_by() -> list[str | None]:
    """The versions of the packages that make converted networks."""
    from importlib.metadata import PackageNotFoundError, version  # exported models start without it

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return [installed(package) for package in MADE_BY]


def cached(folder: Path | None, key: str, make: Callable[[Path], None]) -> Path | None:
    """The entry's folder, made by ``make`` (given an empty folder) when it is missing or damaged, which is said.

    None when there is no cache or the entry cannot be written; then nothing was kept.
    """
    if folder is None:
        return None
    entry = folder / key
    temporary = None
    try:
        if find(folder, key) is not None:
            return entry
        remove_leftovers(folder)
        temporary = Path(mkdtemp(prefix=temporary_prefix(), dir=folder))
        make(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        write_json(temporary / CHECKSUMS, {path.relative_to(temporary).as_posix(): file_digest(path) for path in files})
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another process was faster
                raise
    except OSError as error:
        log.info("not cached: %s (%s)", entry, error)
        return None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder)
    return entry


def find(folder: Path | None, key: str) -> Path | None:
    """The entry's folder, marked as used; None where it is missing. A damaged one is removed, which is said."""
    if folder is None or not (folder / key).is_dir():
        return None
    wrong = damage(folder / key)
    if wrong is not None:
        log.warning("the cache entry %s is damaged (%s); it is made again", folder / key, wrong)
        shutil.rmtree(folder / key, ignore_errors=True)
        return None
    with suppress(OSError):  # of a cache that may only be read
        os.utime(folder / key)
    return folder / key


def damage(entry: Path) -> str | None:
    """What is wrong with an entry, in words, or None; its files are read whole."""
    try:
        known = read_json(entry / CHECKSUMS, {str: str})
        if not known:
            return f"{CHECKSUMS} names no file"
        different = [name for name, digest in known.items() if file_digest(entry / name) != digest]
    except (OSError, InputError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(different)} changed since it was written" if different else None


def _prune(folder: Path) -> None:
    """Remove the entries that were used longest ago."""
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    ages = sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)
    for old in ages[KEPT_ENTRIES:]:
        shutil.rmtree(old, ignore_errors=True)
