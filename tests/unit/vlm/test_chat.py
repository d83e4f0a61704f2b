"""The conversation: what a model is told turn by turn, what is kept of a stopped answer, and what a saved conversation holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sparse_vlm.errors import UserError
from sparse_vlm.vlm import Timings
from sparse_vlm.vlm.chat import ChatImage, Conversation


class Stream:
    """A scripted answer; `fail_after` pieces it raises."""

    def __init__(self, pieces: list[str], fail_after: int | None) -> None:
        self.pieces, self.fail_after, self.closed = pieces, fail_after, False
        self.timings = Timings(tower_ms=5.0, prefill_ms=7.0, first_token_ms=13.0, tokens_per_second=10.0)

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            if self.timings.answer_tokens == self.fail_after:
                raise UserError("the conversation is too long")
            self.timings.answer_tokens += 1
            yield piece

    def close(self) -> None:
        self.closed = True


class ScriptedModel:
    """Says the same each time and remembers what it was told."""

    tokens_per_image = 49

    def __init__(self) -> None:
        self.told: list[list[dict]] = []
        self.fail_after: int | None = None

    def stream(self, messages: list[dict], max_new_tokens: int) -> Stream:
        self.told.append(messages)
        self.last = Stream([" A cup", " of", " coffee."], self.fail_after)
        return self.last


def picture(name: str) -> ChatImage:
    return ChatImage(Path(name), Image.new("RGB", (8, 6)), decode_ms=3.0)


def shape(messages: list[dict]) -> list[str]:
    """Messages in a few letters: who, and how many images before the text."""
    return [f"{m['role'][0]}{sum(part['type'] == 'image' for part in m['content'])}:{m['content'][-1]['text']}" for m in messages]


def test_messages_grow_at_their_end():
    model = ScriptedModel()
    conversation = Conversation(model, "tiny-chat", [picture("one.png"), picture("two.png")])
    first = conversation.ask(" What is it? ")
    conversation.add_image(picture("three.png"))
    second = conversation.ask("And this?")
    assert shape(model.told[0]) == ["u2:What is it?"]
    assert shape(model.told[1]) == ["u2:What is it?", "a0:A cup of coffee.", "u1:And this?"]
    assert (first.image_tokens, second.image_tokens) == (98, 147)
    assert (first.ms.decode, second.ms.decode) == (6.0, 3.0)
    assert (first.ms.tower, first.ms.prefill, first.ms.first_token) == (5.0, 7.0, 19.0)


def test_reset_keeps_the_opening_pictures_only():
    model = ScriptedModel()
    conversation = Conversation(model, "tiny-chat", [picture("one.png")])
    conversation.ask("What is it?")
    conversation.add_image(picture("two.png"))
    conversation.reset()
    assert [shown.path.name for shown in conversation.images] == ["one.png"]
    conversation.ask("Once more?")
    assert shape(model.told[-1]) == ["u1:Once more?"]


def test_a_stopped_answer_stays_as_far_as_it_was_read():
    model = ScriptedModel()
    conversation = Conversation(model, "tiny-chat", [picture("one.png")])
    seen: list[str] = []
    answer = conversation.ask("What?", show=seen.append, stop=lambda: len(seen) == 2)
    assert (answer.answer, answer.stopped, answer.answer_tokens) == ("A cup of", True, 2)
    assert seen == ["A cup", " of"] and model.last.closed
    conversation.ask("Go on")
    assert shape(model.told[-1]) == ["u1:What?", "a0:A cup of", "u0:Go on"]


@pytest.mark.parametrize("fail_after", [0, 2])
def test_a_failed_question_leaves_the_conversation_as_it_was(fail_after):
    model = ScriptedModel()
    conversation = Conversation(model, "tiny-chat", [picture("one.png")])
    model.fail_after = fail_after
    with pytest.raises(UserError, match="too long"):
        conversation.ask("What?")
    assert conversation.turns == [] and len(conversation.images) == 1 and model.last.closed
    model.fail_after = None
    conversation.ask("Again?")
    assert shape(model.told[-1]) == ["u1:Again?"]


def test_an_empty_question_is_refused():
    with pytest.raises(UserError, match="question is empty"):
        Conversation(ScriptedModel(), "tiny-chat").ask(" \n")


def test_saved_as_json(tmp_path):
    conversation = Conversation(ScriptedModel(), "tiny-chat", [picture(str(tmp_path / "photos" / "ein Täßchen.png"))])
    conversation.ask("What is it?")
    conversation.ask("Sure?", stop=lambda: True)
    conversation.save(tmp_path / "talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert (saved["format"], saved["model"]) == ("sparse-vlm/chat/1", "tiny-chat")
    assert shape(saved["messages"]) == ["u1:What is it?", "a0:A cup of coffee.", "u0:Sure?", "a0:A cup"]
    assert saved["messages"][0]["content"][0] == {"type": "image", "image": "photos/ein Täßchen.png"}
    assert [saved["messages"][i]["stopped"] for i in (1, 3)] == [False, True]
    assert saved["messages"][1]["ms"].keys() == {"decode", "tower", "prefill", "first_token"}


def test_saved_as_markdown(tmp_path):
    conversation = Conversation(ScriptedModel(), "tiny-chat", [picture(str(tmp_path / "a cup.png"))])
    conversation.ask("What is it?")
    conversation.save(tmp_path / "talk.md")
    assert (tmp_path / "talk.md").read_text(encoding="utf-8") == (
        "# Conversation with tiny-chat\n\n![a cup.png](<a cup.png>)\n\n**You:** What is it?\n\n**tiny-chat:** A cup of coffee.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["talk.md"]


def test_what_cannot_be_saved_is_one_line(tmp_path):
    conversation = Conversation(ScriptedModel(), "tiny-chat", [picture("one.png")])
    with pytest.raises(UserError, match="nothing to save yet"):
        conversation.save(tmp_path / "talk.md")
    conversation.ask("What is it?")
    with pytest.raises(UserError, match=r"talk.txt: save as .json or .md"):
        conversation.save(tmp_path / "talk.txt")
    with pytest.raises(UserError, match="talk.md: cannot write here"):
        conversation.save(tmp_path / "nowhere" / "talk.md")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(UserError, match=r"a\\0b.md: cannot write here \(embedded null byte\)"):
        conversation.save("a\0b.md")
    with pytest.raises(UserError, match="folder.md: cannot write here"):
        conversation.save(tmp_path / "folder.md")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.md"]
