"""Index a webdataset tar: the offset of each image, and the JSON of the same key.

Notable: as in webdataset, a key ends at the first dot of the base name. Nothing is unpacked. A tar may be hostile: any error names the tar
and the member.
"""

from __future__ import annotations

import itertools
import json
import posixpath
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError
from sparse_vlm.utils.documents import LFS, NOT_FETCHED, parse_json

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
MAX_HEADERS = 1000  # records of a pax header; tarfile copies all of them for each member
MAX_LINKS = 16  # from one member to the next


@dataclass
class Sample:
    """An image in a tar.

    Attributes:
        member: full name.
        offset, size: of its bytes.
        info: the JSON of the same key; empty without.
    """

    member: str
    offset: int
    size: int
    info: dict[str, Any] = field(default_factory=dict)


def index_tar(path: Path, suffixes: Collection[str]) -> dict[str, Sample]:
    """The images of a tar by key, in order.

    Args:
        suffixes: of images, in lower case, with the dot.

    Raises:
        UserError: not a readable tar, invalid JSON, or two images of one key.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: not a regular file")
        with open(path, "rb") as stream:
            return _index(path, tarfile.open(fileobj=stream, mode="r:"), suffixes)
    except UserError:
        raise
    # a damaged header makes tarfile raise nearly anything: RecursionError of chained headers, OverflowError of a size, KeyError of a link
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: {_what_else(path) or f'not a readable webdataset tar ({why})'}") from None


def _what_else(path: Path) -> str:
    """What a file is if not a tar; empty if unknown."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(len(LFS))
    except OSError:
        return ""
    if head == LFS:
        return NOT_FETCHED
    how = next((name for mark, name in COMPRESSED.items() if head.startswith(mark)), None)
    return f"is compressed ({how}), and photos are read by their place in the tar; unpack it to a plain .tar first" if how else ""


def _index(path: Path, archive: tarfile.TarFile, suffixes: Collection[str]) -> dict[str, Sample]:
    end = path.stat().st_size
    files: dict[str, tuple[int, int]] = {}  # all regular members, which links may refer to
    wanted: dict[str, tarfile.TarInfo] = {}  # the later one of two members of a name, as in tar
    for member in archive:
        where = f"{path}: {member.name}"
        if len(member.pax_headers) > MAX_HEADERS:
            raise UserError(f"{where}: its pax header sets {len(member.pax_headers):,} things; pack the tar anew")
        if member.size < 0 or (member.isreg() and not member.issparse() and member.offset_data + member.size > end):
            raise UserError(f"{where}: said to have {member.size:,} bytes, more than the tar holds; it is damaged or cut off")
        folder, _, name = member.name.rpartition("/")
        suffix = f".{name.lower().rpartition('.')[2]}"
        # macOS' tar stores metadata in ._NAME
        if member.isdir() or name.startswith("._") or "__MACOSX" in folder.split("/"):
            continue
        if member.isreg():
            files[member.name] = (member.offset_data, member.size)
        if suffix in suffixes or name.lower().partition(".")[2] == "json":
            if member.issparse():
                raise UserError(f"{where}: is stored with holes; pack the tar without --sparse")
            if not (member.isreg() or member.islnk() or member.issym()):
                raise UserError(f"{where}: is no file; take it out of the tar")
            wanted[member.name] = member
    return _samples(path, archive, files, wanted, suffixes)


def _samples(
    path: Path,
    archive: tarfile.TarFile,
    files: dict[str, tuple[int, int]],
    wanted: dict[str, tarfile.TarInfo],
    suffixes: Collection[str],
) -> dict[str, Sample]:
    found: dict[str, Sample] = {}
    infos: dict[str, dict[str, Any]] = {}
    for name, member in wanted.items():
        offset, size = _place(path, member, files, wanted)
        folder, slash, base = name.rpartition("/")
        key, _, suffix = base.partition(".")
        key = f"{folder}{slash}{key}"
        if not base.startswith(".") and f".{suffix.lower().rpartition('.')[2]}" in suffixes:
            other = found.setdefault(key, Sample(name, offset, size))
            if other.member != name:
                raise UserError(
                    f"{path}: {other.member} and {name} are two images of one key, {key}, which ends at the first full stop; "
                    "leave one of them in the tar, or rename one"
                )
        elif suffix.lower() == "json":
            archive.fileobj.seek(offset)
            info = parse_json(archive.fileobj.read(size), f"{path}: {name}")
            if not isinstance(info, dict):
                raise UserError(f'{path}: {name}: holds {json.dumps(info)[:40]}, not an object such as {{"captions": [...]}}')
            infos[key] = info
    for key, info in infos.items():
        if key in found:
            found[key].info = info
    return found


def _place(path: Path, member: tarfile.TarInfo, files: dict[str, tuple[int, int]], wanted: dict[str, tarfile.TarInfo]) -> tuple[int, int]:
    """Offset and size of a member, or of its link target: hard links are relative to the root, symbolic ones to their folder."""
    for step in itertools.count():
        if member.isreg():
            return files[member.name]
        target = member.linkname if member.islnk() else posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
        if target in files:
            return files[target]
        if target not in wanted or step == MAX_LINKS:
            raise UserError(f"{path}: {member.name}: a link to {member.linkname}, which is not in the tar; pack it with --dereference")
        member = wanted[target]
    raise AssertionError
