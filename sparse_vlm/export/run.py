"""Exporting: write to a temporary folder, load it again, compare with the model, and only then rename it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from sparse_vlm import __version__
from sparse_vlm.errors import UserError, about
from sparse_vlm.export.formats import choose
from sparse_vlm.export.source import find
from sparse_vlm.hub import store
from sparse_vlm.images.decode import load_image
from sparse_vlm.utils.files import sweep, temporary_prefix, write_text

FORMAT = "sparse-vlm/export/1"
DESCRIPTION = "export.json"
MIN_IMAGES = 3  # of the compared batch


def export(
    model: str,
    name: str,
    out: Path,
    dtype: str | None = None,
    tokens: int | None = None,
    images: Sequence[Path] = (),
    replace: bool = False,
) -> dict[str, Any]:
    """Export a model into a folder.

    Args:
        model: a tower or a VLM: a folder or a zoo name.
        name: of the format, a key of `FORMATS`.
        out: the new folder.
        dtype: of the weights; the format's default for None.
        tokens: token budget, for a model of several.
        images: photos to compare on; synthetic images by default.
        replace: whether to replace an earlier export at `out`.

    Returns:
        The contents of `export.json`: model, kind, format, dtype, tokens, versions, files with size and sha256, comparisons.

    Raises:
        UserError: invalid arguments, or an export whose outputs differ from the model's. Nothing is left then, and an earlier export is
            not changed.
    """
    source = find(model)
    chosen, dtype = choose(name, source.kind, model, source.tower, dtype)
    _check_out(out, replace)
    photos = [load_image(path) for path in images]

    from sparse_vlm.export.card import licence, readme
    from sparse_vlm.export.exporter import synthetic_images

    if not photos:
        photos = synthetic_images(MIN_IMAGES)
    while len(photos) < MIN_IMAGES:
        photos.append(photos[len(photos) % len(images)])
    exporter = chosen.exporter(source.kind)(source.given, dtype, tokens, photos)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {out.parent} cannot be made ({error.strerror}); name another folder") from None
    sweep(out.parent)
    with (
        about(out),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=temporary_prefix(out.name), ignore_cleanup_errors=True) as temporary,
    ):
        staging = Path(temporary) / "export"
        staging.mkdir()
        exporter.write(staging)
        comparisons = exporter.compare(staging)
        if wrong := [one for one in comparisons if not one.agrees]:
            worst = max(wrong, key=lambda one: one.difference)
            raise UserError(
                f"--format {name}: the export differs from {model}: {worst.what} differ by up to {worst.difference:.2g} "
                f"({worst.tolerance:g} is allowed); nothing was kept; torch {version('torch')} may be at fault, try another version"
            )
        write_text(staging / "README.md", readme(source, name, dtype, exporter, comparisons))
        write_text(staging / "LICENSE.md", licence(source))
        described = {
            "format": FORMAT,
            "model": source.name,
            "kind": source.kind,
            "as": name,
            "dtype": dtype,
            "tokens": exporter.config.visual_tokens,
            "image_size": exporter.config.image_size,
            "compared_on": "photos" if images else "synthetic images",
            "compared": [asdict(one) for one in comparisons],
            "versions": {"sparse-vlm": __version__, **{each: version(each) for each in ("torch", "transformers")}},
            "files": {
                path.relative_to(staging).as_posix(): {"size": path.stat().st_size, "sha256": store.sha256(path)}
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            },
        }
        write_text(staging / DESCRIPTION, json.dumps(described, indent=1) + "\n")
        _check_out(out, replace)  # again: it may have changed meanwhile
        old = Path(temporary) / "old"
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(staging, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    return described


def _check_out(out: Path, replace: bool) -> None:
    """Check that `out` is free, empty or an earlier export.

    Raises:
        UserError: it is something else, or an export without `replace`.
    """
    if out.is_symlink():
        raise UserError(f"--out {out}: is a link; name the folder itself")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        described = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
        is_export = described.get("format") == FORMAT
        written = {name: (spec["size"], spec["sha256"]) for name, spec in described["files"].items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        is_export = False
    if not is_export:
        raise UserError(f"--out {out}: exists and is no export of sparse-vlm; name another folder")
    folders = {parent.as_posix() for name in written for parent in PurePosixPath(name).parents}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name == DESCRIPTION or (name in folders and path.is_dir() and not path.is_symlink()):
            continue
        if name not in written or path.is_symlink() or not path.is_file():
            raise UserError(f"--out {out}: holds {name}, which no export wrote; move it away or name another folder")
        if (path.stat().st_size, store.sha256(path)) != written[name]:
            raise UserError(f"--out {out}: {name} is not what the export wrote; move it away or name another folder")
    if not replace:
        raise UserError(f"--out {out}: holds an export of {described.get('model')} already; add --replace, or name another folder")
