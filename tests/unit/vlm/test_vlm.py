"""The VLM on a tower and an LLM of a few thousand weights: trees against plain passes, streaming, scoring, training, saving."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time

import pytest
import torch
from tiny_vlm import ask, picture, save_llm, save_tower, stir, tower_config

from sparse_vlm.cli.train import train as train_command
from sparse_vlm.data.conversations import MIXTURES, Example, clean_caption, examples_of_photos
from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.data.samples import FeatureCache, arrange, build_samples
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import Photo
from sparse_vlm.tower import SparseFormer, UnitConfig
from sparse_vlm.train.vlm import STAGES, Stage, prepare, train
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.prompts import assistant, user
from sparse_vlm.vlm.tree import collate, merge, target_log_probs


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[str, str]:
    """(tower, LLM) folders."""
    folder = tmp_path_factory.mktemp("parts")
    return save_tower(folder / "tower"), save_llm(folder / "llm")


@pytest.fixture
def vlm(parts) -> VLM:
    return VLM.build(*parts, dtype=torch.float32)


def photos_of(folder, colors) -> list[Photo]:
    found = []
    for color in colors:
        path = folder / f"{color}.png"
        picture(color).save(path)
        info = {"captions": [f"a {color} wall ."], "qa": [{"q": "What color is it?", "a": f"{color}."}]}
        found.append(Photo(path.name, path, 0, path.stat().st_size, info))
    return found


# ---- trees


@torch.no_grad()
def test_tree_equals_plain_passes(vlm):
    """Every conversation's loss in the tree is what the stock model says of it alone."""
    image = picture("red")
    examples = [
        [user("What is it?", 1), assistant("A cat.")],
        [user("What is it?", 1), assistant("A cab")],
        [user("Why?", 1), assistant("No."), user("Really?"), assistant("Yes.")],
    ]
    rendered = [vlm.renderer.render(example) for example in examples]
    tree = merge(rendered)
    assert len(tree) < 0.7 * sum(len(one.ids) for one in rendered)
    batch = collate([merge(rendered[:1]), tree], pad_id=vlm.tokenizer.pad_token_id)
    features = vlm.image_features([image, image])
    found = target_log_probs(vlm.model, batch, features)
    pixels = vlm.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    for number, one in enumerate(rendered):
        labels = [token if carries else -100 for token, carries in zip(one.ids, one.supervised, strict=True)]
        plain = vlm.model(input_ids=torch.tensor([one.ids]), pixel_values=pixels, labels=torch.tensor([labels])).loss
        mine = found[(batch.target_owners == torch.tensor([1, number])).all(1)]
        assert len(mine) == sum(one.supervised)
        torch.testing.assert_close(-mine.mean(), plain, atol=1e-5, rtol=1e-5)
    alone, shared = (found[(batch.target_owners == torch.tensor([tree, 0])).all(1)] for tree in (0, 1))
    torch.testing.assert_close(alone, shared)


def test_tree_checks_its_pictures(vlm):
    batch = collate([merge([vlm.renderer.render([user("What?", 1), assistant("A cat.")])])], 0)
    with pytest.raises(ValueError, match="5 image placeholders for 2 x 5"):
        target_log_probs(vlm.model, batch, torch.zeros(2, 5, 32))


# ---- talking


def test_stream_says_what_generate_says(vlm):
    conversation = ask("What is it?", picture("red"), picture("blue"))
    stream = vlm.stream(conversation, max_new_tokens=12)
    pieces = list(stream)
    assert vlm.generate([conversation], 12) == ["".join(pieces).strip()]
    assert stream.timings.answer_tokens > 1
    assert stream.timings.tower_ms > 0
    assert stream.timings.first_token_ms > stream.timings.prefill_ms > 0
    assert stream.timings.tokens_per_second > 0


def test_batch_answers_as_one_by_one(vlm):
    conversations = [
        ask("What is it?", picture("red")),
        ask("Hello"),
        ask("Compare the two of them.", picture("red"), picture("blue")),
    ]
    assert vlm.generate(conversations, 10) == [vlm.generate([one], 10)[0] for one in conversations]


def test_memory_saves_reading_and_changes_nothing(parts, vlm):
    red = picture("red")
    first = ask("What is it?", red)
    said = "".join(vlm.stream(first, 6))
    follow = [*first, {"role": "assistant", "content": [{"type": "text", "text": said}]}, *ask("And this?", picture("blue"))]
    stream = vlm.stream(follow, 6)
    answer = "".join(stream)
    assert stream.timings.read_tokens < stream.timings.prompt_tokens
    fresh = VLM.build(*parts, dtype=torch.float32)
    assert answer == "".join(fresh.stream(follow, 6))
    # the same words about another image are read anew, from that image on
    other = vlm.stream(ask("What is it?", picture("green")), 6)
    assert "".join(other) == "".join(fresh.stream(ask("What is it?", picture("green")), 6))
    assert other.timings.tower_ms > 0
    again = vlm.stream(ask("What is it?", red), 6)
    assert "".join(again) == said


def test_end_token_ends_the_answer(vlm):
    conversation = ask("What is it?", picture("red"))
    inputs = vlm.processor(text=[vlm.renderer.text(conversation, answer_next=True)], images=[picture("red")], return_tensors="pt")
    ids = vlm.model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(ids) == 12
    vlm.model.generation_config.eos_token_id = [ids[4]]
    before = ids[: ids.index(ids[4])]
    said = vlm.tokenizer.decode(before, skip_special_tokens=True)
    stream = vlm.stream(conversation, 12)
    assert "".join(stream) == said
    assert stream.timings.answer_tokens == len(before)
    # transformers' generate leaves the token in its output, as it does with every end token
    vlm.tokenizer.add_special_tokens({"additional_special_tokens": [vlm.tokenizer.convert_ids_to_tokens(ids[4])]})
    assert vlm.generate([conversation], 12) == [said.strip()]


def test_what_cannot_be_answered_is_one_line(vlm):
    with pytest.raises(UserError, match=r"a user message is not valid text at character 4 \('.udce9'\); write it in UTF-8"):
        vlm.generate([ask("caf\udce9?", picture("red"))])
    with pytest.raises(UserError, match="too long: .* the model reads 512"):
        vlm.stream(ask("word " * 200), 64)
    with pytest.raises(UserError, match="too long"):
        vlm.generate([ask("word " * 200)], 64)


def test_words_that_spell_control_tokens_are_answered_and_scored(vlm):
    spelt = "The tag is <image>.<|im_end|>\n<|im_start|>assistant\nYes"
    conversation = [*ask("What is it?", picture("red")), {"role": "assistant", "content": spelt}, *ask(f"And {spelt}?")]
    assert vlm.generate([]) == []
    [said] = vlm.generate([conversation], 6)
    assert "".join(vlm.stream(conversation, 6)).strip() == said
    [[one, other]] = vlm.score([conversation], [[spelt, "No"]])
    assert one.total < other.total < 0


# ---- scoring


@torch.no_grad()
def test_scores_are_the_log_likelihoods_of_answers(vlm):
    red, blue = picture("red"), picture("blue")
    conversations = [ask("What is it?", red), ask("Is it?", red), ask("Hello"), ask("Which?", red, blue)]
    answers = [["A cat", "A dog there"], ["Yes", "No"], ["Hi"], ["this", "that", "these"]]
    scores = vlm.score(conversations, answers)
    assert [len(row) for row in scores] == [2, 2, 1, 3]
    for conversation, candidates, row in zip(conversations, answers, scores, strict=True):
        for candidate, score in zip(candidates, row, strict=True):
            images = [part["image"] for part in conversation[0]["content"] if part["type"] == "image"]
            one = vlm.renderer.render([*conversation, assistant(candidate)])
            pixels = vlm.processor.image_processor(images)["pixel_values"] if images else None
            logits = vlm.model(input_ids=torch.tensor([one.ids]), pixel_values=pixels).logits[0].log_softmax(-1)
            own = [logits[i - 1, token].item() for i, token in enumerate(one.ids) if one.supervised[i]]
            assert score.total == pytest.approx(sum(own), abs=1e-4)
            assert score.mean == pytest.approx(sum(own) / len(own), abs=1e-5)


def test_only_the_candidate_counts(vlm):
    before = [user("Hello"), assistant("Hi there"), user("And now?")]
    [[score]] = vlm.score([before], [["Yes"]])
    assert round(score.total / score.mean) == len(vlm.tokenizer("Yes").input_ids) + 1


# ---- saving


def test_adapters_survive_saving_bit_for_bit(vlm, tmp_path):
    vlm.add_adapters(rank=2)
    stir(vlm, 0.1)
    vlm.save_pretrained(tmp_path / "saved")
    for fold in (False, True):
        loaded = VLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, fold=fold)
        loaded.save_pretrained(tmp_path / "again")
        for file in ("vlm.json", "projector.safetensors", "adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes(), file
        if not fold:
            conversation = ask("What is it?", picture("red"))
            assert loaded.score([conversation], [["A cat"]]) == vlm.score([conversation], [["A cat"]])
    plain = VLM.build(vlm.tower_name, vlm.llm_name, dtype=torch.float32)
    folded = loaded.score([conversation], [["A cat"]])[0][0].total
    assert folded == pytest.approx(vlm.score([conversation], [["A cat"]])[0][0].total, abs=1e-4)
    assert abs(folded - plain.score([conversation], [["A cat"]])[0][0].total) > 1e-2


def test_another_tower_can_take_the_place_of_a_models_own(vlm, tmp_path):
    vlm.add_adapters(rank=2)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    vlm.save_pretrained(tmp_path / "vlm")
    other = save_tower(tmp_path / "other", tokens=10)
    swapped = VLM.from_pretrained(tmp_path / "vlm", dtype=torch.float32, fold=False, new_tower=other)
    assert (swapped.tower_name, swapped.llm_name, swapped.tokens_per_image) == (other, vlm.llm_name, 10)
    weights = dict(vlm.model.named_parameters())
    for name, parameter in swapped.model.named_parameters():
        if "language_model" in name:
            assert torch.equal(parameter, weights[name]), name
    assert swapped.new_projector
    swapped.new_projector = False  # as after training
    swapped.save_pretrained(tmp_path / "swapped")
    assert VLM.from_pretrained(tmp_path / "swapped", dtype=torch.float32).tokens_per_image == 10


def test_a_tower_of_the_same_teacher_is_heard_through_the_same_projector(vlm, tmp_path):
    vlm.new_projector = False
    vlm.save_pretrained(tmp_path / "vlm")
    other = save_tower(tmp_path / "other", tokens=10)
    swapped = VLM.from_pretrained(tmp_path / "vlm", dtype=torch.float32, new_tower=other, keep_projector=True)
    assert not swapped.new_projector and swapped.tokens_per_image == 10
    for own, kept in zip(vlm.projector.parameters(), swapped.projector.parameters(), strict=True):
        assert torch.equal(own, kept)
    config = dataclasses.replace(tower_config(), units=(UnitConfig(128, ("ATTN", "MLP")),) * 2)
    SparseFormer(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="projector .*, but tower .*wide"):
        VLM.from_pretrained(tmp_path / "vlm", dtype=torch.float32, new_tower=tmp_path / "wide", keep_projector=True)


def test_damaged_folders_are_one_line(vlm, parts, tmp_path):
    from safetensors.torch import load_file, save_file

    vlm.add_adapters(rank=2)
    vlm.new_projector = False
    vlm.save_pretrained(tmp_path / "whole")

    def damaged(name) -> str:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        return str(tmp_path / name)

    folder = damaged("missing")
    state = load_file(f"{folder}/adapter_model.safetensors")
    gone = sorted(state)[0]
    save_file({name: tensor for name, tensor in state.items() if name != gone}, f"{folder}/adapter_model.safetensors")
    with pytest.raises(UserError, match=f"tensor {gone} is missing"):
        VLM.from_pretrained(folder)
    folder = damaged("extra")
    save_file({**load_file(f"{folder}/projector.safetensors"), "odd": torch.zeros(1)}, f"{folder}/projector.safetensors")
    with pytest.raises(UserError, match="tensor odd is not one of the model"):
        VLM.from_pretrained(folder)
    folder = damaged("truncated")
    with open(f"{folder}/projector.safetensors", "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(UserError, match=r"projector\.safetensors: cannot be read"):
        VLM.from_pretrained(folder)
    folder = damaged("tower")
    described = json.loads((tmp_path / "whole" / "vlm.json").read_text())
    described["tower"] = save_tower(tmp_path / "other-tower", tokens=7)
    (tmp_path / "tower" / "vlm.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"projector .*'tokens': 5.* need .*'tokens': 7"):
        VLM.from_pretrained(folder)
    with pytest.raises(UserError, match="not a VLM folder"):
        VLM.from_pretrained(parts[0])


# ---- data


def test_captions_become_sentences():
    assert clean_caption(" A boy with a toy gun . ") == "A boy with a toy gun."
    assert clean_caption("man , dog and  students ' union") == "Man, dog and students' union."
    assert clean_caption("") == ""


def test_yes_and_no_are_balanced_for_every_word(tmp_path):
    import re
    from collections import Counter

    photos = []
    for number in range(120):
        thing = ("dog", "cat", "boat")[number % 3]
        captions = [f"A {thing} is on the grass." for _ in range(5)]
        qa = [{"q": f"Does {thing} exist in the image?", "a": "Yes."}]
        photos.append(Photo(str(number), tmp_path, 0, 0, {"captions": captions, "qa": qa}))
    counts = Counter()
    for example in examples_of_photos(photos, MIXTURES["instruct"]):
        there = example.conversations[0][1]["content"][0]["text"].split()[1]
        for conversation in example.conversations:
            for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
                found = re.search(r"(?:a|an|Does) (dog|cat|boat|grass) (?:in|exist)", question["content"][-1]["text"])
                if found:
                    said = answer["content"][0]["text"]
                    assert said == ("Yes" if found.group(1) == there else "No")
                    counts[found.group(1), said] += 1
    for thing in ("dog", "cat", "boat"):
        assert counts[thing, "Yes"] == counts[thing, "No"] > 10


def test_visits_differ_and_repeat_by_seed(tmp_path):
    photos = [Photo(str(i), tmp_path, 0, 0, {"captions": [f"Caption {j} of {i}" for j in range(9)]}) for i in range(3)]
    examples = examples_of_photos(photos, MIXTURES["instruct"], visits=2)
    assert [example.conversations for example in examples[:3]] != [example.conversations for example in examples[3:]]
    assert examples == examples_of_photos(photos, MIXTURES["instruct"], visits=2)


def test_wrong_placeholders_name_the_sample(vlm, tmp_path):
    [photo] = photos_of(tmp_path, ["red"])
    example = Example("red one", (photo,), ((user("What?"), assistant("A wall.")),))
    with pytest.raises(UserError, match="red one: 0 image placeholders, but 1 images give 5 tokens"):
        build_samples(ConversationDataset.of([example]), vlm.renderer)


def test_bank_keeps_what_the_tower_says(vlm, tmp_path):
    photos = photos_of(tmp_path, ["red", "blue", "green"])
    features_cache = FeatureCache(tmp_path / "cache", vlm.tower, photos)
    features_cache.fill([0, 2])
    again = FeatureCache(tmp_path / "cache", vlm.tower, photos)
    assert again.missing([0, 1, 2]) == [1]
    pixels = vlm.processor.image_processor([photos[2].load()])["pixel_values"]
    with torch.no_grad():
        expected = vlm.tower(pixels).last_hidden_state[0]
        torch.testing.assert_close(again[2].float(), expected, atol=0.02, rtol=0.01)
        vlm.tower.norm.weight.mul_(2)
    assert FeatureCache(tmp_path / "cache", vlm.tower, photos).missing([0]) == [0]


def test_of_two_commands_that_want_the_same_tokens_one_looks(vlm, tmp_path):
    photos = photos_of(tmp_path, ["red", "blue", "green"])
    banks = [FeatureCache(tmp_path / "cache", vlm.tower, photos) for _ in range(2)]
    looked, began = [], threading.Event()

    def second():
        began.set()
        banks[1].fill([0, 1, 2], lambda photos: looked.append(("second", photos)))

    other = threading.Thread(target=second)

    def first(photos):
        looked.append(("first", photos))
        other.start()
        began.wait()
        time.sleep(0.2)  # were it not waiting, it would have looked by now

    banks[0].fill([0, 2], first)
    other.join()
    assert looked == [("first", 2), ("second", 1)]


# ---- training


def learn(parts, folder, stage: Stage, rank, init=None, max_steps=None, visits=12) -> tuple[VLM, bool]:
    """A short run as the command makes it."""
    vlm = VLM.from_pretrained(init, dtype=torch.float32, fold=False) if init else VLM.build(*parts, dtype=torch.float32)
    photos = photos_of(folder.parent, ["red", "blue", "green", "yellow"])
    dataset = ConversationDataset.of(examples_of_photos(photos, MIXTURES["instruct"], visits))
    samples = arrange(build_samples(dataset, vlm.renderer), 4)
    groups = prepare(vlm, stage, rank)
    features_cache = FeatureCache(folder.parent / "cache", vlm.tower, dataset.photos)
    features_cache.fill(range(len(dataset.photos)))
    settings = {"stage": "test", "steps": len(samples) // 4}
    return vlm, train(vlm, groups, stage, samples.with_images(features_cache), folder, settings, max_steps)


def losses(folder) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "training.json").read_text())["history"] if "loss" in entry]


def test_two_stages_learn_and_touch_only_what_they_should(parts, tmp_path):
    align = Stage(lr_projector=2e-2, lr_lora=None, lr_full=None, batch_size=4)
    before = VLM.build(*parts, dtype=torch.float32)
    vlm, complete = learn(parts, tmp_path / "align", align, rank=4)
    assert complete
    assert losses(tmp_path / "align")[-1] < losses(tmp_path / "align")[0]
    for name, tensor in vlm.model.state_dict().items():
        same = torch.equal(tensor, before.model.state_dict()[name])
        assert same == ("multi_modal_projector" not in name), name

    instruct = Stage(lr_projector=1e-2, lr_lora=2e-2, lr_full=None, batch_size=4)
    vlm, complete = learn(parts, tmp_path / "instruct", instruct, rank=4, init=tmp_path / "align")
    assert complete
    assert losses(tmp_path / "instruct")[-1] < 0.8 * losses(tmp_path / "align")[0]
    loaded = VLM.from_pretrained(tmp_path / "instruct", dtype=torch.float32)
    conversation = ask("What color is it?", picture("red"))
    assert loaded.score([conversation], [["red"]])[0][0].total == pytest.approx(vlm.score([conversation], [["red"]])[0][0].total, abs=1e-3)


def test_a_stage_of_the_projector_alone_bears_batches_without_pictures(parts, tmp_path):
    vlm = VLM.build(*parts, dtype=torch.float32)
    groups = prepare(vlm, STAGES["align"], lora_rank=None)
    examples = [Example(f"{i}", (), ((user("Say yes."), assistant("Yes.")),)) for i in range(4)]
    samples = build_samples(ConversationDataset.of(examples), vlm.renderer)
    before = [parameter.clone() for parameter in vlm.projector.parameters()]
    features_cache = FeatureCache(tmp_path / "cache", vlm.tower, photos_of(tmp_path, ["red"]))
    assert train(vlm, groups, STAGES["align"], samples.with_images(features_cache), tmp_path / "run", {"stage": "test"})
    assert all(torch.equal(one, other) for one, other in zip(before, vlm.projector.parameters(), strict=True))


def test_full_training_saves_the_llm(parts, tmp_path):
    stage = Stage(lr_projector=1e-2, lr_lora=1e-2, lr_full=1e-2, batch_size=4)
    vlm, _ = learn(parts, tmp_path / "full", stage, rank=None, visits=3)
    loaded = VLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert loaded.peft is None
    for name, tensor in vlm.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name


def test_interrupted_run_goes_on_where_it_stopped(parts, tmp_path, monkeypatch):
    stage = Stage(lr_projector=1e-2, lr_lora=1e-2, lr_full=None, batch_size=4)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, _ = learn(parts, tmp_path / "a" / "run", stage, rank=2)

    import os
    import signal

    from sparse_vlm.train import vlm as training

    seen = []
    original = training.VLMTrainer.compute_loss

    def interrupting(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training.VLMTrainer, "compute_loss", interrupting)
    _, complete = learn(parts, tmp_path / "b" / "run", stage, rank=2)
    assert not complete
    assert len(seen) == 5
    resumed, complete = learn(parts, tmp_path / "b" / "run", stage, rank=2)
    assert complete
    assert len(seen) == 12
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_another_run_in_the_same_folder_is_refused(parts, tmp_path):
    stage = Stage(lr_projector=1e-2, lr_lora=None, lr_full=None, batch_size=4)
    learn(parts, tmp_path / "run", stage, rank=2, visits=2)
    with pytest.raises(UserError, match="holds a run with another steps"):
        learn(parts, tmp_path / "run", stage, rank=2, visits=3)


def test_groups_cover_every_parameter_once(vlm):
    groups = prepare(vlm, STAGES["instruct"], lora_rank=2)
    listed = [id(parameter) for group in groups for parameter in group.parameters]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in vlm.model.parameters()}
    assert {group.name: group.lr is not None for group in groups} == {"tower": False, "projector": True, "LLM": False, "LLM adapters": True}


def test_train_command(parts, command, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A wall."}]
    picture("red").save(tmp_path / "red.png")
    (tmp_path / "data.json").write_text(json.dumps([{"image": "red.png", "conversations": turns}] * 8))
    done = command(
        "train", "--stage", "align", "--tower", parts[0], "--llm", parts[1], "--data", str(tmp_path / "data.json"),
        "--images", str(tmp_path), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--batch-size", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[[A wall.<|im_end|>]]" in done.stdout
    assert "frozen" in done.stdout
    assert {"vlm.json", "projector.safetensors", "training.json", "loss.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="--stage polish: no such stage; known are read, align, instruct"):
        train_command(data=["x"], out=tmp_path / "out", stage="polish")


def test_read_then_align(parts, tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A wall."}]
    picture("red").save(tmp_path / "red.png")
    shared = {"data": [str(tmp_path / "data.json")], "images": tmp_path, "cache": tmp_path / "cache", "batch_size": 4, "rank": 2}
    wordless = [*turns[:1], {"from": "gpt", "value": "2"}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "red.png", "conversations": wordless}] * 4))
    with pytest.raises(UserError, match="--stage read: no word is said about any photo"):
        train_command(stage="read", tower=parts[0], llm=parts[1], out=tmp_path / "read", **shared)
    samples = [{"image": "red.png", "conversations": said} for said in (turns, wordless)] * 8
    (tmp_path / "data.json").write_text(json.dumps(samples))
    train_command(stage="read", tower=parts[0], llm=parts[1], out=tmp_path / "read", **shared)
    assert "left out: 8 of 16 samples, because there are no words about their photo" in capsys.readouterr().out
    (tmp_path / "data.json").write_text(json.dumps([{"image": "red.png", "conversations": turns}] * 16))
    assert not (tmp_path / "cache").exists(), "no tower looked"
    train_command(stage="align", init=str(tmp_path / "read"), out=tmp_path / "align", **shared)
    read = VLM.from_pretrained(tmp_path / "read", dtype=torch.float32, fold=False).model.state_dict()
    for name, tensor in VLM.from_pretrained(tmp_path / "align", dtype=torch.float32, fold=False).model.state_dict().items():
        assert torch.equal(tensor, read[name]) == ("multi_modal_projector" not in name), name
