"""What bootstrapping costs, before it is begun: multiply-accumulates of a view, and hours at a machine's rate.

    python tools/scaling.py --rate 495 --share 0.4 --photos 3600 --devices 1 --devices 8 --devices 64

Notable: a view costs the teacher's forward pass (once, if its answers are cached) and the student's forward and backward pass. A backward
pass costs one forward pass for the gradients of the activations, from the first trained unit on, and one for those of the trained
weights. A device learns no faster than the CPUs beside it decode photos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from sparse_vlm.distill.recipes import Recipe, get_recipe
from sparse_vlm.teachers.base import TeacherSpec
from sparse_vlm.teachers.published import clip_vit
from sparse_vlm.tower.cost import block_macs, count_macs, vit_macs

IMAGENET_1K = 1_281_167
LAION_400M = 407_332_084


@dataclass(frozen=True)
class Run:
    """A run to be costed.

    Attributes:
        photos: in the set.
        epochs: how often each is learnt from; a new view every time, so that no answer of the teacher serves twice.
    """

    name: str
    recipe: str
    teacher: TeacherSpec
    photos: int
    epochs: int


RUNS = (
    Run("B, ImageNet-1k, 10 epochs", "paper-clip-base", clip_vit("CLIP ViT-B/16", 768, 12, 16, 512), IMAGENET_1K, 10),
    Run("L, ImageNet-1k, 10 epochs", "paper-clip-large", clip_vit("CLIP ViT-L/14", 1024, 24, 14, 768), IMAGENET_1K, 10),
    Run("adaptive, L at 336, 12.8 M views", "adaptive", clip_vit("CLIP ViT-L/14 at 336", 1024, 24, 14, 768, 336), IMAGENET_1K, 10),
    Run("B, LAION-400M, once", "paper-clip-base", clip_vit("CLIP ViT-B/16", 768, 12, 16, 512), LAION_400M, 1),
    Run("L, LAION-400M, once", "paper-clip-large", clip_vit("CLIP ViT-L/14", 1024, 24, 14, 768), LAION_400M, 1),
)


@dataclass(frozen=True)
class ViewCost:
    """MACs of one view."""

    teacher: int
    student: int  # forward and backward


def view_cost(recipe: Recipe, spec: TeacherSpec) -> ViewCost:
    """What a view costs teacher and student.

    Args:
        recipe: whose frozen blocks pass gradients on, and have none of their own.
    """
    config = recipe.config(spec)
    frozen = recipe.frozen * block_macs(config.num_tokens, config.width)
    return ViewCost(vit_macs(spec), 3 * count_macs(config).total - frozen)


def main(
    rate: Annotated[float, typer.Option(help="TMAC/s of one device at its best: an H100 is sold with 495 in bfloat16.")] = 495.0,
    share: Annotated[float, typer.Option(help="Share of it that a run gets.", min=0.01, max=1.0)] = 0.4,
    photos: Annotated[float, typer.Option(help="Views a second that the CPUs beside a device decode and crop.", min=1)] = 3600.0,
    devices: Annotated[list[int] | None, typer.Option(help="How many devices; repeat it.")] = None,
) -> None:
    """Hours of the runs that the paper's recipes ask for, at a given rate. Estimates, not measurements."""
    counts = devices or [1, 8, 64]
    heads = ["run", "views, M", "teacher, GMACs", "student, GMACs", "views/s a device", *(f"hours on {n}" for n in counts)]
    print("| " + " | ".join(heads) + " |\n|---" + "|---:" * (len(heads) - 1) + "|")
    for run in RUNS:
        cost = view_cost(get_recipe(run.recipe), run.teacher)
        views = run.photos * run.epochs
        speed = min(photos, rate * 1e12 * share / (cost.teacher + cost.student))
        hours = [f"{h:,.0f}" if h >= 10 else f"{h:.2g}" for h in (views / speed / n / 3600 for n in counts)]
        print(
            "| "
            + " | ".join(
                [run.name, f"{views / 1e6:.1f}", f"{cost.teacher / 1e9:.2f}", f"{cost.student / 1e9:.2f}", f"{speed:,.0f}", *hours]
            )
            + " |"
        )


if __name__ == "__main__":
    typer.run(main)
