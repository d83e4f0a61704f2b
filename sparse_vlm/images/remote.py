"""Photos that lie elsewhere become webdataset tars on this disk, once: a tar's URL, and a data set of Hugging Face.

Notable: bootstrapping asks for any view of any photo, many times, so photos are brought near and not streamed. A download that was cut off
goes on where it stopped; nothing half-written is ever read as photos.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparse_vlm.errors import UserError
from sparse_vlm.hub.store import home

OnProgress = Callable[[str, int, int], None]  # what, done, total (0 where it is not known)
TIMEOUT_S = 30.0
_CHUNK = 1 << 20
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences")


def is_remote(pattern: str) -> bool:
    """Whether a pattern names photos that lie elsewhere."""
    return pattern.startswith(("https://", "http://", "hf:"))


def fetch_photos(pattern: str, on_progress: OnProgress) -> Path:
    """The tar on this disk of a URL or of `hf:NAME@REVISION:SPLIT`.

    Raises:
        UserError: it cannot be had; what was fetched of a URL is kept, and fetched no more.
    """
    folder = home() / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(pattern.encode()).hexdigest()[:12]
    name = pattern.rstrip("/").rpartition("/")[2].partition("?")[0].removesuffix(".tar")
    path = folder / f"{''.join(c if c.isalnum() or c in '-_.' else '-' for c in name)}-{mark}.tar"
    if int(os.environ.get("LOCAL_RANK", 0)) and not path.exists():
        time.sleep(1)  # of several processes on a machine the first one fetches, because it shows how far it is
    with FileLock(path.with_suffix(".lock")):  # and the others wait, of this command or of another
        if not path.exists():
            (_hub if pattern.startswith("hf:") else _download)(pattern, path, on_progress)
    return path


def _download(url: str, path: Path, on_progress: OnProgress) -> None:
    part = path.with_suffix(".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            if done and reply.status != 206:  # a server that starts over
                done = 0
            length = int(reply.headers.get("Content-Length") or 0)
            total = done + length if length else 0
            with open(part, "ab" if done else "wb") as stream:
                while block := reply.read(_CHUNK):
                    stream.write(block)
                    done += len(block)
                    on_progress(url, done, total)
                stream.flush()
                os.fsync(stream.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416:
            part.unlink(missing_ok=True)
        raise UserError(f"{url}: the server says {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot be fetched ({getattr(error, 'reason', None) or error}); give the command again to go on") from None
    if total and done < total:
        raise UserError(f"{url}: cut off after {done:,} of {total:,} bytes; give the command again to go on")
    os.replace(part, path)


def _hub(pattern: str, path: Path, on_progress: OnProgress) -> None:
    """Write a data set's images, with what else its rows hold, into a tar."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{pattern}: needs Hugging Face's datasets; pip install 'sparse-vlm[hub]'") from None
    where, colon, split = pattern.removeprefix("hf:").rpartition(":")
    if not colon:
        raise UserError(f"{pattern}: name the split as well, as hf:ORG/NAME:train or hf:ORG/NAME@REVISION:train")
    name, _, revision = where.partition("@")
    part = path.with_suffix(".part")
    try:
        rows = datasets.load_dataset(name, split=split, revision=revision or None, streaming=True)
        columns = [column for column, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)]
        if len(columns) != 1:
            raise UserError(f"{pattern}: needs one column of images, found {', '.join(columns) or 'none'}")
        labels = {column: feature.names for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)}
        rows = rows.cast_column(columns[0], datasets.Image(decode=False))
        with tarfile.open(part, "w") as archive:
            for number, row in enumerate(rows):
                picture = row.pop(columns[0])
                data = picture["bytes"] or Path(picture["path"]).read_bytes()
                for suffix, content in ((suffix_of(data), data), ("json", json.dumps(_info(row, labels)).encode())):
                    add_member(archive, f"{number:09d}.{suffix}", content)
                on_progress(pattern, number + 1, 0)
    except UserError:
        part.unlink(missing_ok=True)
        raise
    except Exception as error:  # whatever a data set's own code and the network can raise
        part.unlink(missing_ok=True)
        raise UserError(
            f"{pattern}: datasets could not read it ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    os.replace(part, path)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def suffix_of(data: bytes) -> str:
    """By the image's first bytes; what is none of these is decoded, and named, when it is asked for."""
    marks = {b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp", b"II*\x00": "tif", b"MM\x00*": "tif"}
    return next((suffix for mark, suffix in marks.items() if data.startswith(mark)), "jpg")


def _info(row: dict[str, Any], labels: dict[str, list[str]]) -> dict[str, Any]:
    """What our tars say of a photo: captions as a list, a label with its name, and other plain values as they are."""
    info = {key: value for key, value in row.items() if isinstance(value, (str, int, float, bool, list))}
    for column, names in labels.items():
        if isinstance(row.get(column), int) and 0 <= row[column] < len(names):
            info["label"], info["label_name"] = row[column], names[row[column]]
    said = next((info[column] for column in CAPTION_COLUMNS if column in info), None)
    if said is not None:
        info["captions"] = [said] if isinstance(said, str) else said
    return info
