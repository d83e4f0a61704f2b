"""Exporting: write to a temporary folder, load again, compare, and only then let it take its name."""

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
FEWEST_PICTURES = 3  # compared at once


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
        out: the folder to make.
        dtype: of the weights; the format's default for None.
        tokens: latent tokens an image, for a model that serves several budgets.
        images: photos to compare on; made-up images where there are none.
        replace: whether `out` may be an earlier export, which is then replaced.

    Returns:
        What `export.json` in the folder says: model, kind, format, dtype, tokens, versions, files with size and sha256, comparisons.

    Raises:
        UserError: something is wrong with what was asked for, or the export does not say what the model says; nothing is left then, and an
            earlier export stays as it was.
    """
    source = find(model)
    chosen, dtype = choose(name, source.kind, model, source.tower, dtype)
    _check_out(out, replace)
    pictures = [load_image(path) for path in images]

    from sparse_vlm.export.card import licence, readme
    from sparse_vlm.export.exporter import made_up_pictures

    if not pictures:
        pictures = made_up_pictures(FEWEST_PICTURES)
    while len(pictures) < FEWEST_PICTURES:
        pictures.append(pictures[len(pictures) % len(images)])
    exporter = chosen.exporter(source.kind)(source.given, dtype, tokens, pictures)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {out.parent} cannot be made ({error.strerror}); name another folder") from None
    sweep(out.parent)
    with about(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=temporary_prefix(out.name), ignore_cleanup_errors=True) as aside:
        staging = Path(aside) / "export"
        staging.mkdir()
        exporter.write(staging)
        found = exporter.compare(staging)
        if wrong := [one for one in found if not one.agrees]:
            worst = max(wrong, key=lambda one: one.difference)
            raise UserError(
                f"--format {name}: loaded again, it does not say what {model} says: {worst.what} differ by up to {worst.difference:.2g} "
                f"({worst.tolerance:g} is allowed); nothing was kept; torch {version('torch')} may be at fault, try another version"
            )
        write_text(staging / "README.md", readme(source, name, dtype, exporter, found))
        write_text(staging / "LICENSE.md", licence(source))
        described = {
            "format": FORMAT,
            "model": source.name,
            "kind": source.kind,
            "as": name,
            "dtype": dtype,
            "tokens": exporter.config.visual_tokens,
            "image_size": exporter.config.image_size,
            "compared_on": "photos" if images else "made-up pictures",
            "compared": [asdict(one) for one in found],
            "versions": {"sparse-vlm": __version__, **{each: version(each) for each in ("torch", "transformers")}},
            "files": {
                path.relative_to(staging).as_posix(): {"size": path.stat().st_size, "sha256": store.sha256(path)}
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            },
        }
        write_text(staging / DESCRIPTION, json.dumps(described, indent=1) + "\n")
        _check_out(out, replace)  # also what came there meanwhile
        old = Path(aside) / "old"
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
    """Make sure that nothing but an earlier export stands where the new one will.

    Raises:
        UserError: saying what to do.
    """
    if out.is_symlink():
        raise UserError(f"--out {out}: is a link; name the folder itself")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        described = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
        ours = described.get("format") == FORMAT
        written = {name: (spec["size"], spec["sha256"]) for name, spec in described["files"].items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise UserError(f"--out {out}: is there already and is no export of ours; name another folder")
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
