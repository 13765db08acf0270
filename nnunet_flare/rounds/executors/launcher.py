"""Becomes a command that ends when its parent dies: ``python -I -S launcher.py PARENT COMMAND...``.

The child itself asks Linux for that before it starts the command. Code that runs in a forked child before exec, beside
the parent's threads, could stop it for ever. Standard library only.
"""

import os
import sys

PR_SET_PDEATHSIG, SIGTERM = 1, 15


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    try:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGTERM)
    except (OSError, AttributeError, ImportError):
        pass  # not Linux: the next try of the task ends what was left
    if os.getppid() != parent:
        sys.exit(f"{command[0]}: its parent, process {parent}, ended before it started")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
