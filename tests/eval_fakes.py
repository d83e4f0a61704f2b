"""Photos of one colour each, and models that know colours: what tasks are tested on.

A colour stands for a class; a colour-blind model must score worse.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from sparse_vlm.eval import Report, run
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import Inputs, Preprocessor
from sparse_vlm.roi import crop_rois

COLOURS = {"Red": (220, 30, 30), "Green": (30, 200, 40), "Blue": (40, 40, 230), "Yellow": (230, 220, 40), "Grey": (128, 128, 128)}
NAMES = list(COLOURS)


def write_tar(path: Path, photos: list[tuple[str, tuple[int, int, int], dict[str, Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, colour, info in photos:
            stream = io.BytesIO()
            Image.new("RGB", (24, 20), colour).save(stream, "PNG")
            for suffix, data in (("png", stream.getvalue()), ("json", json.dumps(info).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def photos_of(count: int, **extra: Any) -> list[tuple[str, tuple[int, int, int], dict[str, Any]]]:
    """Photos of all colours in turn, each a little different."""
    rows = []
    for i in range(count):
        label = i % len(NAMES)
        colour = tuple(min(255, max(0, c + (i * 7) % 13)) for c in COLOURS[NAMES[label]])
        info = {"label": label, "label_name": NAMES[label], "captions": [f"a {NAMES[label].lower()} photo {i}"] * 2, **extra}
        rows.append((f"photo_{i:03d}", colour, info))
    return rows


def asked(i: int) -> dict[str, Any]:
    """Questions about photo i."""
    name, other = NAMES[i % 5], NAMES[(i + 1) % 5]
    return {
        "pope": [
            {"q": f"Is there a {n.lower()} wall?", "a": a, "s": f"pope_coco_{split}"}
            for split in ("random", "popular")
            for n, a in ((name, "yes"), (other, "no"))
        ],
        "qa": [
            {"q": f"Does {name.lower()} exist?", "a": "Yes.", "s": "gvt_mci"},
            {"q": f"Does {other.lower()} exist?", "a": "No.", "s": "gvt_mci"},
            {"q": "How many walls?", "a": str(1 + i % 5), "s": "gvt_oc"},
        ],
        "aokvqa": [{"question": "What colour?", "choices": NAMES[:4], "correct_choice_idx": i % 5}] if i % 5 < 4 else [],
    }


def embed_colour(colour: np.ndarray) -> np.ndarray:
    return np.concatenate([colour / 255 - 0.45, [0.1]])


class FakeEmbedder:
    """Embeds the mean colour; `blindness` mixes it with what is the same for all photos."""

    kind, width, dtype, tokens, macs, parameters, size = "tower", 4, "float32", 49, 2_000_000, 1_000_000, 32

    def __init__(self, name: str, blindness: float = 0.0) -> None:
        self.name, self.model, self.blindness = name, name, blindness
        self.seen = 0

    def pixels(self, images: Sequence[Image.Image | Photo], size: int | None = None) -> Inputs:
        self.seen += len(images)
        return Preprocessor(size or self.size, (0.0,) * 3, (1 / 255,) * 3)(images)

    def encode(self, inputs: Inputs, region: torch.Tensor | None = None) -> torch.Tensor:
        pixels = inputs.pixels
        if region is not None:
            pixels = crop_rois(pixels, region.unsqueeze(1), self.size).squeeze(1)
        rows = []
        for colour in pixels.mean((2, 3)).numpy():
            red_only = np.array([colour[0], 100.0, 100.0])
            rows.append(embed_colour((1 - self.blindness) * colour + self.blindness * red_only))
        return torch.tensor(np.stack(rows), dtype=torch.float32)


class FakeText:
    """Knows colours by name."""

    name, width = "words", 4

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        colours = []
        for text in texts:
            (name,) = [name for name in NAMES if name.lower() in text]
            assert name not in text, "names are lower-case"
            colours.append(embed_colour(np.array(COLOURS[name], np.float32)))
        return torch.tensor(np.stack(colours), dtype=torch.float32)


class Score(NamedTuple):
    total: float
    mean: float


class FakeVLM:
    """Sees the colour of the photo and nothing else; without a photo it says grey, yes and one."""

    tokens_per_image = 49

    dtype = torch.float32

    class tower:
        class config:
            image_size, image_mean, image_std = 32, (0.5,) * 3, (0.5,) * 3

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def see(self, conversation: list[dict[str, Any]]) -> tuple[str, str]:
        (turn,) = conversation
        *images, text = turn["content"]
        colour = None
        if images:
            pixel = np.asarray(images[0]["image"], float).mean((0, 1))
            colour = min(COLOURS, key=lambda name: float(np.abs(pixel - COLOURS[name]).sum()))
        self.asked.append((text["text"], colour))
        return text["text"], colour or "Grey"

    def generate(self, conversations: list[Any], max_new_tokens: int) -> list[str]:
        found = [self.see(conversation) for conversation in conversations]
        return [f"{1 + NAMES.index(c)} walls." if "How many" in text else f"A {c.lower()} photo." for text, c in found]

    def score(self, conversations: list[Any], answers: list[list[str]]) -> list[list[Score]]:
        rows = []
        for asked_of, choices in zip(conversations, answers, strict=True):
            text, colour = self.see(asked_of)
            truth = colour if "What" in text else ("Yes" if colour.lower() in text else "No")
            rows.append([Score(-1.0 if choice == truth else -2.0, -0.5 if choice == truth else -1.0) for choice in choices])
        return rows


def evaluate(models: Sequence[str], tasks: Sequence[str], data: Path, **options: Any) -> Report:
    """`sparse_vlm.eval.evaluate` of the options of a config and of callbacks."""
    callbacks = {name: options.pop(name) for name in ("on_progress", "on_result") if name in options}
    return run.evaluate(run.EvalConfig(models, tasks, data, **options), **callbacks)
