"""`python -m sparse_vlm.bench.packing --data 'photos/*.tar'`: training steps of an LLM on padded and on packed batches, in turn.

Notable: batches are those that `sparse-vlm train` makes of the same data, and a step is its forward and backward pass without the
optimizer, which both share. Pictures are noise of the right size, because a time does not depend on them: the tower takes no part.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sparse_vlm.bench.turns import FEWEST, Piece, take_turns
from sparse_vlm.data.corpus import files_of, photos_of, read_corpus
from sparse_vlm.data.samples import SampleSet, arrange, build_samples
from sparse_vlm.data.talks import MIXES
from sparse_vlm.devices import own_device
from sparse_vlm.errors import UserError
from sparse_vlm.train.cost import token_cost
from sparse_vlm.train.learner import Gather, Learner
from sparse_vlm.train.parts import choose_attention, computes_in_bfloat16, prepare
from sparse_vlm.train.rows import as_program
from sparse_vlm.train.vlm import STAGES
from sparse_vlm.vlm import VLM

RANK = 32  # of the adapters, as `sparse-vlm train` gives them
PADDED = {"cpu": "eager", "cuda": "sdpa"}  # how the same device attends to padded batches


@dataclass(frozen=True)
class Packing:
    """What padding costs.

    Attributes:
        padding: share of a padded batch's places that hold nothing, over all of the data.
        tokens: of the measured steps, without padding.
        padded_s, packed_s: seconds of those steps, medians.
        ratio, low, high: median and quartiles of packed seconds by padded ones in one round.
    """

    samples: int
    padding: float
    tokens: int
    padded_s: float
    packed_s: float
    ratio: float
    low: float
    high: float

    def line(self) -> str:
        """For people."""
        padded, packed = (self.tokens / seconds for seconds in (self.padded_s, self.packed_s))
        return (
            f"padding fills {self.padding:.1%} of a padded batch ({self.samples:,} samples); tokens/s padded {padded:,.0f}, packed "
            f"{packed:,.0f}; seconds packed by padded {self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.tokens:,} tokens"
        )


def packing(vlm: VLM, samples: SampleSet, batch_size: int, batches: int, rounds: int) -> Packing:
    """Time both kinds of steps in turn.

    Args:
        vlm: from `prepare`.
        samples: arranged.
        batches: that a turn goes through, spread evenly over the samples.

    Raises:
        UserError: fewer samples than those batches, or an LLM that is not given packed rows on this device.
    """
    language, device = vlm.model.model.language_model, vlm.model.device
    whole = len(samples) // batch_size
    if whole < batches:
        raise UserError(f"{len(samples):,} samples are {whole} batches of {batch_size}; {batches} are needed")
    begin = [i * whole // batches * batch_size for i in range(batches)]
    chosen = [[samples[start + i] for i in range(batch_size)] for start in begin]
    shape = vlm.tower.config.visual_tokens, vlm.tower.config.width
    items = [[(sample, torch.randn(len(sample.photos), *shape) if sample.photos else None) for sample in batch] for batch in chosen]
    choose_attention(vlm)
    packed = language.config._attn_implementation
    pieces = {}
    for attention in (PADDED[device.type], packed):
        language.set_attn_implementation(attention)
        gather, learner = Gather(vlm), Learner(vlm).train()
        made = [{name: value for name, value in gather(batch).items() if name != "names"} for batch in items]
        if attention == packed and not all(batch["trees"].lengths for batch in made):
            raise UserError("nothing to compare: this LLM is trained on padded batches here (docs/attention.md says when)")

        def steps(_: Any, attention: str = attention, learner: Learner = learner, made: list[dict[str, Any]] = made) -> None:
            language.config._attn_implementation = attention
            for batch in made:
                on_device = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(vlm)):
                    loss = learner(**on_device)["loss"]
                loss.backward()
                learner.zero_grad(set_to_none=True)

        pieces[attention] = Piece("step", [(steps, 1.0)])
    take_turns(list(pieces.values()), device, rounds, limit_s=float("inf"))
    slow, fast = (piece.seconds for piece in pieces.values())
    low, ratio, high = statistics.quantiles([mine / other for mine, other in zip(fast, slow, strict=True)], n=4)
    return Packing(
        samples=len(samples),
        padding=token_cost(samples, samples.lengths, batch_size, vlm.tokens_per_image).padding,
        tokens=sum(len(sample.tree) for batch in chosen for sample in batch),
        padded_s=statistics.median(slow),
        packed_s=statistics.median(fast),
        ratio=ratio,
        low=low,
        high=high,
    )


def main(
    data: Annotated[list[str], typer.Option(help="As `sparse-vlm train` takes it: tars, or LLaVA's json; repeat it.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures that a LLaVA json names; they are not read.")] = None,
    model: Annotated[str, typer.Option(help="A VLM: a folder or zoo name.")] = "tiny-chat",
    stage: Annotated[str, typer.Option(help="Whose mix of captions and questions: read, align or instruct.")] = "instruct",
    batch_size: Annotated[int, typer.Option(help="Samples a step.", min=1)] = 16,
    samples: Annotated[int, typer.Option(help="Learn from so many at most, drawn at random.", min=1)] = 640,
    batches: Annotated[int, typer.Option(help="Steps a turn.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each after the warm-up, of which the median counts.", min=FEWEST)] = FEWEST,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores unless given.", min=1)] = None,
) -> None:
    """What padding costs a training step on this machine."""
    if stage not in MIXES:
        raise UserError(f"--stage {stage}: no such stage; known are {', '.join(MIXES)}")
    if threads:
        torch.set_num_threads(threads)
    vlm = VLM.from_pretrained(model, own_device(), fold=False)
    corpus = read_corpus(files_of(data), photos_of(data), images, MIXES[stage])
    if samples < len(corpus):
        corpus = corpus.select(random.Random(0).sample(range(len(corpus)), samples))
    prepare(vlm, STAGES["instruct"], RANK)
    print(packing(vlm, arrange(build_samples(corpus, vlm.renderer), batch_size), batch_size, batches, rounds).line())


if __name__ == "__main__":
    as_program(main, "packing")
