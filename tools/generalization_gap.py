"""How close a student is to its teacher on photos that it learnt from, and on those that were held out: is it short of photos?

    python tools/generalization_gap.py --student tiny --teacher local-dir:build/teacher --data 'photos/*.tar'

Shape legend: N student tokens.

Notable: `--data` must be what the student was bootstrapped from, because photos are held out by a hash of their keys. All are shown as
evaluation sees them, and centred by the teacher's mean over the photos learnt from. Where both are alike, more photos of the same kind
would not help, and more steps or more tokens might.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer
from experiments import as_program

from sparse_vlm.distill.live import LiveTeacher
from sparse_vlm.distill.loss import Distillation
from sparse_vlm.distill.views import ViewSet
from sparse_vlm.errors import UserError
from sparse_vlm.eval.metrics import Metric, mean
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.teachers import load_teacher
from sparse_vlm.tower import SparseFormer
from sparse_vlm.train.batches import Batch, held_out, held_out_batches, live_statistics
from sparse_vlm.utils.devices import native_dtype, own_device, set_cpu_threads
from sparse_vlm.utils.files import write_json

SIDES = {"cosine": "embedding", "token_cosine": "tokens"}


@torch.no_grad()
def closeness(model: Distillation, batches: Sequence[Batch], num_tokens: int | None) -> dict[str, Metric]:
    """Mean centred cosines over photos, by the names of `SIDES`, with 95 % intervals.

    Args:
        num_tokens: N, for a student of several budgets.
    """
    device = model.embed_mean.device
    rows = []
    with torch.autocast(device.type, torch.bfloat16, enabled=native_dtype(device) == torch.bfloat16):
        for batch in batches:
            said = model(**{key: value[None].to(device) for key, value in batch.items()}, num_tokens=num_tokens)
            rows.append([said[key].item() for key in SIDES])
    return {key: mean(values, "") for key, values in zip(SIDES, np.array(rows).T, strict=True)}


def measure(student: str, teacher: str, data: Sequence[str], tokens: Sequence[int | None]) -> list[dict[str, Any]]:
    """One row for each number of tokens and each group of photos.

    Raises:
        UserError: none of the photos is held out, or none is left.
    """
    source = load_teacher(teacher)
    tower = SparseFormer.from_pretrained(student).eval()
    device = own_device()
    views = ViewSet(PhotoSet(data), 1, source.spec.image_size)
    unseen = held_out(views.photos)
    spare = set(unseen)
    seen = [index for index in range(len(views.photos)) if index not in spare]
    if not seen or not unseen:
        raise UserError(f"{len(views.photos)} photos are too few: none is held out, or none is left")
    ask = LiveTeacher(source, None if tower.config.budgets else tower.initial_roi.weight.detach(), device)
    model = Distillation(tower, live_statistics(views, seen, ask), 0.0).to(device)
    groups = {"learnt from": seen, "held out": unseen}
    batches = {name: held_out_batches(views, indices, tower.config.image_size, ask) for name, indices in groups.items()}
    return [
        {"tokens": number or tower.config.num_latent_tokens, "photos": name, **closeness(model, some, number)}
        for number in tokens
        for name, some in batches.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| tokens | photos | how many | {' | '.join(SIDES.values())} |", "|---:|---|---:|---:|---:|"]
    for row in rows:
        cells = [f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]" for metric in (row[key] for key in SIDES)]
        lines.append(f"| {row['tokens']} | {row['photos']} | {row['cosine'].units} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    student: Annotated[str, typer.Option(help="A folder, or a name of the model zoo.")],
    teacher: Annotated[str, typer.Option(help="As of sparse-vlm bootstrap.")],
    data: Annotated[list[str], typer.Option(help="What the student learnt from, as of sparse-vlm bootstrap.")],
    tokens: Annotated[list[int] | None, typer.Option(help="Latent tokens; repeat it. The student's own by default.", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure a student on photos that it learnt from, and on held-out ones."""
    set_cpu_threads(threads)
    rows = measure(student, teacher, data, tokens or [None])
    if as_json:
        write_json("-", [{**row, **{key: row[key].as_json() for key in SIDES}} for row in rows])
    else:
        print(table(rows), end="")


if __name__ == "__main__":
    as_program(main, "gap")
