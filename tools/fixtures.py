"""What the campaigns begin with: images, towers, language models and teachers small enough that reading them takes no time."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # what the tests have of the same kind

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 230), "yellow": (230, 220, 40)}
EVIL = "from pathlib import Path\n\nPath(__file__).with_name('CANARY').touch()\n\n\nclass Evil:\n    pass\n"


def noise(size: tuple[int, int] = (48, 40), seed: int = 0) -> Image.Image:
    """An image of noise, RGB."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to a tar."""
    from sparse_vlm.images.remote import add_member

    add_member(archive, name, data)


def write_photos(path: Path, count: int = 4, info: Callable[[int], dict[str, Any]] = lambda i: {}) -> None:
    """A webdataset tar of plain images with what is known of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            name = list(COLOURS)[i % 4]
            stream = io.BytesIO()
            Image.new("RGB", (24, 20), COLOURS[name]).save(stream, "PNG")
            known = {"label": i % 4, "label_name": name, "captions": [f"a {name} wall", f"a wall in {name}."]}
            add(archive, f"{i:03d}.png", stream.getvalue())
            add(archive, f"{i:03d}.json", json.dumps(known | info(i)).encode())


def asked(i: int) -> dict[str, Any]:
    """Questions about a photo, as the tars of docs/evaluation.md hold them."""
    own, other = list(COLOURS)[i % 4], list(COLOURS)[(i + 1) % 4]
    pair = {"type": "swap", "pos": f"a {own} wall. ", "neg": f"a {other} wall"}
    return {
        "pope": [{"q": f"Is there a {n} wall?", "a": a, "s": "pope_coco_random"} for n, a in ((own, "yes"), (other, "no"))],
        "qa": [{"q": f"Does {own} exist?", "a": "Yes.", "s": "gvt_mci"}, {"q": "How many walls?", "a": "1", "s": "gvt_oc"}],
        "aokvqa": [
            {
                "question": "What colour?",
                "choices": list(COLOURS),
                "correct_choice_idx": i % 4,
                "direct_answers": [own] * 10,
                "difficult_direct_answer": False,
            }
        ],
        "sugarcrepe": [pair],
        "valse": [pair | {"vote": 2}],
        "vsr": [{"statement": f"The {own} wall is left.", "label": 1, "relation": "left of"}],
    }


def write_noise(folder: Path, count: int) -> None:
    """Images of noise, a few of which a bootstrap holds out."""
    from sparse_vlm.images.photos import Photo
    from sparse_vlm.train.batches import held_out

    folder.mkdir()
    names = [f"{i:04d}.png" for i in range(1000)]
    kept = set(held_out([Photo(name, folder, 0, 0) for name in names]))
    names = [names[i] for i in sorted(kept)[:4]] + [name for i, name in enumerate(names) if i not in kept][: count - 4]
    for i, name in enumerate(names):
        noise((28, 28), i).save(folder / name)


def save_tower(folder: Path) -> None:
    """`tower`: of random weights."""
    import tiny_vlm

    tiny_vlm.save_tower(folder / "tower")


def save_llm(folder: Path) -> None:
    """`llm`: a LLaMA of two layers, with a file that must never be run."""
    import tiny_vlm

    tiny_vlm.save_llm(folder / "llm")
    (folder / "llm" / "evil.py").write_text(EVIL)


def save_teacher(folder: Path) -> str:
    """`teacher`: an open_clip folder with a ViT of two blocks and random weights; its name."""
    from tiny_teacher import write_teacher

    return write_teacher(folder / "teacher", image_size=28)
