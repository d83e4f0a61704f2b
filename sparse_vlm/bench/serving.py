"""What a server would do, estimated from measured pieces: requests a second and memory, against tokens an image and length of the answer.

Notable: an estimate, not a measurement, and a simple one: requests come and go in batches of a size that was measured,
the machine does one thing at a time, and every answer is as long as the others. It says where fewer tokens do not help, which is where
something else takes the time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from sparse_vlm.bench.summary import Row

TAKES = {
    "picture": "decoding and resizing the image takes",
    "tower": "tower and projector take",
    "prompt": "reading the prompt takes",
    "answer": "writing the answer takes",
}  # the parts of a request, as `shares` names them
HELPS = 0.10  # a gain in requests a second below which fewer tokens do not help
USABLE = 0.9  # share of the memory that a server can fill
ASSUMED = (
    "requests come and go in batches of a size that was measured, and the best size that fits the memory counts",
    "the machine does one thing at a time: images, prompts, answers; on a GPU, images are decoded beside it and cost it nothing",
    "a token of an answer takes what the line through decoding at each measured number of tokens says, the answer's own included",
    f"memory: weights, the largest working memory of a stage, and keys and values of all tokens, in {USABLE:.0%} of the machine's",
)


def serving(document: Row) -> Row:
    """For each model, LLM, dtype and length of answer what a machine serves; plain data."""
    rows = []
    for answer in document["settings"]["answers"]:
        for key in dict.fromkeys((r["llm"], r["dtype"]) for r in document["requests"] if not r["compiled"]):
            of_key = [r for r in document["requests"] if (r["llm"], r["dtype"]) == key and not r["compiled"]]
            for model in dict.fromkeys(r["model"] for r in of_key):
                each = [_served(document, r, answer, _decoding(of_key, r["batch"])) for r in of_key if r["model"] == model]
                rows.append(max(each, key=lambda row: (row["fits"], row["requests_per_second"])))
    return {"assumptions": list(ASSUMED), "rows": rows, "no_help": _no_help(rows)}


def _served(document: Row, request: Row, answer: int, decoding: Callable[[float], float]) -> Row:
    """What one size of batch serves."""
    llm = next(llm for llm in document["llms"] if (llm["name"], llm["dtype"]) == (request["llm"], request["dtype"]))
    machine, batch, ms = document["machine"], request["batch"], request["ms"]
    on_gpu = machine["accelerator"] is not None
    has = document["settings"]["memory_bytes"] or (machine["accelerator"] or machine)["memory_bytes"]
    length = request["tokens"] + document["settings"]["prompt_tokens"] + answer
    taken = {
        "picture": (0.0 if on_gpu else batch * (ms["decode_image"] + ms["preprocess"])),
        "tower": ms["tower"] + ms["projector"],
        "prompt": ms["prefill"],
        # the answer's own tokens stand before it as well: half of them on average
        "answer": answer * decoding(request["tokens"] + answer / 2),
    }
    each = length * llm["kv_bytes_per_token"]
    # the working memory measured is that of the batch, with keys and values of image and text, which are counted here for all tokens
    working = max(0, request["peak_bytes"] - request["weight_bytes"] - batch * (length - answer) * llm["kv_bytes_per_token"])
    memory = request["weight_bytes"] + working + batch * each
    total = sum(taken.values())
    return {
        "model": request["model"],
        "llm": request["llm"],
        "dtype": request["dtype"],
        "tokens": request["tokens"],
        "answer_tokens": answer,
        "batch": batch,
        "requests_per_second": float(f"{1000 * batch / total:.4g}"),  # digits that count: 13B on a CPU serves 0.0002
        "shares": {name: round(value / total, 4) for name, value in taken.items()},
        "memory_bytes": memory,
        "fits": memory <= USABLE * has,
        "concurrent": max(0, int((USABLE * has - request["weight_bytes"] - working) / each)),
    }


def _decoding(requests: list[Row], batch: int) -> Callable[[float], float]:
    """Milliseconds of a decoding step at this number of image tokens, by a line through the measurements.

    A line, because keys and values are read one after the other, and because one disturbed measurement must not decide between two models.
    """
    found = {r["tokens"]: r["ms"]["decode"] for r in requests if r["batch"] == batch}
    if len(found) < 2:
        return lambda tokens: next(iter(found.values()))
    slope, intercept = statistics.linear_regression(list(found), list(found.values()))
    if slope < 0:
        return lambda tokens: statistics.fmean(found.values())
    return lambda tokens: intercept + slope * tokens


def _no_help(rows: list[Row]) -> list[str]:
    """A sentence for each model that has fewer tokens than the one with most, and serves hardly more, or less; both fit."""
    lines = []
    for llm, dtype, name in dict.fromkeys((row["llm"], row["dtype"], row["model"]) for row in rows):
        own = [row for row in rows if (row["llm"], row["dtype"], row["model"]) == (llm, dtype, name)]
        cases = []
        for row in own:
            beside = [r for r in rows if (r["llm"], r["dtype"], r["answer_tokens"]) == (llm, dtype, row["answer_tokens"])]
            most = max(beside, key=lambda r: (r["tokens"], r["requests_per_second"]))
            gain = row["requests_per_second"] / most["requests_per_second"] - 1
            if row["tokens"] < most["tokens"] and gain < HELPS and row["fits"] and most["fits"]:
                part, share = max(row["shares"].items(), key=lambda item: item[1])
                cases.append(f"{gain:+.0%} at answers of {row['answer_tokens']} tokens, where {TAKES[part]} {share:.0%} of the time")
                against = most
        if cases:
            lines.append(f"{llm}, {dtype}: {_named(own[0])} against {_named(against)}, requests a second: {'; '.join(cases)}")
    return lines


def _named(row: Row) -> str:
    """A model and its tokens, once."""
    return row["model"] if row["model"].endswith(" tokens") else f"{row['model']} ({row['tokens']} tokens)"
