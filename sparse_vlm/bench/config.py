"""Settings of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_vlm.bench.machine import COPIED_BYTES
from sparse_vlm.bench.timing import MIN_REPEATS
from sparse_vlm.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Attributes:
        models: towers, as `load_visions` takes them.
        llms: as `plan_llm` takes them.
        tokens: numbers of tokens per image, for models that have a choice.
        images: image files; a synthetic image by default.
        compile: also measure compiled towers.
        optimized: measure towers after `optimize_for_inference`, ours and ViTs alike.
        prompt_tokens: tokens of text beside an image (P).
        rounds: repetitions of each timed call, after the warm-up.
        limit_s: seconds after which a call is not repeated beyond `MIN_REPEATS`.
        copied_bytes: size of the copies that measure memory bandwidth.
        memory_bytes: memory of the machine that serving is estimated for, and a limit for LLMs here; by default the device's own.
        answers: lengths of answers, in tokens, that serving is estimated for.
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
        """Check the settings.

        Raises:
            UserError: names the option to change.
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
