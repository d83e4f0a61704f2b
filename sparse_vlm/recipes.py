"""Recipes: how a tower is bootstrapped from a teacher. A new one is one more entry in `RECIPES`.

A recipe says what the student is made of, which of the teacher's blocks it inherits, which of those are tuned and which stay frozen,
and how long and how fast it learns. Rates are relative to the size of the tensor they change (see `distill.objective.parameter_groups`);
those of RoIs are absolute, and at 5e-4 the RoIs run away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from sparse_vlm.errors import UserError
from sparse_vlm.teacher import TeacherSpec
from sparse_vlm.tower import GlanceConfig, SparseFormerConfig, UnitConfig


@dataclass(frozen=True)
class Recipe:
    """How to make a student of a teacher.

    Attributes:
        summary: one line for people.
        student: the tower's configuration for a given teacher.
        blocks: for each unit of the student, the teacher block that its ATTN and MLP inherit, or None.
        frozen: units whose inherited block is not trained.
        views: views of photos to learn from.
        views_per_photo: distinct views of a photo, cached with the teacher's answers.
        lr: peak learning rate, as a share of a tensor's root mean square a step.
        new_boost: how many times faster new tensors learn than inherited ones.
        lr_rois: absolute peak rate of all that moves points and RoIs.
        dense_weight: weight of the token-by-token term of the objective.
        ema: decay of the averaged weights that become the student.
    """

    summary: str
    student: Callable[[TeacherSpec], SparseFormerConfig]
    blocks: Callable[[TeacherSpec], tuple[int | None, ...]]
    frozen: tuple[int, ...] = ()
    views: int = 40_000
    views_per_photo: int = 2
    batch_size: int = 16
    warmup_steps: int = 200
    lr: float = 2e-3
    new_boost: float = 2.0
    lr_rois: float = 2e-5
    weight_decay: float = 0.05
    dense_weight: float = 0.5
    ema: float = 0.995


def _warm_start(looks: int, pooled: bool) -> Callable[[TeacherSpec], SparseFormerConfig]:
    """49 tokens that begin as the teacher's patch embedding of their cell of a 7 x 7 grid, then all of its blocks; the first `looks` of
    them also look.

    Args:
        pooled: embed patches of the teacher's size and average them over the cell; else scale the cell down to one patch and embed that,
            which is a patch embedding resized to the cell's size.
    """

    def student(spec: TeacherSpec) -> SparseFormerConfig:
        patch = spec.patch_size if pooled else spec.image_size // 7
        units = []
        for index in range(spec.num_blocks):
            before = ("SAMPLING_M",) if index < looks else ()
            after = ("ROI_ADJ",) if index < looks - 1 else ()
            units.append(UnitConfig(spec.width, (*before, "ATTN", "MLP", *after), activation=spec.activation))
        return SparseFormerConfig(
            units=tuple(units),
            num_latent_tokens=49,
            embed_dim=spec.embed_dim,
            image_size=spec.image_size,
            image_mean=spec.image_mean,
            image_std=spec.image_std,
            cls_before_unit=0 if spec.has_cls else None,
            head=spec.head,
            head_bias=spec.head_bias,
            token_init="glance",
            glance=GlanceConfig(patch, spec.image_size // patch, 4 if pooled else 1, spec.norm_pre),
            num_heads=spec.num_heads,
            ln_eps=spec.ln_eps,
        )

    return student


def _elastic(spec: TeacherSpec) -> SparseFormerConfig:
    """The warm start for any number of tokens: each begins as the teacher's embedding of its cell, scaled to one patch of a 49th of the
    picture, and the mean of the teacher's positions there."""
    config = _warm_start(looks=4, pooled=False)(spec)
    return replace(config, budgets=(9, 64), glance=GlanceConfig(spec.image_size // 7, spec.grid, 4, spec.norm_pre, kind="crop"))


def _as_published(name: str) -> Callable[[TeacherSpec], SparseFormerConfig]:
    """A published configuration, with the teacher's own preprocessing, activation and epsilon."""

    def student(spec: TeacherSpec) -> SparseFormerConfig:
        config = SparseFormerConfig.named(name)
        units = [replace(unit, activation=spec.activation) if unit.ops == ("ATTN", "MLP") else unit for unit in config.units]
        return replace(
            config,
            units=tuple(units),
            embed_dim=spec.embed_dim,
            head_bias=spec.head_bias,
            image_size=spec.image_size,
            image_mean=spec.image_mean,
            image_std=spec.image_std,
            ln_eps=spec.ln_eps,
        )

    return student


def _last_two_thirds(spec: TeacherSpec) -> tuple[int | None, ...]:
    """The paper's choice: a focusing unit and one more look take the place of the first third of the teacher's blocks."""
    return (None, None, *range(spec.num_blocks // 3, spec.num_blocks))


def _paper(name: str, summary: str, blocks: int) -> Recipe:
    """The paper's bootstrapping of a teacher of so many blocks: the first third dropped, the second tuned, the last frozen, and the final
    representation alone aligned (figure 2). How long and how fast is ours, for an ImageNet-1k and several GPUs."""
    third = blocks // 3
    return Recipe(
        summary=summary,
        student=_as_published(name),
        blocks=_last_two_thirds,
        frozen=tuple(range(2 + third, 2 + 2 * third)),
        views=12_800_000,
        views_per_photo=10,
        batch_size=1024,
        dense_weight=0.0,
    )


def _all_blocks(spec: TeacherSpec) -> tuple[int | None, ...]:
    return tuple(range(spec.num_blocks))


RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        summary="49 tokens that begin as the teacher's patch embedding of their cell and look four times; all blocks inherited",
        student=_warm_start(looks=4, pooled=False),
        blocks=_all_blocks,
    ),
    "elastic": Recipe(
        summary="as tiny, for any number of tokens from 9 to 64 with the same weights",
        student=_elastic,
        blocks=_all_blocks,
    ),
    "tiny-pool": Recipe(
        summary="as tiny, but tokens begin as the teacher's patch embeddings averaged over their cell",
        student=_warm_start(looks=4, pooled=True),
        blocks=_all_blocks,
    ),
    "control-pool": Recipe(
        summary="control: the teacher's blocks fed with 7 x 7 average-pooled patch embeddings; no looking",
        student=_warm_start(looks=0, pooled=True),
        blocks=_all_blocks,
    ),
    "control-stride32": Recipe(
        summary="control: the teacher's blocks fed with a stride-32 patch embedding (its own, resized); no looking",
        student=_warm_start(looks=0, pooled=False),
        blocks=_all_blocks,
    ),
    "paper-clip-base": _paper("sparseformer_btsp_openai_clip_base", "as in the paper, of a CLIP ViT-B: 49 tokens, 8 of 12 blocks", 12),
    "paper-clip-large": _paper("sparseformer_btsp_openai_clip_large", "as in the paper, of a CLIP ViT-L: 64 tokens, 16 of 24 blocks", 24),
    "paper-augreg-base": _paper("sparseformer_btsp_augreg_base", "as in the paper, of an AugReg ViT-B: 49 tokens, 8 of 12 blocks", 12),
    "paper-augreg-large": _paper("sparseformer_btsp_augreg_large", "as in the paper, of an AugReg ViT-L: 49 tokens, 16 of 24 blocks", 24),
}


def get_recipe(name: str) -> Recipe:
    """A recipe by its exact name.

    Raises:
        UserError: no such recipe; the message lists them.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe is called {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """A recipe with some of its numbers changed.

    Args:
        changes: each `field=number`.

    Raises:
        UserError: no such number in a recipe, or no number.
    """
    numbers = {field.name: int if field.type == "int" else float for field in fields(Recipe) if field.type in ("int", "float")}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in numbers:
            raise UserError(f"--set {change}: a recipe has no number called {name!r}; it has {', '.join(numbers)}")
        try:
            recipe = replace(recipe, **{name: numbers[name](value)})
        except ValueError as error:
            raise UserError(f"--set {change}: {value!r} is not {'a whole number' if numbers[name] is int else 'a number'}") from error
    return recipe
