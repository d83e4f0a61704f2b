"""`python tools/preprocessing_cost.py`: what it costs to make a tower's pixels of a photo's file, beside the tower itself, and whether
the ways of doing so agree.

Shape legend: S side of a tower's image in pixels.

Notable: photos of 0.3, 2 and 12 megapixels are made of the given ones, so that all sizes show the same: enlarged, and then given the grain
of a sensor, without which a large file would hold fewer bits, and be read sooner, than a camera's. Everything takes turns in one process.
An image is always decoded by one thread; several threads decode several images.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from experiments import as_program
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparse_vlm.bench.machine import describe, versions
from sparse_vlm.bench.run import synthetic_image
from sparse_vlm.bench.timing import MIN_REPEATS, TimedCall, time_interleaved
from sparse_vlm.bench.vision import load_visions
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import formats
from sparse_vlm.images.photos import Photo, PhotoSet
from sparse_vlm.images.preprocess import load_crop, normalize, preprocess, to_uint8
from sparse_vlm.teachers import load_teacher
from sparse_vlm.tower import SparseFormer
from sparse_vlm.utils.devices import native_dtype
from sparse_vlm.utils.files import write_json

MEGAPIXELS = (0.3, 2.0, 12.0)
GRAIN = 6  # standard deviation of what a sensor adds, of 255 levels
QUALITY = 92
AT_ONCE = 4  # photos that are timed together, at most
THREADS = (1, 2)
TOWERS = ("tiny", "sparseformer-b")
SIZE = 224  # of the towers' images
MEAN = STD = (0.5, 0.5, 0.5)  # normalising costs the same whatever the numbers
Way = Callable[[Photo], Tensor]  # to (3, S, S), normalised float32
PLAIN = "Pillow, whole"


@dataclass(frozen=True)
class Time:
    """Milliseconds of an image: median and quartiles.

    Attributes:
        what: a way, or a tower.
        megapixels: None for a tower.
        batch: images in one turn.
    """

    what: str
    megapixels: float | None
    batch: int
    threads: int
    ms: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Agreement:
    """Cosines between a model's embeddings of pixels that come of a way and of those that come of the whole image by Pillow."""

    model: str
    megapixels: float
    way: str
    photos: int
    lowest: float
    median: float


def ways() -> dict[str, Way]:
    """From a photo to a tower's pixels.

    Raises:
        UserError: torchvision or open_clip is not installed.
    """
    try:
        import open_clip
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise UserError(f"{error.name} is not installed, and is measured as well; pip install 'sparse-vlm[train]'") from None
    transform = open_clip.image_transform(SIZE, is_train=False, mean=MEAN, std=STD)

    def by_torchvision(photo: Photo) -> Tensor:
        whole = decode_jpeg(torch.frombuffer(bytearray(photo.read()), dtype=torch.uint8), mode=ImageReadMode.RGB)
        small = functional.resize(whole, [SIZE], interpolation=InterpolationMode.BICUBIC, antialias=True)
        return normalize(functional.center_crop(small, [SIZE, SIZE]), MEAN, STD)

    return {
        PLAIN: lambda photo: preprocess(photo.load(), SIZE, MEAN, STD)[0],
        "sparse-vlm": lambda photo: normalize(to_uint8(load_crop(photo, SIZE)), MEAN, STD),
        "torchvision, tensors": by_torchvision,
        "torchvision, PIL (open_clip)": lambda photo: transform(Image.open(io.BytesIO(photo.read()), formats=formats())),
    }


def grow(image: Image.Image, megapixels: float, seed: int = 0) -> bytes:
    """A JPEG of so many megapixels, with the grain that a camera's has."""
    times = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    large = image.resize((round(image.width * times), round(image.height * times)), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(seed).standard_normal((large.height, large.width, 3), dtype=np.float32)
    stream = io.BytesIO()
    Image.fromarray((np.asarray(large) + GRAIN * noise).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def write_photos(images: Iterable[Image.Image], folder: Path) -> dict[float, list[Photo]]:
    """Each image at each of `MEGAPIXELS`, in files."""
    found: dict[float, list[Photo]] = {megapixels: [] for megapixels in MEGAPIXELS}
    for number, image in enumerate(images):
        for megapixels, photos in found.items():
            path, data = folder / f"{number}-{megapixels}.jpg", grow(image, megapixels, number)
            path.write_bytes(data)
            photos.append(Photo(path.name, path, 0, len(data)))
    return found


def time_all(photos: dict[float, list[Photo]], how: dict[str, Way], rounds: int, limit_s: float = 60.0) -> list[Time]:
    """Time ways and towers in turn, for each number of threads.

    Args:
        photos: of each number of megapixels; the first few of each are timed.
        rounds: turns of each after the warm-up.
        limit_s: what took so many seconds takes no more turns than a median needs.

    Raises:
        UserError: fewer rounds than make a median.
    """
    if rounds < MIN_REPEATS:
        raise UserError(f"--rounds is {rounds}; a median needs {MIN_REPEATS} at least")
    pieces: list[tuple[TimedCall, dict[str, Any]]] = []

    def add(call: Callable[[], Any], threads: int, computing: int, **of: Any) -> None:
        piece = TimedCall(of["what"], [(lambda _: call(), 1 / of["batch"])], prepare=lambda: torch.set_num_threads(computing))
        pieces.append((piece, of | {"threads": threads}))

    for megapixels, every in photos.items():
        some = every[:AT_ONCE]
        for threads in THREADS:
            for name, way in how.items():
                add(
                    lambda way=way, some=some, n=threads: _each(way, some, n), threads, 1, what=name, megapixels=megapixels, batch=len(some)
                )
    for vision in load_visions(TOWERS):
        vision.module.to(native_dtype())
        for batch in (1, AT_ONCE):
            pixels = torch.zeros(batch, 3, vision.size, vision.size, dtype=native_dtype())
            for threads in THREADS:
                add(lambda v=vision, p=pixels: v.encode(p), threads, threads, what=vision.name, megapixels=None, batch=batch)
    before = torch.get_num_threads()
    try:
        time_interleaved([piece for piece, _ in pieces], torch.device("cpu"), rounds, limit_s)
    finally:
        torch.set_num_threads(before)
    return [Time(**of, ms=ms.pop("median"), **ms, rounds=len(piece.seconds)) for piece, of in pieces if (ms := piece.quartiles())]


def _each(way: Way, photos: Sequence[Photo], threads: int) -> list[Tensor]:
    """The pixels of photos, by several threads as `Preprocessor.load_all` loads them."""
    if threads == 1:
        return list(map(way, photos))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(way, photos))


@torch.inference_mode()
def agree(photos: dict[float, list[Photo]], how: dict[str, Way], teacher: str | None = None) -> list[Agreement]:
    """How near the embeddings by each way come to those by `PLAIN`, in float32.

    Args:
        teacher: a teacher to compare on as well as on the first of `TOWERS`; named as `load_teacher` takes it.
    """
    tower = SparseFormer.from_pretrained(TOWERS[0])
    models = {TOWERS[0]: (lambda pixels: tower(pixels).image_embeds, tower.config.image_mean, tower.config.image_std)}
    if teacher is not None:
        vit = load_teacher(teacher).float()
        models["teacher"] = (lambda pixels: vit(pixels).embeds, vit.spec.image_mean, vit.spec.image_std)
    found = []
    for megapixels, every in photos.items():
        pixels = {name: torch.stack([way(photo) for photo in every]) for name, way in how.items()}
        for model, (embed, mean, std) in models.items():
            # from one normalisation to the model's own
            embeds = {name: embed(normalize((shown * STD[0] + MEAN[0]) * 255, mean, std)) for name, shown in pixels.items()}
            for name in how:
                cosines = cosine_similarity(embeds[name], embeds[PLAIN], dim=-1).tolist()
                found.append(Agreement(model, megapixels, name, len(every), min(cosines), median(cosines)))
    return found


def as_table(times: Sequence[Time], agreements: Sequence[Agreement]) -> str:
    """Markdown: milliseconds of an image, and cosines."""
    heads = [f"{megapixels:g} MP" for megapixels in MEGAPIXELS]
    lines: list[str] = []
    for first, columns, own in (
        ("ms a picture, median [quartiles]", heads, [time for time in times if time.megapixels is not None]),
        ("the tower for a picture, ms", ["alone", f"in a batch of {AT_ONCE}"], [time for time in times if time.megapixels is None]),
    ):
        if not own:
            continue
        lines += [f"| {first} | threads | {' | '.join(columns)} |", "|---|---:|" + "---:|" * len(columns)]
        for name in dict.fromkeys(time.what for time in own):
            for threads in THREADS:
                cells = [_spread(time) for time in own if (time.what, time.threads) == (name, threads)]
                lines.append(f"| {name} | {threads} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"| cosine to {PLAIN}: lowest, median | model | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for name in dict.fromkeys(one.way for one in agreements if one.way != PLAIN):
        for model in dict.fromkeys(one.model for one in agreements):
            cells = [f"{one.lowest:.5f}, {one.median:.5f}" for one in agreements if (one.way, one.model) == (name, model)]
            lines.append(f"| {name} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(time: Time) -> str:
    return f"{time.ms:.1f} [{time.low:.1f}, {time.high:.1f}]"


def main(
    image: Annotated[list[str] | None, typer.Option(help="Photos: an image, folder or tar; repeat it. One is made unless given.")] = None,
    limit: Annotated[int, typer.Option(help="Photos at most, evenly spread.", min=1)] = 8,
    teacher: Annotated[str | None, typer.Option(help="A teacher whose embeddings are compared as well.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each after the warm-up, of which the median counts; 0 leaves times out.")] = 7,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write one JSON document; - is stdout.")] = None,
) -> None:
    """What decoding and resizing a photo costs by us, by Pillow and by torchvision, beside towers, and whether the embeddings agree.

    Example: python tools/preprocessing_cost.py --image examples
    """
    how = ways()
    if image:
        found = PhotoSet(image)
        count = min(limit, len(found))
        images: Iterable[Image.Image] = (found[i * len(found) // count].load() for i in range(count))
    else:
        images = [synthetic_image()[2]]
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(images, Path(folder))
        times, agreements = time_all(photos, how, rounds) if rounds else [], agree(photos, how, teacher)
        sizes = [{"megapixels": mp, "photos": len(every), "bytes": round(median(p.size for p in every))} for mp, every in photos.items()]
    if json_file is None:
        sys.stdout.write(as_table(times, agreements))
        return
    document = {
        "format": "sparse-vlm/pictures/1",
        "machine": describe(torch.device("cpu")),
        "versions": versions() | {name: version(name) for name in ("torchvision", "open_clip_torch")},
        "dtype": str(native_dtype()).removeprefix("torch."),
        "photos": sizes,
        "times": [asdict(time) for time in times],
        "agreement": [asdict(one) for one in agreements],
    }
    write_json(json_file, document)


if __name__ == "__main__":
    as_program(main, "pictures")
