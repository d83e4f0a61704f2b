"""Writing files whole or not at all, room for large ones, and folders that one run has for itself."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError, as_user_error, printable

LOCK = ".lock"
_held: set[Path] = set()  # by this process
_ASIDE = re.compile(r"\.(\d+)@([^@/]*)\.(?:tmp|[A-Za-z0-9_]*)$")  # at the end of a name: process and host that are writing

_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # what it writes to before it takes the name that it was given


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what was written is flushed to disk and takes its name when all went well, and is gone when not.

    Several processes may write the same file at once: one of them wins, whole.

    Raises:
        OSError: names `path`, also where the system names no file.
        UserError: the same, of what libraries say of a file that cannot be written.
    """
    part = path.with_name(f"{path.name}{_own_mark()}.tmp")
    try:
        yield part
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            if error.errno is not None and error.filename in (None, str(part), os.fspath(part)):
                error.filename, error.filename2 = str(path), None
        elif not isinstance(error, UserError) and (found := as_user_error(error, path)):
            raise found from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(where: str, document: Any) -> None:
    """Write a JSON document to a file, whole, or to stdout where its name is `-`."""
    text = json.dumps(document, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(where), text)


def reserve(path: Path, size: int) -> None:
    """Make a file as large as it will be, on disk and not only by name: what is written to it later through memory always has room.

    Args:
        path: there already; it becomes no smaller.
        size: in bytes.

    Raises:
        OSError: there is no room; the file is as large as it was.
    """
    before = path.stat().st_size
    try:
        free = shutil.disk_usage(path.parent).free
        if 0 < free < size - before:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({size / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free)")
        with open(path, "rb+") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
            else:  # zeros that are written take the room as well
                stream.seek(before)
                for start in range(before, size, 1 << 24):
                    stream.write(bytes(min(1 << 24, size - start)))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        error.filename = error.filename or str(path)
        raise


# ---- one run at a time


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Have a folder for oneself, among all processes that ask for it so; it is made where there is none.

    The system lets go of the lock when a process ends, however it ends: a run that was killed keeps nobody out. What killed runs had
    half-written in the folder is removed.

    Args:
        folder: that this process has already may be asked for again.
        wait: until another process lets go of it.

    Raises:
        UserError: another process has it, and one does not wait; the line says who, and since when.
    """
    from filelock import FileLock, Timeout

    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    owner = folder / f"{LOCK}.owner"
    # a file of its own says who: taking a lock empties the lock's file
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = f"{folder}: another run has it ({_read_owner(owner)})"
        if not wait:
            raise UserError(f"{who}; wait for its end, or choose another folder") from None
        print(printable(f"{who}; waiting for it"), file=sys.stderr)
        lock.acquire()
    except OSError:
        _remove_if_empty(folder, was_there)
        raise
    _held.add(folder)
    try:
        sweep(folder, alone=True)
        write_text(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        yield
    except BaseException:
        owner.unlink(missing_ok=True)
        _remove_if_empty(folder, was_there)
        raise
    finally:
        _held.discard(folder)
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _remove_if_empty(folder: Path, was_there: bool) -> None:
    """Remove a folder that was made for a run which left nothing in it but its lock."""
    with contextlib.suppress(OSError):
        if not was_there and {path.name for path in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _read_owner(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"pid {int(found['pid'])} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "it does not say who"


# ---- what killed processes leave


def _own_mark() -> str:
    return f".{os.getpid()}@{socket.gethostname()}"


def temporary_prefix(name: str) -> str:
    """How the name of a temporary folder begins that is made beside what will be `name`; `sweep` knows such folders."""
    return f".{name}{_own_mark()}."


def sweep(folder: Path, alone: bool = False) -> None:
    """Remove the temporary files and folders in a folder whose process, of this host, is no more.

    Args:
        alone: nobody else writes there, so that what safetensors was writing, whose name tells of no process, goes as well.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            mark = _ASIDE.search(path.name)
            if mark is not None and (mark[2] != socket.gethostname() or _is_alive(int(mark[1]))):
                continue
            if mark is None and not (alone and _SAFETENSORS.fullmatch(path.name)):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
