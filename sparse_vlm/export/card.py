"""README.md of an export, with the hub's metadata, and LICENSE.md with the licences of its parts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from huggingface_hub import ModelCardData

from sparse_vlm.export.exporter import Comparison, Exporter
from sparse_vlm.export.formats import KINDS
from sparse_vlm.export.source import Part, Source

# the hub's names of licences; all others are `other`, with LICENSE.md
HUB_LICENSES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}


def readme(source: Source, name: str, dtype: str, exporter: Exporter, comparisons: Sequence[Comparison]) -> str:
    """README.md of an export.

    Args:
        name: of the format.
    """
    own = source.parts[0]
    config = exporter.config
    side = config.image_size
    size = f"an image of {side} x {side} pixels" if config.fit == "crop" else f"an image of any aspect, at most {side} pixels a side"
    what = own.entry.summary if own.entry else f"{KINDS[source.kind].capitalize()} made with sparse-vlm"
    lines = [
        "---",
        _metadata(source, name, exporter).to_yaml(),
        "---",
        f"# {source.name}",
        "",
        f"{what}.",
        "",
        f"This folder holds {exporter.holds}: {config.visual_tokens} tokens for {size}, weights in {dtype}. "
        f"`sparse-vlm export --format {name}` created it from `{source.name}`.",
        "",
        "```python",
        exporter.example(),
        "```",
        "",
        "## Compared",
        "",
        "The export was loaded again and compared with its model:",
        "",
        "| output | images at a time | largest difference | largest value |",
        "|---|---:|---:|---:|",
        *[f"| {one.what} | {one.pictures or ''} | {one.difference:.2g} | {one.largest:.3g} |" for one in comparisons],
        "",
        "## Licence",
        "",
        "Licences of the parts ([LICENSE.md](LICENSE.md) quotes their cards):",
        "",
        *[f"* `{part.name}`: {_licence(part)}" for part in source.parts],
    ]
    for part in source.parts:
        if part.card:
            lines += ["", f"## The card of {part.name}", "", _nested(part.card)]
    return "\n".join(lines).rstrip() + "\n"


def licence(source: Source) -> str:
    """LICENSE.md: the licence of every part, with the sections of its card."""
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
    return "as its card says" if part.card else "not stated; add it before you publish this"


def _section(card: str, title: str) -> str:
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return match[1].strip() if match else ""


def _nested(card: str) -> str:
    """A card as a section: without its title, its headings one level down; comments in code blocks are not headings."""
    lines, code = [], False
    for line in card.strip().splitlines():
        code ^= line.startswith("```")
        if not code and line.startswith("# "):
            continue
        lines.append(f"#{line}" if not code and line.startswith("##") else line)
    return "\n".join(lines).strip()
