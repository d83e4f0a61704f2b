"""Run a benchmark: from a `BenchConfig` to the JSON document.

    from sparse_vlm.bench import BenchConfig, measure

    document = measure(BenchConfig(models=["tiny", "clip-l14-336"], llms=["135m"]))

Shape legend: B images or requests, M tokens of a tower, N tokens per image in the LLM, P tokens of text beside it, D width of the LLM.

Notable: the document is written after each group of timed calls, so an interrupted run keeps what is finished. Settings are checked
before the first measurement. Timings of all towers are interleaved, and so are those of all numbers of tokens of an LLM; LLMs are
measured one after the other, because two large ones rarely fit in memory.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sparse_vlm.bench.config import DTYPES, BenchConfig
from sparse_vlm.bench.llms import Language, LLMPlan, layers_that_fit, plan_llm
from sparse_vlm.bench.machine import describe, higher, peak_bytes, peaks, versions
from sparse_vlm.bench.serving import serving
from sparse_vlm.bench.summary import requests, saturation
from sparse_vlm.bench.timing import WARM_UP, TimedCall, time_interleaved
from sparse_vlm.bench.vision import Vision, count_weights, load_visions, projector_work
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import decode_image, load_image
from sparse_vlm.images.preprocess import Inputs
from sparse_vlm.tower.cost import Work
from sparse_vlm.utils.devices import compiling

FORMAT = "sparse-vlm/bench/1"
NEITHER = 1 / 3  # share of both peaks below which a call is bound by neither
IMAGE_SIZE = (640, 480)  # pixels of the synthetic image


def measure(
    config: BenchConfig,
    on_progress: Callable[[int], None] = lambda thousandths: None,
    on_document: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measure everything and return the document (docs/bench-schema.json).

    Args:
        on_progress: called with progress since the last call, in thousandths of the expected time.
        on_document: called with the document after each group, also when the run ends early.

    Raises:
        UserError: an unknown model, an unreadable image, an invalid setting, or too little memory.
    """
    return _Bench(config, on_progress, on_document).run()


class _Bench:
    def __init__(self, config: BenchConfig, on_progress: Callable[[int], None], on_document: Callable[[dict[str, Any]], None]) -> None:
        config.check()
        self.config, self._progress, self._save = config, on_progress, on_document
        self.device = torch.device(config.device)
        self.images = [_read(name) for name in config.images] or [synthetic_image()]
        self.plans = [plan_llm(name) for name in dict.fromkeys(config.llms)]
        self.visions = load_visions(list(dict.fromkeys(config.models)), config.tokens)
        if config.optimized and (pruned := [vision.model for vision in self.visions if vision.prunes]):
            raise UserError(f"--optimized: {pruned[0]} prunes tokens within its tower and cannot be optimized; leave it out")
        self._began = time.monotonic()
        self._expected = self._done = 0.0
        self._projector_work: dict[str, Work] = {}
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
        with self._records_state():
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
    def _records_state(self) -> Iterator[None]:
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
                raise UserError(f"out of memory ({line}); take a smaller --batch or fewer models") from error
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

    def _of_images(self) -> Iterator[TimedCall]:
        """Decoding, and preprocessing for each input size, per image and always on the CPU."""

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
        """One model for each distinct tower."""
        return list({vision.tower: vision for vision in self.visions}.values())

    def _of_towers(self, dtype: torch.dtype, batch: int) -> Iterator[TimedCall]:
        for vision in self._by_tower():
            pixels = vision.pixels([self.images[i % len(self.images)][2] for i in range(batch)]).to(self.device, dtype)
            for compiled in (False, True) if self.config.compile else (False,):

                def encode(_: Any, vision: Vision = vision, pixels: Inputs = pixels, compiled: bool = compiled) -> torch.Tensor:
                    with compiling(vision.name):
                        return vision.encode(pixels, compiled)

                tokens = vision.tokens if vision.prunes else vision.tokens_in
                call = TimedCall("tower", [(encode, 1.0)], vision.tower, None, batch, tokens, vision.work, compiled)
                call.expected_s = self._seconds_at_peak(dtype, batch * vision.work.macs)
                yield call

    def _measure_llm(self, plan: LLMPlan, dtype: torch.dtype) -> None:
        """Measure everything that needs one LLM, which is released afterwards."""
        name = str(dtype).removeprefix("torch.")
        language = Language(plan, dtype, self.device, self._tower_bytes(dtype), self.config.memory_bytes)
        self.document["llms"].append(language.described())
        projectors = {vision.name: vision.projector(plan.width).to(self.device, dtype) for vision in self.visions}
        self._projector_work = {vision.name: _projector_work(vision, projectors[vision.name]) for vision in self.visions}
        for batch in self.config.batches:
            self._group(list(self._of_projectors(language, projectors, batch)), name)
            self._group(list(self._of_prompts(language, batch)), name)
            self._group(list(self._of_answers(language, batch)), name)
        self._group(list(self._of_first_tokens(language, projectors, self.config.batches[0])), name)

    def _of_projectors(self, language: Language, projectors: dict[str, torch.nn.Module], batch: int) -> Iterator[TimedCall]:
        for vision in self.visions:
            projector, work = projectors[vision.name], self._projector_work[vision.name]
            rows = vision.tokens if vision.prunes else vision.tokens_in
            tokens = torch.randn(batch, rows, vision.width).to(self.device, language.dtype)

            @torch.inference_mode()
            def project(_: Any, projector: torch.nn.Module = projector, tokens: torch.Tensor = tokens) -> torch.Tensor:
                return projector(tokens)

            yield TimedCall("projector", [(project, 1.0)], vision.name, language.plan.name, batch, vision.tokens, work)

    def _of_prompts(self, language: Language, batch: int) -> Iterator[TimedCall]:
        """Prefill of image and text tokens, and the choice of the answer's first token."""
        for tokens in self._token_counts():
            length = tokens + self.config.prompt_tokens
            yield TimedCall(
                "prefill",
                [(language.decode, language.scale), (language.choose, 1.0)],
                llm=language.plan.name,
                batch=batch,
                tokens=tokens,
                work=language.work(length),
                prepare=lambda length=length: language.embeds(batch, length),
                expected_s=self._prefill_seconds(language.plan, language.dtype, batch, length),
                beyond_bytes=language.missing_bytes(batch * length),
            )

    def _of_answers(self, language: Language, batch: int) -> Iterator[TimedCall]:
        """One decoding step of each request, with image and text in the cache."""
        one = language.embeds(batch, 1)
        for tokens in self._token_counts():
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
        """From encoded image files to the first token of an answer, in one call."""
        text = language.embeds(batch, self.config.prompt_tokens)
        for vision in self.visions:

            @torch.inference_mode()
            def read(_: Any, vision: Vision = vision, projector: torch.nn.Module = projectors[vision.name]) -> torch.Tensor:
                encoded = [self.images[i % len(self.images)] for i in range(batch)]
                pixels = vision.pixels([decode_image(data, name) for name, data, _image in encoded])
                seen = projector(vision.encode(pixels.to(self.device, language.dtype)))
                return torch.cat([seen, text], dim=1)

            length = vision.tokens + self.config.prompt_tokens
            work = vision.work + self._projector_work[vision.name] + language.work(length)
            steps = [(read, 1.0), (language.decode, language.scale), (language.choose, 1.0)]
            call = TimedCall("ttft", steps, vision.name, language.plan.name, batch, vision.tokens, work)
            call.expected_s = self._prefill_seconds(language.plan, language.dtype, batch, length)
            yield call

    def _token_counts(self) -> list[int]:
        """Each number of tokens per image that some model has."""
        return sorted({vision.tokens for vision in self.visions})

    def _group(self, calls: Sequence[TimedCall], dtype: str) -> None:
        """Time calls interleaved, and record those that have a median, even if interrupted."""
        try:
            time_interleaved(calls, self.device, self.config.rounds, self.config.limit_s, self._advance)
            for call in calls:
                if call.stage in ("tower", "prefill", "decode") and not call.compiled:
                    call.peak_bytes = peak_bytes(call.once, self.device) + call.beyond_bytes
        finally:
            self.document["measurements"] += [self._measured(call, dtype) for call in calls if call.finished]
            self._write()

    def _measured(self, call: TimedCall, dtype: str) -> dict[str, Any]:
        return {
            "stage": call.stage,
            "model": call.model,
            "llm": call.llm,
            "dtype": dtype if call.work is not None else None,
            "compiled": call.compiled,
            "batch": call.batch,
            "tokens": call.tokens,
            "ms": {key: round(value, 4) for key, value in call.quartiles().items()} | {"rounds": len(call.seconds)},
            "macs": None if call.work is None else call.work.macs * call.batch,
            "bytes": None if call.work is None else call.work.bytes(call.batch, DTYPES[dtype].itemsize),
            "of_peak": None,
            "bound": None,
            "peak_bytes": call.peak_bytes,
        }

    def _compare_with_peaks(self, row: dict[str, Any]) -> None:
        """Add the shares of both peaks that a call reached, and the peak that bounds it."""
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

    def _prefill_seconds(self, plan: LLMPlan, dtype: torch.dtype, batch: int, length: int) -> float:
        """Estimated seconds of a prefill, of the layers that are run."""
        layers = layers_that_fit(plan, dtype, self.device, self._tower_bytes(dtype), self.config.memory_bytes)
        weights = plan.parameters * layers // plan.layers
        return self._seconds_at_peak(dtype, weights * batch * length, weights * dtype.itemsize)

    def _tower_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the towers' weights."""
        return dtype.itemsize * count_weights(vision.module for vision in self.visions)

    def _expect(self, dtype: torch.dtype) -> float:
        """Estimated seconds of one round of the long calls: towers, prefills and first tokens."""
        first, text = self.config.batches[0], self.config.prompt_tokens
        towers = {vision.tower: vision for vision in self.visions}.values()
        times = 2 if self.config.compile else 1
        each = [times * self._seconds_at_peak(dtype, b * vision.work.macs) for vision in towers for b in self.config.batches]
        for plan in self.plans:
            each += [self._prefill_seconds(plan, dtype, b, n + text) for b in self.config.batches for n in self._token_counts()]
            each += [self._prefill_seconds(plan, dtype, first, vision.tokens + text) for vision in self.visions]
        return sum(each)

    def _advance(self, call: TimedCall) -> None:
        """Report progress."""
        before = int(self._done)
        self._done += 1000 * call.expected_s / (self._expected * (WARM_UP + self.config.rounds))
        if int(self._done) > before:
            self._progress(int(self._done) - before)


def _projector_work(vision: Vision, projector: torch.nn.Module) -> Work:
    return projector_work(projector, vision.tokens if vision.prunes else vision.tokens_in, vision.width)


def _read(name: str) -> tuple[str, bytes, Image.Image]:
    """Name, encoded bytes and decoded image of a file."""
    image = load_image(name)
    return name, Path(name).read_bytes(), image


def synthetic_image() -> tuple[str, bytes, Image.Image]:
    """A synthetic image with about a photo's detail, smooth colours and grain; (description, JPEG bytes, image)."""
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(IMAGE_SIZE, Image.Resampling.BICUBIC)
    grain = generator.normal(0, 6, (IMAGE_SIZE[1], IMAGE_SIZE[0], 3))
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    name = f"synthetic, {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} pixels"
    return name, stream.getvalue(), decode_image(stream.getvalue(), name)
