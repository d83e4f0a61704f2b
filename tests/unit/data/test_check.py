"""`sparse-vlm train --check`: everything that is wrong with a data set, without a model."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from tiny_vlm import picture, save_llm, save_tower

from sparse_vlm.cli.train import train as train_command
from sparse_vlm.data import check
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import formats
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.config import parts_of
from sparse_vlm.vlm.tokenization import load_renderer


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Tower and LLM without a weight."""
    folder = tmp_path_factory.mktemp("parts")
    save_tower(folder / "tower")
    save_llm(folder / "llm")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return {"tower": str(folder / "tower"), "llm": str(folder / "llm")}


def sample(question: str, answer: str = "A wall.", **more: object) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def good(number: int) -> dict:
    return sample("<image>\nWhat is it?", f"A wall {number}.", id=f"good {number}", image="red.png")


@pytest.fixture
def run(parts, tmp_path, capsys):
    """Checks samples; gives exit code and what was said."""
    picture("red").save(tmp_path / "red.png")
    picture("blue").save(tmp_path / "blue.png")

    def checked(*samples: object, lines: str = "", as_json: bool = True) -> tuple[int, object]:
        (tmp_path / "data.json").write_text(json.dumps(samples))
        (tmp_path / "more.jsonl").write_text(lines)
        data = [str(tmp_path / "data.json"), *([str(tmp_path / "more.jsonl=0.01")] if lines else [])]
        capsys.readouterr()
        with pytest.raises(Exception) as raised:  # typer's way to an exit code
            train_command(data=data, images=tmp_path, check=True, as_json=as_json, threads=2, **parts)
        said = capsys.readouterr().out
        return raised.value.exit_code, json.loads(said) if as_json else said

    return checked


def test_a_clean_set_is_counted(run, parts, tmp_path):
    code, found = run(good(0), good(1), sample("<image> or <image>?", "Both.", id="two", image=["red.png", "blue.png"]), sample("Hi", id=3))
    assert code == 0 and found["problems"] == {} and found["notes"] == {}
    assert {name: found[name] for name in ("samples", "text_only", "several_pictures", "pictures", "conversations")} == {
        "samples": 4,
        "text_only": 1,
        "several_pictures": 1,
        "pictures": 2,
        "conversations": 4,
    }
    tokens = found["tokens"]
    assert tokens["image"]["sum"] == 4 * 5 and tokens["image"]["max"] == 10 and tokens["image"]["min"] == 0
    assert tokens["all"]["sum"] == tokens["image"]["sum"] + tokens["text"]["sum"]
    # every byte of an answer is a token, and the end of the turn is one
    assert tokens["with loss"]["sum"] == 2 * (len("A wall 0.") + 1) + len("Both.") + 1 + len("A wall.") + 1
    assert sum(bar["samples"] for bar in found["histogram"]) == 4
    renderer, _ = load_renderer(**parts)
    text = renderer.text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A wall."}])
    assert tokens["all"]["min"] == len(renderer.tokens(text)) - 2  # the last of the answer is only predicted, the line break not even that


def test_every_problem_is_named_not_only_the_first(run, tmp_path):
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:50])
    (tmp_path / "page.png").write_text("<html>")
    samples = [
        good(0),
        "text",
        {"id": "role", "conversations": [{"from": "bot", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]},
        {"id": "order", "image": "red.png", "conversations": good(0)["conversations"][::-1]},
        sample("<image>", id="stray"),
        sample("Hi", "See <image>", id="mark"),
        sample("<image> and <image>", "", id="two at once", image="red.png"),
        sample("<image>", "Gone.", id="gone", image="gone.png"),
        sample("<image>", "Cut.", id="cut", image=["cut.png"]),
        sample("<image>", "Gone too.", id="again", image="gone.png"),
        sample("<image>", "A page.", id="page", image="page.png"),
        sample("Hi", "long " * 120, id="long"),
        good(0),
        {**good(1), "id": "good 0"},
        sample("Hi", "He said <|im_end|> and went.", id="markup"),
        sample("<video>What is it?", id="clip", video="a.mp4"),
        sample("Hi", "A wall \ud83d", id="half"),
        sample("<image>", image="../red.png", id="out"),
    ]
    code, found = run(*samples, lines=f"{json.dumps(good(7))}\n{{\n{json.dumps(good(8))}\n")
    assert code == 1 and found["samples"] == 21
    name = str(tmp_path / "data.json")

    def cases(group: str) -> dict[str, list[tuple[str, str]]]:
        return {kind: [(case["sample"], case["text"]) for case in entry["cases"]] for kind, entry in found[group].items()}

    gone, cut, page = (str(tmp_path / file) for file in ("gone.png", "cut.png", "page.png"))
    assert cases("problems") == {
        "unreadable line": [(f"{tmp_path / 'more.jsonl'}:2", cases("problems")["unreadable line"][0][1])],
        "not a sample": [(f"{name}:1", "a str, not an object")],
        "wrong role": [(f"{name}:2 (id role)", "turn 0 is from 'bot'; known are human, user, gpt, assistant, system")],
        "turns that do not alternate": [(f"{name}:3 (id order)", "turn 0 is from 'gpt'; human and gpt must alternate, human first")],
        "image marks": [
            (f"{name}:4 (id stray)", "1 <image> marks for 0 images"),
            (f"{name}:6 (id two at once)", "2 <image> marks for 1 images"),
        ],
        "mark in an answer": [(f"{name}:5 (id mark)", "turn 1, from 'gpt', holds <image>")],
        "other media": [
            (f"{name}:15 (id clip)", "turn 0 shows <video>, which is not learnt from"),
            (f"{name}:15 (id clip)", "holds 'video', which is not read"),
        ],
        "broken text": [(f"{name}:16 (id half)", "turn 1 holds half of a character (a surrogate alone)")],
        "outside the image folder": [(f"{name}:17 (id out)", f"'../red.png' leads out of {tmp_path}")],
        "empty answer": [(f"{name}:6 (id two at once)", "turn 1, from 'gpt', is empty")],
        "missing image": [(f"{name}:7 (id gone)", f"{gone}: no such image (and 1 more samples show it)")],
        "broken image": [
            (f"{name}:8 (id cut)", f"{cut}: truncated or damaged image (image file is truncated)"),
            (f"{name}:10 (id page)", f"{page}: not an image (or in none of the formats {', '.join(formats())})"),
        ],
        "repeated sample": [(f"{name}:12 (id good 0)", f"is {name}:0 (id good 0) once more")],
        "label mask": [
            (f"{name}:14 (id markup)", "the assistant's turn 1 contains the text '<|im_end|>', which ends a turn; leave it out")
        ],
        "too long": [(f"{name}:11 (id long)", cases("problems")["too long"][0][1])],
    }
    assert cases("problems")["too long"][0][1].endswith(" tokens, but the LLM reads 512")
    assert cases("notes") == {"repeated id": [(f"{name}:13 (id good 0)", f"has the id of {name}:0 (id good 0)")]}
    assert all(entry["count"] == len(entry["cases"]) and entry["what to do"] for entry in found["problems"].values())
    assert set(check.KINDS) == set(found["problems"]), "every kind is tried here"


def test_the_page_shows_the_first_few_of_a_kind(run):
    code, said = run(*(good(i) for i in range(3)), *(sample("<image>", id=i) for i in range(9)), as_json=False)
    assert code == 1
    assert "data: 12 samples (0 of text alone, 0 of several images), 3 conversations, 1 images" in said
    assert "9 problems, in 9 samples:" in said
    assert "  image marks: 9; write <image> in a human's turn once for each image" in said
    assert "data.json:7 (id 4): 1 <image> marks for 0 images" in said and "data.json:8 (id 5)" not in said
    assert "and 4 more; --json lists all" in said
    assert "samples by their tokens; the LLM reads 512:" in said and "##" in said
    code, said = run(good(0), as_json=False)
    assert code == 0 and "no problems" in said


def test_the_command_exits_with_1_and_starts_no_model(command, parts, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([sample("<image>")]))
    where = ["--data", str(tmp_path / "data.json"), "--tower", parts["tower"], "--llm", parts["llm"]]
    done = command("train", "--check", "--json", *where)
    assert done.returncode == 1, done.stderr
    assert list(json.loads(done.stdout)["problems"]) == ["image marks"]
    (tmp_path / "data.json").write_text(json.dumps([sample("<image>", image="red.png")]))
    with pytest.raises(UserError, match="say where images lie with --images"):
        train_command(data=where[1:2], check=True, **parts)
    with pytest.raises(UserError, match="--out is missing"):
        train_command(data=["x"])
    with pytest.raises(UserError, match="--json needs --check"):
        train_command(data=["x"], out=tmp_path, as_json=True)


def test_what_is_read_is_what_the_model_reads(tmp_path):
    """The renderer without weights says what the VLM's own says, and a VLM's folder names its parts."""
    tower, llm = save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm")
    vlm = VLM.build(tower, llm, dtype=torch.float32)
    renderer, context = load_renderer(tower, llm)
    assert context == vlm.model.config.text_config.max_position_embeddings == 512
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A wall."},
    ]
    assert renderer.render(conversation) == vlm.renderer.render(conversation)
    vlm.save_pretrained(tmp_path / "vlm")
    assert parts_of(tmp_path / "vlm") == (tower, llm, None, "mlp")
    with pytest.raises(UserError, match="4 tokens only"):
        load_renderer(tower, llm, num_tokens=9)
    shutil.rmtree(tmp_path / "vlm")
    with pytest.raises(UserError, match="vlm: not a tower folder"):
        (tmp_path / "vlm").mkdir()
        load_renderer(str(tmp_path / "vlm"), llm)


def test_parts_are_found_from_any_folder_and_after_a_move(tmp_path, monkeypatch):
    """A VLM that was made of `tower` and `llm`, as seen from where it was made."""
    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    save_tower(made / "tower"), save_llm(made / "llm"), elsewhere.mkdir()
    monkeypatch.chdir(made)
    VLM.build("tower", "llm", dtype=torch.float32).save_pretrained("runs/vlm")
    assert json.loads((made / "runs" / "vlm" / "vlm.json").read_text())["ways"] == {"tower": "../../tower", "llm": "../../llm"}, "by name"
    assert parts_of("runs/vlm")[:2] == ("tower", "llm"), "as they were named"
    monkeypatch.chdir(elsewhere)
    save_tower(elsewhere / "tower", tokens=9)  # another of that name
    assert parts_of(made / "runs" / "vlm")[:2] == (str(made / "tower"), str(made / "llm"))
    found = VLM.from_pretrained(made / "runs" / "vlm", dtype=torch.bfloat16, fold=False)
    assert found.dtype == torch.bfloat16 != found.tower.initial_roi.weight.dtype
    found.save_pretrained("again")
    assert parts_of("again")[:2] == (str(made / "tower"), str(made / "llm"))
    made.rename(tmp_path / "moved")
    assert parts_of(tmp_path / "moved" / "runs" / "vlm")[0] == str(tmp_path / "moved" / "tower")
    (tmp_path / "moved" / "llm").rename(tmp_path / "lost")
    with pytest.raises(UserError, match="llm: no such folder"):
        VLM.from_pretrained(tmp_path / "moved" / "runs" / "vlm", fold=False)


def test_the_histogram_bears_one_very_long_sample():
    values = np.array([*range(100, 200), 100_000])
    bins = check.histogram_of(values)
    assert len(bins) == check.BINS and sum(count for *_, count in bins) == 101
    assert bins[0][0] == 100 and bins[-1][1] == 100_000 and max(count for *_, count in bins) < 12
    assert all(low == before + 1 for (_, before, _), (low, _, _) in itertools.pairwise(bins))
    assert check.histogram_of(np.array([], dtype=int)) == [] and check.histogram_of(np.array([7]))[0] == (7, 7, 1)
