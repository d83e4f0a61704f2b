"""What a run trains on and trains: token statistics, parameter groups, one sample with its label mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_vlm.data.samples import Sample, TokenizedDataset, arrange, summarize
from sparse_vlm.train.parts import Group
from sparse_vlm.train.reporter import Reporter
from sparse_vlm.vlm import VLM

SHOWN = 500  # samples that are counted one by one


@dataclass(frozen=True)
class TokenCost:
    """Tokens of samples: those of images, those of text, and those that carry loss; mean and largest of a sample.

    Attributes:
        samples: how many were counted.
        padding: share of padding in a padded batch.
    """

    samples: int
    image: tuple[float, int]
    text: tuple[float, int]
    targets: tuple[float, int]
    padding: float

    @property
    def image_share(self) -> float:
        """Mean share of image tokens in a sample."""
        return self.image[0] / (self.image[0] + self.text[0])

    def lines(self) -> list[str]:
        """As text."""
        parts = {"image": self.image, "text": self.text, "with loss": self.targets}
        each = ", ".join(f"{name} {mean:.1f} (at most {most:,})" for name, (mean, most) in parts.items())
        return [
            f"tokens a sample, mean of {self.samples:,}: {each}",
            f"images are {self.image_share:.0%} of the tokens; padding fills {self.padding:.0%} of a padded batch",
        ]


def token_cost(samples: Sequence[Sample], lengths: Sequence[int], batch_size: int, tokens_per_image: int) -> TokenCost:
    """Count the tokens of samples.

    Args:
        samples: in training order; of many, `SHOWN` evenly spread ones are rendered and counted.
        lengths: (samples,) of their trees in tokens, may be approximate.
        batch_size: samples a step.
    """
    counted = [samples[index] for index in range(0, len(samples), -(-len(samples) // SHOWN))]
    image = [len(sample.photos) * tokens_per_image for sample in counted]
    text = [len(sample.tree) - images for sample, images in zip(counted, image, strict=True)]
    targets = [len(sample.tree.targets) for sample in counted]
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    places = sum(len(batch) * int(max(batch)) for batch in batches)
    padding = 1 - sum(int(length) for length in lengths) / places

    def mean_and_most(numbers: list[int]) -> tuple[float, int]:
        return sum(numbers) / len(numbers), max(numbers)

    return TokenCost(len(counted), mean_and_most(image), mean_and_most(text), mean_and_most(targets), padding)


def describe(samples: TokenizedDataset, groups: Sequence[Group], vlm: VLM, batch_size: int, seed: int, reporter: Reporter) -> None:
    """Report what is in the data, what it costs in tokens, what is trained, and one conversation with its label mask."""
    counted = samples.counts.examples
    about = "" if counted == len(samples) else f", of the text by {counted:,} samples (the others are rendered and checked during training)"
    reporter.message("data: " + ", ".join(f"{number:,} {name}" for name, number in summarize(samples).items()) + about)
    ordered = arrange(samples, batch_size, seed)
    for line in token_cost(ordered, ordered.lengths, batch_size, vlm.tokens_per_image).lines():
        reporter.message(line)
    reporter.table(
        "what is trained",
        ("part", "tensors", "parameters", "learning rate"),
        [
            (group.name, str(len(group.parameters)), f"{group.size:,}", "frozen" if group.lr is None else f"{group.lr:g}")
            for group in groups
        ],
    )
    example = samples.examples[0]
    rendered = vlm.renderer.renderings(example.conversations[-1], example.name)[-1]
    reporter.message(f"one conversation, [[what carries loss]] in brackets ({example.name}):\n{vlm.renderer.describe(rendered)}")
