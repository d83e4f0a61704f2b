"""What a server would do, put together from measured pieces: by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_vlm.bench.serving import serving


def test_serving_by_hand() -> None:
    def request(model: str, tokens: int, batch: int, prefill: float, decode: float) -> dict[str, Any]:
        ms = {"decode_image": 2.0, "preprocess": 3.0, "tower": 10.0, "projector": 1.0, "prefill": prefill, "decode": decode, "ttft": 0.0}
        sizes = {"weight_bytes": 1000, "peak_bytes": 1000 + 50 + batch * (tokens + 4) * 2}
        return {"model": model, "llm": "x", "dtype": "float32", "compiled": False, "batch": batch, "tokens": tokens, "ms": ms, **sizes}

    document = {
        "machine": {"accelerator": None, "memory_bytes": 2000},
        "settings": {"answers": (10, 1000), "prompt_tokens": 4, "memory_bytes": None},
        "llms": [{"name": "x", "dtype": "float32", "kv_bytes_per_token": 2}],
        "requests": [request("few", 10, 1, 20.0, 5.0), request("many", 110, 1, 150.0, 6.0), request("many", 110, 9, 200.0, 6.0)],
    }
    found = serving(document)
    few, many = found["rows"][:2]
    # a token more in the cache takes 0.01 ms; on average five of the answer stand there
    assert few["requests_per_second"] == pytest.approx(1000 / (5 + 11 + 20 + 10 * (5 + 0.05)), rel=1e-3)
    assert few["memory_bytes"] == 1000 + 50 + (10 + 4 + 10) * 2
    assert few["concurrent"] == (1800 - 1050) // (24 * 2)
    assert few["shares"]["answer"] == pytest.approx(50.5 / 86.5, abs=1e-3)
    assert (many["batch"], many["fits"]) == (1, True), "nine do not fit"
    assert found["no_help"] == [], "at ten tokens they help, and a thousand do not fit"
    document["machine"] = {"accelerator": {"name": "g", "memory_bytes": 10**6}, "memory_bytes": 2000}
    found = serving(document)
    few, many = found["rows"][:2]
    assert few["shares"]["picture"] == 0.0 and many["batch"] == 9, "images are decoded beside a GPU"
    (line,) = found["no_help"]
    assert line.startswith("x, float32: few (10 tokens) against many (110 tokens), requests a second: -")
    assert "at answers of 10 tokens" in line and "at answers of 1000 tokens, where writing the answer takes 100% of the time" in line
