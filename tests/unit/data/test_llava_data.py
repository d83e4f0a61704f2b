"""LLaVA's files as people have them: read where they stand, mixed, rendered when needed, with images that cannot be used."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_vlm import picture, save_llm, save_tower

from sparse_vlm.cli.train import train as train_command
from sparse_vlm.data import records, samples
from sparse_vlm.data.bad_images import blank, resolve_bad_images
from sparse_vlm.data.conversations import MIXTURES
from sparse_vlm.data.dataset import ConversationDataset, drawn, files_of, photos_of, read_conversations, weighted
from sparse_vlm.data.llava import LlavaFile
from sparse_vlm.data.samples import FeatureCache, arrange, build_samples, summarize
from sparse_vlm.errors import UserError
from sparse_vlm.images.preprocess import preprocess
from sparse_vlm.train import vocabulary
from sparse_vlm.train.loss_module import Collator
from sparse_vlm.train.vocabulary import words_of
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.prompts import text_of
from sparse_vlm.vlm.tree import merge, target_log_probs


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[str, str]:
    """(tower, LLM) folders."""
    folder = tmp_path_factory.mktemp("parts")
    return save_tower(folder / "tower"), save_llm(folder / "llm")


@pytest.fixture(scope="module")
def vlm(parts) -> VLM:
    return VLM.build(*parts, dtype=torch.float32)


def sample(question: str, answer: str = "A wall.", **more: object) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def dataset_of(folder, *entries: dict, name: str = "data.json", **options) -> ConversationDataset:
    (folder / name).write_text(json.dumps(entries))
    return read_conversations([(folder / name, 1.0)], {}, folder, MIXTURES["align"], **options)


# ---- records


RECORDS = [{"id": i, "text": 'ä–€𝄞 \\ " ] , { ' * (i % 5), "list": [i, [1.5, None]], "n": {"a": "\u2028"}} for i in range(60)]


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_records_are_found_where_they_stand(tmp_path, monkeypatch, piece, style):
    monkeypatch.setattr(records, "_PIECE", piece)
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" * ("indent" in style) + f" {json.dumps(RECORDS, **style)}\n".encode())
    found = list(records.scan(path))
    assert [(record.number, record.value) for record in found] == list(enumerate(RECORDS))
    assert [records.read_at(path, record.offset, record.size) for record in found] == RECORDS


def test_lines_are_records_and_a_bad_one_is_told(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(RECORDS[0])}\n\n{json.dumps(RECORDS[1])}\n{{\n{json.dumps(RECORDS[2])}")
    found = list(records.scan(path))
    assert [record.number for record in found] == [1, 3, 4, 5]
    assert [record.value for record in found if not record.error] == RECORDS[:3]
    assert found[2].error.startswith("not a line of json")
    assert records.read_at(path, found[3].offset, found[3].size) == RECORDS[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', r"data.json, line 2, byte 7: .*Expecting ':' delimiter, in sample 1"),
        ('[{"a": 1}, {"a": "', r"line 1, byte 18: .*Unterminated string"),
        ('[{"a": 1}', "line 1, byte 10: .*the list breaks off"),
        ('[{"a": 1} {"a": 2}]', "line 1, byte 11: .*no comma between two samples"),
        ('[{"a": 1}]\nx', "line 2, byte 1: .*something follows the list"),
        ('{"a": 1}\n{"a": 2}', "line 1, byte 1: .*json lines need the suffix .jsonl"),
        ("", "not a list of samples"),
    ],
)
def test_a_list_that_is_none_says_where(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=message):
        list(records.scan(tmp_path / "data.json"))


def test_a_mistake_far_back_is_found_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 64)
    monkeypatch.setattr(records, "_LONGEST", 128)
    (tmp_path / "data.json").write_text('[{"a" 1}, ' + " " * 100_000 + "]")
    read = []
    with pytest.raises(UserError, match="line 1, byte 7: .*Expecting ':'"):
        list(records.scan(tmp_path / "data.json", read.append))
    assert sum(read) < 1000
    (tmp_path / "data.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(UserError, match="not UTF-8"):
        list(records.scan(tmp_path / "data.json"))


# ---- samples as people write them


def test_marks_stay_where_they_stand(vlm, tmp_path):
    for color in ("red", "blue"):
        picture(color).save(tmp_path / f"{color}.png")
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "user", "value": "Is <image> like\n<image>?"},
        {"from": "assistant", "value": " No. "},
        {"from": "human", "value": "And this?\n<image>"},
        {"from": "gpt", "value": "Yes."},
    ]
    examples = dataset_of(
        tmp_path,
        {"id": 9, "image": ["red.png", "blue.png", "red.png"], "conversations": turns},
        sample("<image>\nWhat is it?", image="blue.png"),
        sample("Hello", image=None),
    )
    assert [[photo.key for photo in example.photos] for example in examples] == [["red.png", "blue.png", "red.png"], ["blue.png"], []]
    assert [examples.photo_numbers(i) for i in range(3)] == [(0, 1, 0), (1,), ()]
    assert [photo.load().getpixel((0, 0)) for photo in examples.photos] == [(255, 0, 0), (0, 0, 255)]
    assert examples[0].name == f"{tmp_path / 'data.json'}:0 (id 9)"
    assert vlm.renderer.text(examples[0].conversations[0]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nIs <image>\nlike\n<image>\n?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nAnd this?\n<image>\n<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    built = build_samples(examples, vlm.renderer)
    assert [len(one.photos) * vlm.tokens_per_image for one in built] == [one.tree.ids.count(vlm.renderer.image_id) for one in built]
    assert summarize(built)["answers"] == 4 and summarize(built)["photos"] == 2


@torch.no_grad()
def test_every_picture_stands_at_its_own_mark(vlm, tmp_path):
    entries = (
        sample("One <image> two <image>?", image=["red.png", "blue.png"]),
        sample("Hello"),
        sample("This?\n<image>", image="blue.png"),
    )
    examples = dataset_of(tmp_path, *entries)
    features_cache = torch.randn(2, vlm.tokens_per_image, 32, generator=torch.Generator().manual_seed(0))
    batch = Collator(vlm)(list(build_samples(examples, vlm.renderer).with_images(features_cache)))
    seen = []
    hook = vlm.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    target_log_probs(vlm.model, batch["trees"], batch["images"])
    hook.remove()
    ids = batch["trees"].input_ids
    [embeds] = seen
    assert torch.equal(embeds[0][ids[0] == vlm.renderer.image_id], features_cache.flatten(0, 1))
    assert torch.equal(embeds[2][ids[2] == vlm.renderer.image_id], features_cache[1])
    assert vlm.renderer.image_id not in ids[1]
    text = vlm.tokenizer.decode(ids[0]).replace("<image>" * vlm.tokens_per_image, "*")
    assert "One *\ntwo *\n?" in text


def test_a_step_names_the_sample_whose_pictures_do_not_fit(vlm, tmp_path):
    picture("red").save(tmp_path / "red.png")
    [one] = build_samples(dataset_of(tmp_path, sample("<image> or <image>?", id="x", image=["red.png"] * 2)), vlm.renderer)
    tokens = torch.zeros(2, 5, 64)
    assert Collator(vlm)([replace(one, images=tuple(tokens))])["names"] == [one.name]
    with pytest.raises(UserError, match=r"data.json:0 \(id x\): 10 image placeholders, but 1 images give 5 tokens"):
        Collator(vlm)([replace(one, images=(tokens[0],))])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (sample("<image>"), "1 <image> marks for 0 images"),
        (sample("Hi", image="red.png"), "0 <image> marks for 1 images"),
        (sample("<image> and <image>", image="red.png"), "2 <image> marks for 1 images"),
        (sample("Hi", "<image>"), "turn 1, from 'gpt', holds <image>"),
        (sample("Hi", " "), "turn 1, from 'gpt', is empty"),
        ({"conversations": sample("Hi")["conversations"][::-1]}, "turn 0 is from 'gpt'; human and gpt must alternate, human first"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}, *sample("Hi")["conversations"]]}, "turn 0 is from 'gpt'"),
        ({"conversations": sample("Hi")["conversations"][:1]}, "turn 0, the last, is from 'human' and has no answer"),
        ({"conversations": [{"from": "system", "value": "Hi"}]}, "turn 0, the last, is from 'system' and has no answer"),
        ({"conversations": [*sample("Hi")["conversations"], {"from": "system", "value": ""}] * 2}, "turn 2 is from 'system'"),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, "turn 0 is from 'bot'; known are human, user, gpt, assistant, system"),
        ({"conversations": [{"role": "user", "content": "Hi"}]}, "turn 0 is not {'from': ..., 'value': ...}"),
        ({"conversations": []}, "'conversations' is not a list of turns"),
        ({"id": "1"}, "'conversations' is missing"),
        (sample("<image>", image=7), "'image' is neither a path nor a list of paths"),
        ("text", "a str, not an object"),
    ],
)
def test_a_sample_that_is_not_as_it_must_be_is_named(tmp_path, entry, message):
    with pytest.raises(UserError, match=r"data.json:1") as raised:
        dataset_of(tmp_path, sample("Hi"), entry)
    assert message in str(raised.value)


def test_what_else_is_wrong_with_a_file(vlm, tmp_path):
    with pytest.raises(UserError, match="data.json: holds no samples"):
        dataset_of(tmp_path)
    with pytest.raises(UserError, match="names the image red.png; say where images lie with --images"):
        LlavaFile(tmp_path / "data.json", None, {}) if dataset_of(tmp_path, sample("<image>", image="red.png")) else None
    examples = dataset_of(tmp_path, sample("Hi"), sample("Ho"))
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(UserError, match="data.json: was changed while it is in use"):
        examples[1]
    with pytest.raises(UserError, match=r"data.json:0: 6\d\d tokens, but the LLM reads 512"):
        build_samples(dataset_of(tmp_path, sample("Hi" * 300)), vlm.renderer, context=512)


# ---- mixing


def test_weights_are_part_of_an_entry(tmp_path):
    assert weighted("a.json=0.5") == ("a.json", 0.5)
    assert weighted("a.json") == ("a.json", 1.0)
    assert weighted("https://host/a.tar?version=2") == ("https://host/a.tar?version=2", 1.0)
    (tmp_path / "a=2").mkdir()
    assert weighted(str(tmp_path / "a=2")) == (str(tmp_path / "a=2"), 1.0)
    for entry in ("a.json=x", "a.json=0", "a.json=-1", "a.json=inf"):
        with pytest.raises(UserError, match="is no weight; write a number above 0"):
            weighted(entry)


def test_a_part_is_drawn_without_replacement():
    half = drawn(10, 0.5, seed=0)
    assert len(half) == len(set(half)) == 5
    assert half.tolist() == drawn(10, 0.5, seed=0).tolist() != drawn(10, 0.5, seed=1).tolist()
    assert np.bincount(drawn(10, 2.5, seed=0)).tolist() == [2 + (i in half) for i in range(10)]
    assert drawn(10, 1, seed=0).tolist() == list(range(10))
    assert len(drawn(10, 0.01, seed=0)) == 1 and len(drawn(0, 0.5, seed=0)) == 0


def add_tar(path, count: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            image = io.BytesIO()
            picture("green", (40 + number, 40)).save(image, "png")
            files = {f"{number}.png": image.getvalue(), f"{number}.json": json.dumps({"captions": [f"green number {number}"]}).encode()}
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def test_files_and_tars_are_mixed_by_weight(tmp_path):
    picture("red").save(tmp_path / "red.png")
    (tmp_path / "a.json").write_text(json.dumps([sample(f"<image> a{i}", image="red.png") for i in range(4)]))
    (tmp_path / "b1.jsonl").write_text("".join(json.dumps(sample(f"b{i}")) + "\n" for i in range(6)))
    (tmp_path / "b2.jsonl").write_text(json.dumps(sample("<image> b", image="red.png")))
    add_tar(tmp_path / "c.tar", 4)

    def questions(*weights: str, epochs: int = 1) -> list[str]:
        data = [f"{tmp_path}/{name}{weight}" for name, weight in zip(("a.json", "b*.jsonl", "c.tar"), weights, strict=True)]
        examples = read_conversations(files_of(data), photos_of(data), tmp_path, MIXTURES["align"], epochs)
        # the images of the files are one, and are numbered after those of the tar
        assert [photo.key for photo in examples.photos] == ["0", "1", "2", "3", "red.png"]
        assert all(
            examples.photos[number] == photo
            for i, example in enumerate(examples)
            for number, photo in zip(examples.photo_numbers(i), example.photos, strict=True)
        )
        return [text_of(example.conversations[0][int(".tar:" in example.name)]) for example in examples]

    files = ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "b4", "b5", "b"]
    tar = [f"Green number {i}." for i in range(4)]
    assert questions("", "", "") == tar + files
    assert sorted(questions("=0.5", "", "", epochs=2)) == sorted(tar * 2 + files[:4] + files[4:] * 2)
    mixed = questions("=2", "=0.5", "=0.25")
    assert [mixed.count(name) for name in files[:4]] == [2] * 4
    assert sum(name.startswith("b") for name in mixed) == 3 + 1
    assert sum(name in tar for name in mixed) == 1
    assert mixed == questions("=2", "=0.5", "=0.25")


# ---- large sets


def test_a_large_set_is_rendered_when_it_is_needed(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "ALL_AHEAD", 40)
    monkeypatch.setattr(samples, "SOME_AHEAD", 10)
    rendered = []
    render = samples.render
    monkeypatch.setattr(samples, "render", lambda example, *args: rendered.append(example.name) or render(example, *args))
    examples = dataset_of(tmp_path, *(sample("Hi", "word " * (1 + 7 * i % 50)) for i in range(200)))
    built = build_samples(examples, vlm.renderer)
    assert len(rendered) == len(set(rendered)) == 10
    assert summarize(built)["answers"] == 200
    exact = [len(one.tree) for one in built]
    assert summarize(built)["tokens"] == pytest.approx(sum(exact), rel=0.5)
    # lengths that are only about right group as well as exact ones
    in_order = arrange(built, 4, seed=3)
    assert len(in_order) == 200 and {one.name for one in in_order} == {one.name for one in built}
    lengths = [len(one.tree) for one in in_order]
    padded = sum(4 * max(lengths[i : i + 4]) for i in range(0, 200, 4))
    assert padded < 1.15 * sum(exact)
    again = arrange(build_samples(examples, vlm.renderer), 4, seed=3)
    assert [again[i].name for i in (0, 77, 199)] == [in_order[i].name for i in (0, 77, 199)]


def test_words_of_many_talks_come_from_some(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "MIN_PHOTOS", 1)
    monkeypatch.setattr(vocabulary, "MAX_EXAMPLES", 5)
    picture("red").save(tmp_path / "red.png")
    examples = dataset_of(tmp_path, *(sample("<image>", f"word{'abcdefghijkl'[i]}", image=f"{i}.png") for i in range(12)))

    class Vocabulary:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [1]

    assert words_of(examples, Vocabulary()).photos == (0, 3, 6, 9)


# ---- images that cannot be used


@pytest.fixture
def damaged(tmp_path) -> dict:
    """Arguments of a run over twenty samples, of whose images three cannot be used, and a tar, one of whose photos cannot."""
    for i in range(20):
        picture("red", (40 + i, 40)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").unlink()
    (tmp_path / "4.png").write_bytes((tmp_path / "5.png").read_bytes()[:60])
    (tmp_path / "6.png").write_text("<html>")
    entries = [sample("<image>\nWhat is it?", f"A wall {i}.", id=i, image=f"{i}.png") for i in range(20)]
    entries.append(sample("<image> or <image>?", "Both.", id="both", image=["3.png", "7.png"]))
    (tmp_path / "data.json").write_text(json.dumps(entries))
    add_tar(tmp_path / "photos.tar", 4)
    data = bytearray((tmp_path / "photos.tar").read_bytes())
    data[512:540] = b"x" * 28  # the first member's first bytes
    (tmp_path / "photos.tar").write_bytes(data)
    return {
        "data": [str(tmp_path / "data.json"), str(tmp_path / "photos.tar")],
        "images": tmp_path,
        "out": tmp_path / "run",
        "cache": tmp_path / "cache",
        "batch_size": 4,
    }


def settings(out) -> dict:
    return json.loads((out / "training.json").read_text())["settings"]


def test_a_bad_image_stops_a_run_and_names_its_sample(parts, damaged, tmp_path):
    run = {**damaged, "tower": parts[0], "llm": parts[1]}
    with pytest.raises(UserError, match=r"data.json:3 \(id 3\): .*3.png: no such image; --check finds all"):
        train_command(**run)
    picture("red").save(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"^photos.tar:0: not an image .*--on-bad-image skip"):
        train_command(**run)
    assert not (damaged["out"] / "bad-images.json").exists()
    with pytest.raises(UserError, match="--on-bad-image drop: unknown; known are raise, skip, blank"):
        train_command(**run, on_bad_image="drop")


def test_samples_of_bad_images_are_left_out_also_when_a_run_goes_on(parts, damaged, tmp_path, capsys):
    run = {**damaged, "tower": parts[0], "llm": parts[1], "on_bad_image": "skip"}
    train_command(**run)
    said = capsys.readouterr().out
    assert "bad images: 4, 5 of 25 samples are left out" in said and "3.png: no such image" in said
    assert "of the images 4 could not be used" in said
    found = settings(damaged["out"])
    assert found["samples"] == 20 and found["on_bad_image"] == "skip"
    assert [why.rsplit("/")[-1].split(":")[0] for why in found["bad_images"].values()] == ["3.png", "photos.tar", "4.png", "6.png"]
    # an image that is there by now is left out as before; the cache is another, as one image is
    picture("red").save(tmp_path / "3.png")
    train_command(**run)
    assert settings(damaged["out"]) == found
    (tmp_path / "9.png").unlink()
    with pytest.raises(UserError, match=r"data.json:9 \(id 9\): .*9.png: no such image; this run began with it"):
        train_command(**run)


def test_a_blank_picture_stands_in_for_a_bad_one(parts, vlm, damaged, tmp_path):
    train_command(**damaged, tower=parts[0], llm=parts[1], on_bad_image="blank")
    found = settings(damaged["out"])
    assert found["samples"] == 24 and len(found["bad_images"]) == 4  # of 25, in batches of 4
    features_cache = FeatureCache(tmp_path / "other", vlm.tower, photos_of([damaged["data"][1]])[1.0])
    bad: dict[int, str] = {}
    features_cache.fill([0, 1], on_bad=lambda number, why: bad.update({number: str(why)}))
    assert list(bad) == [0] and features_cache.missing([0, 1]) == [0]
    features_cache.stand_in(bad)
    with torch.no_grad():
        pixels = preprocess(blank(32, vlm.tower.config.image_mean), 32, vlm.tower.config.image_mean, vlm.tower.config.image_std)
        expected = vlm.tower.visual_tokens(pixels)[0]
    assert pixels.abs().max() < 0.01  # half a step of 255, over a deviation of 0.2
    torch.testing.assert_close(features_cache[0].float(), expected, atol=0.01, rtol=0.01)


def test_a_decision_is_of_one_run(tmp_path):
    picture("red").save(tmp_path / "red.png")
    examples = dataset_of(tmp_path, sample("<image>", image="red.png"), sample("<image>", image="gone.png"))
    bad = resolve_bad_images(examples, "skip", tmp_path / "run")
    assert list(bad) == [1]
    # other processes take over what the first one found, and find nothing themselves
    (tmp_path / "red.png").unlink()
    assert resolve_bad_images(examples, "skip", tmp_path / "run", decides=False) == bad
    with pytest.raises(UserError, match="data.json:0: .*red.png: no such image; this run began with it"):
        resolve_bad_images(examples, "skip", tmp_path / "run")
    for other, policy in ((examples, "blank"), (examples.select([1]), "skip")):
        with pytest.raises(UserError, match="bad-images.json: was decided for other data or another --on-bad-image"):
            resolve_bad_images(other, policy, tmp_path / "run")


def test_nothing_left_is_an_error(parts, damaged, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([sample("<image>\nWhat?", image="3.png")]))
    with pytest.raises(UserError, match="--on-bad-image skip: no sample is left, as 1 images cannot be used"):
        train_command(**{**damaged, "data": damaged["data"][:1]}, tower=parts[0], llm=parts[1], on_bad_image="skip")


def test_trees_need_no_pictures_twice(vlm, tmp_path):
    """Conversations about one photo share its placeholders, whatever the number of conversations."""
    add_tar(tmp_path / "photos.tar", 1)
    [photo] = photos_of([str(tmp_path / "photos.tar")])[1.0]
    photo.info["captions"] += ["Another one.", "A third."]
    data = [str(tmp_path / "photos.tar")]
    examples = read_conversations(files_of(data), {1.0: [photo]}, None, MIXTURES["align"])
    [one] = build_samples(examples, vlm.renderer)
    assert len(examples[0].conversations) == 3
    assert one.tree.ids.count(vlm.renderer.image_id) == vlm.tokens_per_image
    assert one.tree == merge([vlm.renderer.render(conversation) for conversation in examples[0].conversations])
