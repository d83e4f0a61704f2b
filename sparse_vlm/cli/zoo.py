"""`sparse-vlm zoo list|show NAME|pull NAME`: list, describe and download models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparse_vlm.cli.progress import readable
from sparse_vlm.errors import printable
from sparse_vlm.hub import store
from sparse_vlm.hub import zoo as models

zoo = typer.Typer(help="List, show and fetch models.", no_args_is_help=True, add_completion=False)

Name = Annotated[str, typer.Argument(help="A model of the zoo.")]
NameOrFolder = Annotated[str, typer.Argument(help="A model of the zoo, or the folder of a vision-language model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@zoo.command("list", epilog="Example: sparse-vlm zoo list")
def list_models(as_json: AsJson = False) -> None:
    """List all models, one line each."""
    described = [models.describe(model) for model in store.entries().values()]
    if as_json:
        print(json.dumps(described, indent=2))
        return
    rows = [(d["name"], d["kind"], f"{d['bytes'] / 1e6:.1f} MB", "here" if d["folder"] else "to fetch", d["summary"]) for d in described]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))


@zoo.command(epilog="Example: sparse-vlm zoo show tiny")
def show(name: NameOrFolder, as_json: AsJson = False) -> None:
    """Show a model's card, files and sources; of a VLM's folder, how each part is stored."""
    if Path(name).is_dir():
        _show_folder(Path(name), as_json)
        return
    described = models.describe(store.entry(name))
    if as_json:
        print(json.dumps({**described, "card": models.card(name)}, indent=2))
        return
    print(readable(models.card(name).rstrip()))
    print("\n## Files\n")
    for file, spec in described["files"].items():
        print(f"{spec['sha256']}  {spec['size']:>10}  {file}")
    sources = " or ".join(store.describe_source(source) for source in described["sources"])
    print(f"\nlicence: {described['license']}")
    print(f"lies in: {described['folder'] or 'not here yet; ' + f'sparse-vlm zoo pull {name}'}")
    print(f"comes from: {sources or 'sparse-vlm itself'}")
    if described["needs"]:
        print(f"needs: {', '.join(described['needs'])}")


def _show_folder(folder: Path, as_json: bool) -> None:
    parts = models.describe_folder(folder)
    if as_json:
        print(json.dumps(parts, indent=2))
        return
    for part, held in parts.items():
        here = f"; {held['file']}: {held['tensors']} tensors, {held['parameters']:,} parameters" if "file" in held else ""
        print(printable(": ".join(filter(None, (part, held["name"]))) + f" ({held['how']}{here})"))


@zoo.command(epilog="Example: sparse-vlm zoo pull tiny-chat")
def pull(name: Name, as_json: AsJson = False) -> None:
    """Download a model and those it depends on; all files are verified by sha256."""
    folders = models.pull(name)
    if as_json:
        print(json.dumps({key: str(folder) for key, folder in folders.items()}, indent=2))
        return
    for key, folder in folders.items():
        print(printable(f"{key}: {folder}"))
