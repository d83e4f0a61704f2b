"""Questions that captions answer."""

from __future__ import annotations

from sparse_vlm.data.caption_questions import questions_of
from sparse_vlm.data.conversations import MIXTURES, SHORT_ANSWER, examples_of_photos
from sparse_vlm.images.photos import Photo

CAPTIONS = [
    "A Black dog is jumping over a grey wall .",
    "a black dog and a white cat running; the children playing",
    "A red car by a wall, a blue car in front .",
    "A man wearing a black hat during the evening.",
]


def test_what_captions_answer():
    found = questions_of(CAPTIONS, things={"dog", "wall", "car", "cat"}, there={"wall", "dog"})
    assert [(asked.word, asked.sentence) for asked in found["there"]] == [
        ("dog", "There is a dog in the image."),
        ("wall", "There is a wall in the image."),
    ]
    assert [(asked.question, asked.word, asked.sentence) for asked in found["color"]] == [
        ("What color is the cat?", "white", "The cat is white."),
        ("What color is the dog?", "black", "The dog is black."),
        ("What color is the wall?", "gray", "The wall is gray."),
    ], "no car, of which there are two, and no hat, which is not known to be a thing"
    assert [(asked.question, asked.word, asked.sentence) for asked in found["doing"]] == [
        ("What is the cat doing?", "running", "The cat is running."),
        ("What are the children doing?", "playing", "The children are playing."),
        ("What is the dog doing?", "jumping", "The dog is jumping."),
    ]
    assert [(asked.word, asked.sentence) for asked in found["who"]] == [
        ("man", "There is a man in the picture."),
        ("children", "There are children in the picture."),
    ]
    assert found["where"] == found["sport"] == found["handling"] == [], "a hat is not known to be a thing"
    assert questions_of([], things={}, there={"skis", "apple", "bus"})["there"][2].sentence == "There are skis in the image."


def test_places_sports_and_what_hands_hold():
    captions = [
        "A man riding a big wave at the beach.",
        "a woman holding an orange umbrella in an old market",
        "Two men are playing baseball on a baseball field and one is holding a bat",
        "A man riding wave after wave; men holding orange.",
    ]
    found = questions_of(captions, things={"wave", "umbrella", "bat", "orange"}, there=())
    assert [(asked.word, asked.sentence) for asked in found["where"]] == [
        ("beach", "This is at the beach."),
        ("field", "This is on a field."),
        ("market", "This is in a market."),
    ]
    assert [(asked.question, asked.word, asked.sentence) for asked in found["sport"]] == [
        ("What sport is this?", "baseball", "The sport is baseball.")
    ]
    assert [(asked.question, asked.word, asked.sentence) for asked in found["handling"]] == [
        ("What is the man riding?", "wave", "The man is riding a wave."),
        ("What is the woman holding?", "umbrella", "The woman is holding an umbrella."),
    ], "an orange is not asked for, because the word is more often a colour"


def test_they_are_asked_in_the_last_stage(tmp_path):
    info = {"captions": ["A dog is running on grass."] * 5, "qa": [{"q": "Does dog exist in the image?", "a": "Yes."}]}
    others = {"captions": ["A boat at sea."] * 5, "qa": [{"q": "Does dog exist in the image?", "a": "No."}]}
    photos = [Photo(str(i), tmp_path, i, 0, info if i % 2 else others) for i in range(40)]
    answered = {"dog": set(), "boat": set()}
    for example in examples_of_photos(photos, MIXTURES["instruct"]):
        for question, answer, *_ in example.conversations:
            answered["dog" if example.photos[0].info is info else "boat"].add(
                (question["content"][-1]["text"], answer["content"][0]["text"])
            )
    assert (f"What is the dog doing?\n{SHORT_ANSWER}", "running") in answered["dog"]
    assert ("What is the dog doing?", "The dog is running.") in answered["dog"]
    assert (f"What is in the image?\n{SHORT_ANSWER}", "dog") in answered["dog"] - answered["boat"]
    assert ("What is in the image?", "There is a dog in the image.") in answered["dog"] - answered["boat"]
    assert not any(
        turn["content"][-1]["text"].startswith("What")
        for example in examples_of_photos(photos, MIXTURES["read"])
        for conversation in example.conversations
        for turn in conversation
    )
