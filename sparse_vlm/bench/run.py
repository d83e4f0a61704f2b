"""A benchmark from its config to its document: what is measured, in which order, and what is kept when it ends early.

    from sparse_vlm.bench import BenchConfig, measure

    document = measure(BenchConfig(models=["tiny", "clip-l14-336"], llms=["135m"]))

Shape legend: B images or requests, M tokens of a tower, N tokens an image in the LLM, P tokens of text beside it, D width of the LLM.

Notable: the document is written after each group of pieces, so that whatever ends a run leaves what was finished. Everything that a user
may have got wrong is asked before the first measurement. All towers take turns with each other, and so do all numbers of tokens before
an LLM; LLMs follow one another, because two large ones rarely fit side by side.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sparse_vlm.bench.llms import Language, LLMPlan, layers_that_fit, plan_llm
from sparse_vlm.bench.machine import COPIED_BYTES, describe, higher, peak_bytes, peaks, versions
from sparse_vlm.bench.serving import serving
from sparse_vlm.bench.summary import requests, saturation
from sparse_vlm.bench.timing import MIN_REPEATS, WARM_UP, TimedCall, take_turns
from sparse_vlm.bench.vision import Vision, count_weights, load_visions, projector_work
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import decode_image, load_image
from sparse_vlm.images.preprocess import Inputs
from sparse_vlm.tower.cost import Work
from sparse_vlm.utils.devices import compiling

FORMAT = "sparse-vlm/bench/1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEITHER = 1 / 3  # share of both peaks below which neither of them binds
IMAGE_SIZE = (640, 480)  # pixels of the image that is made where none is given


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Attributes:
        models: towers, as `load_visions` takes them.
        llms: as `plan_llm` takes them.
        tokens: numbers of tokens an image, where they can be chosen.
        images: files of images; one is made where there are none.
        compile: measure towers compiled as well.
        optimized: measure towers after `optimize_for_inference`, ours and ViTs alike.
        prompt_tokens: of text beside an image (P).
        rounds: turns of each piece, after the warm-up.
        limit_s: a piece that took so many seconds takes no more turns than it must.
        copied_bytes: what the memory's peak is measured on.
        memory_bytes: of the machine that serving is estimated for, and what an LLM must fit into here if that is less; the device's own
            unless given.
        answers: lengths of answers in tokens that serving is estimated for.
    """

    models: Sequence[str]
    llms: Sequence[str]
    tokens: Sequence[int] = ()
    images: Sequence[str] = ()
    batches: Sequence[int] = (1, 16)
    dtypes: Sequence[str] = ("bfloat16",)
    device: str = "cpu"
    compile: bool = False
    optimized: bool = False
    prompt_tokens: int = 32
    rounds: int = 10
    limit_s: float = 20.0
    copied_bytes: int = COPIED_BYTES
    memory_bytes: int | None = None
    answers: Sequence[int] = ()

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            UserError: with the one to change.
        """
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise UserError(f"--dtype {dtype}: known are {', '.join(DTYPES)}")
        if self.rounds < MIN_REPEATS:
            raise UserError(f"--rounds is {self.rounds}; a median needs {MIN_REPEATS} at least")
        kind = self.device.partition(":")[0]
        if self.optimized and self.compile:
            raise UserError("--optimized and --compile: an optimized tower cannot be compiled; measure them in two runs")
        if self.optimized and len(self.dtypes) > 1:
            raise UserError("--optimized: weights are laid out for one --dtype; measure each in a run of its own")
        if self.optimized and kind != "cpu":
            raise UserError(f"--optimized: folds towers for a CPU, not for {self.device}; on a GPU take --compile")
        if kind not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device}: known are cpu and cuda")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {self.device}: torch sees no GPU here; leave it out for the CPU")


def measure(
    config: BenchConfig,
    on_progress: Callable[[int], None] = lambda thousandths: None,
    on_document: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measure everything; the document (docs/bench-schema.json).

    Args:
        on_progress: called with how many more thousandths of the expected time are done.
        on_document: called with the document whenever there is more in it, also when the run ends early.

    Raises:
        UserError: an unknown model, an image that cannot be read, a setting that makes no sense, or too little memory.
    """
    return _Bench(config, on_progress, on_document).run()


class _Bench:
    def __init__(self, config: BenchConfig, on_progress: Callable[[int], None], on_document: Callable[[dict[str, Any]], None]) -> None:
        config.check()
        self.config, self._progress, self._save = config, on_progress, on_document
        self.device = torch.device(config.device)
        self.images = [_read(name) for name in config.images] or [made_image()]
        self.plans = [plan_llm(name) for name in dict.fromkeys(config.llms)]
        self.visions = load_visions(list(dict.fromkeys(config.models)), config.tokens)
        if config.optimized and (pruned := [vision.model for vision in self.visions if vision.prunes]):
            raise UserError(f"--optimized: {pruned[0]} makes tokens fewer within its tower, which is measured plain; leave it out")
        self._began = time.monotonic()
        self._expected = self._done = 0.0
        self._projecting: dict[str, Work] = {}
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "state": "running",
            "problem": None,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "machine": describe(self.device),
            "versions": versions(),
            "settings": asdict(config) | {"warm_up": WARM_UP},
            "pictures": [{"name": name, "bytes": len(data), "pixels": list(image.size)} for name, data, image in self.images],
            "peaks": [],
            "models": [vision.described() for vision in self.visions],
            "llms": [],
            "measurements": [],
            "requests": [],
            "saturation": [],
            "serving": None,
        }

    def run(self) -> dict[str, Any]:
        with self._records_how_it_ended():
            for name in self.config.dtypes:
                self.document["peaks"].append(peaks(DTYPES[name], self.device, self.config.copied_bytes))
            self._expected = sum(self._expect(DTYPES[name]) for name in self.config.dtypes)
            self._group(list(self._of_images()), self.config.dtypes[0])
            for name in self.config.dtypes:
                dtype = DTYPES[name]
                for vision in self.visions:
                    vision.module.to(self.device, dtype)
                if self.config.optimized:
                    for vision in self._by_tower():
                        vision.optimize()
                for batch in self.config.batches:
                    self._group(list(self._of_towers(dtype, batch)), name)
                for plan in self.plans:
                    self._measure_llm(plan, dtype)
                self._peak(name).update(higher(self._peak(name), peaks(dtype, self.device, self.config.copied_bytes)))
            if (left := 1000 - int(self._done)) > 0:
                self._progress(left)
        return self.document

    @contextmanager
    def _records_how_it_ended(self) -> Iterator[None]:
        try:
            yield
            self.document["state"] = "finished"
        except KeyboardInterrupt:
            self.document["state"] = "interrupted"
            raise
        except (MemoryError, RuntimeError) as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
            self.document |= {"state": "failed", "problem": line}
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in line:
                raise UserError(f"memory does not suffice ({line}); take a smaller --batch or fewer models") from error
            raise
        except BaseException as error:
            self.document |= {"state": "failed", "problem": str(error)}
            raise
        finally:
            self._write()

    def _write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self._began, 1)
        for row in self.document["measurements"]:
            self._compare_with_peaks(row)
        self.document["requests"] = requests(self.document)
        self.document["saturation"] = saturation(self.document["requests"])
        if self.config.answers:
            self.document["serving"] = serving(self.document)
        self._save(self.document)

    # ---- what is measured

    def _of_images(self) -> Iterator[TimedCall]:
        """Decoding, and preprocessing for each size: per image, on the CPU, whatever the device."""

        def decode(_: Any) -> None:
            for name, data, _image in self.images:
                decode_image(data, name)

        yield TimedCall("decode_image", [(decode, 1 / len(self.images))])
        for prepared, vision in {vision.prepared: vision for vision in self.visions}.items():

            def prepare(_: Any, vision: Vision = vision) -> None:
                for *_ignored, image in self.images:
                    vision.pixels(image)

            yield TimedCall("preprocess", [(prepare, 1 / len(self.images))], model=prepared)

    def _by_tower(self) -> list[Vision]:
        """One of those that share a tower."""
        return list({vision.tower: vision for vision in self.visions}.values())

    def _of_towers(self, dtype: torch.dtype, batch: int) -> Iterator[TimedCall]:
        for vision in self._by_tower():
            pixels = vision.pixels([self.images[i % len(self.images)][2] for i in range(batch)]).to(self.device, dtype)
            for compiled in (False, True) if self.config.compile else (False,):

                def encode(_: Any, vision: Vision = vision, pixels: Inputs = pixels, compiled: bool = compiled) -> torch.Tensor:
                    with compiling(vision.name):
                        return vision.encode(pixels, compiled)

                tokens = vision.tokens if vision.prunes else vision.tokens_in
                piece = TimedCall("tower", [(encode, 1.0)], vision.tower, None, batch, tokens, vision.work, compiled)
                piece.expected_s = self._seconds_at_peak(dtype, batch * vision.work.macs)
                yield piece

    def _measure_llm(self, plan: LLMPlan, dtype: torch.dtype) -> None:
        """All that concerns one LLM; it is gone when this returns."""
        name = str(dtype).removeprefix("torch.")
        language = Language(plan, dtype, self.device, self._taken(dtype), self.config.memory_bytes)
        self.document["llms"].append(language.described())
        projectors = {vision.name: vision.projector(plan.width).to(self.device, dtype) for vision in self.visions}
        self._projecting = {vision.name: _projecting(vision, projectors[vision.name]) for vision in self.visions}
        for batch in self.config.batches:
            self._group(list(self._of_projectors(language, projectors, batch)), name)
            self._group(list(self._of_prompts(language, batch)), name)
            self._group(list(self._of_answers(language, batch)), name)
        self._group(list(self._of_first_tokens(language, projectors, self.config.batches[0])), name)

    def _of_projectors(self, language: Language, projectors: dict[str, torch.nn.Module], batch: int) -> Iterator[TimedCall]:
        for vision in self.visions:
            projector, work = projectors[vision.name], self._projecting[vision.name]
            rows = vision.tokens if vision.prunes else vision.tokens_in
            tokens = torch.randn(batch, rows, vision.width).to(self.device, language.dtype)

            @torch.inference_mode()
            def project(_: Any, projector: torch.nn.Module = projector, tokens: torch.Tensor = tokens) -> torch.Tensor:
                return projector(tokens)

            yield TimedCall("projector", [(project, 1.0)], vision.name, language.plan.name, batch, vision.tokens, work)

    def _of_prompts(self, language: Language, batch: int) -> Iterator[TimedCall]:
        """Reading an image's tokens and the text beside them, and choosing the first token of the answer."""
        for tokens in self._numbers():
            length = tokens + self.config.prompt_tokens
            yield TimedCall(
                "prefill",
                [(language.decode, language.scale), (language.choose, 1.0)],
                llm=language.plan.name,
                batch=batch,
                tokens=tokens,
                work=language.work(length),
                prepare=lambda length=length: language.embeds(batch, length),
                expected_s=self._reading(language.plan, language.dtype, batch, length),
                beyond_bytes=language.missing_bytes(batch * length),
            )

    def _of_answers(self, language: Language, batch: int) -> Iterator[TimedCall]:
        """One more token of each request's answer, with image and text in the cache."""
        one = language.embeds(batch, 1)
        for tokens in self._numbers():
            length = tokens + self.config.prompt_tokens
            yield TimedCall(
                "decode",
                [(lambda cache: language.decode(one, cache), language.scale), (language.choose, 1.0)],
                llm=language.plan.name,
                batch=batch,
                tokens=tokens,
                work=language.work(1, length),
                prepare=lambda length=length: language.filled_cache(batch, length),
                beyond_bytes=language.missing_bytes(batch * length),
            )

    def _of_first_tokens(self, language: Language, projectors: dict[str, torch.nn.Module], batch: int) -> Iterator[TimedCall]:
        """From encoded images to the first token of an answer, in one go."""
        text = language.embeds(batch, self.config.prompt_tokens)
        for vision in self.visions:

            @torch.inference_mode()
            def read(_: Any, vision: Vision = vision, projector: torch.nn.Module = projectors[vision.name]) -> torch.Tensor:
                encoded = [self.images[i % len(self.images)] for i in range(batch)]
                pixels = vision.pixels([decode_image(data, name) for name, data, _image in encoded])
                seen = projector(vision.encode(pixels.to(self.device, language.dtype)))
                return torch.cat([seen, text], dim=1)

            length = vision.tokens + self.config.prompt_tokens
            work = vision.work + self._projecting[vision.name] + language.work(length)
            steps = [(read, 1.0), (language.decode, language.scale), (language.choose, 1.0)]
            piece = TimedCall("ttft", steps, vision.name, language.plan.name, batch, vision.tokens, work)
            piece.expected_s = self._reading(language.plan, language.dtype, batch, length)
            yield piece

    # ---- how

    def _numbers(self) -> list[int]:
        """Each number of tokens an image that some model has."""
        return sorted({vision.tokens for vision in self.visions})

    def _group(self, pieces: Sequence[TimedCall], dtype: str) -> None:
        """Time pieces in turn, and write down those that have a median, also when a turn is interrupted."""
        try:
            take_turns(pieces, self.device, self.config.rounds, self.config.limit_s, self._advance)
            for piece in pieces:
                if piece.stage in ("tower", "prefill", "decode") and not piece.compiled:
                    piece.peak_bytes = peak_bytes(piece.once, self.device) + piece.beyond_bytes
        finally:
            self.document["measurements"] += [self._measured(piece, dtype) for piece in pieces if piece.finished]
            self._write()

    def _measured(self, piece: TimedCall, dtype: str) -> dict[str, Any]:
        return {
            "stage": piece.stage,
            "model": piece.model,
            "llm": piece.llm,
            "dtype": dtype if piece.work is not None else None,
            "compiled": piece.compiled,
            "batch": piece.batch,
            "tokens": piece.tokens,
            "ms": {key: round(value, 4) for key, value in piece.quartiles().items()} | {"rounds": len(piece.seconds)},
            "macs": None if piece.work is None else piece.work.macs * piece.batch,
            "bytes": None if piece.work is None else piece.work.bytes(piece.batch, DTYPES[dtype].itemsize),
            "of_peak": None,
            "bound": None,
            "peak_bytes": piece.peak_bytes,
        }

    def _compare_with_peaks(self, row: dict[str, Any]) -> None:
        """Say which shares of the peaks a piece reached, and which peak it is bound by."""
        if row["dtype"] is not None:
            peak, seconds = self._peak(row["dtype"]), row["ms"]["median"] / 1000
            compute = row["macs"] / seconds / peak["macs_per_second"]
            memory = row["bytes"] / seconds / peak["bytes_per_second"]
            row["of_peak"] = {"compute": round(compute, 4), "memory": round(memory, 4)}
            row["bound"] = "neither" if max(compute, memory) < NEITHER else "compute" if compute >= memory else "memory"

    def _peak(self, dtype: str) -> dict[str, Any]:
        return next(peak for peak in self.document["peaks"] if peak["dtype"] == dtype)

    def _seconds_at_peak(self, dtype: torch.dtype, macs: int, moved: int = 0) -> float:
        peak = self._peak(str(dtype).removeprefix("torch."))
        return max(macs / peak["macs_per_second"], moved / peak["bytes_per_second"])

    def _reading(self, plan: LLMPlan, dtype: torch.dtype, batch: int, length: int) -> float:
        """A guess at a prefill's seconds, of the layers that are run."""
        layers = layers_that_fit(plan, dtype, self.device, self._taken(dtype), self.config.memory_bytes)
        weights = plan.parameters * layers // plan.layers
        return self._seconds_at_peak(dtype, weights * batch * length, weights * dtype.itemsize)

    def _taken(self, dtype: torch.dtype) -> int:
        """Bytes that the towers' weights take."""
        return dtype.itemsize * count_weights(vision.module for vision in self.visions)

    def _expect(self, dtype: torch.dtype) -> float:
        """A guess at the seconds of a turn of all that takes long: towers, prefills and first tokens."""
        first, text = self.config.batches[0], self.config.prompt_tokens
        towers = {vision.tower: vision for vision in self.visions}.values()
        times = 2 if self.config.compile else 1
        each = [times * self._seconds_at_peak(dtype, b * vision.work.macs) for vision in towers for b in self.config.batches]
        for plan in self.plans:
            each += [self._reading(plan, dtype, b, n + text) for b in self.config.batches for n in self._numbers()]
            each += [self._reading(plan, dtype, first, vision.tokens + text) for vision in self.visions]
        return sum(each)

    def _advance(self, piece: TimedCall) -> None:
        """Tell how far it is, in thousandths."""
        before = int(self._done)
        self._done += 1000 * piece.expected_s / (self._expected * (WARM_UP + self.config.rounds))
        if int(self._done) > before:
            self._progress(int(self._done) - before)


def _projecting(vision: Vision, projector: torch.nn.Module) -> Work:
    return projector_work(projector, vision.tokens if vision.prunes else vision.tokens_in, vision.width)


def _read(name: str) -> tuple[str, bytes, Image.Image]:
    """An image's name, its bytes, and itself."""
    image = load_image(name)
    return name, Path(name).read_bytes(), image


def made_image() -> tuple[str, bytes, Image.Image]:
    """An image with the detail of a photo: smooth colours and some grain; (what it is, its JPEG, itself)."""
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(IMAGE_SIZE, Image.Resampling.BICUBIC)
    grain = generator.normal(0, 6, (IMAGE_SIZE[1], IMAGE_SIZE[0], 3))
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    name = f"made, {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} pixels"
    return name, stream.getvalue(), decode_image(stream.getvalue(), name)
