#!/usr/bin/env python3
"""Stands in for ``docker build``, ``run`` and ``save`` where no daemon runs: no image, but the same files and script.

``build`` checks that everything the Dockerfile copies is in the context, exports the model as its first stage does and
lays out the work folder; ``run`` runs the command there, with the mounted folders in place of the container's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path


def build(words: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-f", required=True)
    parser.add_argument("-t", required=True)
    parser.add_argument("--build-arg", action="append", default=[])
    parser.add_argument("context")
    given = parser.parse_args(words)
    dockerfile = Path(given.f).read_text(encoding="utf-8")
    arguments = dict(word.split("=", 1) for word in given.build_arg)
    image = Path(f"image-{given.t}")
    image.mkdir(exist_ok=True)
    for stage, source, target in re.findall(r"^COPY (?:--from=(\S+) |--\S+ )*(\S+) (\S+)$", dockerfile, re.M):
        if stage:
            if source == "/model":
                exported = str(image / target.removeprefix("/workspace/"))
                subprocess.run(["flare-export", "-m", arguments["MODEL"], "-o", exported], check=True)
            continue
        path = Path(given.context, re.sub(r"\$\{(\w+)\}", lambda match: arguments[match.group(1)], source))
        if not path.exists():
            sys.exit(f"COPY failed: {path} is not in the context")
        if target.startswith("/workspace/"):
            (image / target.removeprefix("/workspace/")).symlink_to(path.absolute())
    declared = set(re.findall(r"^ARG (\w+)", dockerfile, re.M))
    if not set(arguments) <= declared:
        sys.exit(f"unknown build arguments {set(arguments) - declared}")
    return 0


def run(words: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rm", action="store_true")
    parser.add_argument("-v", action="append", default=[])
    parser.add_argument("-e", action="append", default=[])
    parser.add_argument("image")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(words)
    mounts = {inside: outside for outside, inside in (word.split(":") for word in given.v)}
    environment = {
        **os.environ,
        **dict(word.split("=", 1) for word in given.e),
        "FLARE_INPUTS": mounts["/workspace/inputs"],
        "FLARE_OUTPUTS": mounts["/workspace/outputs"],
        "FLARE_MODEL": "model",
    }
    return subprocess.run(given.command, env=environment, cwd=f"image-{given.image}", check=False).returncode


def save(words: list[str]) -> int:
    sys.stdout.writelines(sorted(path.name for path in Path(f"image-{words[0]}").iterdir()))
    return 0


if __name__ == "__main__":
    sys.exit({"build": build, "run": run, "save": save}[sys.argv[1]](sys.argv[2:]))
