"""A benchmark's document as tables for people, as Markdown, and as plots of cost against tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from sparse_vlm.bench.summary import Row
from sparse_vlm.errors import printable
from sparse_vlm.tower.visualize import as_label, save_figure
from sparse_vlm.utils.files import write_text


@dataclass(frozen=True)
class Sheet:
    """A table; its first `words` columns hold text, the others numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def _short(value: float) -> str:
    """A number with three digits that say something, and all of those before the point."""
    digits = next((digits for digits, least in ((0, 100), (1, 10), (2, 1), (3, 0.1)) if value >= least), 4)
    return f"{value:,.{digits}f}"


REQUEST_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: r["model"] + (", compiled" if r["compiled"] else ""),
    "tokens": lambda r: str(r["tokens"]),
    "GMACs": lambda r: _short(r["macs"] / 1e9),
    "image, ms": lambda r: _short(r["batch"] * (r["ms"]["decode_image"] + r["ms"]["preprocess"])),
    "tower, ms": lambda r: _short(r["ms"]["tower"]),
    "projector, ms": lambda r: _short(r["ms"]["projector"]),
    "prefill, ms": lambda r: _short(r["ms"]["prefill"]),
    "first token, ms": lambda r: _short(r["ms"]["ttft"]) + ("" if r["ttft_from"] == "measured" else " *"),
    "images/s": lambda r: _short(r["images_per_second"]),
    "answer, tokens/s": lambda r: _short(r["answer_tokens_per_second"]),
    "KV, MB an image": lambda r: _short(r["kv_bytes_per_image"] / 1e6),
    "memory, MB": lambda r: f"{r['peak_bytes'] / 1e6:,.0f}",
}
STAGE_COLUMNS: dict[str, Callable[[Row], str]] = {
    "stage": lambda m: m["stage"] + (", compiled" if m["compiled"] else ""),
    "of": lambda m: m["model"] or "",
    "LLM": lambda m: m["llm"] or "",
    "dtype": lambda m: m["dtype"] or "",
    "batch": lambda m: str(m["batch"]),
    "tokens": lambda m: "" if m["tokens"] is None else str(m["tokens"]),
    "ms [quartiles]": lambda m: f"{_short(m['ms']['median'])} [{_short(m['ms']['low'])}, {_short(m['ms']['high'])}]",
    "GMACs": lambda m: "" if m["macs"] is None else _short(m["macs"] / 1e9),
    "MB moved": lambda m: "" if m["bytes"] is None else _short(m["bytes"] / 1e6),
    "of peak MAC/s": lambda m: "" if m["of_peak"] is None else f"{m['of_peak']['compute']:.0%}",
    "of peak bytes/s": lambda m: "" if m["of_peak"] is None else f"{m['of_peak']['memory']:.0%}",
    "bound by": lambda m: m["bound"] or "",
}
SATURATION_COLUMNS: dict[str, Callable[[Row], str]] = {
    "LLM": lambda s: s["llm"],
    "dtype": lambda s: s["dtype"],
    "model": REQUEST_COLUMNS["model"],
    "tokens": lambda s: str(s["tokens"]),
    "images/s": lambda s: _short(s["images_per_second"]),
    "from a batch of": lambda s: "not reached" if s["images"] is None else str(s["images"]),
    "answer, tokens/s": lambda s: _short(s["answer_tokens_per_second"]),
    "from requests": lambda s: "not reached" if s["requests"] is None else str(s["requests"]),
}
SERVING_COLUMNS: dict[str, Callable[[Row], str]] = {
    "LLM": lambda s: s["llm"],
    "dtype": lambda s: s["dtype"],
    "model": lambda s: s["model"],
    "answer": lambda s: str(s["answer_tokens"]),
    "tokens": lambda s: str(s["tokens"]),
    "requests/s": lambda s: _short(s["requests_per_second"]) if s["fits"] else "does not fit",
    "in batches of": lambda s: str(s["batch"]),
    "at once by memory": lambda s: f"{s['concurrent']:,}",
    "memory, GB": lambda s: f"{s['memory_bytes'] / 1e9:.2f}",
    "answer's share": lambda s: f"{s['shares']['answer']:.0%}",
}


def sheets(document: Row) -> list[Sheet]:
    """All tables: requests by LLM, dtype and batch; the most of each; every measurement; what serving is estimated at."""
    found = []
    keys = dict.fromkeys((r["llm"], r["dtype"], r["batch"]) for r in document["requests"])
    for llm, dtype, batch in keys:
        rows = [r for r in document["requests"] if (r["llm"], r["dtype"], r["batch"]) == (llm, dtype, batch)]
        title = f"{_titled(document, llm, dtype)}, {dtype}, batch of {batch}"
        found.append(Sheet(title, list(REQUEST_COLUMNS), _cells(rows, REQUEST_COLUMNS)))
    if document["saturation"]:
        found.append(Sheet("at saturation", list(SATURATION_COLUMNS), _cells(document["saturation"], SATURATION_COLUMNS), 3))
    found.append(Sheet("every measurement", list(STAGE_COLUMNS), _cells(document["measurements"], STAGE_COLUMNS), 4))
    if document["serving"] and document["serving"]["rows"]:
        found.append(Sheet("serving, estimated", list(SERVING_COLUMNS), _cells(document["serving"]["rows"], SERVING_COLUMNS), 3))
    return found


def _cells(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> list[list[str]]:
    return [[cell(row) for cell in columns.values()] for row in rows]


def _titled(document: Row, name: str, dtype: str) -> str:
    """An LLM with what one must know of it."""
    llm = next(llm for llm in document["llms"] if (llm["name"], llm["dtype"]) == (name, dtype))
    parts = [f"{name} ({llm['summary']}, {llm['parameters'] / 1e6:,.0f} M parameters, {llm['weights']} weights"]
    if llm["measured_layers"] < llm["layers"]:
        parts.append(f"measured block by block: {llm['measured_layers']} of {llm['layers']} layers")
    return "; ".join(parts) + ")"


def notes(document: Row) -> list[str]:
    """Notes for readers of the tables."""
    machine, settings = document["machine"], document["settings"]
    accelerator = f", {machine['accelerator']['name']}" if machine["accelerator"] else ""
    peaks = "; ".join(
        f"{peak['dtype']} {peak['macs_per_second'] / 1e9:,.1f} GMAC/s and {peak['bytes_per_second'] / 1e9:,.1f} GB/s"
        for peak in document["peaks"]
    )
    lines = [
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} threads{accelerator}",
        f"load average when it began: {machine['load_average']}",
        f"this machine's own peaks (matrix product and copy, same threads): {peaks}",
        f"medians of up to {settings['rounds']} repetitions after {settings['warm_up']} warm-ups, models interleaved",
        f"tokens of text beside an image: {settings['prompt_tokens']}",
        "bound by: the peak that a piece comes nearer to, neither where both are below a third; above 100 % of bytes/s it runs from caches",
        "first token: from the encoded image on, in one go; with a star the sum of its pieces' medians",
    ]
    random = [model["name"] for model in document["models"] if model["weights"] == "random"]
    if random:
        lines.append(f"random weights, which take the same time: {', '.join(random)}")
    if settings.get("optimized"):
        lines.append("towers folded for inference on a CPU, ours and ViTs alike")
    if document["state"] != "finished":
        problem = f": {document['problem']}" if document["problem"] else ""
        lines.append(f"this run is not whole: {document['state']}{problem}")
    return lines


def as_tables(document: Row) -> list[Table]:
    """For the terminal."""
    made = []
    for sheet in sheets(document):
        title = Text(printable(sheet.title), style="table.title")
        table = Table(title=title, title_justify="left", pad_edge=False, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, head in enumerate(sheet.heads):
            words = number < sheet.words
            shown = Text(printable(head) if words else printable(head).replace(" ", "\n"))  # names may break, numbers not
            table.add_column(
                shown,
                justify="left" if words else "right",
                vertical="bottom",
                overflow="fold",
                no_wrap=not words,
                min_width=9 if words else None,
            )
        for row in sheet.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        made.append(table)
    return made


def as_markdown(document: Row) -> str:
    """For documents."""
    lines = [f"* {note}" for note in notes(document)]
    for sheet in sheets(document):
        lines += ["", f"## {sheet.title}", "", "| " + " | ".join(sheet.heads) + " |"]
        lines.append("|" + "---|" * sheet.words + "---:|" * (len(sheet.heads) - sheet.words))
        lines += ["| " + " | ".join(row) + " |" for row in sheet.rows]
    if document["serving"]:
        lines += ["", *(f"* assumed: {line}" for line in document["serving"]["assumptions"])]
        lines += [
            "",
            "Where fewer tokens do not help:",
            "",
            *(f"* {line}" for line in document["serving"]["no_help"] or ["nowhere in this run"]),
        ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Panel:
    """What a plot shows of a request.

    Attributes:
        of_tokens: whether it depends on the number of tokens alone, whatever model they come from.
        log: whether costs lie so far apart that their logarithms are shown.
    """

    unit: str
    value: Callable[[Row], float]
    of_tokens: bool = False
    log: bool = True


PANELS: dict[str, Panel] = {
    "keys and values": Panel("MB an image", lambda r: r["kv_bytes_per_image"] / 1e6, of_tokens=True),
    "work to the first token": Panel("GMACs a request", lambda r: r["macs"] / 1e9 / r["batch"]),
    "tower and projector": Panel("ms a batch", lambda r: r["ms"]["tower"] + r["ms"]["projector"]),
    "prefill": Panel("ms a batch", lambda r: r["ms"]["prefill"], of_tokens=True),
    "time to first token": Panel("ms a batch", lambda r: r["ms"]["ttft"]),
    "answer": Panel("tokens/s", lambda r: r["answer_tokens_per_second"], of_tokens=True, log=False),
}


def draw(document: Row, folder: Path) -> list[Path]:
    """Write a plot of cost against tokens for each LLM, dtype and batch; a model of several numbers of tokens is a line."""
    from matplotlib.figure import Figure

    written = []
    eager = [r for r in document["requests"] if not r["compiled"]]
    for key in dict.fromkeys((r["llm"], r["dtype"], r["batch"]) for r in eager):
        rows = [r for r in eager if (r["llm"], r["dtype"], r["batch"]) == key]
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        axes = figure.subplots(2, 3)
        for axis, (title, panel) in zip(axes.flat, PANELS.items(), strict=True):
            if panel.of_tokens:
                axis.plot(*zip(*sorted({row["tokens"]: panel.value(row) for row in rows}.items()), strict=True), color="0.3", marker=".")
            else:
                for number, (name, of_model) in enumerate(_by_model(document, rows).items()):
                    points = sorted((row["tokens"], panel.value(row)) for row in of_model)
                    style = {"marker": "osD^v<>PX*"[number // 10 % 10], "linestyle": "-" if len(points) > 1 else ""}
                    axis.plot(*zip(*points, strict=True), color=f"C{number % 10}", label=as_label(name), **style)
            axis.set(title=title, ylabel=panel.unit, xlabel="tokens an image", xscale="log")
            axis.set_xticks(ticks := sorted({row["tokens"] for row in rows}), [str(tick) for tick in ticks], fontsize=7)
            axis.minorticks_off()
            if panel.log:
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
            axis.grid(alpha=0.3)
        llm, dtype, batch = key
        figure.suptitle(as_label(f"{_titled(document, llm, dtype)}, {dtype}, batch of {batch}"), fontsize=10)
        handles, labels = axes.flat[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=8)
        path = folder / f"cost.{Path(llm).name}.{dtype}.{batch}.png"
        save_figure(figure, path, dpi=110)
        written.append(path)
    return written


def _by_model(document: Row, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one model with its numbers of tokens together."""
    models = {model["name"]: model["model"] for model in document["models"]}
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(models[row["model"]], []).append(row)
    return found


def save(document: Row, folder: Path) -> None:
    """Write the tables in Markdown, and the images."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.md", as_markdown(document))
    draw(document, folder)
