"""Damage to files, as disks, networks, editors and hostile people do it: any file by its bytes, and known ones by their structure.

`mutate(data, name, rng)` gives damaged bytes and says what was done. The same state of `rng` gives the same damage.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

Damage = tuple[bytes, str]

SIZES = (0, 1, 2, 7, 255, 256, 65535, 65536, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1)
TEXTS = (
    "",
    " ",
    "0",
    "nan",
    "../../../escape",
    "/etc/passwd",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\x00",
    "\ud800",
    "<image>",
    "<|im_end|>",
    "{{ 1/0 }}",
    "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "[red]x[/",
    "$\\frac{$",
    "é" * 300,
    "x" * 100_000,
)
KEYS: dict[str, Any] = {
    # what model folders of others carry, and a loader may act on
    "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil") | {"AutoTokenizer": ["evil.Evil"] * 2},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "dtype": "evil",
    "architectures": ["Evil"],
    "model_type": "evil",
    "tokenizer_class": "Evil",
    "format": "evil/9",
    "unknown": 1,
}


# ---- any file, by its bytes


def _flip(data: bytes, rng: random.Random) -> Damage:
    out = bytearray(data)
    places = [rng.randrange(len(out)) for _ in range(rng.choice((1, 1, 4, 32)))]
    for place in places:
        out[place] ^= 1 << rng.randrange(8)
    return bytes(out), f"{len(places)} bits flipped, first in byte {places[0]}"


def _cut(data: bytes, rng: random.Random) -> Damage:
    keep = rng.choice((0, 1, rng.randrange(len(data)), rng.randrange(len(data)), len(data) - 1))
    return data[:keep], f"cut after {keep} of {len(data)} bytes"


def _splice(data: bytes, rng: random.Random) -> Damage:
    start, size, to = rng.randrange(len(data)), rng.choice((1, 8, 64, 512)), rng.randrange(len(data))
    block = data[start : start + size]
    return data[:to] + block + data[to + len(block) :], f"{len(block)} bytes of {start} over those at {to}"


def _repeat(data: bytes, rng: random.Random) -> Damage:
    start, size, times = rng.randrange(len(data)), rng.choice((1, 16, 512)), rng.choice((2, 100, 2000))
    block = data[start : start + size]
    return data[:start] + block * times + data[start:], f"{len(block)} bytes at {start} repeated {times} times"


def _drop(data: bytes, rng: random.Random) -> Damage:
    start, size = rng.randrange(len(data)), rng.choice((1, 4, 64, 512))
    return data[:start] + data[start + size :], f"{size} bytes at {start} left out"


def _fill(data: bytes, rng: random.Random) -> Damage:
    start, size, byte = rng.randrange(len(data)), rng.choice((4, 64, 4096)), rng.choice(b"\x00\xff\x7f")
    block = bytes([byte]) * min(size, len(data) - start)
    return data[:start] + block + data[start + len(block) :], f"{len(block)} bytes at {start} set to {byte}"


def _number(data: bytes, rng: random.Random) -> Damage:
    """A binary integer, mostly of the header, becomes another one, as a length field may."""
    width, order = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q"))), rng.choice("<>")
    size, code = width
    reach = len(data) if rng.random() < 0.3 else min(len(data), 256)
    at = rng.randrange(max(1, reach - size + 1))
    value = rng.choice(SIZES) & (2 ** (8 * size) - 1)
    return data[:at] + struct.pack(order + code, value) + data[at + size :], f"{size} bytes at {at} are the number {value}"


def _digits(data: bytes, rng: random.Random) -> Damage:
    """A number in text becomes another one."""
    found = list(re.finditer(rb"\d+(?:\.\d+)?", data[: 1 << 20]))
    if not found:
        return _flip(data, rng)
    match = rng.choice(found)
    value = rng.choice((b"0", b"-1", b"1e308", b"-1e999", b"NaN", b"9" * 30, b"9" * 5000, b"65536", b"2147483648", b"0.5"))
    return data[: match.start()] + value + data[match.end() :], f"{match[0][:20]!r} at {match.start()} is {value[:20]!r}"


def _other(data: bytes, rng: random.Random) -> Damage:
    """Another file under this one's name."""
    gzip = zlib.compressobj(wbits=31)
    there = {
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        "gzip": gzip.compress(data) + gzip.flush(),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        "a pickle": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        "zeros": bytes(len(data)),
        "noise": rng.randbytes(min(len(data), 4096)),
        "UTF-16": data[:4096].decode("latin-1").encode("utf-16"),
        "with a byte order mark": b"\xef\xbb\xbf" + data,
    }
    name = rng.choice(list(there))
    return there[name], f"the file is {name}"


BYTES: tuple[Callable[[bytes, random.Random], Damage], ...] = (_flip, _flip, _cut, _cut, _splice, _repeat, _drop, _fill, _number, _number)


def damage_bytes(data: bytes, rng: random.Random) -> Damage:
    """Damage that asks nothing about the format."""
    if not data:
        return rng.randbytes(16), "noise in an empty file"
    if rng.random() < 0.06:
        return _other(data, rng)
    return rng.choice(BYTES)(data, rng)


# ---- JSON


def deep(levels: int, leaf: str = "1", key: str = "") -> str:
    """JSON text that is nested so deep."""
    return f'{{"{key}":' * levels + leaf + "}" * levels if key else "[" * levels + leaf + "]" * levels


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value."""
    found, stack = [], [document]
    while stack:
        at = stack.pop()
        inner = at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
        for key, value in inner:
            found.append((at, key))
            stack.append(value)
    return found


def _value(old: Any, rng: random.Random) -> Any:
    """Another value: of the same type, mostly a strange one, or of another type."""
    if isinstance(old, bool):
        same: tuple[Any, ...] = (not old,)
    elif isinstance(old, int):
        same = (0, -1, 1, old + 1, old * 2, -old, *SIZES)
    elif isinstance(old, float):
        same = (0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"))
    elif isinstance(old, str):
        same = (old + "\x1b[2J", old.upper(), old[: len(old) // 2], *TEXTS)
    elif isinstance(old, list):
        same = ([], old * 2, old[:-1], [old], old[::-1], *([old * min(1000, 10**5 // len(old))] if old else []))
    elif isinstance(old, dict):
        same = ({}, {"": old}, {**old, "\x1b[1m": 1}, list(old.values()))
    else:
        same = (0,)
    others = (None, True, 0, -1, 0.5, float("nan"), "", "x", [], {}, [None], {"a": None}, [[]], 10**4000)
    return rng.choice(same if rng.random() < 0.6 else others)


def damage_json(data: bytes, rng: random.Random) -> Damage:
    """A value, a key or the nesting of a JSON document."""
    document = json.loads(data)
    places = _places(document)
    way = rng.choice(("value", "value", "value", "value", "left out", "added", "renamed", "swapped", "deep", "digits", "root", "bytes"))
    if way == "bytes" or not places:
        return damage_bytes(data, rng)
    if way == "digits":
        return _digits(data, rng)
    if way == "root":
        new = rng.choice((None, 5, "x", [], {}, [1], [document], {"a": document}))
        return json.dumps(new).encode(), f"the document is a {type(new).__name__}"
    holder, key = rng.choice(places)
    old = holder[key]
    said = f"{key!r}"
    if way == "value":
        holder[key] = _value(old, rng)
        said += f" is {_dump(holder[key])[:60]!r}"
    elif way == "left out":
        del holder[key]
        said += " is left out"
    elif way == "added":
        added = rng.choice(list(KEYS))
        (holder if isinstance(holder, dict) else document if isinstance(document, dict) else {})[added] = KEYS[added]
        said = f"{added!r} is there"
    elif way == "renamed" and isinstance(holder, dict):
        name = rng.choice(TEXTS[:12])
        holder[name] = holder.pop(key)
        said += f" is called {name!r}"
    elif way == "deep":
        levels = rng.choice((500, 5000, 200_000))
        text = deep(levels, key=rng.choice(("", "a")))
        holder[key] = "@deep@"
        return _dump(document).replace('"@deep@"', text).encode("utf-8", "surrogatepass"), f"{said} is nested {levels} deep"
    else:
        other, name = rng.choice(places)
        holder[key], other[name] = other[name], old
        said += f" and {name!r} change places"
    try:
        return _dump(document).encode("utf-8", "surrogatepass"), said
    except (RecursionError, ValueError):  # what changed places holds itself, or a number longer than Python writes
        return _digits(data, rng)


def _dump(document: Any) -> str:
    return json.dumps(document, ensure_ascii=True)


def damage_lines(data: bytes, rng: random.Random) -> Damage:
    """A line of a file of JSON documents, or of cells."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    way = rng.choice(("inside", "inside", "inside", "twice", "left out", "joined", "bytes"))
    if way == "inside":
        inner = damage_json if lines[at].lstrip()[:1] in (b"{", b"[") else damage_cells
        lines[at], said = inner(lines[at], rng)
        lines[at] += b"\n"
    elif way == "twice":
        lines.insert(at, lines[at])
        said = "twice"
    elif way == "left out":
        del lines[at]
        said = "left out"
    elif way == "joined":
        lines[at] = lines[at].rstrip(b"\n")
        said = "without its end"
    else:
        return damage_bytes(data, rng)
    return b"".join(lines), f"line {at + 1}: {said}"


def damage_cells(data: bytes, rng: random.Random) -> Damage:
    """A cell of a line between tabs."""
    cells = data.rstrip(b"\n").split(b"\t")
    at = rng.randrange(len(cells))
    new = rng.choice((b"", b"x", b"\x1b[2J", b'"', b"-1", b"9" * 5000, b"\xff\xfe", b"=" * 5, b"A" * 200_000, cells[at][:-1]))
    cells[at] = new
    return b"\t".join(cells), f"cell {at + 1} is {new[:20]!r}"


# ---- binary files of known structure


def damage_safetensors(data: bytes, rng: random.Random) -> Damage:
    """Header, length of the header, or numbers."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    way = rng.choice(("header", "header", "length", "numbers", "numbers", "tensor", "bytes"))
    if way == "header":
        new, said = damage_json(header, rng)
        return len(new).to_bytes(8, "little") + new + body, f"header: {said}"
    if way == "length":
        value = rng.choice((0, 1, size - 1, size + 1, len(data), 10**8, *SIZES))
        return (value % 2**64).to_bytes(8, "little") + data[8:], f"the header's length is {value}"
    if way == "numbers" and body:
        start = rng.randrange(len(body))
        block = rng.choice((b"\xff", b"\x00", b"\x7f")) * min(rng.choice((4, 64, len(body))), len(body) - start)
        return data[: 8 + size + start] + block + body[start + len(block) :], f"{len(block)} bytes of numbers at {start} are {block[:1]!r}"
    if way == "tensor":
        names = [name for name in json.loads(header) if name != "__metadata__"]
        if names:
            document = json.loads(header)
            name = rng.choice(names)
            shape = document[name]["shape"]
            document[name]["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], [0], []))
            new = json.dumps(document).encode()
            return len(new).to_bytes(8, "little") + new + body, f"{name} is of shape {document[name]['shape']}"
    return damage_bytes(data, rng)


def damage_tar(data: bytes, rng: random.Random) -> Damage:
    """A member's header, with the right checksum, or a member's content; the tar is otherwise whole."""
    way = rng.choice(("header", "header", "content", "content", "bytes"))
    if way == "bytes":
        return damage_bytes(data, rng)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    at = rng.randrange(len(members))
    if way == "content":
        member, content = members[at]
        new, said = mutate(content, member.name, rng)
        member.size = len(new)
        members[at] = member, new
        return _tar(members), f"{member.name}: {said}"
    start = members[at][0].offset
    head = bytearray(data[start : start + 512])
    fields = {"name": (0, 100), "size": (124, 136), "type": (156, 157), "link": (157, 257), "magic": (257, 265), "prefix": (345, 500)}
    field = rng.choice(("name", "size", "size", "type", "type", "link", "magic", "prefix"))
    low, high = fields[field]
    values = {
        "name": (b"", b"../../escape.jpg", b"/abs.jpg", b"\xff\xfe.png", b"\x1b[2Jx.png", b"a" * 100, members[0][0].name.encode()),
        "size": (b"0", b"77777777777", b"-1", b"\x80" + (2**62).to_bytes(11, "big"), b"\xff" * 12, b"00000000001", b"x"),
        "type": (b"1", b"2", b"3", b"4", b"5", b"6", b"x", b"g", b"L", b"S", b"V"),
        "link": (b"/etc/passwd", b"..", members[at][0].name.encode()),
    }.get(field, (b"", b"\xff" * 8, b"../.."))
    value = rng.choice(values)
    head[low:high] = value[: high - low].ljust(high - low, b"\0")
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:]))
    return data[:start] + bytes(head) + data[start + 512 :], f"{members[at][0].name}: {field} is {value[:30]!r}"


def _tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def damage_png(data: bytes, rng: random.Random) -> Damage:
    """A chunk, with the right checksum."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    way = rng.choice(("inside", "inside", "order", "added", "bytes"))
    if way == "bytes" or len(chunks) < 3:
        return damage_bytes(data, rng)
    at = rng.randrange(len(chunks))
    kind, body = chunks[at]
    said = kind.decode("latin-1")
    if way == "inside" and body:
        new, what = rng.choice((_flip, _cut, _number, _fill))(body, rng)
        chunks[at] = kind, new
        said += f": {what}"
    elif way == "order":
        other = rng.randrange(len(chunks))
        chunks[at], chunks[other] = chunks[other], chunks[at]
        said += " is elsewhere"
    else:
        bomb = zlib.compress(bytes(10**7))
        added = rng.choice(
            ((b"zTXt", b"k\0\0" + bomb), (b"iCCP", b"k\0\0" + bomb), (b"eXIf", rng.randbytes(64)), (b"tRNS", rng.randbytes(7)))
        )
        chunks.insert(1, added)
        said = f"{added[0].decode()} is there"
    made = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:8] + made, said


STRUCTURES: dict[str, Callable[[bytes, random.Random], Damage]] = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".tsv": damage_lines,
    ".safetensors": damage_safetensors,
    ".tar": damage_tar,
    ".png": damage_png,
}


def mutate(data: bytes, name: str, rng: random.Random) -> Damage:
    """Damaged bytes of a file, and what was done to them.

    Args:
        name: of the file; its suffix says what is known of its structure.
    """
    damage = STRUCTURES.get(PurePath(name).suffix, damage_bytes)
    try:
        return damage(data, rng)
    except (ValueError, LookupError, struct.error, tarfile.TarError, RecursionError):  # not of that structure: POPE's .json holds lines
        inner = damage_lines if damage is damage_json and data.count(b"\n") > 1 else damage_bytes
        return inner(data, rng)
