"""Download photos once, as webdataset tars: from the URL of a tar, or from a data set of Hugging Face.

Notable: bootstrapping reads photos many times in random order, so that they are downloaded and not streamed. An interrupted download
continues where it stopped; partial files are never read as photos.
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

OnProgress = Callable[[str, int, int], None]  # name, done, total (0 if unknown)
TIMEOUT_S = 30.0
_CHUNK = 1 << 20
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences")


def is_remote(pattern: str) -> bool:
    """Whether a pattern is a URL or a data set of Hugging Face."""
    return pattern.startswith(("https://", "http://", "hf:"))


def fetch_photos(pattern: str, on_progress: OnProgress) -> Path:
    """Download a URL or `hf:NAME@REVISION:SPLIT` unless it is there; returns the path of the tar.

    Raises:
        UserError: it cannot be downloaded; the part of a URL that was downloaded is kept.
    """
    folder = home() / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(pattern.encode()).hexdigest()[:12]
    name = pattern.rstrip("/").rpartition("/")[2].partition("?")[0].removesuffix(".tar")
    path = folder / f"{''.join(c if c.isalnum() or c in '-_.' else '-' for c in name)}-{mark}.tar"
    if int(os.environ.get("LOCAL_RANK", 0)) and not path.exists():
        time.sleep(1)  # the first process on a machine downloads, because it shows the progress
    with FileLock(path.with_suffix(".lock")):  # other processes and commands wait
        if not path.exists():
            (_hub if pattern.startswith("hf:") else _download)(pattern, path, on_progress)
    return path


def _download(url: str, path: Path, on_progress: OnProgress) -> None:
    part = path.with_suffix(".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            if done and reply.status != 206:  # the server ignored the range
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
    """Write the images of a data set, with the other columns as JSON, to a tar."""
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
                image = row.pop(columns[0])
                data = image["bytes"] or Path(image["path"]).read_bytes()
                for suffix, content in ((suffix_of(data), data), ("json", json.dumps(_info(row, labels)).encode())):
                    add_member(archive, f"{number:09d}.{suffix}", content)
                on_progress(pattern, number + 1, 0)
    except UserError:
        part.unlink(missing_ok=True)
        raise
    except Exception as error:  # a data set's reader and the network may raise anything
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
    """File name suffix by the first bytes of an image; 'jpg' for unknown ones, which fail when they are decoded."""
    marks = {b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp", b"II*\x00": "tif", b"MM\x00*": "tif"}
    return next((suffix for mark, suffix in marks.items() if data.startswith(mark)), "jpg")


def _info(row: dict[str, Any], labels: dict[str, list[str]]) -> dict[str, Any]:
    """The JSON of a photo: captions as a list, a label with its name, and other plain values unchanged."""
    info = {key: value for key, value in row.items() if isinstance(value, (str, int, float, bool, list))}
    for column, names in labels.items():
        if isinstance(row.get(column), int) and 0 <= row[column] < len(names):
            info["label"], info["label_name"] = row[column], names[row[column]]
    captions = next((info[column] for column in CAPTION_COLUMNS if column in info), None)
    if captions is not None:
        info["captions"] = [captions] if isinstance(captions, str) else captions
    return info
