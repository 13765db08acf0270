"""``flare-predict``, ``flare-evaluate`` and ``flare-postprocess`` use nothing that only POSIX systems have.

Linux is what is supported; here these modules and functions are taken away, as they are missing on Windows.
"""

from __future__ import annotations

import subprocess
import sys

import model_folders as models
import numpy as np
import pytest
import small_scans as scans

from nnunet_flare.images import Volume, write_labels, write_volume

MISSING_ON_WINDOWS = """
chown chroot confstr ctermid environb fchdir fchown fdatasync fork forkpty fpathconf fstatvfs fwalk getegid getenvb
geteuid getgid getgrouplist getgroups getloadavg getpgid getpgrp getpriority getrandom getresgid getresuid getsid getuid
getxattr killpg lchown listxattr lockf major makedev memfd_create minor mkfifo mknod nice openpty pathconf pidfd_open
pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev readv register_at_fork
removexattr sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups setpgid setpgrp
setpriority setregid setresgid setresuid setreuid setsid setuid setxattr splice statvfs sync sysconf tcgetpgrp tcsetpgrp
ttyname uname wait wait3 wait4 waitid writev copy_file_range eventfd O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOATIME
O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE PRIO_PROCESS RTLD_GLOBAL RTLD_LAZY RTLD_LOCAL RTLD_NOW SEEK_DATA
SEEK_HOLE ST_RDONLY WCOREDUMP WEXITSTATUS WIFEXITED WIFSIGNALED WIFSTOPPED WNOHANG WNOWAIT WTERMSIG WUNTRACED
ITIMER_PROF ITIMER_REAL ITIMER_VIRTUAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGQUIT
SIGRTMAX SIGRTMIN SIGSTOP SIGSYS SIGTRAP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH SIGXCPU
SIGXFSZ SIG_BLOCK SIG_SETMASK SIG_UNBLOCK alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt
sigpending sigtimedwait sigwait sigwaitinfo
"""
"""Names of ``os`` and ``signal``; macOS lacks ``posix_fallocate`` and ``sched_getaffinity`` too."""

WITHOUT_POSIX = f"""
import builtins, types
BLOCKED = set("crypt curses fcntl grp nis posix pty pwd readline resource spwd syslog termios tty".split())
MISSING = set({MISSING_ON_WINDOWS!r}.split())
real = builtins.__import__
def left(module):
    made = types.ModuleType(module.__name__)
    vars(made).update((name, value) for name, value in vars(module).items() if name not in MISSING)
    return made
fewer = {{name: left(__import__(name)) for name in ("os", "signal")}}
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    # other packages know what they may use where
    if str((globals or {{}}).get("__name__", "")).startswith("nnunet_flare"):
        if name in BLOCKED:
            raise ImportError(f"{{name}} is of POSIX alone")
        if name in fewer:
            return fewer[name]
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
"""


def without_posix(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + code], capture_output=True, text=True, check=False, timeout=500
    )


@pytest.mark.parametrize(
    "code, message",
    [
        ("import fcntl", "fcntl is of POSIX alone"),
        ("import os; os.getuid()", "'os' has no attribute 'getuid'"),
        ("from signal import SIGKILL", "cannot import name 'SIGKILL'"),
    ],
)
def test_the_guard_stops_what_it_should(code, message):
    done = without_posix(f"exec({code!r}, {{'__name__': 'nnunet_flare.x'}})")
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize("command", ["predict", "evaluate", "postprocess"])
def test_help_needs_nothing_of_posix(command):
    done = without_posix(f"from nnunet_flare.cli.{command} import main; main(['--help'])")
    assert done.returncode == 0 and "usage: flare-" in done.stdout, done.stderr


def test_what_a_prediction_imports_needs_nothing_of_posix():
    modules = (
        "folder",
        "inputs",
        "forms",
        "statistics",
        "previews",
        "watching",
        "exported",
        "cache",
        "openvino_runtime",
    )
    done = without_posix("".join(f"import nnunet_flare.inference.{name}\n" for name in modules))
    assert done.returncode == 0, done.stderr


def test_statistics_are_written_without_locks(tmp_path):
    done = without_posix(
        "from pathlib import Path\n"
        "from nnunet_flare.inference.statistics import Statistics\n"
        f"with Statistics(Path({str(tmp_path)!r}), {{1: 'liver'}}, ct=True)._locked(): print('inside')"
    )
    assert done.stdout == "inside\n", done.stderr


def test_a_scan_is_predicted_with_everything_that_can_be_written_of_it(tmp_path):
    model = models.write_model(tmp_path / "model")
    write_volume(tmp_path / "in" / "a_0000.nii.gz", scans.blobs((10, 36, 40)))
    wanted = ["--save_probabilities", "--statistics", "--preview", "--uncertainty"]
    words = ["-i", "in", "-o", "out", "-m", str(model), "-device", "cpu", "--backend", "torch", *wanted]
    done = without_posix(
        f"import os; os.chdir({str(tmp_path)!r})\n"
        f"from nnunet_flare.cli.predict import main\n"
        f"raise SystemExit(main({words!r}))\n"
    )
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {"a.nii.gz", "a.npz", "a.pkl", "a.png", "statistics.csv", "uncertainty/a.nii.gz"} <= written, written


def test_label_maps_are_cleaned_and_scored(tmp_path):
    array = np.zeros((6, 12, 12), np.uint8)
    array[1:5, 2:9, 2:9] = 1
    write_labels(tmp_path / "maps" / "a.nii.gz", array, Volume(array, (2.0, 1.0, 1.0)))
    maps, out, table = str(tmp_path / "maps"), str(tmp_path / "out"), str(tmp_path / "s.csv")
    done = without_posix(
        "from nnunet_flare.cli.postprocess import main as clean\n"
        "from nnunet_flare.cli.evaluate import main as score\n"
        f"assert clean(['-i', {maps!r}, '-o', {out!r}, '-np', '1']) == 0\n"
        f"assert score(['-ref', {maps!r}, '-pred', {out!r}, '-o', {table!r}, '-np', '1']) == 0\n"
    )
    assert done.returncode == 0, done.stderr
    assert "1 cases, official rules" in done.stdout and (tmp_path / "s.png").is_file()
