"""What the data costs in tokens, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_vlm.data.samples import Sample

SHOWN = 500  # samples that are counted one by one


@dataclass(frozen=True)
class TokenCost:
    """Tokens of samples: those of images, those of text, and those that carry loss; mean and largest of a sample.

    Attributes:
        samples: that were counted.
        padding: share of a batch's places that hold nothing, where it is padded.
    """

    samples: int
    image: tuple[float, int]
    text: tuple[float, int]
    targets: tuple[float, int]
    padding: float

    @property
    def image_share(self) -> float:
        """Of a sample's tokens those of images, on average."""
        return self.image[0] / (self.image[0] + self.text[0])

    def lines(self) -> list[str]:
        """For people."""
        parts = {"image": self.image, "text": self.text, "with loss": self.targets}
        each = ", ".join(f"{name} {mean:.1f} (at most {most:,})" for name, (mean, most) in parts.items())
        return [
            f"tokens a sample, mean of {self.samples:,}: {each}",
            f"images are {self.image_share:.0%} of the tokens; padding fills {self.padding:.0%} of a padded batch",
        ]


def token_cost(samples: Sequence[Sample], lengths: Sequence[int], batch_size: int, tokens_per_image: int) -> TokenCost:
    """Count what a run learns from.

    Args:
        samples: in the order in which they are learnt from; of many, some evenly spread over all are rendered and counted.
        lengths: (samples,) of their trees in tokens, at least about.
        batch_size: samples a step.
    """
    counted = [samples[index] for index in range(0, len(samples), -(-len(samples) // SHOWN))]
    image = [len(sample.photos) * tokens_per_image for sample in counted]
    text = [len(sample.tree) - pictures for sample, pictures in zip(counted, image, strict=True)]
    targets = [len(sample.tree.targets) for sample in counted]
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    places = sum(len(batch) * int(max(batch)) for batch in batches)
    padding = 1 - sum(int(length) for length in lengths) / places

    def mean_and_most(numbers: list[int]) -> tuple[float, int]:
        return sum(numbers) / len(numbers), max(numbers)

    return TokenCost(len(counted), mean_and_most(image), mean_and_most(text), mean_and_most(targets), padding)
