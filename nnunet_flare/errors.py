"""The package's errors. Every message names the case or file, what was found, what was expected and what to do."""

from __future__ import annotations


class FlareError(Exception):
    """Base of every error that this package raises on purpose; commands print it as one line, without a traceback."""

    exit_code = 1


class InputError(FlareError):
    """Wrong usage or unusable input: nothing was started (exit code 2)."""

    exit_code = 2


class CaseError(FlareError):
    """One case cannot be used; it is set aside and reported while the others go on (exit code 1 at the end)."""

    def __init__(self, case: str, message: str) -> None:
        super().__init__(f"{case}: {message}")
        self.case = case
        self.reason = message

    def __reduce__(self) -> tuple[type[CaseError], tuple[str, str]]:
        return type(self), (self.case, self.reason)


class DeviceError(FlareError):
    """This process cannot use the GPU any more: nothing more can be done before it is started again (exit code 1)."""


class TaskError(FlareError):
    """A task of a run failed; the message holds its exit code and last lines (exit code 1)."""
