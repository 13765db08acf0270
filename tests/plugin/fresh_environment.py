"""A fresh virtual environment that sees everything this interpreter has installed, without its start-up files.

The outer packages are named in a ``.pth`` file, so nothing is downloaded. Python runs no ``.pth`` file of a folder
that is added this way, so a package that is installed outside is importable at most, and its plugin is not active.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = tuple(dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")))
NO_ISOLATION = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
"""The build backend of this environment is used where it has one; else pip fetches it."""


class Environment:
    """One virtual environment below ``folder``."""

    def __init__(self, folder: Path) -> None:
        with_pip = importlib.util.find_spec("pip") is None
        venv.create(folder / "venv", with_pip=with_pip, symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        self._pip = (
            [str(self.python), "-m", "pip"] if with_pip else [sys.executable, "-m", "pip", "--python", str(self.python)]
        )
        self.site = Path(self.call("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        (self.site / "zz_outer_packages.pth").write_text("".join(f"{site}\n" for site in SITE))

    def pip(self, *arguments: str) -> None:
        """Run pip on this environment; nothing is fetched beyond what is asked for."""
        command = [*self._pip, *arguments, "--disable-pip-version-check", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python outside the repository, with nothing of the caller's Python variables."""
        dropped = ("PYTHON", "COV_", "COVERAGE_", "NNUNET_", "nnUNet_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        return subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            cwd=self.python.parent,
            env={**inherited, **variables},
            check=False,
            timeout=300,
        )

    def call(self, code: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run ``code`` and expect success."""
        done = self.run(*flags, "-c", code, **variables)
        assert done.returncode == 0, done.stderr
        return done


def build_wheel(folder: Path, source: Path = REPOSITORY) -> Path:
    """Build this repository's wheel, or that of another source, into ``folder``."""
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        *isolation,
        "--quiet",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))
