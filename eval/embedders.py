"""Image and text encoders behind one interface: towers, their controls, and teachers.

Shape legend: B batch, P photos, E embedding, T texts.

Notable: weights are converted to bfloat16 where the machine multiplies in it (autocast would convert them anew in every forward pass), and
features of a (model, photos) pair are computed once in a run and shared by all tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.eval.placement import PLACEMENTS, replace_focus
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import Inputs, Preprocessor
from sparse_vlm.roi import crop_rois
from sparse_vlm.teachers import load_teacher, split_tag
from sparse_vlm.teachers.text import TextEncoder
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.cost import count_macs, vit_macs
from sparse_vlm.utils.devices import native_dtype, own_device

BATCH = 32


class Embedder:
    """A model that turns images into embeddings, with its cost.

    Args:
        name: unique in a run.
        model: as the user gave it, and the control; `name` adds the token budget where it was chosen.
        kind: "tower" or "teacher".
        forward: from `Inputs` and a region of each, (B, 4) or None, to embeddings (B, E).
        preprocessor: the preprocessing it was trained with.
        width: of its embeddings (E).
        tokens, macs: of one image.

    Attributes:
        dtype: that it computes in.
        parameters: number of weights.
        size: side of the squares that it was trained on, or of the largest canvas, in pixels (S).
    """

    def __init__(
        self,
        name: str,
        model: str,
        kind: str,
        module: nn.Module,
        forward: Callable[[Inputs, Tensor | None], Tensor],
        preprocessor: Preprocessor,
        width: int,
        tokens: int,
        macs: int,
    ) -> None:
        self.name, self.model, self.kind = name, model, kind
        self.width, self.tokens, self.macs = width, tokens, macs
        self.dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
        self.parameters = sum(p.numel() for p in module.parameters())
        self.module, self.forward = module, forward
        self.preprocessor, self.size = preprocessor, preprocessor.size

    def pixels(self, images: Sequence[Image.Image | Photo], size: int | None = None) -> Inputs:
        """What the module is given of images, or of their files, where and as it computes; S is the model's unless given."""
        weight = next(self.module.parameters())
        prepare = self.preprocessor if size is None else replace(self.preprocessor, size=size)
        return prepare(images).to(weight.device, weight.dtype)

    @torch.inference_mode()
    def encode(self, inputs: Inputs, region: Tensor | None = None) -> Tensor:
        """(B, E) float32 on the CPU, not normalised.

        Args:
            region: (B, 4), relative to the image: what is encoded of each; all of it by default.

        Raises:
            UserError: a tower that cannot begin in a region.
        """
        if region is not None:
            region = region.to(inputs.pixels.device)
        return self.forward(inputs, region).float().cpu()


def budget_name(name: str, num_tokens: int | None) -> str:
    """The name of a model at a token budget; None for its own number."""
    return name if num_tokens is None else f"{name}, {num_tokens} tokens"


def tower_embedder(name: str, control: str = "none", num_tokens: int | None = None, teacher: Embedder | None = None) -> Embedder:
    """A tower from a folder or the zoo.

    Args:
        control: a key of `TOWER_CONTROLS`; what is measured under one is named after it, too.
        num_tokens: latent tokens, for a tower that serves several budgets; it is named after them as well.
        teacher: for the control that places cells by its features.

    Raises:
        UserError: no such tower, a number of tokens that it was not made for, or a control that does not apply to it.
    """
    device = own_device()
    tower = SparseFormer.from_pretrained(name, native_dtype(device), num_tokens).to(device)
    config, model, name = tower.config, name, budget_name(name, num_tokens)
    if control == "crop" and config.fit == "crop":
        raise UserError(f"{name} sees centre squares as it is; leave the control crop out")
    if control == "no-looks":
        if not any("SAMPLING_M" in unit.ops for unit in config.units):
            raise UserError(f"{name} does not sample the image, so no-looks is the tower itself; leave that control out")
        for unit in tower.units():
            unit.ops = tuple(op for op in unit.ops if op != "SAMPLING_M")
    elif control in PLACEMENTS:
        replace_focus(tower, name, control, None if teacher is None else teacher.module)

    def forward(inputs: Inputs, region: Tensor | None) -> Tensor:
        if region is not None and not config.zooms:
            raise UserError(f"{name} cannot begin in a region of an image; measure zoom on a tower that can, as of the recipe elastic")
        return tower(inputs.pixels, region=region, image_sizes=inputs.image_sizes).image_embeds

    embedder = Embedder(
        name if control == "none" else f"{name}, {control}",
        model if control == "none" else f"{model}, {control}",
        "tower",
        tower,
        forward,
        Preprocessor.of(config, "crop" if control == "crop" else None),
        config.embed_dim,
        config.visual_tokens,
        count_macs(config if control != "grid" else replace(config, focus=None)).total,
    )
    tower.optimize_for_inference()  # once its parameters are counted, because packed ones are none
    return embedder


def teacher_embedder(name: str) -> Embedder:
    """A teacher, named as `load_teacher` takes it.

    Raises:
        TeacherError: no such teacher.
    """
    device = own_device()
    teacher = load_teacher(name).to(device, native_dtype(device))
    spec = teacher.spec
    return Embedder(
        name,
        name,
        "teacher",
        teacher,
        lambda inputs, region: teacher(inputs.pixels if region is None else _cut_out(inputs.pixels, region, spec.image_size)).embeds,
        Preprocessor.of(spec),
        spec.embed_dim,
        spec.grid**2 + spec.has_cls,
        vit_macs(spec),
    )


def _cut_out(pixels: Tensor, region: Tensor, size: int) -> Tensor:
    """What lies in each image's region, (B, 3, size, size)."""
    return crop_rois(pixels, region.unsqueeze(1), size).squeeze(1)


class TeacherText:
    """A teacher's own text side, through open_clip.

    Raises:
        UserError: open_clip cannot load it.
    """

    def __init__(self, name: str) -> None:
        import open_clip

        model_name, tag = split_tag(name)
        self.name = name
        try:
            self._model = open_clip.create_model(model_name, pretrained=tag).eval()
            self._tokenizer = open_clip.get_tokenizer(model_name)
        except Exception as error:
            raise UserError(f"the text side of {name}: open_clip could not load it ({error}); name another with --text") from error
        self.width = self.encode(["a"]).shape[1]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """(T, E) float32, not normalised."""
        parts = [self._model.encode_text(self._tokenizer(list(texts[i : i + BATCH]))) for i in range(0, len(texts), BATCH)]
        return torch.cat(parts).float()


TextSide = TextEncoder | TeacherText


def text_side(text: str | None, teacher: str | None) -> TextSide | None:
    """The text side that a run uses: `text` (a folder or zoo name) where given, else the teacher's own."""
    if text is not None:
        return TextEncoder.from_pretrained(text)
    return None if teacher is None else TeacherText(teacher)


class Features:
    """Embeddings of photos and texts, each computed once in a run.

    Args:
        on_photos: called with (what is being embedded, photos done, photos in total).
    """

    def __init__(self, text: TextSide | None, on_photos: Callable[[str, int, int], None]) -> None:
        self.text = text
        self.on_photos = on_photos
        self._images: dict[tuple[str, str], np.ndarray] = {}
        self._texts: dict[str, np.ndarray] = {}

    def images(self, embedder: Embedder, photos: Sequence[Photo]) -> np.ndarray:
        """(P, E) float32, not normalised."""
        key = (embedder.name, hashlib.sha256("\n".join(f"{p.source}:{p.key}" for p in photos).encode()).hexdigest())
        if key not in self._images:
            what = f"{embedder.name}: {photos[0].source.stem}"
            parts = []
            self.on_photos(what, 0, len(photos))
            for start in range(0, len(photos), BATCH):
                batch = photos[start : start + BATCH]
                parts.append(embedder.encode(embedder.pixels(batch)))
                self.on_photos(what, start + len(batch), len(photos))
            self._images[key] = torch.cat(parts).numpy()
        return self._images[key]

    def generated(self, embedder: Embedder, what: str, count: int, make: Callable[[int], Image.Image]) -> np.ndarray:
        """Embed generated images without keeping them: (count, E) float32, not normalised.

        Args:
            what: for progress.
            make: returns the i-th image.
        """
        parts = []
        for start in range(0, count, BATCH):
            images = [make(i) for i in range(start, min(start + BATCH, count))]
            parts.append(embedder.encode(embedder.pixels(images)))
            self.on_photos(what, start + len(images), count)
        return torch.cat(parts).numpy()

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(T, E) float32, not normalised."""
        assert self.text is not None
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            self._texts.update(zip(batch, self.text.encode(batch).numpy(), strict=True))
        return np.stack([self._texts[text] for text in texts])
