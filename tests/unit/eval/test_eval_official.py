"""Benchmarks in their official files, generated small: what is asked, what it is worth, and what is said about files that are not right."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_fakes import COLOURS, NAMES, FakeEmbedder, FakeText, FakeVLM, Score, evaluate, photos_of, write_tar
from PIL import Image

from sparse_vlm.errors import UserError
from sparse_vlm.eval import run
from sparse_vlm.eval.multiple_choice import MMBench
from sparse_vlm.eval.report import as_json, as_markdown, as_tables, save
from sparse_vlm.eval.task import Data
from sparse_vlm.eval.vqa import SHORT_ANSWER
from sparse_vlm.eval.yes_no import pope_says_yes

LETTER = "Answer with the option's letter from the given choices directly."


class Says(FakeVLM):
    """Answers by a function of the question and of the colour that it sees."""

    def __init__(self, answer: Callable[[str, str], str]) -> None:
        super().__init__()
        self.answer = answer

    def generate(self, conversations: list[Any], max_new_tokens: int) -> list[str]:
        return [self.answer(*self.see(conversation)) for conversation in conversations]


def measure(monkeypatch: pytest.MonkeyPatch, models: dict[str, FakeVLM], task: str, data: Path, **options: Any) -> run.Report:
    class Loader:
        @staticmethod
        def from_pretrained(name: str, device: torch.device, num_tokens: int | None) -> FakeVLM:
            return models[name]

    monkeypatch.setattr("sparse_vlm.vlm.VLM", Loader)
    monkeypatch.setattr("sparse_vlm.vlm.config.parts_of", lambda name: None)
    return evaluate(list(models), [task], data, **{"controls": ["none"], **options})


def picture(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), COLOURS[name]).save(path)


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def colour(text: str, seen: str) -> str:
    return f"The {seen}."


def only(report: run.Report, task: str) -> Any:
    return report.results[task][run.Column(next(iter(report.models)), "none")]


@pytest.fixture
def vqav2(tmp_path: Path) -> Path:
    """Five photos; of photo i, so many annotators said its colour: 1, 2, 3, 4, 10."""
    questions, annotations = [], []
    for i, (name, agreeing) in enumerate(zip(NAMES, (1, 2, 3, 4, 10), strict=True)):
        picture(tmp_path / f"vqav2/val2014/COCO_val2014_{i + 7:012d}.jpg", name)
        questions.append({"image_id": i + 7, "question": "What color is it?", "question_id": 1000 + i})
        answers = [{"answer": name.lower() if k < agreeing else f"odd {k}", "answer_id": k + 1} for k in range(10)]
        kind = "other" if i else "number"
        annotations.append({"question_id": 1000 + i, "image_id": i + 7, "answers": answers, "answer_type": kind})
    write_json(tmp_path / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(tmp_path / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return tmp_path


def test_vqav2(vqav2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Says(colour)
    result = only(measure(monkeypatch, {"m": model}, "vqav2", vqav2), "vqav2")
    assert [row["credit"] for row in result.predictions] == pytest.approx([0.3, 0.6, 0.9, 1, 1])
    assert result.metrics["accuracy"].value == pytest.approx(3.8 / 5)
    assert result.details["number accuracy"].value == pytest.approx(0.3)
    assert result.details["other accuracy"].value == pytest.approx(3.5 / 4)
    assert {text for text, _ in model.asked} == {f"What color is it?\n{SHORT_ANSWER}"}
    assert result.predictions[0]["photo"] == "COCO_val2014_000000000007.jpg"


def test_controls_and_limit_of_files_of_their_own(vqav2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measure(monkeypatch, {"m": Says(colour)}, "vqav2", vqav2, controls=["none", "no-image", "wrong-image"], limit=3)
    values = [result.metrics["accuracy"].value for result in report.results["vqav2"].values()]
    assert values == pytest.approx([(0.3 + 0.6 + 1) / 3, 0, 0])


def test_gqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {}
    for i, name in enumerate(NAMES):
        picture(tmp_path / f"gqa/images/n{i}.jpg", name)
        rows[f"2{i}"] = {"question": "What color?", "imageId": f"n{i}", "answer": name.lower(), "types": {"structural": "query"}}
        rows[f"3{i}"] = {"question": f"Is it {name}?", "imageId": f"n{i}", "answer": "yes", "types": {"structural": "verify"}}
    rows["20"]["answer"] = "the red"
    write_json(tmp_path / "gqa/testdev_balanced_questions.json", rows)
    answer = lambda text, seen: f"{seen}." if "What" in text else "Yes"  # noqa: E731
    result = only(measure(monkeypatch, {"m": Says(answer)}, "gqa", tmp_path), "gqa")
    assert result.metrics["accuracy"].value == pytest.approx(0.9)
    assert result.metrics["accuracy"].units == 5, "questions of one photo are resampled together"
    assert (result.details["open accuracy"].value, result.details["binary accuracy"].value) == (pytest.approx(0.8), 1)


def test_textvqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for i, name in enumerate(NAMES[:2]):
        picture(tmp_path / f"textvqa/train_images/t{i}.jpg", name)
        answers = [f"{name}'s"] * 4 + ["other"] * 6
        rows.append({"question_id": i, "image_id": f"t{i}", "question": "what is the brand?", "answers": answers, "ocr_tokens": ["SALE"]})
    write_json(tmp_path / "textvqa/TextVQA_0.5.1_val.json", {"data": rows})
    model = Says(lambda text, seen: f"{seen} 's" if seen == "Red" else "sale")
    result = only(measure(monkeypatch, {"m": model}, "textvqa", tmp_path), "textvqa")
    assert [row["credit"] for row in result.predictions] == [1, 0]
    assert "SALE" not in model.asked[0][0]


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    """Two photos and three splits; "Is there red?" and "Is there blue?" about each, as POPE's lines hold them."""
    lines = []
    for i, name in enumerate(("Red", "Blue")):
        picture(tmp_path / f"pope/val2014/COCO_val2014_{i:012d}.jpg", name)
        about = {"image": f"COCO_val2014_{i:012d}.jpg"}
        lines += [about | {"text": f"Is there {n} in the image?", "label": "yes" if n == name else "no"} for n in ("Red", "Blue")]
    for split in ("random", "popular", "adversarial"):
        text = "\n".join(json.dumps({"question_id": n} | line) for n, line in enumerate(lines, start=1))
        (tmp_path / f"pope/coco_pope_{split}.json").write_text(text + "\n")
    return tmp_path


def test_pope_in_its_own_files_and_words(pope: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees red and says so, and says of the blue photo that both are there."""
    model = Says(lambda text, seen: "Yes, it is." if seen in text or seen == "Blue" else "There is not, no.")
    result = only(measure(monkeypatch, {"m": model}, "pope-coco", pope), "pope-coco")
    values = {name: metric.value for name, metric in result.metrics.items()}
    # of four questions a split: yes rightly twice, no rightly once, yes wrongly once
    assert values == pytest.approx({"accuracy": 3 / 4, "precision": 2 / 3, "recall": 1, "F1": 4 / 5, "yes-ratio": 3 / 4})
    assert result.details["coco adversarial accuracy"].value == pytest.approx(3 / 4)
    assert len(result.predictions) == 12 and len(model.asked) == 4, "the splits ask the same here, once"
    assert {row["words"] for row in result.predictions} == {"Yes, it is.", "There is not, no."}


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("No", False),
        ("No, there is none.", False),
        ("There is not a dog.", False),
        ("Yes. There is no cat.", True),  # the first sentence alone counts
        ("NO", True),  # neither "No" nor "no"
        ("None of them", True),
        ("Yes", True),
        ("", True),
    ],
)
def test_what_an_answer_means_to_pope(answer: str, yes: bool) -> None:
    """Worked by hand from `evaluate.py` of POPE's authors."""
    assert pope_says_yes(answer) is yes


@pytest.fixture
def aokvqa(tmp_path: Path) -> Path:
    """Three questions about two photos, one of them marked as difficult."""
    rows = []
    for i, name in enumerate(("Red", "Blue", "Blue")):
        picture(tmp_path / f"aokvqa/val2017/{min(i, 1) + 5:012d}.jpg", name)
        row = {"split": "val", "image_id": min(i, 1) + 5, "question_id": f"q{i}", "question": "What colour?", "rationales": ["It is."] * 3}
        people = [name.lower()] * (2 if i == 0 else 4) + ["colour"] * (8 if i == 0 else 6)
        choices = {"choices": list(NAMES[:4]), "correct_choice_idx": NAMES.index(name)}
        rows.append(row | choices | {"direct_answers": people, "difficult_direct_answer": i == 2})
    write_json(tmp_path / "aokvqa/aokvqa_v1p0_val.json", rows)
    return tmp_path


def test_direct_answers_of_aokvqa(aokvqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Says(lambda text, seen: f" {seen}.")
    result = only(measure(monkeypatch, {"m": model}, "aokvqa-val-direct", aokvqa), "aokvqa-val-direct")
    assert [row["credit"] for row in result.predictions] == pytest.approx([2 / 3, 1])
    assert result.metrics["accuracy"].value == pytest.approx(5 / 6)
    assert result.notes == ["1 of 3 questions are marked as difficult and left out"]
    assert {text for text, _ in model.asked} == {f"What colour?\n{SHORT_ANSWER}"}


def test_choices_of_aokvqa_in_its_own_file(aokvqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = only(measure(monkeypatch, {"m": FakeVLM()}, "aokvqa-val", aokvqa), "aokvqa-val")
    assert len(result.predictions) == 3 and result.metrics["accuracy"].value == 1


def test_files_of_pope_that_are_not_right(pope: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pope / "pope/coco_pope_popular.json").write_text('{"image": "a.jpg"}\n')
    with pytest.raises(UserError, match="coco_pope_popular.json, line 1: not in the benchmark's own layout.*'text'"):
        measure(monkeypatch, {"m": Says(colour)}, "pope-coco", pope)
    (pope / "pope/coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match="coco_pope_popular.json: no such file"):
        measure(monkeypatch, {"m": Says(colour)}, "pope-coco", pope)


def test_difficult_questions_alone(aokvqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = aokvqa / "aokvqa/aokvqa_v1p0_val.json"
    write_json(path, [row | {"difficult_direct_answer": True} for row in json.loads(path.read_text())])
    with pytest.raises(UserError, match="every question is left out"):
        measure(monkeypatch, {"m": Says(colour)}, "aokvqa-val-direct", aokvqa)


def test_scienceqa_asks_what_has_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [name.lower() for name in NAMES[:3]]
    problems, numbers = {}, []
    for i, name in enumerate([*NAMES[:3], None]):
        number = str(10 + i)
        row = {"question": "Which?", "choices": options, "answer": i % 3, "hint": "", "image": None, "subject": "natural science"}
        if name:
            picture(tmp_path / f"scienceqa/images/test/{number}/image.png", name)
            row |= {"image": "image.png", "hint": "Look." if i == 1 else ""}
        problems[number] = row
        numbers.append(number)
    write_json(tmp_path / "scienceqa/problems.json", problems | {"99": {}})
    write_json(tmp_path / "scienceqa/pid_splits.json", {"test": numbers, "train": ["99"]})
    model = Says(lambda text, seen: {"Red": "A", "Green": "The answer is B.", "Blue": "blue"}[seen])
    result = only(measure(monkeypatch, {"m": model}, "scienceqa", tmp_path), "scienceqa")
    assert [row["credit"] for row in result.predictions] == [1, 1, 0]
    assert result.predictions[0]["photo"] == "10/image.png"
    assert f"Context: Look.\nWhich?\nA. red\nB. green\nC. blue\n{LETTER}" in {text for text, _ in model.asked}
    assert result.details["natural science accuracy"].value == pytest.approx(2 / 3)


def write_mmbench(root: Path, rotated: bool) -> None:
    heads = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    lines = ["\t".join(heads)]
    for i, name in enumerate(NAMES[:4]):
        stream = io.BytesIO()
        Image.new("RGB", (24, 20), COLOURS[name]).save(stream, "PNG")
        options = [*(other.lower() for other in NAMES[:3]), ""] if i == 0 else [other.lower() for other in NAMES[:4]]
        about = ["Which color?", "a wall" if i == 1 else "", *options, "ABCD"[i], "color" if i else "shade"]
        encoded = base64.b64encode(stream.getvalue()).decode()
        lines.append("\t".join([str(i), *about, encoded]))
        if rotated:
            lines.append("\t".join([str(1_000_000 + i), *about, encoded]))
    path = root / "mmbench/MMBench_DEV_EN.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def option(text: str, wanted: str) -> str:
    """The letter of an option."""
    (line,) = [line for line in text.splitlines() if line[1:] == f". {wanted.lower()}"]
    return line[0]


def test_mmbench_counts_what_is_right_in_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mmbench(tmp_path, rotated=True)
    model = Says(lambda text, seen: "B" if seen == "Green" else "grey" if seen == "Blue" else option(text, seen))
    result = only(measure(monkeypatch, {"m": model}, "mmbench", tmp_path), "mmbench")
    # green: always B, which is right in the first of its four rounds alone; blue: no option at all
    assert result.metrics["circular accuracy"].value == 0.5
    assert result.metrics["accuracy of the first round"].value == 0.75
    assert result.details["shade circular accuracy"].value == 1
    assert result.notes == ["4 of 15 answers name no option or several"]
    assert [row["round"] for row in result.predictions] == [*range(3), *range(4), *range(4), *range(4)]
    assert [row["truth"] for row in result.predictions[3:7]] == ["B", "A", "D", "C"]
    asked = {text for text, _ in model.asked}
    assert f"Which color?\nA. red\nB. green\nC. blue\n{LETTER}" in asked
    assert f"a wall\nWhich color?\nA. green\nB. blue\nC. yellow\nD. red\n{LETTER}" in asked


def test_mmbench_with_and_without_rows_of_rotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rotated in (True, False):
        write_mmbench(tmp_path / str(rotated), rotated)
        found.append(only(measure(monkeypatch, {"m": Says(option)}, "mmbench", tmp_path / str(rotated)), "mmbench").predictions)
    assert found[0] == found[1]
    assert all(row["credit"] for row in found[0])


def test_a_picture_that_is_no_base64_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mmbench(tmp_path, rotated=False)
    path = tmp_path / "mmbench/MMBench_DEV_EN.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2] + "?", *lines[3:]]))
    with pytest.raises(UserError, match=r"MMBench_DEV_EN.tsv:1: its image is not base64"):
        measure(monkeypatch, {"m": Says(option)}, "mmbench", tmp_path)


def test_mmvet_writes_what_its_evaluator_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def about(index: int) -> dict[str, Any]:
        return {"index": index, "q": "What x?" if index < 9 else "What y?", "a": "3", "category": "ocr", "image_inferred": index == 2}

    rows = photos_of(3)
    kept = [(key, tint, {"questions": [about(index)]}) for (key, tint, _), index in zip(rows, (10, 2, 1), strict=True)]
    write_tar(tmp_path / "eval/mmvet.tar", kept)
    report = measure(monkeypatch, {"m": Says(colour)}, "mmvet", tmp_path)
    save(report, tmp_path / "out")
    written = json.loads((tmp_path / "out/mmvet.m.none.json").read_text())
    assert list(written.items()) == [("v1_0", "The Blue."), ("v1_1", "The Green."), ("v1_9", "The Red.")]
    assert only(report, "mmvet").metrics["words an answer"].value == 2
    assert only(report, "mmvet").notes == ["1 of 3 questions stand with an image that was inferred from the order of the set"]


# ---- two sentences and a photo


def pairs_of(i: int) -> dict[str, Any]:
    own, other = NAMES[i % 5].lower(), NAMES[(i + 1) % 5].lower()
    pair = {"type": "swap" if i % 2 else "add", "pos": f"a {own} wall. ", "neg": f"a {other} wall"}
    backwards = {"type": "plurals", "pos": f"a {other} wall", "neg": f"a {own} wall", "vote": 1}
    return {"sugarcrepe": [pair], "valse": [pair | {"vote": 2}, backwards]}


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    write_tar(tmp_path / "eval/coco_vqa.tar", [(key, tint, info | pairs_of(i)) for i, (key, tint, info) in enumerate(photos_of(10))])
    return tmp_path


def test_towers_choose_the_nearer_sentence(sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"good": FakeEmbedder("good"), "blind": FakeEmbedder("blind", 1.0)}
    monkeypatch.setattr(run, "tower_embedder", lambda name, control, count, teacher: made[name])
    monkeypatch.setattr(run, "text_side", lambda text, teacher: FakeText())
    report = evaluate(["good", "blind"], ["sugarcrepe", "valse"], sentences, text="words")
    for task in ("sugarcrepe", "valse"):
        good, blind = (report.results[task][run.Column(name)] for name in ("good", "blind"))
        assert good.metrics["accuracy"].value == 1, "a foil that its annotators do not call one is not counted"
        assert blind.metrics["accuracy"].value < 0.9
        assert len(good.predictions) == 10
        assert set(good.details) == {"swap accuracy", "add accuracy"}


def test_language_models_choose_the_likelier_caption(sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(FakeVLM):
        def score(self, conversations: list[Any], answers: list[list[str]]) -> list[list[Score]]:
            seen = [self.see(conversation)[1].lower() for conversation in conversations]
            return [
                [Score(-9.0, -1.0) if tint in choice else Score(-8.0, -2.0) for choice in choices]
                for tint, choices in zip(seen, answers, strict=True)
            ]

    report = measure(monkeypatch, {"m": Reader()}, "valse-captions", sentences, controls=["none", "wrong-image"])
    seeing, wrong = report.results["valse-captions"].values()
    assert seeing.metrics["accuracy"].value == 1
    assert seeing.predictions[0]["scores"] == [-1, -2], "the mean a token decides, not the sum"
    # half of ten photos on is the photo of the same colour
    assert wrong.metrics["accuracy"].value == 1


def test_vsr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for i, (key, tint, info) in enumerate(photos_of(4)):
        true = {"statement": f"The {NAMES[i].lower()} wall is left.", "label": 1, "relation": "left of"}
        rows.append((key, tint, info | {"vsr": [true, {"statement": "The mauve wall is left.", "label": 0, "relation": "left of"}]}))
    write_tar(tmp_path / "eval/coco_vqa.tar", rows)
    model = FakeVLM()
    result = only(measure(monkeypatch, {"m": model}, "vsr", tmp_path), "vsr")
    assert result.metrics["accuracy"].value == 1
    assert result.details == {}
    assert f"Is this statement true? The red wall is left.\n{SHORT_ANSWER}" in {text for text, _ in model.asked}
    assert result.predictions[0]["split"] == "left of"


# ---- two models


def test_two_models_are_compared_on_the_same_photos(vqav2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"sees": Says(colour), "blind": Says(lambda text, seen: "red"), "mute": Says(lambda text, seen: "")}
    report = measure(monkeypatch, models, "vqav2", vqav2, controls=["none", "no-image"])
    document = as_json(report)
    found = {(row["model"], row["over"], row["control"]): row for row in document["paired"]}
    assert set(found) == {(b, a, c) for a, b in (("sees", "blind"), ("sees", "mute"), ("blind", "mute")) for c in ("none", "no-image")}
    row = found["blind", "sees", "none"]
    assert row["value"] == pytest.approx((0.3 - 3.8) / 5)
    assert row["low"] < row["value"] < row["high"] <= 0
    assert found["mute", "blind", "none"]["value"] == pytest.approx(-0.3 / 5)
    assert found["mute", "blind", "no-image"]["high"] == 0, "neither is ever worth more than the other but in one photo"
    assert "| task | metric | blind − sees | mute − sees | blind, no-image − sees |" in as_markdown(report)
    assert [str(column.header) for column in as_tables(report)[1].columns][2] == "blind − sees"
    single = measure(monkeypatch, {"sees": models["sees"]}, "vqav2", vqav2)
    assert as_json(single)["paired"] == [] and len(as_tables(single)) == 1


def test_what_is_finished_outlives_an_error(vqav2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture_of_the_second = vqav2 / "vqav2/val2014/COCO_val2014_000000000008.jpg"
    folder = tmp_path / "out"
    write_mmbench(vqav2, rotated=False)

    def keep(report: run.Report) -> None:
        save(report, folder)
        picture_of_the_second.write_bytes(b"no picture")

    model = Says(lambda text, seen: "A")
    monkeypatch.setattr("sparse_vlm.vlm.VLM.from_pretrained", lambda name, device, num_tokens: model)
    monkeypatch.setattr("sparse_vlm.vlm.config.parts_of", lambda name: None)
    with pytest.raises(UserError, match="COCO_val2014_000000000008.jpg: not an image"):
        evaluate(["m"], ["mmbench", "vqav2"], vqav2, controls=["none"], on_result=keep)
    (row,) = json.loads((folder / "report.json").read_text())["results"]
    assert row["task"] == "mmbench"
    assert len((folder / "mmbench.m.none.jsonl").read_text().splitlines()) == 15
    assert (folder / "table.md").read_text().startswith("| task | metric | m |")


# ---- mistakes


def test_mistakes(vqav2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(task: str, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            measure(monkeypatch, {"m": Says(colour)}, task, vqav2, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "gqa/testdev_balanced_questions.json: no such file; --data names the folder that holds gqa/" in said("gqa")
    (vqav2 / "vqav2/val2014/COCO_val2014_000000000009.jpg").unlink()
    assert "1 of 5 images are not there, such as " in said("vqav2")
    questions = vqav2 / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
    questions.write_text('{"questions": [{"image_id": 7}]}')
    assert "not in the benchmark's own layout, which docs/evaluation.md shows (KeyError('question_id'))" in said("vqav2")
    questions.write_text('{"questions": []}')
    assert "fewer than two images are asked about" in said("vqav2")
    for text, why in (("<image> or not?", "its text holds <image>"), ("Half \ud83d", "its text holds half of a character")):
        rows = [{"image_id": i + 7, "question": text if i == 2 else "What?", "question_id": 1000 + i} for i in range(5)]
        write_json(questions, {"questions": rows})
        picture(vqav2 / "vqav2/val2014/COCO_val2014_000000000009.jpg", NAMES[2])
        assert f"{questions}: question 1002: {why}" in said("vqav2")
    questions.write_text("{")
    assert "not a readable json file" in said("vqav2")
    write_mmbench(vqav2, rotated=False)
    table = vqav2 / "mmbench/MMBench_DEV_EN.tsv"
    table.write_text(table.read_text().replace("\tanswer\t", "\ttruth\t"))
    assert "not in the benchmark's own layout, which docs/evaluation.md shows (KeyError('answer'))" in said("mmbench")
    table.write_text(
        table.read_text().replace("\ttruth\t", "\tanswer\t").replace("\tA\tcolor", "\tE\tcolor").replace("\tA\tshade", "\tE\tshade")
    )
    assert "question 0: its answer 'E' is none of its options A, B, C" in said("mmbench")


def test_a_byte_order_mark_and_cells_of_nan_say_nothing(tmp_path: Path) -> None:
    write_mmbench(tmp_path, rotated=False)
    plain = MMBench().items(Data(tmp_path))
    table = tmp_path / "mmbench/MMBench_DEV_EN.tsv"
    first, *others = table.read_text().splitlines()
    cells = [line.split("\t") for line in others]
    text = "\n".join("\t".join(cell or "nan" for cell in row) for row in cells)
    table.write_text(f"{first}\n{text}\n", encoding="utf-8-sig")
    items = MMBench().items(Data(tmp_path))
    assert [item.text for item in items] == [item.text for item in plain]
    assert [len(item.truth["options"]) for item in items if item.about["round"] == 0] == [3, 4, 4, 4]
