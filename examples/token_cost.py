"""Measure what the visual tokens of your own model cost on this machine, beside a baseline.

    python examples/token_cost.py --model tiny --model clip-l14-336 --llm 135m

`--model` takes a tower (folder, zoo name), a teacher's name or a baseline; `--llm` a folder, a zoo name, or a shape with random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sparse_vlm.bench import BenchConfig, measure


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One request a model: its tokens, MACs, milliseconds by stage, and bytes of keys and values."""
    parser = argparse.ArgumentParser(description="Measure the cost of visual tokens.")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--llm", default="135m")
    parser.add_argument("--image", action="append", default=[])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)

    config = BenchConfig(
        models=tuple(args.model), llms=(args.llm,), images=tuple(args.image), batches=(1,), dtypes=(args.dtype,), rounds=args.rounds
    )
    requests = measure(config)["requests"]
    print(f"{'model':20} {'tokens':>6} {'GMACs':>7} {'tower ms':>9} {'prefill ms':>11} {'first token ms':>15} {'KV MB':>6}")
    for request in requests:
        ms = request["ms"]
        print(
            f"{request['model']:20} {request['tokens']:6} {request['macs'] / 1e9:7.2f} {ms['tower']:9.1f} {ms['prefill']:11.1f} "
            f"{ms['ttft']:15.1f} {request['kv_bytes_per_image'] / 1e6:6.2f}"
        )
    return requests


if __name__ == "__main__":
    main()
