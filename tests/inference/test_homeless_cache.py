"""A user without a home folder, as in containers that run with any user id, has a cache all the same."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest

from nnunet_flare.inference.cache import cache_folder


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """No HOME and no entry in the password file; temporary files in the test's folder."""

    def none(cls):
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME", "XDG_CACHE_HOME", "NNUNET_FLARE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(none))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"nnunet-flare-{os.getuid()}"


def test_the_cache_lies_among_temporary_files_for_this_user_alone(homeless, caplog):
    caplog.set_level(logging.INFO, "nnunet_flare")
    assert cache_folder("openvino") == homeless / "nnunet-flare" / "openvino"
    assert homeless.stat().st_mode & 0o777 == 0o700
    assert "no home folder (HOME is not set)" in caplog.text


def test_a_folder_that_is_not_this_users_is_not_used_and_the_reason_is_said(homeless, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nnunet_flare")
    (tmp_path / "theirs").mkdir()
    homeless.symlink_to(tmp_path / "theirs")
    assert cache_folder("openvino") is None
    assert "belongs to another user" in caplog.text and "NNUNET_FLARE_CACHE" in caplog.text


def test_a_home_that_cannot_be_written_is_said(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "nnunet_flare")
    monkeypatch.delenv("NNUNET_FLARE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cache_folder("openvino") is None and "no cache for openvino" in caplog.text
