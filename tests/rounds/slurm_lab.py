"""A real Slurm of two nodes on this machine, for tests: loopback only, fake GPUs, no accounting, no authentication.

Each "node" is a ``slurmd`` with its own name and port. A GPU is a link to ``/dev/null`` whose trailing number is what
Slurm puts into ``CUDA_VISIBLE_DEVICES``. Debian: ``apt-get install slurmctld slurmd slurm-client munge``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

BINARIES = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")

CONFIGURATION = """\
ClusterName=flaretest
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=50
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=15
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_binaries() -> list[str]:
    """Slurm's programs that this machine lacks; its daemons lie in ``/usr/sbin``, which is not on every PATH."""
    return [name for name in BINARIES if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"


def _free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that nobody listens on."""
    for first in range(26800, 30000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError("no free ports")


class SlurmLab:
    """The cluster; a context manager that ends every daemon it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> SlurmLab:
        for name in ("state", "spool/n1", "spool/n2", "gpus/n1", "gpus/n2"):
            (self.folder / name).mkdir(parents=True)
        port = _free_ports(3)
        names = {"host": socket.gethostname().partition(".")[0], "user": os.environ.get("USER") or "root"}
        if os.getuid() == 0:
            names["user"] = "root"
        text = CONFIGURATION.format(folder=self.folder, port=port, first=port + 1, last=port + 2, **names)
        (self.folder / "slurm.conf").write_text(text)
        gpus = []
        for node in ("n1", "n2"):
            for number in range(2):
                device = self.folder / "gpus" / node / f"gpu{number}"
                device.symlink_to("/dev/null")
                gpus.append(f"NodeName={node} Name=gpu File={device}\n")
        (self.folder / "gres.conf").write_text("".join(gpus))
        try:
            for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
                self.daemons.append(self._start(command))
            self.wait(
                lambda: self.call("sinfo", "-h", "-N", "-p", "lab", "-t", "idle", "-o", "%N").split() == ["n1", "n2"]
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        program = shutil.which(command[0], path=_path())
        with open(self.folder / f"{command[0]}-{command[-1]}.out", "ab") as stream:
            return subprocess.Popen(
                [str(program), *command[1:]], env={**os.environ, **self.environment}, stdout=stream, stderr=stream
            )

    def __exit__(self, *error: object) -> None:
        if self.daemons and self.daemons[0].poll() is None:
            for job in self.call("squeue", "-h", "-o", "%A").split():
                self.call("scancel", "--signal=KILL", "--full", job)
        for daemon in self.daemons:  # the controller first, else it waits for the nodes
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def lose_node(self, name: str) -> None:
        """Kill a node's daemon and every process of its jobs, as a power cut does."""
        daemon = self.daemons.pop({"n1": 1, "n2": 2}[name])
        lost = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == name:
                    lost += [process, *(parent for parent in process.parents() if parent.name() == "slurmstepd")]
        for end in (psutil.Process.suspend, psutil.Process.kill):  # all at once: nobody may report a neighbour's death
            for process in lost:
                with suppress(psutil.Error):
                    end(process)
        daemon.wait()

    def call(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout

    def states(self) -> dict[str, str]:
        """State of every job that Slurm knows, ended ones too, by id (``12_3`` for array elements)."""
        printed = self.call("scontrol", "--oneliner", "show", "job")
        states = {}
        for line in printed.splitlines():
            fields = dict(re.findall(r"(JobId|ArrayJobId|ArrayTaskId|JobState)=(\S+)", line))
            if "JobId" in fields:
                array = f"{fields.get('ArrayJobId')}_{fields.get('ArrayTaskId')}"
                states[array if "ArrayJobId" in fields else fields["JobId"]] = fields["JobState"]
        return states

    def wait(self, condition, seconds: float = 60.0) -> None:  # type: ignore[no-untyped-def]
        ends = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > ends:
                raise AssertionError(f"did not happen within {seconds} s; jobs: {self.states()}")
            time.sleep(0.1)
