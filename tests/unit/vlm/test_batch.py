"""Answers about many images: files in, one file out, continued where it was stopped."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from tiny_vlm import ask, photo, save_llm, save_whole_tower, stir

from sparse_vlm.cli.answer import answer as answer_command
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import load_image
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.batch import FIELDS, AnswerConfig, answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("model")
    vlm = VLM.build(save_whole_tower(root / "tower"), save_llm(root / "llm"))
    stir(vlm, 0.3)
    vlm.save_pretrained(root / "vlm")
    return str(root / "vlm")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five images and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        photo(60 + 10 * number, 40, number).save(folder / f"{number}.png")
    (folder / "3a.png").write_bytes(b"no image")
    return folder


def settings(model: str, out: Path, /, **changes: object) -> AnswerConfig:
    return AnswerConfig(**{"out": out, "model": model, "question": "What is it?", "batch_size": 2, "max_new_tokens": 4} | changes)


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_image_has_a_row_and_the_model_s_answer(model: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "answers.jsonl"
    result = answer(settings(model, out, images=[str(images)]))
    rows = rows_of(out)
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png", "3.png", "3a.png", "4.png"]
    assert (result.kept, result.answered, len(result.failed)) == (0, 6, 1)
    assert "3a.png" in result.failed[0]["error"] and rows[4]["error"] and not rows[4]["answer"]
    first = [ask("What is it?", load_image(row["image"])) for row in rows[:2]]
    assert [row["answer"] for row in rows[:2]] == VLM.from_pretrained(model).generate(first, 4)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("cut", [0, 1, 40, 250])
def test_a_file_that_was_cut_anywhere_is_continued(suffix: str, cut: int, model: str, images: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    answer(settings(model, whole, images=[str(images)]))
    out.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) - cut])
    told: list[int] = []
    result = answer(settings(model, out, images=[str(images)]), on_progress=told.append)
    assert out.read_bytes() == whole.read_bytes()
    assert result.kept + sum(told) == 6 and (result.kept == 6) == (cut == 0)


def test_a_csv_has_a_line_for_each_row(model: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    answer(settings(model, out, images=[str(images / "0.png"), str(images / "1.png")], question='One,\n"two"?'))
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert tuple(rows[0]) == FIELDS and [row["question"] for row in rows] == ['One, "two"?'] * 2
    assert len(out.read_text().splitlines()) == 3


def test_questions_come_from_a_file_and_images_from_a_tar(model: str, images: Path, tmp_path: Path) -> None:
    lines = [{"image": "images/0.png", "question": "What?"}, {"image": "images/0.png", "question": "Why?"}]
    (tmp_path / "questions.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    answer(settings(model, tmp_path / "a.jsonl", questions=tmp_path / "questions.jsonl"))
    assert [(row["image"], row["question"]) for row in rows_of(tmp_path / "a.jsonl")] == [tuple(line.values()) for line in lines]
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(images / "0.png", "one/0.png")
    answer(settings(model, tmp_path / "b.jsonl", images=[str(tmp_path / "photos.tar")]))
    assert rows_of(tmp_path / "b.jsonl")[0]["image"] == f"{tmp_path / 'photos.tar'}:one/0"


def test_a_question_that_is_too_long_leaves_the_others(model: str, images: Path, tmp_path: Path) -> None:
    lines = [{"image": "images/0.png", "question": "What?"}, {"image": "images/1.png", "question": "Why? " * 5000}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answer(settings(model, tmp_path / "a.jsonl", questions=tmp_path / "questions.jsonl"))
    first, second = rows_of(tmp_path / "a.jsonl")
    assert not first["error"] and "too long" in second["error"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"out": "answers.txt"}, "answers.txt: write to a file whose name ends with .jsonl or .csv"),
        ({"images": []}, "give either images"),
        ({"question": " "}, "the question is empty"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"images": ["nowhere"]}, "nowhere"),
    ],
)
def test_wrong_settings_are_one_line(changes: dict, named: str, model: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        answer(settings(model, tmp_path / "a.jsonl", **({"images": [str(images)]} | changes)))


@pytest.mark.parametrize(
    ("line", "named"),
    [("[1]", "line 1: write an object"), ('{"image": "0.png"}', "line 1: write an object"), ("{", "line 1"), ("", "holds no line")],
)
def test_wrong_questions_name_their_line(line: str, named: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(UserError, match=named):
        answer(settings(model, tmp_path / "a.jsonl", questions=tmp_path / "q.jsonl"))


def test_answers_of_something_else_are_kept(model: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    answer(settings(model, out, images=[str(images / "0.png")]))
    before = out.read_bytes()
    for changes, named in (
        ({"images": [str(images / "1.png")]}, "its answer 1 is about .*0.png"),
        ({"question": "Why?"}, "another question"),
        ({"model": str(images)}, "its answer 1 is by"),
    ):
        with pytest.raises(UserError, match=named):
            answer(settings(model, out, **({"images": [str(images / "0.png")]} | changes)))
    assert out.read_bytes() == before
    out.write_text("notes of mine\n")
    with pytest.raises(UserError, match="holds something else"):
        answer(settings(model, out, images=[str(images / "0.png")]))
    assert out.read_text() == "notes of mine\n"


def test_the_command_says_what_could_not_be_read(model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer_command(tmp_path / "a.jsonl", [str(images)], model=model, question="What is it?", max_new_tokens=2, threads=1)
    printed = capsys.readouterr()
    assert "6 rows, 6 of them new; 1 without an answer" in printed.out
    assert printed.err.count("3a.png") == 1
