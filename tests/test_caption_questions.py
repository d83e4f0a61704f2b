"""Questions that captions answer."""

from __future__ import annotations

from sparse_vlm.data.caption_questions import questions_of
from sparse_vlm.data.talks import MIXES, SHORT_ANSWER, photo_talks
from sparse_vlm.photos import Photo

CAPTIONS = [
    "A Black dog is jumping over a grey wall .",
    "a black dog and a white cat running; the children playing",
    "A red car by a wall, a blue car in front .",
    "A man wearing a black hat during the evening.",
]


def test_what_captions_answer():
    found = questions_of(CAPTIONS, things={"dog", "wall", "car", "cat"}, there={"wall", "dog"})
    assert [thing for _, thing in found["there"]] == ["dog", "wall"]
    assert found["color"] == [
        ("What color is the cat?", "white"),
        ("What color is the dog?", "black"),
        ("What color is the wall?", "gray"),
    ], "no car, of which there are two, and no hat, which is not known to be a thing"
    assert found["doing"] == [
        ("What is the cat doing?", "running"),
        ("What are the children doing?", "playing"),
        ("What is the dog doing?", "jumping"),
    ]


def test_they_are_asked_in_the_last_stage(tmp_path):
    info = {"captions": ["A dog is running on grass."] * 5, "qa": [{"q": "Does dog exist in the image?", "a": "Yes."}]}
    others = {"captions": ["A boat at sea."] * 5, "qa": [{"q": "Does dog exist in the image?", "a": "No."}]}
    photos = [Photo(str(i), tmp_path, i, 0, info if i % 2 else others) for i in range(40)]
    answered = {"dog": set(), "boat": set()}
    for talk in photo_talks(photos, MIXES["instruct"]):
        for question, answer, *_ in talk.conversations:
            text = question["content"][-1]["text"].removesuffix(f"\n{SHORT_ANSWER}")
            answered["dog" if talk.photo.info is info else "boat"].add((text, answer["content"][0]["text"]))
    assert ("What is the dog doing?", "running") in answered["dog"]
    assert ("What is in the image?", "dog") in answered["dog"] - answered["boat"]
    assert not any(
        turn["content"][-1]["text"].startswith("What")
        for talk in photo_talks(photos, MIXES["read"])
        for conversation in talk.conversations
        for turn in conversation
    )
