"""Base classes of tasks: a task declares its files, runs on one model at a time, and returns metrics and predictions.

Notable: to add a task, write one class and enter it in `sparse_vlm.eval.tasks.TASKS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparse_vlm.data.conversations import known_about
from sparse_vlm.errors import UserError
from sparse_vlm.eval.metrics import Metric
from sparse_vlm.images.decode import read_file
from sparse_vlm.images.photos import Photo, PhotoSet
from sparse_vlm.utils.documents import parse_json

if TYPE_CHECKING:
    from sparse_vlm.eval.embedders import Embedder, Features
    from sparse_vlm.vlm import VLM

CONTROLS = {
    "none": "the photo itself",
    "no-image": "the same questions without any image",
    "wrong-image": "another photo of the set in its place",
}
TOWER_CONTROLS = {
    "none": "the tower as it is",
    "no-looks": "the same weights with nothing added by any look",
    "grid": "the same weights on a uniform grid of cells",
    "random": "the same weights on cells that are split at random",
    "teacher": "the same weights on cells that are split where the teacher's own features vary",
    "crop": "the same weights on the centre square of each photo, where the tower sees it whole",
}


@dataclass
class Result:
    """The result of a task on one model.

    Attributes:
        metrics: what a table shows, by name.
        predictions: one record for each answer.
        notes: for readers of the metrics.
        details: further metrics, for the JSON.
        submission: answers in the format of the benchmark's own scoring program; None if they are scored here.
    """

    metrics: dict[str, Metric]
    predictions: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Metric] = field(default_factory=dict)
    submission: dict[str, Any] | None = None


class Data:
    """The photos of the data folder, cut to `limit` a set.

    Args:
        root: the folder that holds `eval/` and `train/`, and benchmarks in folders of their own.
        limit: photos a set, spread evenly over it; all by default.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root, self.limit = root, limit
        self._sets: dict[str, list[Photo]] = {}
        self._made: dict[Hashable, Any] = {}

    def check(self, file: str) -> Path:
        """The path of a file or folder of the data folder.

        Raises:
            UserError: there is none.
        """
        path = self.root / file
        if not path.exists() or (path.suffix == ".tar" and not path.is_file()):
            raise UserError(
                f"{path}: no such file; --data names the folder that holds {Path(file).parts[0]}/, as docs/evaluation.md shows it"
            )
        return path

    def document(self, file: str) -> Any:
        """A parsed json file; read once.

        Raises:
            UserError: no such file, or no json in it.
        """

        def read() -> Any:
            try:
                return parse_json(read_file(self.check(file)), str(self.root / file))
            except OSError as error:
                raise UserError(f"{self.root / file}: not a readable json file ({error})") from None

        return self.once(f"document {file}", read)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made when it is first asked for by this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def everything(self, file: str) -> list[Photo]:
        """The photos of one tar, in its order.

        Raises:
            UserError: no such file.
        """
        if file not in self._sets:
            self._sets[file] = [known_about(photo) for photo in PhotoSet(self.check(file))]
        return self._sets[file]

    def photos(self, file: str, most: int | None = None) -> list[Photo]:
        """The photos of one tar that a task uses: all, `limit` or `most` of them."""
        return self.cut(self.everything(file), most)

    def cut(self, photos: list[Photo], most: int | None = None) -> list[Photo]:
        """At most `limit` (and `most`) of these photos, spread evenly."""
        count = min(limit for limit in (self.limit, most, len(photos)) if limit is not None)
        return [photos[i * len(photos) // count] for i in range(count)]


class Task(ABC):
    """A task.

    Attributes:
        files: what it reads below the data folder.
        protocol: one sentence that says how it is measured.
    """

    files: ClassVar[tuple[str, ...]]
    protocol: ClassVar[str]

    def look_up(self, data: Data) -> None:
        """Make sure that what it reads is there, before any model is loaded; tars of photos are indexed.

        Raises:
            UserError: a file that is not there or cannot be read.
        """
        for file in self.files:
            data.everything(file) if file.endswith(".tar") else data.check(file)


class ImageTask(Task):
    """A task for anything that embeds photos.

    Attributes:
        needs_text: whether it compares photos with words.
        needs_teacher: whether it compares towers with the teacher.
        includes_teacher: whether a task that does is run on the teacher as well, and on ViTs of any embedding width.
    """

    needs_text: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    includes_teacher: ClassVar[bool] = False

    @abstractmethod
    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Measure one model."""


class VLMTask(Task):
    """A task for a model that answers in words; run once for each control."""

    @abstractmethod
    def run(self, model: VLM, control: str, data: Data, on_answers: Callable[[int, int], None]) -> Result:
        """Measure one model under one of `CONTROLS`.

        Args:
            on_answers: called with (answers done, answers in total).
        """


def captions_of(photos: Sequence[Photo], file: str) -> list[list[str]]:
    """The human captions of each photo.

    Raises:
        UserError: a photo about which nothing is written.
    """
    for photo in photos:
        if not photo.info.get("captions"):
            raise UserError(f"{file}: photo {photo.key} has no captions in its json")
    return [photo.info["captions"] for photo in photos]


def classes_of(photos: Sequence[Photo], file: str) -> dict[int, str]:
    """The name of each class by its number, in the order of the numbers.

    Raises:
        UserError: a photo without either.
    """
    found = {}
    for photo, name in zip(photos, labels_of(photos, file), strict=True):
        label = photo.info.get("label")
        if not isinstance(label, int) or isinstance(label, bool):
            raise UserError(f"{file}: photo {photo.key} has no whole number as label in its json")
        found[label] = name
    return dict(sorted(found.items()))


def labels_of(photos: Sequence[Photo], file: str) -> list[str]:
    """The class name of each photo.

    Raises:
        UserError: a photo without one.
    """
    for photo in photos:
        if not photo.info.get("label_name"):
            raise UserError(f"{file}: photo {photo.key} has no label_name in its json")
    return [photo.info["label_name"] for photo in photos]
