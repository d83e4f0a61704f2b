"""Atomic writes, reserved disk space, and locked folders."""

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
_ASIDE = re.compile(r"\.(\d+)@([^@/]*)\.(?:tmp|[A-Za-z0-9_]*)$")  # end of a temporary name: process and host

_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # temporary names of the safetensors library


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which is synced and renamed to `path` on success and removed on failure.

    Several processes may write the same file at once; it is then one's, entire.

    Raises:
        OSError: names `path`, even if the system's error names no file.
        UserError: the same for errors of libraries that could not write.
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
    """Write a text file atomically; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(where: str, document: Any) -> None:
    """Write a JSON document to a file, atomically, or to stdout if the name is `-`."""
    text = json.dumps(document, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(where), text)


def reserve(path: Path, size: int) -> None:
    """Allocate disk space for a file, so that later writes through a memory map cannot run out of space.

    Args:
        path: an existing file; it is never shrunk.
        size: in bytes.

    Raises:
        OSError: not enough space; the file keeps its size.
    """
    before = path.stat().st_size
    try:
        free = shutil.disk_usage(path.parent).free
        if 0 < free < size - before:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({size / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free)")
        with open(path, "rb+") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
            else:  # written zeros allocate, too
                stream.seek(before)
                for start in range(before, size, 1 << 24):
                    stream.write(bytes(min(1 << 24, size - start)))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        error.filename = error.filename or str(path)
        raise


# ---- locks


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Lock a folder for this process; the folder is created.

    The system releases the lock when the process ends, even if it is killed. Temporary files that killed runs left in the folder are
    removed.

    Args:
        folder: may be one that this process has locked already.
        wait: for another process to release it.

    Raises:
        UserError: another process has it, and `wait` is false; the message has its pid, host and time.
    """
    from filelock import FileLock, Timeout

    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    owner = folder / f"{LOCK}.owner"
    # a separate file names the owner: locking truncates the lock file
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
    """Remove a folder that was created for a run and holds nothing but its lock."""
    with contextlib.suppress(OSError):
        if not was_there and {path.name for path in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _read_owner(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"pid {int(found['pid'])} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "owner unknown"


# ---- temporary files of killed processes


def _own_mark() -> str:
    return f".{os.getpid()}@{socket.gethostname()}"


def temporary_prefix(name: str) -> str:
    """Prefix of a temporary folder's name beside the future `name`; `sweep` recognizes it."""
    return f".{name}{_own_mark()}."


def sweep(folder: Path, alone: bool = False) -> None:
    """Remove temporary files and folders of processes of this host that no longer run.

    Args:
        alone: no other process writes there, so that temporary files of safetensors, whose names have no pid, are removed, too.
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
