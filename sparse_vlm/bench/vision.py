"""Vision models of a benchmark: towers, ViTs, and what makes a ViT's tokens fewer. A baseline is one more entry in `BASELINES`.

Shape legend: B images, M tokens of the tower, N tokens for the LLM, d width of the tower, D width of the LLM.

Notable: a model is named `TOWER` or `TOWER+KIND`: a tower of the zoo or a folder, a baseline, or a teacher's name; KIND is one of
`sparse_vlm.vlm.projectors`, or a pruner. Baselines are built from their published dimensions with random weights, because time does not
depend on them, as our own class: a ViT is a tower with a token a patch and no sampling, exactly (the recipe `vit`). What is timed ends with
the tokens that a language model is given; the embedding that zero-shot classification reads is left out of times and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sparse_vlm.bench.pruner import PRUNERS
from sparse_vlm.bench.summary import prepared_as
from sparse_vlm.distill.recipes import get_recipe
from sparse_vlm.errors import UserError
from sparse_vlm.hub.store import locate
from sparse_vlm.images.preprocess import Inputs, Preprocessor
from sparse_vlm.teachers import TeacherSpec, is_teacher, load_teacher
from sparse_vlm.teachers.published import clip_vit
from sparse_vlm.tower import SparseFormer, SparseFormerConfig
from sparse_vlm.tower.config import HALF, serves_budgets
from sparse_vlm.tower.cost import Work, count_work, vit_work
from sparse_vlm.vlm.projectors import DEFAULT_TOKENS, MLP, PROJECTORS, make_projector


@dataclass(frozen=True)
class Baseline:
    """A tower of published dimensions.

    Attributes:
        vit: the dimensions, where it is a ViT; `config` is then its form as a tower.
    """

    summary: str
    config: SparseFormerConfig
    vit: TeacherSpec | None = None


# what SigLIP's ViTs have otherwise than CLIP's
SIGLIP = {
    "image_mean": HALF, "image_std": HALF, "activation": "gelu_tanh", "ln_eps": 1e-6, "head": "map", "norm_pre": False, "head_bias": True
}  # fmt: skip


def _vit(summary: str, width: int, blocks: int, patch: int, size: int = 224, embed: int = 512, **changes: Any) -> Baseline:
    spec = replace(clip_vit(summary, width, blocks, patch, embed, size), **changes)
    return Baseline(summary, get_recipe("vit").config(spec), spec)


BASELINES: dict[str, Baseline] = {
    "clip-b32": _vit("CLIP ViT-B/32 at 224 pixels", 768, 12, 32),
    "clip-b16": _vit("CLIP ViT-B/16 at 224 pixels", 768, 12, 16),
    "siglip-b16": _vit("SigLIP ViT-B/16 at 224 pixels", 768, 12, 16, embed=768, **SIGLIP),
    "clip-l14": _vit("CLIP ViT-L/14 at 224 pixels", 1024, 24, 14, embed=768),
    "clip-l14-336": _vit("CLIP ViT-L/14 at 336 pixels, LLaVA-1.5's tower", 1024, 24, 14, 336, 768),
    "vit-s14": _vit("ViT-S/14 at 224 pixels, the shape of tiny's teacher", 384, 12, 14, norm_pre=False, activation="gelu"),
    "vit-s32": _vit("the same blocks on 49 patches, as tiny's tokens are", 384, 12, 32, norm_pre=False, activation="gelu"),
    "sparseformer-b": Baseline(
        "SparseFormer B, bootstrapped of CLIP ViT-B", SparseFormerConfig.named("sparseformer_btsp_openai_clip_base")
    ),
    "sparseformer-l": Baseline(
        "SparseFormer L, bootstrapped of CLIP ViT-L", SparseFormerConfig.named("sparseformer_btsp_openai_clip_large")
    ),
}
PUBLISHED = tuple(BASELINES)
# students of ViT-S/14 for whole images, which differ in where their tokens begin alone
ADAPTIVE = get_recipe("adaptive").config(BASELINES["vit-s14"].vit)
BASELINES |= {
    "adaptive-s": Baseline("49 tokens with ViT-S/14's blocks, on cells that a focus places", ADAPTIVE),
    "uniform-s": Baseline("the same on an even grid", replace(ADAPTIVE, focus=None)),
}
REDUCTIONS = (*PROJECTORS, *PRUNERS)
BOX = ("tiny", *PUBLISHED, *(f"clip-l14+{kind}" for kind in REDUCTIONS))  # what `--rivals` measures


@dataclass
class Vision:
    """A model under test, up to the tokens that its projector is given.

    Attributes:
        name: as it was asked for, with the number of tokens where that was chosen.
        model: as it was asked for.
        tower: what times of the tower alone are filed under; models that differ in their projector share it.
        weights: `trained` or `random`.
        module: which holds all weights, those of towers alike shared between models.
        encoder: pixels (B, 3, S, S), and the sizes of whole images (B, 2), to tokens (B, M, d), or already (B, N, d) of a pruner.
        reduction: `mlp`, or the kind of projector or pruner that makes tokens fewer.
        tokens_in, tokens: M and N.
        width: d.
        preprocessor: what its pixels are made by.
        work: what `encoder` does for an image; of one that sees whole images, for an image that fills its canvas.
        compiled: `encoder` compiled, once it was asked for.
    """

    name: str
    model: str
    tower: str
    summary: str
    weights: str
    module: nn.Module
    encoder: Callable[..., Tensor]
    reduction: str
    tokens_in: int
    tokens: int
    width: int
    preprocessor: Preprocessor
    work: Work
    compiled: dict[str, Callable[..., Tensor]] = field(default_factory=dict, repr=False)

    @property
    def prunes(self) -> bool:
        """Whether tokens become fewer before the projector."""
        return self.reduction in PRUNERS

    @property
    def size(self) -> int:
        """Side of its images in pixels (S)."""
        return self.preprocessor.size

    @property
    def prepared(self) -> str:
        """Key of its preprocessing times; models with the same input share it."""
        return prepared_as(self.size, self.preprocessor.fit)

    def pixels(self, images: Image.Image | Sequence[Image.Image]) -> Inputs:
        """Its input: squares of S x S also for whole images, which is the most that they cost."""
        return self.preprocessor(images, square=True)

    @torch.inference_mode()
    def encode(self, inputs: Tensor | Inputs, compiled: bool = False) -> Tensor:
        """(B, 3, S, S), alone or with sizes, to (B, M, d), of a pruner (B, N, d)."""
        encoder = self._compiled() if compiled else self.encoder
        pixels, sizes = (inputs, None) if isinstance(inputs, Tensor) else inputs
        return encoder(pixels) if sizes is None else encoder(pixels, sizes)

    def optimize(self) -> None:
        """Optimize a tower of ours for inference, in place."""
        if isinstance(self.module, SparseFormer):
            self.module.optimize_for_inference()

    def _compiled(self) -> Callable[..., Tensor]:
        if "encoder" not in self.compiled:
            self.compiled["encoder"] = torch.compile(self.encoder, fullgraph=True, dynamic=False)
        return self.compiled["encoder"]

    def projector(self, llm_width: int) -> nn.Module:
        """From what `encode` returns to (B, N, D); new weights.

        Raises:
            UserError: numbers of tokens that this kind cannot serve.
        """
        if self.reduction in PROJECTORS:
            made = make_projector(self.reduction, self.width, llm_width, self.tokens_in, self.tokens)
        else:
            made = nn.Sequential(nn.Linear(self.width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))
        return made.requires_grad_(False).eval()

    def described(self) -> dict[str, object]:
        """Its entry in the document."""
        return {
            "name": self.name,
            "model": self.model,
            "tower": self.tower,
            "summary": self.summary,
            "weights": self.weights,
            "reduction": self.reduction,
            "tower_tokens": self.tokens_in,
            "tokens": self.tokens,
            "width": self.width,
            "image_size": self.size,
            "fit": self.preprocessor.fit,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "macs": self.work.macs,
        }


def load_visions(names: Sequence[str], tokens: Sequence[int] = ()) -> list[Vision]:
    """Models by name, each in eval mode and float32.

    Args:
        tokens: numbers of tokens (N) to measure, for towers that serve several budgets and for what makes tokens fewer; a tower's own
            number and `DEFAULT_TOKENS` unless given.

    Raises:
        UserError: an unknown name, or a number of tokens that a model cannot serve.
    """
    towers: dict[tuple[str, int | None], Vision] = {}
    visions = []
    for name in names:
        tower_name, kind = _split(name)
        elastic = kind == MLP and _serves_budgets(tower_name)
        for count in (tokens or [DEFAULT_TOKENS]) if kind != MLP else (tokens or [None]) if elastic else [None]:
            key = tower_name, count if elastic else None
            if key not in towers:
                towers[key] = _load_tower(*key)
            visions.append(_vision(name, towers[key], kind, count, bool(tokens)))
    return visions


def _split(name: str) -> tuple[str, str]:
    """`clip-l14+pool` as (tower, kind)."""
    tower, plus, kind = name.rpartition("+")
    if not plus:
        return name, MLP
    if kind not in REDUCTIONS:
        raise UserError(f"--model {name}: {kind} does not make tokens fewer; known are {', '.join(REDUCTIONS)}")
    return tower, kind


def _serves_budgets(name: str) -> bool:
    return name not in BASELINES and not is_teacher(name) and serves_budgets(name)


def _load_tower(name: str, tokens: int | None) -> Vision:
    """A tower with all its tokens."""
    if is_teacher(name):
        teacher = load_teacher(name).float()
        spec, count = teacher.spec, teacher.spec.grid**2
        return Vision(
            *(name, name, name, "a ViT by its own library", "trained"),
            teacher,
            lambda pixels, sizes=None: teacher(pixels).patches,
            *(MLP, count, count, spec.width, Preprocessor.of(spec), vit_work(spec)),
        )
    baseline = BASELINES.get(name)
    if baseline is None:
        _check_name(name)
        tower = SparseFormer.from_pretrained(name, num_tokens=tokens)
    else:
        tower = SparseFormer(baseline.config).eval()
    config = tower.requires_grad_(False).config
    if baseline is not None and baseline.vit is not None:
        work = vit_work(baseline.vit)
    else:
        work = sum((taken for part, taken in count_work(config).items() if part != "head"), Work())

    def encode(pixels: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        for x, _ in tower.run_units(pixels, image_sizes=image_sizes):
            tokens = x
        return tower.norm(tokens)[:, -config.visual_tokens :]

    title = name if tokens is None else f"{name}, {tokens} tokens"
    about = (baseline.summary, "random") if baseline else ("a tower", "trained")
    counts = config.visual_tokens, config.visual_tokens, config.width, Preprocessor.of(config), work
    return Vision(title, name, title, *about, tower, encode, MLP, *counts)


def _check_name(name: str) -> None:
    """Refuse a name that neither the zoo nor this benchmark knows."""
    try:
        locate(name, kind="tower")
    except UserError as error:
        raise UserError(f"--model {error}; baselines are {', '.join(BASELINES)}") from error


def _vision(name: str, tower: Vision, kind: str, count: int | None, chosen: bool) -> Vision:
    """A model of a tower and what makes its tokens fewer."""
    title = f"{name}, {count} tokens" if chosen and count is not None else name
    vision = replace(tower, name=title, model=name, reduction=kind)
    if kind != MLP and count is not None:
        vision.tokens = count
    if kind in PRUNERS:
        if not isinstance(tower.module, SparseFormer):
            raise UserError(f"--model {name}: only a baseline or a tower can be pruned, because a teacher keeps its attention to itself")
        pruner = PRUNERS[kind](tower.module, vision.tokens).eval()
        vision = replace(vision, tower=title, encoder=pruner, work=tower.work + pruner.work(), compiled={})
    with torch.device("meta"):
        vision.projector(64)  # says now what it cannot serve
    return vision


def projector_work(projector: nn.Module, tokens_in: int, width: int) -> Work:
    """What a projector does for an image: MACs as torch counts its matrix products, numbers moved as those of its linear layers and
    convolutions.

    Args:
        projector: from (B, `tokens_in`, `width`); it is run on tensors without values.
    """
    from torch.utils.flop_counter import FlopCounterMode

    ghost = deepcopy(projector).to("meta").float()
    moved = Work()

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += Work(0, sum(p.numel() for p in module.parameters()), inputs[0].numel() + output.numel())

    for module in ghost.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(seen)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(1, tokens_in, width, device="meta"))
    return Work(counter.get_total_flops() // 2, moved.weights, moved.activations)


def count_weights(modules: Iterable[nn.Module]) -> int:
    """Number of all weights, those that are shared counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
