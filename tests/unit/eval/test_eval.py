"""Tasks and runs on small generated photos: colours stand for classes, a colour-blind model must score worse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fakes import NAMES, FakeEmbedder, FakeText, FakeVLM, Score, asked, evaluate, photos_of, write_tar
from PIL import Image

from sparse_vlm.errors import UserError
from sparse_vlm.eval import run
from sparse_vlm.eval.agreement import SETS as AGREEMENT_SETS
from sparse_vlm.eval.answers import Question, conversation, generated, scored, shown_photo
from sparse_vlm.eval.captions import PROMPT
from sparse_vlm.eval.embedders import Features, tower_embedder
from sparse_vlm.eval.probes import FOLDS, fold_of
from sparse_vlm.eval.report import as_json, as_markdown, as_tables, save
from sparse_vlm.eval.task import CONTROLS, Data
from sparse_vlm.eval.tasks import TASKS
from sparse_vlm.eval.vqa import SHORT_ANSWER, first_number
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.images.preprocess import preprocess
from sparse_vlm.vlm.config import parts_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for task in ("imagenet", "cifar10"):
        write_tar(root / TASKS[task].files[0], photos_of(20))
    write_tar(root / "eval/flickr8k_retrieval.tar", photos_of(5))
    write_tar(root / "eval/coco_vqa.tar", [(key, colour, {**info, **asked(i)}) for i, (key, colour, info) in enumerate(photos_of(12))])
    write_tar(root / "train/imagen_200x5.tar", photos_of(50))
    write_tar(root / "train/nips2017_imagenet_like.tar", photos_of(50))
    sets = ("imagenette", "imagewoof", "pacs")
    write_tar(
        root / "train/misc_diverse.tar",
        [(f"{name}_{key}", colour, {**info, "set": name}) for name in sets for key, colour, info in photos_of(40)],
    )
    return root


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeEmbedder]:
    made = {"good": FakeEmbedder("good"), "blind": FakeEmbedder("blind", 1.0), "teacher": FakeEmbedder("teacher")}
    monkeypatch.setattr(run, "tower_embedder", lambda name, control, count, teacher: made[name])
    monkeypatch.setattr(run, "teacher_embedder", made.__getitem__)
    monkeypatch.setattr(run, "text_side", lambda text, teacher: FakeText())
    return made


IMAGE_TASKS = ["imagenet", "cifar10", "flickr8k", "coco", "cosine", "knn", "probe"]


def test_image_tasks(data: Path, fakes: dict[str, FakeEmbedder], tmp_path: Path) -> None:
    report = evaluate(["good", "blind"], IMAGE_TASKS, data, teacher="teacher")
    good, blind, teacher = (run.Column(name) for name in ("good", "blind", "teacher"))
    for task, metric in (("imagenet", "top-1"), ("cifar10", "top-1"), ("knn", "pacs top-1"), ("probe", "imagen-200 top-1")):
        found = report.results[task]
        assert found[good].metrics[metric].value == found[teacher].metrics[metric].value == 1.0, task
        assert found[blind].metrics[metric].value < 0.9, task
    assert report.results["flickr8k"][good].metrics["text to image R@1"].value == 1.0
    assert report.results["flickr8k"][good].metrics["image to text R@1"].value == 1.0
    # twelve photos of five colours: up to three share their words, and so their six captions
    assert report.results["coco"][good].metrics["image to text R@5"].value == 1.0
    assert report.results["coco"][blind].metrics["text to image R@1"].value < 0.5
    assert teacher not in report.results["cosine"], "the teacher is not compared with itself"
    assert report.results["cosine"][good].metrics["Flickr8k centred"].value == pytest.approx(1)
    assert set(report.results["cosine"][good].metrics) == {f"{name} {kind}" for name in AGREEMENT_SETS for kind in ("plain", "centred")}
    kept = report.results["cosine"][blind].metrics
    assert kept["ImageNet centred"].value < kept["ImageNet plain"].value < 1

    assert report.of_teacher("imagenet", good, "top-1").value == 1.0
    assert report.of_teacher("imagenet", teacher, "top-1") is None
    assert report.of_teacher("cosine", good, "ImageNet plain") is None, "a cosine is not a share of the teacher's"
    assert report.summary(good)["average"] == 1.0
    assert report.summary(blind)["lowest"] < report.summary(blind)["average"] < 0.9

    photos = {file for task in IMAGE_TASKS for file in TASKS[task].files}
    in_files = sum(len(PhotoSet(data / file)) for file in photos)
    assert fakes["good"].seen == in_files + 1, "every photo is embedded once, however many tasks look at it, and one is timed"
    time = report.models["good"]["ms"]
    assert 0 < time["low"] <= time["median"] <= time["high"]
    check_outputs(report, tmp_path, ["good", "blind", "teacher"])


def test_a_zoom_tells_apart_what_is_in_one_picture(data: Path, fakes: dict[str, FakeEmbedder]) -> None:
    (result,) = evaluate(["good"], ["zoom"], data, text="words").results["zoom"].values()
    # sixteen photos of one colour each in an image: told apart when zoomed in, one answer for all of them on the whole
    assert len(result.predictions) == 16
    assert len({answer["whole"] for answer in result.predictions}) == 1
    assert all(answer["zoomed"] == answer["zoomed, small"] == answer["label"] for answer in result.predictions)
    assert result.metrics["zoomed top-5"].value == 1.0


def check_outputs(report: run.Report, folder: Path, titles: list[str]) -> None:
    document = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert document["format"] == "sparse-vlm/eval/1"
    assert {row["task"] for row in document["results"]} == set(report.results)
    for row in document["results"]:
        for metric in row["metrics"].values():
            assert metric["low"] <= metric["value"] + 1e-9 and metric["value"] <= metric["high"] + 1e-9
    assert [str(column.header) for column in as_tables(report)[0].columns][2:] == titles
    markdown = as_markdown(report)
    assert f"| task | metric | {' | '.join(titles)} |" in markdown
    assert all(f"* {name}: {task.protocol}." in markdown for name, task in report.tasks.items())
    save(report, folder)
    assert json.loads((folder / "report.json").read_text()) == as_json(report)
    assert (folder / "table.md").read_text() == markdown
    assert not (folder / "tokens.png").exists(), "every model has one number of tokens"
    for task, of_task in report.results.items():
        for column, result in of_task.items():
            name = ".".join(filter(None, [task, column.model, column.control]))
            assert [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] == result.predictions


def test_ratio_in_the_document(data: Path, fakes: dict[str, FakeEmbedder]) -> None:
    document = as_json(evaluate(["blind"], ["imagenet"], data, teacher="teacher"))
    (blind,) = [row for row in document["results"] if row["model"] == "blind"]
    top1 = blind["metrics"]["top-1"]
    assert top1["of_teacher"]["value"] == top1["value"] < 1
    assert document["of_teacher"]["blind"]["lowest_metric"] == "top-1"
    (teacher,) = [row for row in document["results"] if row["model"] == "teacher"]
    assert "of_teacher" not in teacher["metrics"]["top-1"]


def test_limit_keeps_the_classes(data: Path, fakes: dict[str, FakeEmbedder]) -> None:
    report = evaluate(["good"], ["imagenet"], data, text="words", limit=4)
    result = report.results["imagenet"][run.Column("good")]
    assert result.metrics["top-1"].units == 4
    assert len(result.predictions) == 4
    assert len(result.predictions[0]["top5"]) == 5
    assert report.teacher is None and report.summary(run.Column("good")) is None


def test_folds_depend_on_the_key_alone() -> None:
    assert [fold_of(f"photo_{i}") for i in range(6)] == [fold_of(f"photo_{i}") for i in range(6)]
    sizes = np.bincount([fold_of(f"imagen_{i}") for i in range(1000)], minlength=FOLDS)
    assert sizes.min() > 150


# ---- models that answer in words


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch) -> FakeVLM:
    made = FakeVLM()

    class Loader:
        @staticmethod
        def from_pretrained(name: str, device: torch.device, num_tokens: int | None) -> FakeVLM:
            return made

    monkeypatch.setattr("sparse_vlm.vlm.VLM", Loader)
    monkeypatch.setattr("sparse_vlm.vlm.config.parts_of", lambda name: None)
    return made


def test_vlm_tasks_beside_their_controls(data: Path, vlm: FakeVLM, tmp_path: Path) -> None:
    report = evaluate(["talker"], ["captions", "pope", "aokvqa", "existence", "counting"], data)
    seeing, blind, wrong = (run.Column("talker", control) for control in CONTROLS)
    for task in ("pope", "existence", "aokvqa", "counting"):
        accuracy = {column: result.metrics["accuracy"].value for column, result in report.results[task].items()}
        assert accuracy[seeing] == 1.0, task
        assert accuracy[blind] < 0.7, task
        assert accuracy[wrong] < 0.7, task
        for control in (blind, wrong):
            more = report.over_control(task, control, "accuracy")
            assert more.value == accuracy[seeing] - accuracy[control] > 0 and more.low <= more.value <= more.high
    assert report.over_control("pope", seeing, "accuracy") is None
    assert "photo +" in as_markdown(report)
    pope = report.results["pope"][seeing]
    assert pope.metrics["yes-ratio"].value == 0.5
    assert pope.details["coco popular F1"].value == 1.0
    assert len(pope.predictions) == 48
    cider = {column: result.metrics["CIDEr"].value for column, result in report.results["captions"].items()}
    assert cider[seeing] > max(cider[blind], cider[wrong])
    assert any(note.startswith("tokenizer: ") for note in report.results["captions"][seeing].notes)
    assert "1 different captions of 12 photos, 3.0 words each" in report.results["captions"][blind].notes
    assert report.results["counting"][seeing].notes == ["0 of 12 answers hold no number"]
    check_outputs(report, tmp_path, ["talker", "talker, no-image", "talker, wrong-image"])


def test_of_choices_that_is_taken_whose_mean_likelihood_is_highest(data: Path, vlm: FakeVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens at -1 each are likelier, token by token, than one at -2, which is the likelier in all."""
    by_hand = [Score(-3.0, -1.0), *[Score(-2.0, -2.0)] * 3]
    monkeypatch.setattr(vlm, "score", lambda conversations, answers: [by_hand[: len(choices)] for choices in answers])
    (result,) = evaluate(["talker"], ["aokvqa"], data, controls=["none"]).results["aokvqa"].values()
    assert all(row["answer"] == row["choices"][0] for row in result.predictions)
    right = [row["choices"].index(row["truth"]) == 0 for row in result.predictions]
    assert 0 < sum(right) < len(right) and result.metrics["accuracy"].value == pytest.approx(sum(right) / len(right))
    # of four choices at -1, -2, -2 and -2 the first has e / (e + 3) and each other 1 / (e + 3)
    shares = [(math.e if first else 1) / (math.e + 3) for first in right]
    assert result.metrics["probability"].value == pytest.approx(sum(shares) / len(shares))


def test_each_question_is_asked_once(data: Path, vlm: FakeVLM) -> None:
    evaluate(["talker"], ["pope"], data, controls=["none"])
    assert len(vlm.asked) == 24, "POPE's two splits hold the same questions"
    vlm.asked.clear()
    evaluate(["talker"], ["pope"], data, controls=["no-image"])
    assert len(vlm.asked) == 5
    assert {colour for _, colour in vlm.asked} == {None}


def test_answers_come_in_the_order_of_the_questions(data: Path) -> None:
    photos = Data(data).photos("eval/coco_vqa.tar")[:7]
    questions = [Question(i, "What colour?" if i % 2 else "What colour is this wall?", tuple(NAMES)) for i in (6, 0, 3, 3, 1)]
    seen: list[tuple[int, int]] = []
    on_answers = lambda done, total: seen.append((done, total))  # noqa: E731
    found = generated(FakeVLM(), photos, questions, "none", 8, on_answers)
    assert found == [f"A {NAMES[question.photo % 5].lower()} photo." for question in questions]
    assert seen == [(0, 4), (4, 4)]
    best = [int(np.argmax([score.mean for score in row])) for row in scored(FakeVLM(), photos, questions, "wrong-image", on_answers)]
    assert best == [(question.photo + 3) % 7 % 5 for question in questions]


def test_controls() -> None:
    assert [shown_photo(i, 5, "wrong-image") for i in range(5)] == [2, 3, 4, 0, 1]
    assert shown_photo(3, 5, "none") == 3
    assert shown_photo(3, 5, "no-image") is None
    assert conversation(None, "Why?") == [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    with pytest.raises(ValueError, match="no other photo"):
        generated(FakeVLM(), [object()], [Question(0, "What?")], "wrong-image", 8, lambda done, total: None)


def test_questions_are_asked_as_they_were_trained() -> None:
    from sparse_vlm.data.conversations import CAPTION_PROMPTS
    from sparse_vlm.data.conversations import SHORT_ANSWER as TRAINED

    assert CAPTION_PROMPTS[0] == PROMPT
    assert SHORT_ANSWER == TRAINED


@pytest.mark.parametrize(
    ("answer", "number"), [("3", 3), ("There are 12 dogs.", 12), ("Two of 3", 2), ("None", None), ("someone", None), ("ten", 10)]
)
def test_first_number(answer: str, number: int | None) -> None:
    assert first_number(answer) == number


# ---- the real thing, small


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparse_vlm.tower import SparseFormer, SparseFormerConfig, UnitConfig

    torch.manual_seed(0)
    config = SparseFormerConfig(
        units=(UnitConfig(64, ("SAMPLING_M", "ATTN", "MLP")),),
        num_latent_tokens=4,
        embed_dim=16,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
        image_size=32,
        conv_dim=16,
        head="avg",
        token_init="each",
    )
    folder = tmp_path_factory.mktemp("tower")
    SparseFormer(config).save_pretrained(folder)
    return folder


def test_a_tower_as_embedder(tower_folder: Path, data: Path) -> None:
    from sparse_vlm.tower import SparseFormer

    embedder = tower_embedder(str(tower_folder))
    photos = PhotoSet(data / "eval/flickr8k_retrieval.tar")
    found = Features(None, lambda what, done, total: None).images(embedder, photos)
    tower = SparseFormer.from_pretrained(tower_folder)
    with torch.no_grad():
        expected = tower(preprocess([photo.load() for photo in photos], 32, (0.5,) * 3, (0.25,) * 3)).image_embeds
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=0.05 * float(expected.abs().max()))
    assert (embedder.width, embedder.tokens, embedder.kind) == (16, 4, "tower")
    assert embedder.macs > 0


def test_a_tower_kept_from_looking(tower_folder: Path, tmp_path: Path) -> None:
    from sparse_vlm.tower import SparseFormer

    config = SparseFormer.from_pretrained(tower_folder).config
    blind = tuple(replace(unit, ops=("ATTN", "MLP")) for unit in config.units)
    SparseFormer(replace(config, units=blind)).save_pretrained(tmp_path / "blind")
    pictures = [Image.new("RGB", (32, 32), name) for name in ("red", "blue")]
    seeing, kept = (tower_embedder(str(tower_folder), control) for control in ("none", "no-looks"))
    assert not torch.equal(*seeing.encode(seeing.pixels(pictures)))
    assert torch.equal(*kept.encode(kept.pixels(pictures))), "without looks nothing of the image is left in this tower"
    assert kept.name == f"{seeing.name}, no-looks"
    with pytest.raises(UserError, match="blind does not sample"):
        tower_embedder(str(tmp_path / "blind"), "no-looks")


def test_command(command: Any, tower_folder: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["eval", "--model", str(tower_folder), "--tasks", "knn", "--data", str(data), "--threads", "1"]
    done = command(*arguments, "--json", "-", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["models"][str(tower_folder)]["tokens"] == 4
    assert document["results"][0]["metrics"]["pacs top-1"]["photos"] == 40
    assert (tmp_path / "out" / "table.md").is_file()
    done = command(*arguments, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert "pacs top-1" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["results"] == document["results"]


def test_help_names_every_task() -> None:
    from sparse_vlm.cli.eval import TASK_NAMES

    assert all(name in TASK_NAMES for name in TASKS)


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"tasks": ["imagenot"]}, "imagenot: no such task; there are imagenet, cifar10"),
        ({"tasks": ["imagenet"], "teacher": None}, "imagenet compares photos with words; give --text, or --teacher"),
        ({"tasks": ["cosine"], "teacher": None}, "cosine compares with the teacher; name it with --teacher"),
        ({"tasks": ["knn"], "models": [], "teacher": None}, "no model to measure"),
        ({"tasks": ["pope"], "models": []}, "no model to measure"),
        ({"tasks": ["imagenet", "pope"]}, "imagenet measure towers, pope models that answer in words; run them apart"),
        ({"tasks": ["pope"], "controls": ["no-photo"]}, "no-photo: no such control for pope; there are none, no-image, wrong-image"),
        ({"tasks": ["knn"], "controls": ["no-image"]}, "no-image: no such control for knn; there are none, no-looks"),
        ({"tasks": ["imagenet"], "limit": 1}, "--limit is 1; it must be at least 2"),
        ({"tasks": ["knn"], "limit": 2}, "imagen-200 .*: too few photos to learn from"),
        ({"tasks": ["pope"], "data": Path("nowhere")}, "nowhere/eval/coco_vqa.tar: no such file; --data names the folder"),
    ],
)
def test_mistakes(arguments: dict[str, Any], line: str, data: Path, fakes: dict[str, FakeEmbedder], vlm: FakeVLM) -> None:
    with pytest.raises(UserError, match=line) as caught:
        evaluate(**{"models": ["good"], "teacher": "teacher", "data": data, **arguments})
    assert "\n" not in str(caught.value)


def test_a_wrong_name_is_said_before_the_first_model_answers(data: Path, vlm: FakeVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_vlm.vlm.config.parts_of", parts_of)
    with pytest.raises(UserError, match="tiny-chart: no such folder and no such model; the zoo has .*did you mean tiny-chat"):
        evaluate(["tiny-chat", "tiny-chart"], ["pope"], data)
    assert not vlm.asked


def test_embeddings_of_different_width(data: Path, fakes: dict[str, FakeEmbedder]) -> None:
    fakes["good"].width = 8
    with pytest.raises(UserError, match="good embeds into 8 dimensions, the text side words into 4"):
        evaluate(["good"], ["imagenet"], data, text="words")
    with pytest.raises(UserError, match="good embeds into 8 dimensions, the teacher teacher into 4"):
        evaluate(["good"], ["cosine"], data, teacher="teacher")


def test_incomplete_photos(data: Path, fakes: dict[str, FakeEmbedder], vlm: FakeVLM, tmp_path: Path) -> None:
    rows = photos_of(6)
    write_tar(tmp_path / "eval/imagenet1k_one_per_class.tar", [(key, colour, {}) for key, colour, _ in rows])
    write_tar(tmp_path / "eval/flickr8k_retrieval.tar", [(key, colour, {"captions": []}) for key, colour, _ in rows])
    wrong = {"pope": [{"q": "Is it?", "a": "maybe", "s": "pope_coco_random"}]}
    write_tar(tmp_path / "eval/coco_vqa.tar", [(key, colour, wrong) for key, colour, _ in rows])
    with pytest.raises(UserError, match="photo photo_000 has no label_name"):
        evaluate(["good"], ["imagenet"], tmp_path, text="words")
    with pytest.raises(UserError, match="photo photo_000 has no captions"):
        evaluate(["good"], ["flickr8k"], tmp_path, text="words")
    with pytest.raises(UserError, match="the answer is 'maybe', expected yes or no"):
        evaluate(["talker"], ["pope"], tmp_path)
    with pytest.raises(UserError, match="coco_vqa.tar: fewer than two images are asked about"):
        evaluate(["talker"], ["aokvqa"], tmp_path)


def test_mistakes_of_the_command(command: Any, data: Path, tmp_path: Path) -> None:
    for arguments, line in (
        (["--model", "no-such-model", "--tasks", "knn"], "no-such-model: no such folder"),
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "knn", "--model", "local-dir:nowhere"], "no open_clip_config.json in that folder"),
        (["--tasks", "knn", "--json", str(tmp_path)], "is a folder; name a file"),
        (["--tasks", "knn", "--threads", "0"], "--threads is 0"),
    ):
        done = command("eval", "--data", str(data), *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert line in done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_a_model_that_is_the_teacher_is_measured_once(data: Path, fakes: dict[str, FakeEmbedder]) -> None:
    report = evaluate(["good", "teacher"], ["imagenet"], data, teacher="teacher")
    assert [column.model for column in report.columns] == ["good", "teacher"]
