"""Models of a benchmark in one scenario (an LLM, a dtype, a batch, a length of answer): their cost, and their name in the evaluation.

Notable: a VLM of an evaluation has another name than the tower that a benchmark measures, so a user says which belong together
(`--pair VLM=TOWER`); names that are equal go together without being told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from sparse_vlm.bench.serving import serving
from sparse_vlm.bench.summary import Measured, Row, pieces_of, requests
from sparse_vlm.errors import UserError
from sparse_vlm.report.quality import Quality, read_document
from sparse_vlm.utils.schema import COUNT, SIZE, SOME, Number

FORMAT = "sparse-vlm/bench/1"
_LLM = {
    "name": str,
    "dtype": str,
    "summary": str,
    "weights": str,
    "parameters": SOME,
    "weight_bytes": SOME,
    "kv_bytes_per_token": SOME,
}
_MODEL = {"tower_tokens": SOME, "tokens": SOME, "width": SOME, "image_size": SOME, "parameters": SOME, "macs": SOME}
_STAGES = dict.fromkeys(("decode_image", "preprocess", "tower", "projector", "prefill", "decode", "ttft"), SIZE)
_CASE = {"dtype": str, "compiled": bool, "batch": SOME, "tokens": SOME}
# What a page is made of; docs/bench-schema.json describes all.
DOCUMENT = {
    "state": str,
    "machine": {
        "processor": str,
        "cores": SOME,
        "threads": SOME,
        "memory_bytes": SOME,
        "system": str,
        "accelerator": (None, {"name": str, "memory_bytes": SOME}),
        "load_average": Number(0),
    },
    "versions": {str: str},
    "settings": {"batches": [SOME], "prompt_tokens": COUNT, "rounds": COUNT, "warm_up": COUNT, "memory_bytes": (None, SOME)},
    "problem": (str, None),
    "started": str,
    "pictures": [{"name": str, "pixels": [SOME]}],
    "peaks": [{"dtype": str, "macs_per_second": SIZE, "bytes_per_second": SIZE}],
    "models": [{"name": str, "model": str, "tower": str, "summary": str, "weights": str, "reduction": str} | _MODEL],
    "llms": [_LLM | {"layers": SOME, "measured_layers": SOME}],
    "measurements": [
        {
            "stage": str,
            "model": (str, None),
            "llm": (str, None),
            "ms": {"median": SIZE, "low": Number(0), "high": Number(0)},
            "macs": (COUNT, None),
            "peak_bytes": (COUNT, None),
        }
        | _CASE
        | {"dtype": (str, None), "tokens": (COUNT, None)}
    ],
    "requests": [
        {
            "model": str,
            "llm": str,
            "whole_llm": bool,
            "ms": _STAGES,
            "ttft_from": str,
            "macs": SOME,
            "images_per_second": SIZE,
            "answer_tokens_per_second": SIZE,
            "kv_bytes_per_image": SIZE,
            "weight_bytes": SOME,
            "peak_bytes": COUNT,
        }
        | _CASE
    ],
}
ANSWERS = (16, 128, 512)  # tokens; a short, a middling and a long answer that stand beside the user's


def read_bench(path: Path) -> Row:
    """Read a document of `sparse-vlm bench`.

    Raises:
        UserError: no such document, or not one whole request in it.
    """
    document = read_document(path, FORMAT, "sparse-vlm bench", DOCUMENT)
    if not document["requests"]:
        raise UserError(f"{path}: no model was measured to its end (the run is {document['state']}); run sparse-vlm bench again")
    again = "make it again by sparse-vlm bench"
    for i, picture in enumerate(document["pictures"]):
        if len(picture["pixels"]) != 2:
            raise UserError(f"{path}: pictures[{i}].pixels must be width and height; {again}")
    whole = {_key(row) for row in requests(document)}
    peaks = {peak["dtype"] for peak in document["peaks"]}
    for i, row in enumerate(document["requests"]):
        if _key(row) not in whole:
            raise UserError(f"{path}: requests[{i}] ({row['model']}) is of a model, an LLM or measurements that it does not hold; {again}")
        if row["dtype"] not in peaks:
            raise UserError(f"{path}: peaks holds no {row['dtype']}, which requests[{i}] is in; {again}")
    if all(row["compiled"] for row in document["requests"]):
        raise UserError(f"{path}: no model was measured uncompiled, as a page compares them; run sparse-vlm bench again")
    return document


def _key(request: Row) -> tuple[object, ...]:
    return tuple(request[name] for name in ("model", "llm", "dtype", "compiled", "batch", "tokens"))


@dataclass(frozen=True)
class Scenario:
    """How a model is used.

    Attributes:
        batch: requests at once.
        answer: tokens of an answer.
    """

    llm: str
    dtype: str
    batch: int
    answer: int

    @property
    def answers(self) -> list[int]:
        """The lengths that are shown, the user's among them."""
        return sorted({*ANSWERS, self.answer})


def choose_scenario(document: Row, llm: str | None, dtype: str | None, batch: int | None, answer: int) -> Scenario:
    """The scenario that a user names, the first that was measured for all that they do not name.

    Raises:
        UserError: it was not measured.
    """
    found = {"llm": llm, "dtype": dtype, "batch": batch}
    rows = [row for row in document["requests"] if not row["compiled"]]
    for key, wanted in found.items():
        there = list(dict.fromkeys(row[key] for row in rows))
        if wanted is not None and wanted not in there:
            beside = "".join(f", {name} {found[name]}" for name in list(found)[: list(found).index(key)])
            raise UserError(f"--{key} {wanted}: not measured{beside}; there is {', '.join(map(str, there))}; run sparse-vlm bench with it")
        found[key] = there[0] if wanted is None else wanted
        rows = [row for row in rows if row[key] == found[key]]
    return Scenario(rows[0]["llm"], rows[0]["dtype"], rows[0]["batch"], answer)


@dataclass(frozen=True)
class Record:
    """A model in a scenario.

    Attributes:
        name: what a reader sees: of a VLM its own, of a tower that of what its cost is of.
        series: what models have in common that differ in their number of tokens alone.
        request, model: its rows in the benchmark.
        pieces: milliseconds (median, low, high) of each stage of a batch, by stage; of decode_image and preprocess of one image.
        served: what a server would do, by tokens of an answer.
        answer: tokens of an answer in the scenario.
        quality_name: its name in the evaluation; None where it is not in it.
    """

    name: str
    series: str
    request: Row
    model: Row
    pieces: dict[str, Row]
    served: dict[int, Row]
    answer: int
    quality_name: str | None

    @property
    def cost_name(self) -> str:
        """Its name in the benchmark."""
        return self.model["name"]

    def spread(self, *stages: str) -> tuple[float, float]:
        """Quartiles of the milliseconds that a batch spends in some stages; the sums of the stages' quartiles where there are several."""
        per_batch = [self.request["batch"] if stage in ("decode_image", "preprocess") else 1 for stage in stages]
        pairs = [(n * self.pieces[stage]["low"], n * self.pieces[stage]["high"]) for n, stage in zip(per_batch, stages, strict=True)]
        return sum(low for low, _ in pairs), sum(high for _, high in pairs)

    def first_token_spread(self) -> tuple[float, float]:
        """Quartiles of the milliseconds to the first token."""
        if self.request["ttft_from"] == "measured":
            return self.spread("ttft")
        return self.spread("decode_image", "preprocess", "tower", "projector", "prefill")


def make_records(document: Row, scenario: Scenario, quality: Quality, pairs: Sequence[str]) -> list[Record]:
    """All models that were measured in a scenario, with their names in the evaluation.

    Args:
        pairs: `EVAL=BENCH`, the names of one model in both.

    Raises:
        UserError: a pair of names that are not there or do not fit; or an evaluation that has no model in common with the benchmark.
    """
    rows = [r for r in document["requests"] if (r["llm"], r["dtype"], r["batch"]) == (scenario.llm, scenario.dtype, scenario.batch)]
    measured_of = {row["model"]: row for row in rows if not row["compiled"]}
    models = {model["name"]: model for model in document["models"] if model["name"] in measured_of}
    paired = _paired(quality, models, pairs)
    if quality.models and not paired:
        raise UserError(
            f"no model is in both files: quality of {', '.join(quality.models)}; cost of {', '.join(models)}; "
            "say which belong together, --pair QUALITY=COST"
        )
    settings = document["settings"] | {"answers": scenario.answers}
    served = serving(document | {"settings": settings, "requests": list(measured_of.values())})["rows"]
    llm = next(llm for llm in document["llms"] if (llm["name"], llm["dtype"]) == (scenario.llm, scenario.dtype))
    measured = Measured(document)
    found = [(name, None) for name in models if name not in paired.values()]
    order = {name: number for number, name in enumerate(models)}
    both = sorted([(cost, name) for name, cost in paired.items()] + found, key=lambda pair: order[pair[0]])
    names = [name if name is not None and quality.models[name]["kind"] == "vlm" else cost for cost, name in both]
    short = shorten([name if names.count(name) == 1 else worth or name for name, (_, worth) in zip(names, both, strict=True)])
    family = shorten([_family(quality, models, cost, name) for cost, name in both])
    records = []
    for (cost, name), shown, series in zip(both, short, family, strict=True):
        pieces = pieces_of(measured, llm, models[cost], scenario.batch, compiled=False)
        times = {stage: piece["ms"] for stage, piece in pieces.items() if piece is not None}
        of_model = {row["answer_tokens"]: row for row in served if row["model"] == cost}
        records.append(Record(shown, series, measured_of[cost], models[cost], times, of_model, scenario.answer, name))
    return records


def no_help(document: Row, scenario: Scenario, records: Sequence[Record]) -> list[str]:
    """Where fewer tokens do not help in a scenario, a sentence a model, by the names that a reader sees."""
    rows = list({record.cost_name: record.request | {"model": record.name} for record in records}.values())
    return serving(document | {"settings": document["settings"] | {"answers": scenario.answers}, "requests": rows})["no_help"]


def find_record(records: Sequence[Record], option: str, name: str) -> Record:
    """The record of a name, as either file has it.

    Raises:
        UserError: there is none, or several.
    """
    found = [record for record in records if name in (record.quality_name, record.name)] or [r for r in records if r.cost_name == name]
    names = ", ".join(record.quality_name or record.cost_name for record in found or records)
    if not found:
        raise UserError(f"{option} {name}: not in the benchmark; there are {names}")
    if len(found) > 1:
        raise UserError(f"{option} {name}: stands for {names}; name one of them")
    return found[0]


def shorten(names: Sequence[str]) -> list[str]:
    """Names without the folders that all can do without: as many of a path's last parts as tell it from the others."""
    parts = {name: PurePath(name).parts for name in names}
    taken = dict.fromkeys(parts, 1)
    while True:
        short = {name: "/".join(own[-taken[name] :]) for name, own in parts.items()}
        alike = [name for name in parts if list(short.values()).count(short[name]) > 1 and taken[name] < len(parts[name])]
        if not alike:
            return [short[name] for name in names]
        for name in alike:
            taken[name] += 1


def _family(quality: Quality, models: dict[str, Row], cost: str, name: str | None) -> str:
    return models[cost]["model"] if name is None else quality.models[name]["model"]


def _paired(quality: Quality, models: dict[str, Row], pairs: Iterable[str]) -> dict[str, str]:
    """Name in the benchmark by name in the evaluation."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, cost = pair.partition("=")
        if not equals:
            raise UserError(f"--pair {pair}: write QUALITY=COST, a model's name in --eval and its name in --bench")
        if name not in quality.models:
            raise UserError(f"--pair {pair}: no quality of {name}; there are {', '.join(quality.models) or 'none; give --eval'}")
        if cost not in models:
            raise UserError(f"--pair {pair}: no cost of {cost} in this scenario; there are {', '.join(models)}")
        if name in found:
            raise UserError(f"--pair {pair}: {name} has a pair already, {found[name]}")
        if not _same_tokens(quality.models[name], models[cost]):
            raise UserError(
                f"--pair {pair}: {name} was measured with {quality.models[name]['tokens']} tokens an image, "
                f"{cost} has {models[cost]['tokens']}"
            )
        found[name] = cost
    for name, own in quality.models.items():
        alike = [c for c, model in models.items() if (c == name or model["model"] == own["model"]) and _same_tokens(own, model)]
        if name not in found and alike:
            found[name] = alike[0]
    return found


def _same_tokens(own: Row, model: Row) -> bool:
    """Whether a model was evaluated with the tokens that its cost is of. A tower by itself has those from before they are made fewer, and a
    ViT's CLS may be among them."""
    tower = own["kind"] != "vlm"
    return own["tokens"] == model["tokens"] or (tower and own["tokens"] - model["tower_tokens"] in (0, 1))
