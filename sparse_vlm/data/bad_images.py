"""Images that cannot be read: found before the first step, and skipped, replaced or refused; a resumed run decides alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo
from sparse_vlm.utils.documents import parse_json
from sparse_vlm.utils.files import write_text

ON_BAD_IMAGE = {
    "raise": "stop and name the sample",
    "skip": "leave out its samples",
    "blank": "show a grey image instead",
}
DECISIONS = "bad-images.json"
OnBad = Callable[[int, ImageError], None]
OnPhotos = Callable[[int], None]


def blank(size: int, mean: tuple[float, float, float]) -> Image.Image:
    """An image of a tower's mean colour, which is zero after normalisation but for rounding.

    Args:
        size: of its sides in pixels.
        mean: of each channel, from 0 to 1.
    """
    return Image.new("RGB", (size, size), tuple(round(255 * value) for value in mean))


def absent(photos: Sequence[Photo], wanted: Sequence[int]) -> dict[int, str]:
    """Photos without a file, each with a message; nothing is read."""
    sizes = ((index, photos[index]) for index in wanted)
    return {index: f"{photo.source}: no such image" for index, photo in sizes if photo.size < 0}


def broken(
    photos: Sequence[Photo], wanted: Sequence[int], on_bad: OnBad, on_photos: OnPhotos = lambda photos: None, threads: int = 1
) -> None:
    """Read photos to the end, decoding as little of each as possible.

    Args:
        on_bad: called with each photo that cannot be used, and why.
        on_photos: called with the number of photos just decoded.
        threads: that decode.
    """

    def look(index: int) -> ImageError | None:
        try:
            photos[index].draft(1)
        except ImageError as error:
            return error
        return None

    piece = 64 * threads
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(wanted), piece):
            part = wanted[start : start + piece]
            for index, error in zip(part, pool.map(look, part), strict=True):
                if error:
                    on_bad(index, error)
            on_photos(len(part))


def resolve_bad_images(
    examples: ConversationDataset,
    policy: str,
    out: Path,
    decides: bool = True,
    look: Callable[[Sequence[int], OnBad], None] = lambda wanted, on_bad: None,
) -> dict[int, str]:
    """Find the images that a run cannot read; a resumed run uses the decision of its start.

    Args:
        policy: a key of `ON_BAD_IMAGE`.
        out: the run's folder, where the decision is kept.
        decides: whether this process decides; the others wait for its decision.
        look: reads photos and reports those that cannot be read.

    Returns:
        Numbers of the photos that cannot be used, with the line that says why; empty where `policy` is `raise`.

    Raises:
        UserError: an image that cannot be used, named with its sample, where `policy` is `raise` or the run had it before; or a folder
            that holds the decision of another run.
    """
    path = out / DECISIONS
    while not (decides or path.exists()):
        time.sleep(0.2)
    began, bad = path.exists(), {}
    belongs = {"on_bad_image": policy, "data": examples.fingerprint()}
    if began:
        decided = parse_json(path.read_bytes(), str(path))
        if not isinstance(decided, dict) or {name: decided.get(name) for name in belongs} != belongs:
            raise UserError(
                f"{path}: was decided for other data or another --on-bad-image; choose another --out, or remove it to start over"
            )
        bad = {int(number): why for number, why in decided["images"].items()}
    if not decides:
        return bad

    def on_bad(number: int, why: ImageError | str, others: int = 0) -> None:
        name = examples.example_showing(number)
        line = f"{name}: {str(why).removeprefix(f'{name}: ')}" + (f" (and {others:,} more)" if others else "")
        if policy == "raise":
            raise UserError(f"{line}; --check finds all that are bad, --on-bad-image skip or blank goes on without them")
        if began:
            raise UserError(f"{line}; this run began with it: restore it, or choose another --out")
        bad[number] = str(why)

    wanted = [photo for photo in examples.used_photos() if photo not in bad]
    missing = absent(examples.photos, wanted)
    for number, why in missing.items():
        on_bad(number, why, len(missing) - 1)
    look([photo for photo in wanted if photo not in missing], on_bad)
    if not began:
        write_text(path, json.dumps({**belongs, "images": bad}, indent=1) + "\n")
    return bad
