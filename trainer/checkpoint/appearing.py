"""Folders that appear when they are complete: one process fills one at a time, and a full disk is told plainly.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.checkpoint.layout import begin_folder, commit_folder, unfinished
from trainer.errors import PacktrainError, Preempted, UserError
from trainer.launchers import host_name
from trainer.units import tell_size

LOCK = ".lock"  # after an unfinished folder's name, beside it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def folder_appears_when_complete(
    final: Path,
    can_go_on: Callable[[Path], bool] = lambda folder: False,
    num_bytes: int = 0,
    replaces: bool = False,
) -> Iterator[Path]:
    """Yields a folder to fill; after success it is synced and becomes `final`, after an error `final` never appears.

    Args:
        can_go_on: whether what an earlier filling left unfinished can be gone on from. Then it is yielded as it is, and
            kept by a stop that was asked for; an error always removes it, as a full disk has no room for half a model.
        num_bytes: that will be written, as far as it is known.
        replaces: at the end takes the place of what is at `final`, which must not exist else.

    Raises:
        UserError: `final` exists, another process is filling it, or the disk has too little room.
    """
    temporary = unfinished(final)
    with _only_writer(final):
        if os.path.lexists(final) and not replaces:
            raise UserError(str(final), "exists: another process was first", "a new folder", "use it, or name another")
        if num_bytes > _room_for(final):
            raise _no_room(temporary, final, num_bytes, os.strerror(errno.ENOSPC))
        try:
            if not can_go_on(temporary):
                begin_folder(final)
            yield temporary
            if replaces and final.exists():
                shutil.rmtree(final)
            commit_folder(temporary, final)
        except BaseException as error:
            file = _file_without_room(error, temporary)
            was_asked = isinstance(error, Preempted) or not isinstance(error, Exception)
            if was_asked and can_go_on(temporary):
                logger.info("%s is kept: the same command goes on from there", temporary)
            else:
                shutil.rmtree(temporary, ignore_errors=True)
            if file:
                raise _no_room(file, final, num_bytes, _reason(error)) from error
            raise


@contextlib.contextmanager
def _only_writer(final: Path) -> Iterator[None]:
    """Holds the lock beside an unfinished folder; the system frees it however the process ends."""
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(unfinished(final).name + LOCK)
    lock = _take_lock(path, final)
    try:
        with contextlib.suppress(OSError):  # a disk too full to say who writes
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {host_name(os.environ)}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever has it open already sees then that it is gone
        os.close(lock)


def _take_lock(path: Path, final: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _try_lock(lock, path, final)
        except UserError:
            os.close(lock)
            raise
        if _is_at(path, lock):
            return lock
        os.close(lock)


def _try_lock(lock: int, path: Path, final: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 1024, 0).decode(errors="replace") or "another process"
        fix = "wait for it, stop it, or name another folder"
        raise UserError(str(final), f"{holder} is writing this folder", "a folder of one writer", fix) from error
    except OSError as error:  # such as Lustre mounted without flock
        logger.warning("%s: its file system has no locks (%s): nothing keeps two writers apart", path.parent, error)


def _is_at(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(lock))
    except FileNotFoundError:
        return False


def _room_for(final: Path) -> int:
    """Bytes that are free there, what an unfinished folder holds among them."""
    held = sum(path.stat().st_size for path in unfinished(final).rglob("*") if path.is_file())
    return shutil.disk_usage(final.parent).free + held


def _file_without_room(error: BaseException, temporary: Path) -> Path | None:
    """The file in `temporary` that a full disk or quota had no room for; None where that was not what went wrong."""
    if isinstance(error, PacktrainError) or not _reason(error):
        return None
    if isinstance(error, shutil.Error):  # of copytree: a list of what it could not copy, where to and why
        named_by = [error.args[0][0][1]]
    else:
        named_by = [error.filename2, error.filename] if isinstance(error, OSError) else []
    places = [Path(name) for name in named_by if isinstance(name, str)]
    if places:
        return next((place for place in places if place.is_relative_to(temporary)), None)
    written = [path for path in temporary.rglob("*") if path.is_file()]
    return max(written, key=lambda path: path.stat().st_mtime_ns, default=temporary)


def _reason(error: BaseException) -> str:
    """What a full disk or quota is called; also found where a library says it in a text of its own."""
    told = [os.strerror(number) for number in FULL if getattr(error, "errno", None) == number]
    return next(iter(told + [text for text in map(os.strerror, FULL) if text in str(error)]), "")


def _no_room(file: Path, final: Path, num_bytes: int, reason: str) -> UserError:
    needed = f"{final.name} takes somewhat more than {tell_size(num_bytes)}, and " if num_bytes else ""
    return UserError(
        str(file),
        f"{reason}: {needed}{tell_size(_room_for(final))} are free there",
        fix="make room, and give the same command again; no half of it is left, and what it is made from is as it was",
    )
