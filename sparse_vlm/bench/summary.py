"""What a run's measurements say of whole requests: an image, some text, and the first token of an answer."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
NEAR = 0.05  # share by which a larger batch must do more for the one before not to be enough
FEWEST_BATCHES = 3  # of which saturation can be read off
# what saturates, and what a batch of it is called
RATES = {"images_per_second": "images", "answer_tokens_per_second": "requests"}


def requests(document: Row) -> list[Row]:
    """For each model, LLM, dtype and batch whose pieces are all there, what a batch of requests takes; plain data.

    The time to the first token is measured in one go for the first batch size, and the sum of its pieces' medians for others and for
    compiled towers (`ttft_from` says which).
    """
    found = Measured(document)
    rows = []
    for llm in document["llms"]:
        for model in document["models"]:
            for batch in document["settings"]["batches"]:
                for compiled in (False, True):
                    if (row := _request(found, llm, model, batch, compiled)) is not None:
                        rows.append(row)
    return rows


def saturation(rows: list[Row]) -> list[Row]:
    """For each model, LLM, dtype and form with enough batches, the most images and answer tokens a second, and from which batch on.

    Args:
        rows: `requests` of a document.

    Returns:
        `images_per_second` and `answer_tokens_per_second` at most, and under `images` and `requests` the smallest batch that comes near to
        it; None where the largest batch still does more than the one before, so that the machine is not at its end.
    """
    found = []
    for key in dict.fromkeys((r["model"], r["llm"], r["dtype"], r["compiled"]) for r in rows):
        of_key = sorted((r for r in rows if (r["model"], r["llm"], r["dtype"], r["compiled"]) == key), key=lambda r: r["batch"])
        if len(of_key) < FEWEST_BATCHES:
            continue
        row: Row = dict(zip(("model", "llm", "dtype", "compiled"), key, strict=True)) | {"tokens": of_key[0]["tokens"]}
        for rate, name in RATES.items():
            each = [r[rate] for r in of_key]
            enough = next(r["batch"] for r in of_key if r[rate] >= (1 - NEAR) * max(each))
            row |= {rate: max(each), name: None if each[-1] > (1 + NEAR) * max(each[:-1]) else enough}
        found.append(row)
    return found


class Measured:
    """The measurements of a document, by what they are of."""

    def __init__(self, document: Row) -> None:
        self.prompt_tokens = document["settings"]["prompt_tokens"]
        self.rows = {
            (
                r["stage"],
                r["model"],
                r["llm"],
                r["dtype"],
                r["batch"],
                r["compiled"],
                r["tokens"] if r["stage"] in ("prefill", "decode") else None,
            ): r
            for r in document["measurements"]
        }

    def of(
        self,
        stage: str,
        model: str | None = None,
        llm: Row | None = None,
        dtype: str | None = None,
        batch: int = 1,
        compiled: bool = False,
        tokens: int | None = None,
    ) -> Row | None:
        """A measurement; None where it was not reached."""
        return self.rows.get((stage, model, None if llm is None else llm["name"], dtype, batch, compiled, tokens))


def prepared_as(size: int, fit: str) -> str:
    """Key of the preprocessing to this number of pixels."""
    return str(size) if fit == "crop" else f"{size}, {fit}"


def pieces_of(found: Measured, llm: Row, model: Row, batch: int, compiled: bool) -> dict[str, Row | None]:
    """The measurements that a batch of requests consists of, by stage; `ttft` is there where it was measured in one go."""
    dtype, name = llm["dtype"], model["name"]
    return {
        "decode_image": found.of("decode_image"),
        "preprocess": found.of("preprocess", prepared_as(model["image_size"], model.get("fit", "crop"))),
        "tower": found.of("tower", model["tower"], None, dtype, batch, compiled),
        "projector": found.of("projector", name, llm, dtype, batch),
        "prefill": found.of("prefill", None, llm, dtype, batch, tokens=model["tokens"]),
        "decode": found.of("decode", None, llm, dtype, batch, tokens=model["tokens"]),
        "ttft": None if compiled else found.of("ttft", name, llm, dtype, batch),
    }


def _request(found: Measured, llm: Row, model: Row, batch: int, compiled: bool) -> Row | None:
    dtype, tokens = llm["dtype"], model["tokens"]
    pieces = pieces_of(found, llm, model, batch, compiled)
    whole = pieces.pop("ttft")
    if any(piece is None for piece in pieces.values()):
        return None
    ms = {stage: piece["ms"]["median"] for stage, piece in pieces.items()}
    seeing = batch * (ms["decode_image"] + ms["preprocess"]) + ms["tower"] + ms["projector"]
    first = seeing + ms["prefill"] if whole is None else whole["ms"]["median"]
    itemsize = llm["weight_bytes"] // llm["parameters"]
    held = [piece["peak_bytes"] for stage in ("tower", "prefill", "decode") if (piece := pieces[stage])["peak_bytes"] is not None]
    plain = found.of("tower", model["tower"], None, dtype, batch)
    held += [plain["peak_bytes"]] if compiled and plain is not None else []
    return {
        "model": model["name"],
        "llm": llm["name"],
        "dtype": dtype,
        "compiled": compiled,
        "batch": batch,
        "tokens": tokens,
        "whole_llm": llm["measured_layers"] == llm["layers"],
        "ms": {**{stage: round(value, 4) for stage, value in ms.items()}, "ttft": round(first, 4)},
        "ttft_from": "pieces" if whole is None else "measured",
        "macs": sum(pieces[stage]["macs"] for stage in ("tower", "projector", "prefill")),
        "images_per_second": round(1000 * batch / seeing, 3),
        "answer_tokens_per_second": round(1000 * batch / ms["decode"], 3),
        "kv_bytes_per_image": tokens * llm["kv_bytes_per_token"],
        "weight_bytes": llm["weight_bytes"] + itemsize * model["parameters"],
        "peak_bytes": llm["weight_bytes"] + itemsize * model["parameters"] + max(held, default=0),
    }
