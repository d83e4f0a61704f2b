"""Recipes: how a tower is bootstrapped from a teacher. A new one is one more entry in `RECIPES`.

A recipe defines the student's architecture, which of the teacher's blocks it inherits, which of those are tuned and which frozen, and the
training schedule. Learning rates are relative to the size of the tensor that they change (see `distill.loss.parameter_groups`); those of
RoIs are absolute, and at 5e-4 the RoIs diverge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from sparse_vlm.errors import UserError
from sparse_vlm.teachers import TeacherSpec
from sparse_vlm.tower import FocusConfig, RoIPatchConfig, SparseFormerConfig, UnitConfig

FINER = 2  # side of the canvas for whole images, in sides of the teacher's images; the smallest cells are an eighth of the coarse ones


@dataclass(frozen=True)
class Recipe:
    """How to make a student from a teacher. Its numbers can be changed (`--set`, `changed`).

    Attributes:
        summary: one line.
        student: the tower's configuration, from the teacher's spec and this recipe.
        blocks: for each unit of the student the teacher block whose attention and MLP it inherits, or None.
        looks: number of sampling and mixing steps; at most one before each block, if they are before blocks.
        points: sampling points of a token in such a step.
        tokens: a single token budget to train for; 0 is the recipe's own.
        dropped: number of the teacher's first blocks that are left out.
        frozen: number of the teacher's last blocks that are inherited and not trained.
        resolution: side of the student's images in pixels; 0 is the teacher's.
        views: number of views to train on; 0 trains nothing.
        views_per_photo: distinct views of a photo, whose teacher outputs are cached; 0 makes a new view every time and computes teacher
            outputs at every step.
        lr: peak learning rate, relative to a tensor's root mean square.
        new_boost: factor on the learning rate of new tensors.
        lr_rois: absolute peak rate of what moves sampling points and RoIs.
        lr_focus: absolute peak rate of the network that places cells.
        dense_weight: weight of the loss' token term.
        whitened: share of the embedding's term that is computed after whitening.
        mixed: share of views that are mixed with another of the batch (mixup); needs `views_per_photo` 0.
        small: share of views that are shrunk on a plain background (`distill.shrink`); for students of several token budgets.
        ema: decay of the moving average of weights, which becomes the student.
    """

    summary: str
    student: Callable[[TeacherSpec, Recipe], SparseFormerConfig]
    blocks: Callable[[TeacherSpec, Recipe], tuple[int | None, ...]]
    looks: int = 4
    points: int = 16
    tokens: int = 0
    dropped: int = 0
    frozen: int = 0
    resolution: int = 0
    views: int = 40_000
    views_per_photo: int = 2
    batch_size: int = 16
    warmup_steps: int = 200
    lr: float = 2e-3
    new_boost: float = 2.0
    lr_rois: float = 2e-5
    lr_focus: float = 2e-3
    weight_decay: float = 0.05
    dense_weight: float = 0.5
    whitened: float = 0.0
    mixed: float = 0.0
    small: float = 0.0
    ema: float = 0.995

    def config(self, spec: TeacherSpec) -> SparseFormerConfig:
        """The student of this teacher.

        Raises:
            UserError: numbers or an architecture that do not fit the teacher.
        """
        if not 0 <= self.dropped < spec.num_blocks or not 0 <= self.frozen <= spec.num_blocks - self.dropped:
            raise UserError(f"dropped={self.dropped}, frozen={self.frozen}: the teacher has {spec.num_blocks} blocks")
        student = self.student(spec, self)
        if self.tokens:
            try:
                student = replace(student.at_budget(self.tokens), budgets=None)
            except ValueError as error:
                raise UserError(f"tokens={self.tokens}: {error}") from error
        if student.fit == "whole" and self.mixed:
            raise UserError("--set mixed: views of different aspect ratios cannot be mixed; leave it at 0 for a recipe of whole images")
        if self.small and student.budgets is None:
            raise UserError("--set small: needs a student of several token budgets; take another recipe")
        if (student.cls_before_unit is None) == spec.has_cls:
            raise UserError(f"teacher {spec.name} has no CLS token, and this recipe's student reads its embedding from one")
        if student.num_heads is None and spec.width != 64 * spec.num_heads:
            raise UserError(f"teacher {spec.name} has attention heads of size {spec.width / spec.num_heads:g}, this recipe's student of 64")
        return replace(
            student,
            embed_dim=spec.embed_dim,
            head=spec.head,
            head_bias=spec.head_bias,
            image_size=self.resolution or spec.image_size * (FINER if student.fit == "whole" else 1),
            image_mean=spec.image_mean,
            image_std=spec.image_std,
            ln_eps=spec.ln_eps,
        )

    def mapping(self, spec: TeacherSpec) -> list[tuple[int | None, bool]]:
        """For each unit of the student the teacher block that it inherits (or None), and whether that is trained."""
        return [(block, block is not None and block < spec.num_blocks - self.frozen) for block in self.blocks(spec, self)]


def _warm_start(pooled: bool) -> Callable[[TeacherSpec, Recipe], SparseFormerConfig]:
    """49 tokens initialized by the teacher's patch embedding of their cell in a 7 x 7 grid, then the teacher's blocks, with sampling and
    mixing before the first of them.

    Args:
        pooled: average the embeddings of the cell's patches; otherwise embed the cell as one patch, with a patch embedding resized to it.
    """

    def student(spec: TeacherSpec, recipe: Recipe) -> SparseFormerConfig:
        patch = spec.patch_size if pooled else spec.image_size // 7
        count = spec.num_blocks - recipe.dropped
        looks = min(recipe.looks, count)
        units = []
        for index in range(count):
            before = ("SAMPLING_M",) if index < looks else ()
            after = ("ROI_ADJ",) if index < looks - 1 else ()
            units.append(UnitConfig(spec.width, (*before, "ATTN", "MLP", *after), activation=spec.activation))
        return SparseFormerConfig(
            units=tuple(units),
            num_latent_tokens=49,
            embed_dim=spec.embed_dim,
            image_mean=spec.image_mean,
            image_std=spec.image_std,
            num_points=recipe.points,
            cls_before_unit=0 if spec.has_cls else None,
            head=spec.head,
            token_init="glance",
            glance=RoIPatchConfig(patch, spec.image_size // patch, 4 if pooled else 1, spec.norm_pre),
            num_heads=spec.num_heads,
        )

    return student


def _elastic(spec: TeacherSpec, recipe: Recipe) -> SparseFormerConfig:
    """The warm start for token budgets from 9 to 64: each token is initialized by the embedding of its cell, scaled to the patch of a 7 x 7
    grid, and the mean of the teacher's position embeddings there."""
    config = _warm_start(pooled=False)(spec, recipe)
    return replace(config, budgets=(9, 64), glance=RoIPatchConfig(spec.image_size // 7, spec.grid, 4, spec.norm_pre, kind="crop"))


def _regular(spec: TeacherSpec, recipe: Recipe) -> SparseFormerConfig:
    """Elastic, on whole images, each on a regular grid of its own aspect."""
    return replace(_elastic(spec, recipe), fit="whole")


def _adaptive(spec: TeacherSpec, recipe: Recipe) -> SparseFormerConfig:
    """Elastic, on whole images, with small cells where there is much to see."""
    return replace(_regular(spec, recipe), focus=FocusConfig())


def _whole(spec: TeacherSpec, recipe: Recipe) -> SparseFormerConfig:
    """The teacher itself as a tower: one token a patch."""
    config = _warm_start(pooled=True)(spec, recipe)
    return replace(config, num_latent_tokens=spec.grid**2, glance=RoIPatchConfig(spec.patch_size, spec.grid, 1, spec.norm_pre))


def _as_published(name: str) -> Callable[[TeacherSpec, Recipe], SparseFormerConfig]:
    """A published configuration, with the teacher's own activation."""

    def student(spec: TeacherSpec, recipe: Recipe) -> SparseFormerConfig:
        config = SparseFormerConfig.named(name)
        first, *others = config.units
        units = [replace(unit, activation=spec.activation) if unit.ops == ("ATTN", "MLP") else unit for unit in others]
        return replace(config, units=(replace(first, repeats=recipe.looks), *units), num_points=recipe.points)

    return student


def _focusing(rois: Literal["grid", "released"]) -> Callable[[TeacherSpec, Recipe], SparseFormerConfig]:
    """The paper's architecture at a small teacher's size: a new focusing unit of width 256, one more sampling unit, then blocks."""

    def student(spec: TeacherSpec, recipe: Recipe) -> SparseFormerConfig:
        cortex = [UnitConfig(spec.width, ("ATTN", "MLP"), activation=spec.activation)] * (spec.num_blocks - recipe.dropped)
        return SparseFormerConfig(
            units=(
                UnitConfig(256, ("SAMPLING_M", "PE_INJECT", "ATTN", "MLP", "ROI_ADJ"), repeats=recipe.looks),
                UnitConfig(spec.width, ("SAMPLING_M", "PE_INJECT")),
                *cortex,
            ),
            num_latent_tokens=48,
            embed_dim=spec.embed_dim,
            image_mean=spec.image_mean,
            image_std=spec.image_std,
            num_points=recipe.points,
            cls_before_unit=2,
            rois_init=rois,
        )

    return student


def _each_block(spec: TeacherSpec, recipe: Recipe) -> tuple[int | None, ...]:
    return tuple(range(recipe.dropped, spec.num_blocks))


def _after_focusing(spec: TeacherSpec, recipe: Recipe) -> tuple[int | None, ...]:
    """A focusing unit and one more sampling unit precede the teacher's blocks."""
    return (None, None, *_each_block(spec, recipe))


def _paper(name: str, summary: str, blocks: int) -> Recipe:
    """The paper's recipe for a teacher of `blocks` blocks: the first third dropped, the second tuned, the last frozen, and only the final
    representation aligned (figure 2). The schedule is ours, for ImageNet-1k and several GPUs."""
    return Recipe(
        summary=summary,
        student=_as_published(name),
        blocks=_after_focusing,
        dropped=blocks // 3,
        frozen=blocks // 3,
        views=12_800_000,
        views_per_photo=0,
        batch_size=1024,
        dense_weight=0.0,
    )


_ELASTIC = Recipe(
    summary="as tiny, for any token budget from 9 to 64 with the same weights",
    student=_elastic,
    blocks=_each_block,
    lr=1.4e-3,
    dense_weight=1.0,
    whitened=0.5,
)
_ADAPTIVE = replace(
    _ELASTIC,
    summary="as elastic, on whole images, with small cells where the teacher's features vary",
    student=_adaptive,
    small=0.25,
)

RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        summary="49 tokens from the teacher's patch embedding of their cell, four sampling and mixing steps; all blocks inherited",
        student=_warm_start(pooled=False),
        blocks=_each_block,
    ),
    "elastic": _ELASTIC,
    "adaptive": _ADAPTIVE,
    "control-grid": replace(_ADAPTIVE, summary="control: as adaptive, on a regular grid of each image's aspect", student=_regular),
    "tiny-pool": Recipe(
        summary="as tiny, but tokens are initialized by patch embeddings averaged over their cell",
        student=_warm_start(pooled=True),
        blocks=_each_block,
    ),
    "tiny-focus": Recipe(
        summary="as in the paper, at tiny's size: a new focusing part and the last two thirds of a small teacher",
        student=_focusing("grid"),
        blocks=_after_focusing,
        dropped=4,
    ),
    "tiny-focus-twins": Recipe(
        summary="as tiny-focus, with the paper's initial RoIs, of which twelve are the same",
        student=_focusing("released"),
        blocks=_after_focusing,
        dropped=4,
    ),
    "control-pool": Recipe(
        summary="control: the teacher's blocks fed with 7 x 7 average-pooled patch embeddings; no sampling",
        student=_warm_start(pooled=True),
        blocks=_each_block,
        looks=0,
    ),
    "control-stride32": Recipe(
        summary="control: the teacher's blocks fed with a stride-32 patch embedding (its own, resized); no sampling",
        student=_warm_start(pooled=False),
        blocks=_each_block,
        looks=0,
    ),
    "vit": Recipe(
        summary="the teacher itself as a tower, one token a patch, for token reduction methods; nothing is trained",
        student=_whole,
        blocks=_each_block,
        looks=0,
        views=0,
    ),
    "paper-clip-base": _paper("sparseformer_btsp_openai_clip_base", "as in the paper, of a CLIP ViT-B: 49 tokens, 8 of 12 blocks", 12),
    "paper-clip-large": _paper("sparseformer_btsp_openai_clip_large", "as in the paper, of a CLIP ViT-L: 64 tokens, 16 of 24 blocks", 24),
    "paper-augreg-base": _paper("sparseformer_btsp_augreg_base", "as in the paper, of an AugReg ViT-B: 49 tokens, 8 of 12 blocks", 12),
    "paper-augreg-large": _paper("sparseformer_btsp_augreg_large", "as in the paper, of an AugReg ViT-L: 49 tokens, 16 of 24 blocks", 24),
}


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UserError: no such recipe; the message lists all.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe is called {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]


def changed(recipe: Recipe, changes: Mapping[str, float] | Sequence[str]) -> Recipe:
    """A recipe with some of its numbers changed.

    Args:
        changes: number by name, or texts `name=number`.

    Raises:
        UserError: no such field, or not a number.
    """
    numbers = {field.name: int if field.type == "int" else float for field in fields(Recipe) if field.type in ("int", "float")}
    for change in [f"{name}={value}" for name, value in changes.items()] if isinstance(changes, Mapping) else changes:
        name, _, value = change.partition("=")
        if name not in numbers:
            raise UserError(f"--set {change}: a recipe has no number called {name!r}; it has {', '.join(numbers)}")
        try:
            recipe = replace(recipe, **{name: numbers[name](value)})
        except ValueError as error:
            raise UserError(f"--set {change}: {value!r} is not {'a whole number' if numbers[name] is int else 'a number'}") from error
    return recipe
