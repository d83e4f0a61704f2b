"""Documents as `sparse-vlm bench` and `sparse-vlm eval` write them, with numbers that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparse_vlm.bench.summary import requests
from sparse_vlm.eval.metrics import mean
from sparse_vlm.eval.report import as_json
from sparse_vlm.eval.run import Column, Report
from sparse_vlm.eval.task import Result, VLMTask
from sparse_vlm.report.comparison import Comparison
from sparse_vlm.report.quality import read_quality
from sparse_vlm.report.records import Scenario, make_records

GB = 10**9
SCENARIO = Scenario("135m", "bfloat16", 1, 128)


def time_of(stage: str, ms: float, **about: Any) -> dict[str, Any]:
    """A measurement whose quartiles are 10 % to either side."""
    row = {"model": None, "llm": None, "dtype": "bfloat16", "compiled": False, "batch": 1, "tokens": None, "macs": 10**9, "bytes": 10**6}
    found = {"median": ms, "low": round(0.9 * ms, 4), "high": round(1.1 * ms, 4), "rounds": 10}
    return row | {"stage": stage, "ms": found, "of_peak": None, "bound": None, "peak_bytes": 0} | about


def bench_of(models: dict[str, tuple[int, float, float]], batches: tuple[int, ...] = (1, 8), llm: str = "135m") -> dict[str, Any]:
    """A benchmark of models, each with (tokens, ms of its tower, GMACs of its tower); a prompt takes a ms a token, an answer 10 ms."""
    rows = [time_of("decode_image", 2.0, dtype=None), time_of("preprocess", 3.0, model="224", dtype=None)]
    described = []
    for name, (tokens, ms, gmacs) in models.items():
        about = {"model": name, "tower": name, "name": name, "summary": "a tower", "weights": "trained", "reduction": "mlp"}
        sizes = {"tower_tokens": tokens, "tokens": tokens, "width": 64, "image_size": 224, "parameters": 10**7, "macs": int(gmacs * 1e9)}
        described.append(about | sizes)
        for batch in batches:
            of_llm = {"llm": llm, "batch": batch, "tokens": tokens}
            rows.append(time_of("tower", batch * ms, model=name, batch=batch, macs=int(batch * gmacs * 1e9)))
            rows.append(time_of("projector", 1.0 * batch, model=name, **of_llm))
        rows.append(time_of("ttft", 6.0 + ms + tokens, model=name, llm=llm, tokens=tokens))
    for tokens in {tokens for tokens, _, _ in models.values()}:
        for batch in batches:
            rows.append(time_of("prefill", batch * tokens, llm=llm, batch=batch, tokens=tokens))
            rows.append(time_of("decode", 10.0, llm=llm, batch=batch, tokens=tokens))
    document = {
        "format": "sparse-vlm/bench/1",
        "state": "finished",
        "problem": None,
        "started": "2026-11-25T12:00:00+00:00",
        "seconds": 10.0,
        "machine": {
            "processor": "a processor",
            "cores": 2,
            "threads": 1,
            "memory_bytes": 16 * GB,
            "system": "Linux x86_64",
            "device": "cpu",
            "accelerator": None,
            "load_average": 0.1,
        },
        "versions": {"sparse_vlm": "0.1.0", "python": "3.11.7", "torch": "2.9.0"},
        "settings": {
            "models": list(models),
            "llms": [llm],
            "tokens": [],
            "images": [],
            "batches": list(batches),
            "dtypes": ["bfloat16"],
            "device": "cpu",
            "compile": False,
            "prompt_tokens": 32,
            "rounds": 10,
            "limit_s": 20.0,
            "warm_up": 2,
            "answers": [],
            "memory_bytes": None,
        },
        "pictures": [{"name": "photos/coffee.jpg", "bytes": 1000, "pixels": [640, 480]}],
        "peaks": [{"dtype": "bfloat16", "macs_per_second": 50 * GB, "bytes_per_second": 10 * GB}],
        "models": described,
        "llms": [
            {
                "name": llm,
                "summary": "SmolLM2-135M",
                "weights": "random",
                "parameters": 135_000_000,
                "layers": 30,
                "measured_layers": 30,
                "dtype": "bfloat16",
                "weight_bytes": 270_000_000,
                "kv_bytes_per_token": 23040,
            }
        ],
        "measurements": rows,
        "requests": [],
        "saturation": [],
        "serving": None,
    }
    document["requests"] = requests(document)
    return document


class Pope(VLMTask):
    files, protocol = ("eval/pope.tar",), "yes or no by likelihood"

    def run(self, *arguments: Any) -> Result:
        raise NotImplementedError


def eval_of(models: dict[str, tuple[int, list[float]]], kind: str = "vlm", task: str = "pope", **changes: Any) -> dict[str, Any]:
    """A report on models, each with its tokens and what it scored on each photo."""
    control = "none" if kind == "vlm" else None
    names = {name: {"kind": kind, "model": name.partition(", ")[0], "tokens": tokens} for name, (tokens, _) in models.items()}
    results = {}
    for name, (_, scores) in models.items():
        metrics = {"accuracy": mean(np.asarray(scores)), "yes-ratio": mean(np.full(len(scores), 0.5))}
        results[Column(name, control)] = Result(metrics, [])
    report = Report(names, {task: Pope()}, dtype="bfloat16", results={task: results})
    document = as_json(report) | {"versions": {"sparse_vlm": "0.1.0", "torch": "2.9.0+cpu", "python": "3.11.7"}}
    return json.loads(json.dumps(document | changes))


def write(folder: Path, name: str, document: Any) -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def right(share: float, photos: int = 100) -> list[float]:
    """Scores of which a share is right, the same photos first."""
    return [1.0 if i < share * photos else 0.0 for i in range(photos)]


def records_of(
    tmp_path: Path, document: dict[str, Any], evals: list[dict[str, Any]], pairs: list[str], scenario: Scenario = SCENARIO
) -> tuple:
    quality = read_quality([write(tmp_path, f"report{i}.json", report) for i, report in enumerate(evals)])
    return make_records(document, scenario, quality, pairs), quality


def comparison_of(
    tmp_path: Path, document: dict[str, Any], evals: list[dict[str, Any]], pairs: list[str], scenario: Scenario = SCENARIO
) -> Comparison:
    """The first model of the benchmark in use, the last in its place."""
    records, quality = records_of(tmp_path, document, evals, pairs, scenario)
    return Comparison(document, scenario, quality, records, records[0], records[-1], quality.chosen([]), ["bench.json", "report.json"])


TWO = {"vit+pool": (49, 80.0, 6.0), "tiny": (49, 30.0, 1.6)}
CHATS = {"build/pool-chat": (49, right(0.6)), "tiny-chat": (49, right(0.7))}
PAIRS = ["build/pool-chat=vit+pool", "tiny-chat=tiny"]
