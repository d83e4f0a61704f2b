"""LLaVA's data: json lists or json lines of {"id", "image" (optional), "conversations": [{"from", "value"}]}, as examples.

Source: `preprocess_multimodal` and `preprocess_v1` of LLaVA 1.5 (llava/train/train.py), and what its successors added: several images
a sample, a system turn, and user and assistant for human and gpt. Where LLaVA mends in silence (a leading answer is dropped, a
image without a mark is not shown, a mark is moved to the front), a mistake is an error here, and a mark stays where it stands.

Notable: a file is gone through once and kept as offsets; a sample is read when it is asked for.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_vlm.data.conversations import Example
from sparse_vlm.data.records import Record, read_at, scan
from sparse_vlm.data.source import Source
from sparse_vlm.errors import UserError, printable
from sparse_vlm.images.photos import Photo, file_size
from sparse_vlm.utils.documents import is_encodable
from sparse_vlm.vlm.prompts import IMAGE_TOKEN, Message

# what a turn's "from" may be, and what that is in a chat template
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURN_CHARACTERS = 24  # that a chat template puts around a turn, about
# keys and marks of what successors of LLaVA show beside images, or in another way; a mark stands alone at an end of a turn
OTHER_MEDIA = ("images", "video", "videos", "audio", "audios")
OTHER_MARKS = ("<video>", "<audio>")
WRITTEN = '{"image": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}'

# what can be wrong with a sample, and what to do about it
MISTAKES = {
    "unreadable line": "repair the line or take it out",
    "not a sample": f"write {WRITTEN}",
    "wrong role": "say who speaks as human or gpt (user and assistant will do); system may come first",
    "turns that do not alternate": "human and gpt must take turns: human first, gpt last",
    "image marks": f"write {IMAGE_TOKEN} in a human's turn once for each image of the sample, and nowhere else",
    "mark in an answer": f"take {IMAGE_TOKEN} out of the gpt's or the system's turn; images stand in human turns",
    "other media": f"name one image, or a list of them, under 'image', each with its {IMAGE_TOKEN}; take videos and sound out",
    "broken text": "write the whole character; what cut the text counted in UTF-16",
    "outside the image folder": "put the image under --images, or allow it with --allow-outside",
    "empty answer": "write the answer, or take the question and its answer out",
}


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a sample: a key of `MISTAKES` (or of `data.check.KINDS`), and the case at hand."""

    kind: str
    text: str


def mistakes_of(sample: Any) -> list[Mistake]:
    """Everything that is wrong with a sample, but for its images' files; empty where it is as it must be."""
    if not isinstance(sample, dict):
        return [Mistake("not a sample", f"a {type(sample).__name__}, not an object")]
    turns = sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        return [Mistake("not a sample", "'conversations' is missing" if turns is None else "'conversations' is not a list of turns")]
    images = sample.get("image")
    if not (images is None or isinstance(images, str) or (isinstance(images, list) and all(isinstance(p, str) for p in images))):
        return [Mistake("not a sample", "'image' is neither a path nor a list of paths")]
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            return [Mistake("not a sample", f"turn {number} is not {{'from': ..., 'value': ...}} with two texts")]
    texts = [f"turn {number}" for number, turn in enumerate(turns) if not is_encodable(turn["value"])]
    if broken := texts + [f"the image {name!r}" for name in images_named(sample) if not is_encodable(name)]:
        return [Mistake("broken text", f"{broken[0]} holds half of a character (a surrogate alone)")]
    speakers = [turn["from"] for turn in turns]
    unknown = [(number, speaker) for number, speaker in enumerate(speakers) if speaker not in ROLES]
    if unknown:
        return [Mistake("wrong role", f"turn {number} is from {speaker!r}; known are {', '.join(ROLES)}") for number, speaker in unknown]
    found = _order(speakers)
    roles = [ROLES[speaker] for speaker in speakers]
    for number, (role, turn) in enumerate(zip(roles, turns, strict=True)):
        if role != "user" and IMAGE_TOKEN in turn["value"]:
            found.append(Mistake("mark in an answer", f"turn {number}, from {turn['from']!r}, holds {IMAGE_TOKEN}"))
        mark = next((mark for mark in OTHER_MARKS if turn["value"].strip().startswith(mark) or turn["value"].strip().endswith(mark)), None)
        if role == "user" and mark:
            found.append(Mistake("other media", f"turn {number} shows {mark}, which is not learnt from"))
        if role == "assistant" and not turn["value"].strip():
            found.append(Mistake("empty answer", f"turn {number}, from {turn['from']!r}, is empty"))
    found += [Mistake("other media", f"holds {key!r}, which is not read") for key in OTHER_MEDIA if sample.get(key)]
    marks = sum(turn["value"].count(IMAGE_TOKEN) for role, turn in zip(roles, turns, strict=True) if role == "user")
    shown = len(images_named(sample))
    if marks != shown:
        found.append(Mistake("image marks", f"{marks} {IMAGE_TOKEN} marks for {shown} images"))
    return found


def _order(speakers: Sequence[str]) -> list[Mistake]:
    """Alternating human and gpt turns after an optional system turn, ending with gpt."""
    start = int(ROLES[speakers[0]] == "system")
    for number, speaker in enumerate(speakers[start:], start):
        if ROLES[speaker] != ("user", "assistant")[(number - start) % 2]:
            return [Mistake("turns that do not alternate", f"turn {number} is from {speaker!r}; human and gpt must alternate, human first")]
    if (len(speakers) - start) % 2 or len(speakers) == start:
        return [Mistake("turns that do not alternate", f"turn {len(speakers) - 1}, the last, is from {speakers[-1]!r} and has no answer")]
    return []


def images_named(sample: dict[str, Any]) -> list[str]:
    """Paths of a sample's images in the order of their marks."""
    images = sample.get("image")
    return [] if images is None else [images] if isinstance(images, str) else images


def messages_of(sample: dict[str, Any]) -> tuple[Message, ...]:
    """The conversation of a sample without mistakes; marks stay where they stand."""
    return tuple({"role": ROLES[turn["from"]], "content": _content(turn["value"].strip())} for turn in sample["conversations"])


def _content(text: str) -> list[dict[str, str]]:
    first, *rest = text.split(IMAGE_TOKEN)
    content = [{"type": "text", "text": first}]
    for piece in rest:
        # the template puts what follows an image on a new line
        content += [{"type": "image"}, {"type": "text", "text": piece.lstrip()}]
    return [part for part in content if part["type"] == "image" or part["text"]] or content


def image_in(folder: Path, name: str) -> Photo:
    """An image of the image folder; its size is -1 where there is no such file."""
    file = folder / name
    return Photo(name, file, 0, file_size(file))


class Fence:
    """Says which names leave the image folder: by `..`, as an absolute path, or through a symbolic link.

    Args:
        folder: of the images.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._inside = folder, os.path.realpath(folder)
        self._parents: dict[str, str] = {}

    def left_by(self, name: str) -> bool:
        """Whether a name leaves the folder."""
        try:
            path = os.path.join(self._folder, name)
            parent, base = os.path.split(path)
            if parent not in self._parents:  # images are many and their folders few
                self._parents[parent] = os.path.realpath(parent)
            real = os.path.realpath(path) if base in ("", ".", "..") or os.path.islink(path) else os.path.join(self._parents[parent], base)
            return os.path.commonpath([self._inside, real]) != self._inside
        except (OSError, ValueError):  # a name that no file can have, which is missing
            return False


class LlavaFile(Source):
    """Examples of one LLaVA file, each read when it is asked for.

    Args:
        path: json or jsonl.
        folder: of the images.
        numbers: image to its number in the run; those that are new are added.
        first: the number of the first image of all.
        on_bytes: called with the number of bytes just read.
        on_record: called with each record and the mistakes in it; without it, the first mistake is an error.
        allow_outside: whether images may lie outside `folder`.

    Raises:
        UserError: not such a file, or without `on_record` a sample that is none, named; without samples, too.
    """

    def __init__(
        self,
        path: Path,
        folder: Path | None,
        numbers: dict[str, int],
        first: int = 0,
        on_bytes: Callable[[int], None] = lambda size: None,
        on_record: Callable[[str, Record, list[Mistake]], None] | None = None,
        allow_outside: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.folder = path, folder
        fence = None if allow_outside or folder is None else Fence(folder)
        self._number, self._offset, self._size = array("q"), array("q"), array("l")
        for record in scan(path, on_bytes):
            mistakes = [Mistake("unreadable line", record.error)] if record.error else mistakes_of(record.value)
            name = self._name(record.number, record.value)
            images = [] if mistakes else images_named(record.value)
            if fence:
                outside = [image for image in images if image not in numbers and fence.left_by(image)]
                mistakes += [Mistake("outside the image folder", f"{image!r} leads out of {folder}") for image in outside]
            if on_record:
                on_record(name, record, mistakes)
            elif mistakes:
                raise UserError(f"{name}: {mistakes[0].text}; {MISTAKES[mistakes[0].kind]}")
            if mistakes:
                continue
            if images and folder is None:
                raise UserError(f"{name}: names the image {images[0]}; say where images lie with --images")
            self._number.append(record.number)
            self._offset.append(record.offset)
            self._size.append(record.size)
            turns = record.value["conversations"]
            self.add(
                [numbers.setdefault(image, first + len(numbers)) for image in images],
                sum(len(turn["value"]) + TURN_CHARACTERS for turn in turns),
                (*images, "", *(part for turn in turns for part in (turn["from"], turn["value"]))),
            )
        if not self._offset and not on_record:
            raise UserError(f"{path}: holds no samples")

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        sample = read_at(self.path, self._offset[index], self._size[index])
        name = self._name(self._number[index], sample)
        photos = tuple(image_in(self.folder, name) for name in images_named(sample)) if self.folder else ()
        return Example(name, photos, (messages_of(sample),))

    def _name(self, number: int, sample: Any) -> str:
        known = isinstance(sample, dict) and "id" in sample
        return printable(f"{self.path}:{number} (id {sample['id']})" if known else f"{self.path}:{number}")
