"""The projector learns words from a tower's tokens without the LLM, and hands the LLM vectors that are as long as a word's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from tiny_vlm import picture, save_llm, save_tower

from sparse_vlm.data.conversations import Example
from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.data.samples import build_samples
from sparse_vlm.data.words import words_about
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import Photo
from sparse_vlm.train import vocabulary as learning
from sparse_vlm.train.text_images import WordImages
from sparse_vlm.train.vlm import STAGES, prepare, train
from sparse_vlm.train.vocabulary import pretrain_projector, words_of
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.prompts import assistant, user

COLORS = {"red": (200, 40, 40), "green": (40, 190, 60), "blue": (40, 60, 200)}


class Vocabulary:
    """Knows four words as one token and all others as two."""

    IDS: ClassVar = {" red": 65, " green": 70, " blue": 75, " always": 80}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.IDS[text]] if text in self.IDS else [1, 2]


@pytest.fixture
def vlm(tmp_path) -> VLM:
    return VLM.build(save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm"), dtype=torch.float32)


def talks_about_colors(folder, count: int) -> list[Example]:
    """Walls of three colours, each a little different; two sentences a wall, one of which names the colour."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(count):
        name, base = list(COLORS.items())[i % 3]
        shade = torch.randint(-40, 40, (3,), generator=generator).tolist()
        path = folder / f"{i}.png"
        picture(tuple(value + change for value, change in zip(base, shade, strict=True))).save(path)
        photo = Photo(path.name, path, 0, path.stat().st_size)
        sentences = (f"Always a {name} wall.", "Always a wall, thrice.")
        examples.append(Example(path.name, (photo,), tuple((user("What?", 1), assistant(text)) for text in sentences)))
    return examples


def test_words_are_single_tokens_that_tell_photos_apart(vlm, tmp_path):
    examples = [*talks_about_colors(tmp_path, 39), Example("no photo", (), ((user("Hello"), assistant("A blue one.")),))]
    dataset = ConversationDataset.of(examples)
    words = words_of(dataset, Vocabulary())
    assert words.names == ("blue", "green", "red")  # always is said of all, "wall" and "thrice" are two tokens, "a" names nothing
    assert words.ids.tolist() == [75, 70, 65]
    assert len(words.photos) == len(dataset.photos) == 39
    assert words.frequencies[0].tolist() == [0, 0, 1]
    assert words_of(dataset.select(range(30)), Vocabulary()).names == ()  # ten of each colour are too few


def test_the_projector_learns_to_say_what_is_there(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "BATCH", 8)
    monkeypatch.setattr(learning, "LEARNING_RATE", 1e-2)
    examples = talks_about_colors(tmp_path, 90)
    # one token of five shows the color; an untrained tower would say the same of all walls
    generator = torch.Generator().manual_seed(1)
    features_cache = torch.randn(64, generator=generator) + 0.3 * torch.randn(90, 5, 64, generator=generator)
    features_cache[torch.arange(90), torch.arange(90) % 5] += torch.randn(3, 64, generator=generator)[torch.arange(90) % 3]
    words = words_of(ConversationDataset.of(examples), Vocabulary())
    vlm.projector.float().requires_grad_(True)
    before = {name: t.clone() for name, t in vlm.model.state_dict().items()}
    seen: list[int] = []
    learnt = pretrain_projector(vlm, words, features_cache, epochs=12, on_photos=seen.append)

    held_out = 90 - sum(seen) // 12
    assert 0 < held_out < 15 and sum(seen) == 12 * (90 - held_out)
    assert learnt["first"] > 0.9 > 0.6 > learnt["commonest"]
    for name, tensor in vlm.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("multi_modal_projector" not in name), name

    # a red wall's tokens lie near the embedding of " red", and are as long as a word
    embeddings = vlm.model.get_input_embeddings().weight[words.ids].float()
    with torch.no_grad():
        said = vlm.projector(features_cache[:9]) - embeddings.mean(0)
    directions = torch.nn.functional.normalize(embeddings - embeddings.mean(0), dim=-1)
    clearest = (said @ directions.T).amax(1).argmax(-1)
    assert [words.names[i] for i in clearest.tolist()] == ["red", "green", "blue"] * 3
    expected = (embeddings - embeddings.mean(0)).norm(dim=-1).mean()
    assert said.norm(dim=-1).mean().item() == pytest.approx(expected.item(), rel=0.1)


def test_words_about_a_photo_are_what_is_there(tmp_path):
    info = {"captions": ["A dog on the grass.", "A dog on the grass."], "objects": ["frisbee", "wine glass"]}
    turns = (("Is there a cat in the image?", "No"), ("Does leash exist in the image?", "Yes"), ("What color is it?", "Brown"))
    example = Example("x", (Photo("x", tmp_path, 0, 0, info),), tuple((user(question, 1), assistant(answer)) for question, answer in turns))
    assert words_about(example) == [{"dog", "grass"}, {"frisbee", "wine", "glass"}, {"leash"}, {"brown"}]


def test_pictures_of_words_show_every_word(vlm, tmp_path):
    examples = talks_about_colors(tmp_path, 3)
    embeddings = vlm.model.get_input_embeddings().weight
    shown = WordImages(vlm, ConversationDataset.of(examples))[0]
    assert shown.shape == (vlm.tokens_per_image, embeddings.shape[1])
    # the tokenizer of tests knows bytes: each word begins with a space
    assert {tuple(row) for row in shown.tolist()} == {tuple(embeddings[vlm.tokenizer.encode(" ")[0]].tolist())}


def test_a_stage_on_pictures_of_words_teaches_the_llm_alone(tmp_path):
    """It learns to tell from the words, and the model is not used before its projector has learnt something."""
    vlm = VLM.build(save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm"), dtype=torch.float32)
    before = {name: t.clone() for name, t in vlm.model.state_dict().items()}
    letters = ["x", "y", "z"] * 40
    examples = [
        Example(letter, (Photo(f"{i}", tmp_path, i, 0),), ((user("Which?", 1), assistant(letter)),)) for i, letter in enumerate(letters)
    ]
    dataset = ConversationDataset.of(examples)
    samples = build_samples(dataset, vlm.renderer)
    stage = replace(STAGES["read"], lr_lora=2e-2, batch_size=4)
    groups = prepare(vlm, stage, lora_rank=8)
    assert {group.name: group.lr for group in groups} == {"tower": None, "projector": None, "LLM": None, "LLM adapters": 2e-2}
    fresh = {name: p.detach().clone() for name, p in vlm.model.named_parameters() if p.requires_grad}

    def last_loss(shown: list[str]) -> float:
        pictures = WordImages(vlm, dataset)
        # this tokenizer begins every word with the same byte, and these are told by another
        pictures._ids = {i: vlm.tokenizer.encode(letter) for i, letter in enumerate(shown)}
        with torch.no_grad():
            for name, parameter in vlm.model.named_parameters():
                if name in fresh:
                    parameter.copy_(fresh[name])
        folder = tmp_path / "".join(shown[:3])
        assert train(vlm, groups, stage, samples.with_images(pictures), folder, {"stage": "read"})
        return [entry["loss"] for entry in json.loads((folder / "training.json").read_text())["history"] if "loss" in entry][-1]

    assert last_loss(["w"] * 120) - last_loss(letters) > 0.3, "a letter is told from the image alone"
    after = {name.replace(".base_layer", ""): t for name, t in vlm.model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(UserError, match="its projector is untrained"):
        VLM.from_pretrained(tmp_path / "xyz")
    again = VLM.from_pretrained(tmp_path / "xyz", dtype=torch.float32, fold=False)
    assert again.new_projector and again.peft is not None
