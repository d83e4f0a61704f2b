"""A photo and two sentences of which one is true of it: SugarCrepe and VALSE, for towers and for models that answer in words.

Sources: SugarCrepe (Hsieh et al. 2023), VALSE (Parcalabescu et al. 2022, its pairwise ranking accuracy). A tower is right where the true
sentence's embedding is nearer to the photo's; a tie counts against it. A language model has no such embedding: it is right where it would
say the true sentence rather than the other as the photo's caption, by the mean log-likelihood a token (VisualGPTScore, Lin et al. 2023).

Notable: the false sentences of both sets can often be recognized without the photo, which the controls `no-image` and `wrong-image` show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sparse_vlm.eval.captions import PROMPT
from sparse_vlm.eval.metrics import cosine
from sparse_vlm.eval.questions import FILE, Item, RecordTask, tar_records
from sparse_vlm.eval.task import Data, ImageTask, Result
from sparse_vlm.images.photos import Photo

if TYPE_CHECKING:
    from sparse_vlm.eval.embedders import Embedder, Features

ENOUGH_VOTES = 2  # of VALSE's three annotators, who say whether a foil is false; pairs with fewer are not counted, as in the paper


class LikelierCaption(RecordTask):
    """VLMs: the sentence with the higher likelihood as a caption.

    Args:
        field: of a photo's json that holds the pairs.
    """

    protocol: ClassVar[str] = (
        f"'{PROMPT}'; the true sentence must have a higher mean log-likelihood a token than the false one; chance is 50 %; each type in "
        "the details"
    )

    def __init__(self, field: str) -> None:
        super().__init__(tar_records(field))

    def item(self, photo: Photo, record: dict[str, Any]) -> Item:
        """A pair; the true sentence is the first choice."""
        about = {"type": record["type"], "truth": record["pos"], "other": record["neg"]}
        choices, foil = (record["pos"].strip(), record["neg"].strip()), record.get("vote", ENOUGH_VOTES) >= ENOUGH_VOTES
        return Item(photo, PROMPT, record, about, record["type"], choices, left_out=not foil)

    def grade(self, item: Item, answer: tuple[float, float]) -> tuple[float, dict[str, Any]]:
        """1 where the true sentence has the higher score."""
        right = answer[0] > answer[1]
        return float(right), {"answer": item.truth["pos" if right else "neg"], "scores": [round(float(score), 4) for score in answer]}


class NearerSentence(ImageTask):
    """Towers: the sentence nearer to the photo.

    Args:
        field: of a photo's json that holds the pairs.
    """

    files, needs_text = (FILE,), True
    protocol: ClassVar[str] = "the true sentence must be nearer to the photo than the false one; chance is 50 %; each type in the details"

    def __init__(self, field: str) -> None:
        self.pairs = LikelierCaption(field)

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Compare every pair."""
        photos, pairs = self.pairs.asked(data)
        pairs = [(number, pair) for number, pair in pairs if not pair.left_out]
        images = features.images(model, photos)[[number for number, _ in pairs]]
        true, false = (cosine(images, features.texts([pair.choices[side] for _, pair in pairs])) for side in (0, 1))
        return self.pairs.result(pairs, list(zip(true, false, strict=True)))
