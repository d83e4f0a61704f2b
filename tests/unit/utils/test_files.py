"""Files are written whole or not at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_vlm.errors import UserError
from sparse_vlm.utils import files


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.json"
    files.write_text(path, "before")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "after")
    assert path.read_text() == "before"


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    fsync, own = os.fsync, os.getpid()

    def meanwhile(descriptor: int) -> None:
        """Another process writes the whole file before this one renames its own."""
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        files.write_text(path, "theirs")
        monkeypatch.setattr(os, "getpid", lambda: own)

    monkeypatch.setattr(os, "fsync", meanwhile)
    files.write_text(path, "ours")
    assert path.read_text() == "ours"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    for name in (f"a.json.{ended.pid}@{host}.tmp", f"b.json.{os.getpid()}@{host}.tmp", f"c.json.{ended.pid}@elsewhere.tmp", "notes.tmp"):
        (tmp_path / name).touch()
    (tmp_path / f".tiny.{ended.pid}@{host}.x1y2z3_4" / "files").mkdir(parents=True)
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"b.json.{os.getpid()}@{host}.tmp", f"c.json.{ended.pid}@elsewhere.tmp", "notes.tmp"]
    )
    assert files.temporary_prefix("tiny") == f".tiny.{os.getpid()}@{host}."


HOLD = """
import sys, time
from pathlib import Path
from sparse_vlm.utils.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_who_has_the_folder_and_a_killed_one_keeps_nobody_out(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another run has it \(pid {holder.pid} on .+, since 2"), files.locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with files.locked(tmp_path), files.locked(tmp_path):  # one process may ask again
        assert f'"pid": {os.getpid()}' in (tmp_path / ".lock.owner").read_text()
    assert not (tmp_path / ".lock.owner").exists()


def test_room_is_taken_or_the_file_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"head")
    files.reserve(path, 1 << 20)
    assert path.read_bytes()[:4] == b"head" and path.stat().st_size == 1 << 20
    assert path.stat().st_blocks * 512 >= 1 << 20
    with pytest.raises(OSError, match="No space left on device .*are free") as told:
        files.reserve(path, 1 << 60)
    assert told.value.filename == str(path) and path.stat().st_size == 1 << 20


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672] . file write failed")],
)
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.json"
    with pytest.raises((OSError, UserError), match="a.json"), files.atomic_path(path) as part:
        part.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []
