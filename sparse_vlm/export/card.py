"""What an export says of itself: README.md with the hub's metadata, and LICENSE.md with what is said of every part's licence."""

from __future__ import annotations

import re
from collections.abc import Sequence

from huggingface_hub import ModelCardData

from sparse_vlm.export.exporter import Comparison, Exporter
from sparse_vlm.export.formats import KINDS
from sparse_vlm.export.source import Part, Source

# Licences of the zoo that the hub knows by a name; every other one is its `other`, with our words and LICENSE.md.
HUB_LICENSES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}


def readme(source: Source, name: str, dtype: str, exporter: Exporter, found: Sequence[Comparison]) -> str:
    """The card of an export.

    Args:
        name: of the format.
    """
    own = source.parts[0]
    config = exporter.config
    side = config.image_size
    size = (
        f"an image of {side} x {side} pixels"
        if config.fit == "crop"
        else f"a picture, which is seen whole, at {side} pixels at most a side"
    )
    what = own.entry.summary if own.entry else f"{KINDS[source.kind].capitalize()} made with sparse-vlm"
    lines = [
        "---",
        _metadata(source, name, exporter).to_yaml(),
        "---",
        f"# {source.name}",
        "",
        f"{what}.",
        "",
        f"This folder holds {exporter.holds}: {config.visual_tokens} tokens {size}, weights in {dtype}. "
        f"`sparse-vlm export --format {name}` made it of `{source.name}`.",
        "",
        "```python",
        exporter.example(),
        "```",
        "",
        "## Compared",
        "",
        "Before it was kept it was loaded again and compared with the model that it was made from:",
        "",
        "| output | images at a time | largest difference | largest value |",
        "|---|---:|---:|---:|",
        *[f"| {one.what} | {one.pictures or ''} | {one.difference:.2g} | {one.largest:.3g} |" for one in found],
        "",
        "## Licence",
        "",
        "The parts whose weights are in it ([LICENSE.md](LICENSE.md) has what their cards say):",
        "",
        *[f"* `{part.name}`: {_licence(part)}" for part in source.parts],
    ]
    for part in source.parts:
        if part.card:
            lines += ["", f"## The card of {part.name}", "", _below(part.card)]
    return "\n".join(lines).rstrip() + "\n"


def licence(source: Source) -> str:
    """What is known of the licence of every part, with the words of its card."""
    lines = ["# Licence", ""]
    for part in source.parts:
        lines += [f"## {part.name}", "", f"{_licence(part)[:1].upper()}{_licence(part)[1:]}.", ""]
        for section in ("Licence", "Provenance"):
            if text := _section(part.card or "", section):
                lines += [text, ""]
    return "\n".join(lines).rstrip() + "\n"


def _metadata(source: Source, name: str, exporter: Exporter) -> ModelCardData:
    stated = source.parts[0].entry.license if source.parts[0].entry else None
    known = HUB_LICENSES.get(stated or "")
    bases = [place["repo"] for part in source.parts if part.entry for place in part.entry.sources if place["type"] == "hub"]
    return ModelCardData(
        license=known or ("other" if stated else "unknown"),
        license_name=None if known or not stated else re.sub(r"\W+", "-", stated.lower()),
        license_link=None if known or not stated else "LICENSE.md",
        library_name=exporter.library,
        pipeline_tag=exporter.task,
        base_model=bases or None,
        tags=["sparse-vlm", "sparseformer", *([] if exporter.library else [name])],
    )


def _licence(part: Part) -> str:
    if part.entry:
        return part.entry.license
    return "as its card says" if part.card else "not stated; say what it is before you publish this"


def _section(card: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def _below(card: str) -> str:
    """A card as a section: without its title, and its headings one step down; a comment in a block of code is no heading."""
    lines, code = [], False
    for line in card.strip().splitlines():
        code ^= line.startswith("```")
        if not code and line.startswith("# "):
            continue
        lines.append(f"#{line}" if not code and line.startswith("##") else line)
    return "\n".join(lines).strip()
