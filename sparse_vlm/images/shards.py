"""`python -m sparse_vlm.images.shards PHOTOS... --out FOLDER`: scale photos down once, so that later runs decode less.

Notable: writes webdataset tars that `--data` takes in place of the originals, with the same keys and JSON. A photo whose shortest side is
small enough is copied byte for byte; a larger one becomes a JPEG. Each tar is written atomically and recorded in `shards.json`, so that an
interrupted run continues at the tar where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sparse_vlm.errors import UserError, printable
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo, PhotoSet
from sparse_vlm.images.preprocess import OVERSAMPLING, resize, scaled
from sparse_vlm.images.remote import add_member, suffix_of
from sparse_vlm.utils.documents import is_encodable, parse_json
from sparse_vlm.utils.files import atomic_path, write_text

FORMAT = "sparse-vlm/shards/1"
INDEX = "shards.json"
# A random crop has at least 0.55 of the shortest side (`distill.views`): at 512 that is more than the 224 pixels of most towers.
SIDE = 512
PER_SHARD = 5000
JPEG_SIDE = 65_500  # largest side that libjpeg writes
QUALITY = 95  # without chroma subsampling: a quarter more bytes, half the error
AT_ONCE = 16  # photos a thread, at a time
SHOWN = 10  # unreadable photos that are printed; the index names all


@dataclass(frozen=True)
class Shard:
    """A tar to write.

    Attributes:
        name: of its file.
        photos: by key in the tar.
    """

    name: str
    photos: dict[str, Photo]

    def fingerprint(self) -> str:
        """Digest of its keys, photo sizes and JSON (photos are not read)."""
        lines = "\n".join(f"{key} {photo.size} {json.dumps(photo.info, sort_keys=True)}" for key, photo in self.photos.items())
        return hashlib.sha256(lines.encode()).hexdigest()[:16]


def plan(photos: Sequence[Photo], per_shard: int = PER_SHARD) -> list[Shard]:
    """Assign photos to tars: each source tar and each folder of images gives tars of its name.

    Args:
        per_shard: most photos in a tar.

    Raises:
        UserError: photos, or sources, that would get the same name.
    """
    sources: dict[Path, dict[str, Photo]] = {}
    for photo in photos:
        in_tar = photo.offset > 0  # a tar member has a header before it
        source = photo.source if in_tar else Path(photo.source.as_posix().removesuffix(photo.key))
        plain = PurePosixPath(photo.key)
        # a dot would end the key
        key = photo.key if in_tar else plain.with_name(plain.stem.lstrip(".").replace(".", "-") or "photo").as_posix()
        other = sources.setdefault(source, {}).setdefault(key, photo)
        if other is not photo:
            raise UserError(f"{other.source} and {photo.source} would both be {key} in a tar; rename one of them")
    shards: dict[str, Shard] = {}
    for source, own in sources.items():
        stem = source.stem if source.suffix == ".tar" else source.resolve().name
        parts = [dict(list(own.items())[start : start + per_shard]) for start in range(0, len(own), per_shard)]
        for number, part in enumerate(parts):
            name = f"{stem}-{number:05d}.tar" if len(parts) > 1 else f"{stem}.tar"
            if name in shards:
                raise UserError(f"{source}: another source gives a {name} as well; give each an --out of its own")
            shards[name] = Shard(name, part)
    return list(shards.values())


def write_shards(
    photos: Sequence[Photo],
    out: Path,
    side: int = SIDE,
    per_shard: int = PER_SHARD,
    threads: int | None = None,
    on_photos: Callable[[int], None] = lambda photos: None,
) -> dict[str, Any]:
    """Write tars of photos with at most `side` pixels at the shortest side; existing tars are kept.

    Args:
        per_shard: most photos in a tar.
        threads: for decoding and encoding; torch's number by default.
        on_photos: called with the number of photos just finished.

    Returns:
        The content of `shards.json`: settings, and for each tar its photos, bytes, and photos that could not be read with the reason.

    Raises:
        UserError: a folder with something else in it, two photos of one name, or not one photo that can be read.
    """
    index: dict[str, Any] = {"format": FORMAT, "side": side, "quality": QUALITY, "per_shard": per_shard}
    index["shards"] = _begun(out, index)
    shards = plan(photos, per_shard)
    for shard in shards:
        found, fingerprint = index["shards"].get(shard.name), shard.fingerprint()
        if found and found["source"] != fingerprint:
            raise UserError(f"{out / shard.name}: was made of other photos; remove it, or choose another --out")
        if (out / shard.name).exists():
            if not found:
                raise UserError(f"{out / shard.name}: is there already, and not of our making; choose another --out")
            on_photos(len(shard.photos))
            continue
        with atomic_path(out / shard.name) as part:
            index["shards"][shard.name] = {"source": fingerprint, **_write(shard, part, side, threads, on_photos)}
            # before the tar is renamed: a tar without an entry would be refused
            write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
    made = [index["shards"][shard.name] for shard in shards]
    if not sum(one["photos"] for one in made):
        raise ImageError(f"none of the {len(photos)} photos can be read; {next(iter(made[0]['unreadable'].values()))}")
    return index


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Finished tars of an earlier run with these settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / INDEX
    if not path.exists():
        return {}
    try:
        begun = parse_json(path.read_bytes(), str(path))
        shards = begun.pop("shards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of ours ({error}); choose another --out") from None
    if begun != settings:
        raise UserError(f"{path}: was begun with {_settings(begun)}, not with {_settings(settings)}; choose another --out")
    return shards


def _settings(index: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in index.items())


def _write(shard: Shard, path: Path, side: int, threads: int | None, on_photos: Callable[[int], None]) -> dict[str, Any]:
    """Write a tar; returns its entry in the index."""
    entry: dict[str, Any] = {"photos": 0, "copied": 0, "source_bytes": 0, "unreadable": {}}
    with tarfile.open(path, "w") as archive:
        for key, photo, data in _shrunk(shard, side, threads or torch.get_num_threads()):
            on_photos(1)
            if isinstance(data, ImageError):
                entry["unreadable"][key] = str(data)
                continue
            entry["photos"] += 1
            entry["copied"] += data[1]
            entry["source_bytes"] += photo.size
            add_member(archive, f"{key}.{suffix_of(data[0])}", data[0])
            if photo.info:
                add_member(
                    archive,
                    f"{key}.json",
                    json.dumps(photo.info, ensure_ascii=not is_encodable(json.dumps(photo.info, ensure_ascii=False))).encode(),
                )
    return entry | {"bytes": path.stat().st_size}


def _shrunk(shard: Shard, side: int, threads: int) -> Iterator[tuple[str, Photo, tuple[bytes, bool] | ImageError]]:
    """Key, photo, and result of `shrink` of each, in order."""

    def attempt(photo: Photo) -> tuple[bytes, bool] | ImageError:
        try:
            return shrink(photo, side)
        except ImageError as error:
            return error

    items = list(shard.photos.items())
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), AT_ONCE * threads):  # bounds the results in memory
            part = items[start : start + AT_ONCE * threads]
            for (key, photo), data in zip(part, pool.map(attempt, [photo for _, photo in part]), strict=True):
                yield key, photo, data


def shrink(photo: Photo, side: int) -> tuple[bytes, bool]:
    """The bytes of a JPEG with `side` pixels at the shortest side, or the photo's own if it is small enough (or too long for a JPEG).

    Returns:
        The bytes, and whether they are the photo's own.

    Raises:
        ImageError: it cannot be read.
    """
    draft = photo.draft(OVERSAMPLING * side)
    if min(draft.size) <= side or max(scaled(draft.size, side)) > JPEG_SIDE:
        return photo.read(), True
    stream = io.BytesIO()
    resize(draft, side).save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue(), False


def summary(index: dict[str, Any]) -> str:
    """A summary of an index in a few lines."""
    made = index["shards"].values()
    photos, copied, small, large = (sum(one[name] for one in made) for name in ("photos", "copied", "bytes", "source_bytes"))
    tars = f"{len(made)} tar{'s' * (len(made) != 1)}"
    lines = [f"{photos:,} photos in {tars}, {small / 1e6:,.1f} MB of {large / 1e6:,.1f} MB; {copied:,} were small enough"]
    bad = [why for one in made for why in one["unreadable"].values()]
    if bad:
        lines.append(f"left out: {len(bad):,} that cannot be read, all named in {INDEX}")
        lines += [printable(f"  {why}") for why in bad[:SHOWN]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_vlm.images.shards",
        description="Scale photos down once, to webdataset tars that --data takes. The same command continues an interrupted run.",
        epilog="Example: python -m sparse_vlm.images.shards 'photos/*.tar' --out small",
    )
    parser.add_argument("photos", nargs="+", help="tars, folders, images, globs and {000..099} of them, URLs, or hf:ORG/NAME:SPLIT")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the tars go")
    parser.add_argument("--side", type=int, default=SIDE, help=f"most pixels of the shortest side; {SIDE} by default")
    parser.add_argument("--per-shard", type=int, default=PER_SHARD, help=f"most photos in a tar; {PER_SHARD} by default")
    parser.add_argument("--threads", type=int, help="for decoding and encoding; all cores by default")
    given = parser.parse_args(arguments)
    try:
        for option in ("side", "per_shard", "threads"):
            if (number := getattr(given, option)) is not None and number < 1:
                raise UserError(f"--{option.replace('_', '-')} is {number}; it must be at least 1")
        photos = PhotoSet(given.photos)
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            print(f"\r{done:,} of {len(photos):,} photos", end="", file=sys.stderr, flush=True)

        on_photos = tell if sys.stderr.isatty() else lambda count: None
        print(summary(write_shards(photos, given.out, given.side, given.per_shard, given.threads, on_photos)))
    except UserError as error:
        print(printable(f"shards: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("shards: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
