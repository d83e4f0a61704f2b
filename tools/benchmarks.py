"""Benchmarks in their authors' layouts and in our tars, and how they are asked by a model that needs no weights."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from fixtures import COLOURS
from PIL import Image


class Mute:
    """Stands for a VLM that says one word to everything: what is damaged is what it is asked."""

    tokens_per_image, dtype = 5, torch.float32

    class tower:
        class config:
            image_size, image_mean, image_std = 32, (0.5,) * 3, (0.5,) * 3

    def generate(self, conversations: list[Any], max_new_tokens: int) -> list[str]:
        """The same answer to all."""
        return ["A red wall."] * len(conversations)

    def score(self, conversations: list[Any], answers: list[list[str]]) -> Any:
        """All answers are as likely."""
        from sparse_vlm.vlm.scoring import Score

        return [[Score(-1.0, -1.0) for _ in choices] for choices in answers]


def measure(folder: Path, tasks: str) -> Any:
    """By `eval`'s own function, with a model that needs no weights."""
    from rich.console import Console

    import sparse_vlm.eval.captions
    import sparse_vlm.vlm
    import sparse_vlm.vlm.config
    from sparse_vlm.eval import EvalConfig, evaluate
    from sparse_vlm.eval.report import as_json, as_tables, save

    sparse_vlm.eval.captions.java_usable = lambda: False
    sparse_vlm.vlm.VLM.from_pretrained = lambda *arguments, **options: Mute()
    sparse_vlm.vlm.config.parts_of = lambda name: None
    config = EvalConfig(["mute"], tasks.split(","), folder, controls=["none"])
    report = evaluate(config, on_result=lambda report: save(report, folder / "out"))
    json.dumps(as_json(report), allow_nan=False)
    for table in as_tables(report):
        Console(width=100).print(table)


IN_TAR = "captions,pope,pope-words,aokvqa,aokvqa-direct,existence,counting,vsr,sugarcrepe-captions,valse-captions"
IN_FILES = "vqav2,gqa,textvqa,pope-coco,aokvqa-val,aokvqa-val-direct,scienceqa,mmbench"


def make_files(folder: Path) -> None:
    """Two or three questions in the layout of each benchmark's own files."""

    def picture(path: str, name: str) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), COLOURS[name]).save(folder / path)

    def write(path: str, text: Any) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text if isinstance(text, str) else json.dumps(text))

    questions, annotations, gqa, texts, pope, aokvqa, problems, table = [], [], {}, [], [], [], {}, []
    table.append("\t".join(["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]))
    for i, name in enumerate(("red", "blue", "green")):
        picture(f"vqav2/val2014/COCO_val2014_{i:012d}.jpg", name)
        questions.append({"image_id": i, "question": "What color is it?", "question_id": 1000 + i})
        said = [{"answer": name, "answer_id": k} for k in range(10)]
        annotations.append({"question_id": 1000 + i, "image_id": i, "answers": said, "answer_type": "other"})
        picture(f"gqa/images/n{i}.jpg", name)
        gqa[str(i)] = {"question": "What color?", "imageId": f"n{i}", "answer": name, "types": {"structural": "query"}}
        picture(f"textvqa/train_images/t{i}.jpg", name)
        texts.append({"question_id": i, "image_id": f"t{i}", "question": "what?", "answers": [name] * 10, "ocr_tokens": ["SALE"]})
        picture(f"pope/val2014/COCO_val2014_{i:012d}.jpg", name)
        pope.append({"question_id": i, "image": f"COCO_val2014_{i:012d}.jpg", "text": f"Is there {name}?", "label": "yes"})
        picture(f"aokvqa/val2017/{i:012d}.jpg", name)
        about = {"split": "val", "image_id": i, "question_id": f"q{i}", "question": "What colour?", "rationales": ["It is."] * 3}
        choices = {"choices": list(COLOURS), "correct_choice_idx": list(COLOURS).index(name)}
        aokvqa.append(about | choices | {"direct_answers": [name] * 10, "difficult_direct_answer": i == 2})
        picture(f"scienceqa/images/test/{i}/image.png", name)
        about = {"question": "Which?", "choices": list(COLOURS), "answer": i, "hint": "Look.", "image": "image.png"}
        problems[str(i)] = about | {"subject": "natural science", "split": "test"}
        stream = io.BytesIO()
        Image.new("RGB", (24, 20), COLOURS[name]).save(stream, "PNG")
        encoded = base64.b64encode(stream.getvalue()).decode()
        table.append("\t".join([str(i), "Which color?", "", *COLOURS, "ABCD"[i], "color", encoded]))
    write("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write("vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    write("gqa/testdev_balanced_questions.json", gqa)
    write("textvqa/TextVQA_0.5.1_val.json", {"data": texts})
    for split in ("random", "popular", "adversarial"):
        write(f"pope/coco_pope_{split}.json", "".join(json.dumps(line) + "\n" for line in pope))
    write("aokvqa/aokvqa_v1p0_val.json", aokvqa)
    write("scienceqa/problems.json", problems)
    write("scienceqa/pid_splits.json", {"test": list(problems)})
    write("mmbench/MMBench_DEV_EN.tsv", "\n".join(table) + "\n")
