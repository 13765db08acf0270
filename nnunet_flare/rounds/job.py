"""Another name of :mod:`nnunet_flare.rounds.executors.slurm_job`: scripts of queued jobs have it."""

from __future__ import annotations

import sys

from nnunet_flare.rounds.executors.slurm_job import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
