"""A photo and two sentences of which one is true of it: SugarCrepe and VALSE, for towers and for models that answer in words.

Sources: SugarCrepe (Hsieh et al. 2023), VALSE (Parcalabescu et al. 2022, its pairwise ranking accuracy). A tower is right where the true
sentence's embedding is nearer to the photo's; a tie counts against it. A language model has no such embedding: it is right where it would
say the true sentence rather than the other as the photo's caption, by the mean log-likelihood a token (VisualGPTScore, Lin et al. 2023).

Notable: the false sentences of both sets can often be told without the photo, which the controls `no-image` and `wrong-image` show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from sparse_vlm.eval.answers import Question, scored
from sparse_vlm.eval.captions import PROMPT
from sparse_vlm.eval.metrics import cosine, grouped_share
from sparse_vlm.eval.official import by_kind
from sparse_vlm.eval.questions import FILE, InTar
from sparse_vlm.eval.task import Data, ImageTask, Result, VLMTask
from sparse_vlm.images.photos import Photo

if TYPE_CHECKING:
    from sparse_vlm.eval.embedders import Embedder, Features
    from sparse_vlm.vlm import VLM

ENOUGH_VOTES = 2  # of VALSE's three annotators, who say whether a foil is false; pairs with fewer are not counted, as in the paper


def _pairs(data: Data, field: str) -> tuple[list[Photo], list[tuple[int, dict[str, Any]]]]:
    """Photos with pairs, and each pair (`pos`, `neg`, `type`) with its photo's number."""
    photos, records = InTar(field).read(data)
    return photos, [(i, record) for i, record in records if record.get("vote", ENOUGH_VOTES) >= ENOUGH_VOTES]


def _result(photos: list[Photo], pairs: list[tuple[int, dict[str, Any]]], scores: list[tuple[float, float]]) -> Result:
    """The share of pairs whose true sentence has the higher score."""
    hits = [float(true > false) for true, false in scores]
    predictions = [
        {
            "photo": photos[i].key,
            "type": pair["type"],
            "truth": pair["pos"],
            "other": pair["neg"],
            "answer": pair["pos" if hit else "neg"],
            "scores": [round(float(score), 4) for score in of_pair],
        }
        for (i, pair), hit, of_pair in zip(pairs, hits, scores, strict=True)
    ]
    owners = [i for i, _ in pairs]
    details = by_kind("accuracy", hits, owners, [pair["type"] for _, pair in pairs])
    return Result({"accuracy": grouped_share(hits, owners)}, predictions, details=details)


class NearerSentence(ImageTask):
    """For towers: which sentence is nearer to the photo?

    Args:
        field: of a photo's json that holds the pairs.
    """

    files, needs_text = (FILE,), True
    protocol: ClassVar[str] = "the true sentence must be nearer to the photo than the false one; chance is 50 %; each type in the details"

    def __init__(self, field: str) -> None:
        self.field = field

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Compare every pair."""
        photos, pairs = _pairs(data, self.field)
        images = features.images(model, photos)[[i for i, _ in pairs]]
        true, false = (cosine(images, features.texts([pair[side].strip() for _, pair in pairs])) for side in ("pos", "neg"))
        return _result(photos, pairs, list(zip(true, false, strict=True)))


class LikelierCaption(VLMTask):
    """For models that answer in words: which sentence would it rather say?

    Args:
        field: of a photo's json that holds the pairs.
    """

    files = (FILE,)
    protocol: ClassVar[str] = (
        f"'{PROMPT}'; the true sentence must have a higher mean log-likelihood a token than the false one; chance is 50 %; each type in "
        "the details"
    )

    def __init__(self, field: str) -> None:
        self.field = field

    def run(self, model: VLM, control: str, data: Data, on_answers: Callable[[int, int], None]) -> Result:
        """Compare every pair."""
        photos, pairs = _pairs(data, self.field)
        questions = [Question(i, PROMPT, (pair["pos"].strip(), pair["neg"].strip())) for i, pair in pairs]
        likelihoods = scored(model, photos, questions, control, on_answers)
        return _result(photos, pairs, [(true.mean, false.mean) for true, false in likelihoods])
