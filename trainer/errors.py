"""Errors that users read, and the exit status each ends the program with."""

import errno
import re
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_TO_BE_RESUMED = 75  # sysexits.h EX_TEMPFAIL: stopped in order to be resumed


class PacktrainError(Exception):
    """A failure packtrain foresaw. The command line prints its text without a traceback."""

    exit_status = EXIT_FAILURE
    told = False  # whether the user has seen it already
    blamed = ""  # host whose machine is at fault


class UserError(PacktrainError):
    """The user's input is wrong: recipe, data, a missing file.

    Args:
        where: the field or file at fault, such as ``data.train[0].path``.
        found: what was found there.
        allowed: what would have been right; empty when `fix` says it.
        fix: what to do now.
    """

    exit_status = EXIT_USER_ERROR

    def __init__(self, where: str, found: str, allowed: str = "", fix: str = "") -> None:
        self.where, self.found, self.allowed, self.fix = where, found, allowed, fix
        lines = [f"{where}: {found}"]
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))


class PreflightFailed(PacktrainError):
    """The processes cannot compute together, found before they began.

    Args:
        blamed: host at fault; empty where it is no machine's, or nobody can tell which one's.
    """

    def __init__(self, message: str, blamed: str = "") -> None:
        super().__init__(message)
        self.blamed = blamed


def as_read(error: BaseException) -> str:
    """The error as users read it, with its type where packtrain did not foresee it."""
    return str(error) if isinstance(error, PacktrainError) else f"{type(error).__name__}: {error}"


def first_line(error: BaseException) -> str:
    """What a library's error is, where its whole text is for its authors."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def only(hosts: Iterable[str]) -> str:
    """The one host that is named; empty where none is, or several are: what machines have in common is no fault."""
    named = set(hosts) - {""}
    return named.pop() if len(named) == 1 else ""


def first_error(log: str) -> str:
    """What another program's output names first as an error; empty where it names none.

    vLLM's processes pass an error on to one another, and the last one no longer says why.
    """
    found = re.search(r"^(?:\(.*?\) )?(?:ERROR .*?\] )?([\w.]*(?:Error|Exception): .+)$", log, re.MULTILINE)
    return found[1] if found else ""


# What a user can correct by naming another path; anything else, such as a full disk, is a failure.
_WRONG_PATH = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
}


def explain_os_error(error: OSError) -> PacktrainError:
    """What the system refused to do with a file, for users."""
    where, found = str(error.filename or "the system says"), error.strerror or str(error)
    if error.errno in _WRONG_PATH:
        return UserError(where, found, fix="name another path, or change what is there")
    return PacktrainError(f"{where}: {found}")


class TrainingDiverged(PacktrainError):
    """Loss or gradients stayed NaN or Inf; the run stopped at its last good checkpoint."""


class Preempted(PacktrainError):
    """The run saved a checkpoint and stopped in order to be resumed."""

    exit_status = EXIT_TO_BE_RESUMED


class MemoryRanOut(PacktrainError):
    """A GPU's memory did, others wait for it in vain, and the next start takes less."""

    exit_status = EXIT_TO_BE_RESUMED
