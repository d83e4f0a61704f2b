"""Every file format that the project reads: a small whole example, which of its files are damaged, and how it is read.

A reader returns numbers that must be finite. It reads as users do: by the command where there is one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # towers, language models and documents small enough for tests

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 230), "yellow": (230, 220, 40)}
EVIL = "from pathlib import Path\n\nPath(__file__).with_name('CANARY').touch()\n\n\nclass Evil:\n    pass\n"


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        make: writes a whole example into an empty folder.
        damaged: patterns of the files that are damaged, one at a time.
        read: reads the example in a folder and returns numbers.
    """

    make: Callable[[Path], None]
    damaged: tuple[str, ...]
    read: Callable[[Path], Any]


class Refused(Exception):
    """The command ended with an exit code that says that something was wrong with what it was given."""


def command(*arguments: str | Path, fine: tuple[int, ...] = (0,)) -> None:
    """Run `sparse-vlm` in this process.

    Raises:
        Refused: it ended with code 2.
        RuntimeError: it ended with another code.
    """
    from sparse_vlm.cli import main

    sys.argv = ["sparse-vlm", *map(str, arguments)]
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    if code == 2:
        raise Refused
    if code not in fine:
        raise RuntimeError(f"exit code {code}")


# ---- pictures and photos


def noise(size: tuple[int, int] = (48, 40), seed: int = 0) -> Image.Image:
    """A picture of noise, RGB."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def _save_pictures(suffix: str, kinds: dict[str, dict[str, Any]]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, options in kinds.items():
            options = dict(options)
            mode = options.pop("mode", "RGB")
            picture = Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48)) if mode == "I;16" else noise().convert(mode)
            if options.pop("turned", False):
                exif = Image.Exif()
                exif[0x0112] = 6
                options["exif"] = exif
            picture.save(folder / f"{name}.{suffix}", **options)

    return make


def read_pictures(folder: Path) -> Any:
    """As a picture that is shown, and as a photo that is learnt from; each file may be refused for itself."""
    from sparse_vlm.errors import UserError
    from sparse_vlm.photos import PhotoSet, load_image
    from sparse_vlm.preprocess import load_crop, preprocess

    refused = None
    for path in sorted(folder.iterdir()):
        for read in (lambda path=path: load_image(path), lambda path=path: load_crop(PhotoSet(str(path))[0], 32)):
            try:
                picture = read()
            except UserError as error:
                refused = error
                continue
            assert picture.mode == "RGB", picture.mode
            yield preprocess(picture, 32, (0.5,) * 3, (0.25,) * 3)
    if refused:
        raise refused


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to a tar."""
    from sparse_vlm.remote import add_member

    add_member(archive, name, data)


def write_photos(path: Path, count: int = 4, info: Callable[[int], dict[str, Any]] = lambda i: {}) -> None:
    """A webdataset tar of plain pictures with what is known of them."""
    import io

    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            name = list(COLOURS)[i % 4]
            stream = io.BytesIO()
            Image.new("RGB", (24, 20), COLOURS[name]).save(stream, "PNG")
            known = {"label": i % 4, "label_name": name, "captions": [f"a {name} wall", f"a wall in {name}."]}
            add(archive, f"{i:03d}.png", stream.getvalue())
            add(archive, f"{i:03d}.json", json.dumps(known | info(i)).encode())


def asked(i: int) -> dict[str, Any]:
    """Questions about a photo, as the tars of docs/evaluation.md hold them."""
    own, other = list(COLOURS)[i % 4], list(COLOURS)[(i + 1) % 4]
    pair = {"type": "swap", "pos": f"a {own} wall. ", "neg": f"a {other} wall"}
    return {
        "pope": [{"q": f"Is there a {n} wall?", "a": a, "s": "pope_coco_random"} for n, a in ((own, "yes"), (other, "no"))],
        "qa": [{"q": f"Does {own} exist?", "a": "Yes.", "s": "gvt_mci"}, {"q": "How many walls?", "a": "1", "s": "gvt_oc"}],
        "aokvqa": [{"question": "What colour?", "choices": list(COLOURS), "correct_choice_idx": i % 4, "direct_answers": [own] * 10, "difficult_direct_answer": False}],
        "sugarcrepe": [pair],
        "valse": [pair | {"vote": 2}],
        "vsr": [{"statement": f"The {own} wall is left.", "label": 1, "relation": "left of"}],
    }


def read_tar(folder: Path) -> Any:
    """Photos with what is said about them, as stage `instruct` learns from them."""
    from sparse_vlm.data.talks import MIXES, photo_talks
    from sparse_vlm.errors import UserError
    from sparse_vlm.photos import PhotoSet
    from sparse_vlm.preprocess import load_crop, preprocess

    photos = PhotoSet(str(folder / "photos.tar"))
    refused = None
    for photo in photos:
        try:
            yield preprocess(load_crop(photo, 32), 32, (0.5,) * 3, (0.25,) * 3)
        except UserError as error:
            refused = error
    for mix in MIXES.values():
        photo_talks(list(photos), mix)
    if refused:
        raise refused


def _write_llava(folder: Path, name: str) -> None:
    (folder / "images").mkdir()
    rows = []
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (24, 20), COLOURS[colour]).save(folder / "images" / f"{i}.png")
        said = [{"from": "human", "value": f"<image>\nWhat is {i}?"}, {"from": "gpt", "value": f"A {colour} wall."}]
        more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes"}] if i == 1 else []
        rows.append({"id": f"s{i}", "image": f"{i}.png", "conversations": said + more})
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]})
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text)
    save_tower(folder)
    save_llm(folder)


def read_llava(folder: Path) -> None:
    """By `train --check`."""
    (file,) = folder.glob("data.*")
    parts = ["--tower", folder / "tower", "--llm", folder / "llm", "--images", folder / "images"]
    command("train", "--check", "--stage", "instruct", *parts, "--data", file, fine=(0, 1))


# ---- models


def save_tower(folder: Path) -> None:
    """`tower`: of random weights."""
    import tiny_vlm

    tiny_vlm.save_tower(folder / "tower")


def save_llm(folder: Path) -> None:
    """`llm`: a LLaMA of two layers, with a file that must never be run."""
    import tiny_vlm

    tiny_vlm.save_llm(folder / "llm")
    (folder / "llm" / "evil.py").write_text(EVIL)


def read_tower(folder: Path) -> Any:
    """Load it and look at a picture."""
    from sparse_vlm import SparseFormer

    tower = SparseFormer.from_pretrained(folder / "tower")
    with torch.no_grad():
        out = tower(torch.zeros(1, 3, 32, 32))
    return out.last_hidden_state, out.image_embeds, out.rois


def _make_vlm(folder: Path) -> None:
    from sparse_vlm.vlm import VLM

    save_tower(folder)
    save_llm(folder)
    vlm = VLM.build(folder / "tower", folder / "llm", dtype=torch.float32)
    vlm.add_adapters(2)
    vlm.add_tower_adapters(2)
    vlm.new_projector = False
    vlm.save_pretrained(folder / "vlm")


def talk_to(vlm: Any) -> Any:
    """What a VLM says about a picture, and how likely."""
    from tiny_vlm import ask, picture

    question = ask("What is it?", picture("red"))
    vlm.generate([question], max_new_tokens=2)
    return [score.total for row in vlm.score([question], [["A wall.", "No"]]) for score in row]


def read_vlm(folder: Path) -> Any:
    """Load it and ask."""
    from sparse_vlm.vlm import VLM

    return talk_to(VLM.from_pretrained(folder / "vlm", dtype=torch.float32))


def _make_llm(folder: Path) -> None:
    save_tower(folder)
    save_llm(folder)


def read_llm(folder: Path) -> Any:
    """Put it under a tower and ask."""
    from sparse_vlm.vlm import VLM

    return talk_to(VLM.build(folder / "tower", folder / "llm", dtype=torch.float32))


def _make_gguf(folder: Path) -> None:
    import gguf
    from tiny_vlm import CHATML
    from tokenizers import pre_tokenizers

    save_tower(folder)
    (folder / "llm").mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "<|im_start|>", "<|im_end|>"]
    made = gguf.GGUFWriter(folder / "llm" / "tiny.gguf", "llama")
    made.add_context_length(512)
    made.add_embedding_length(32)
    made.add_block_count(1)
    made.add_feed_forward_length(32)
    made.add_head_count(2)
    made.add_head_count_kv(1)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_rope_freq_base(10000.0)
    made.add_vocab_size(len(tokens))
    made.add_tokenizer_model("gpt2")
    made.add_token_list(tokens)
    made.add_token_merges(["a b"])
    made.add_bos_token_id(len(tokens) - 2)
    made.add_eos_token_id(len(tokens) - 1)
    made.add_chat_template(CHATML)
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,), "ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    tensors = {"token_embd": (len(tokens), 32), "output_norm": (32,), "output": (len(tokens), 32)}
    for name, shape in (tensors | {f"blk.0.{name}": shape for name, shape in shapes.items()}).items():
        made.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32) * 0.2)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def _make_text(folder: Path) -> None:
    from tiny_vlm import save_tokenizer
    from transformers import BertConfig, BertModel

    from sparse_vlm.text import TextConfig, TextEncoder

    save_tokenizer(folder / "text-tower")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = BertModel(BertConfig(vocab_size=258, max_position_embeddings=64, **sizes))
    tower.save_pretrained(folder / "text-tower")
    TextEncoder(TextConfig(str(folder / "text-tower"), 16, 32), tower, None).save_pretrained(folder / "text")


def read_text(folder: Path) -> Any:
    """Load it and read a sentence."""
    from sparse_vlm.text import TextEncoder

    return TextEncoder.from_pretrained(folder / "text").encode(["a red wall"])


# ---- teachers, caches and runs


def save_teacher(folder: Path) -> str:
    """`teacher`: an open_clip folder with a ViT of two blocks and random weights; its name."""
    import open_clip
    from safetensors.torch import save_file

    sizes = {"image_size": 28, "layers": 2, "width": 64, "head_width": 64, "patch_size": 14}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    config = {
        "model_cfg": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": sizes, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    target = folder / "teacher"
    target.mkdir(parents=True)
    (target / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{target}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, target / "open_clip_model.safetensors")
    return f"local-dir:{target}"


def _make_teacher(folder: Path) -> None:
    save_teacher(folder)


def _make_vit(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    config = CLIPConfig(text_config=sizes | {"vocab_size": 64}, vision_config=sizes | {"image_size": 28, "patch_size": 14}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder / "vit")
    about = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}}
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(about))
    (folder / "vit" / "evil.py").write_text(EVIL)


def ask_teacher(name: str) -> Any:
    """Load a teacher and show it a picture."""
    from sparse_vlm.teacher import load_teacher

    teacher = load_teacher(name)
    side = teacher.spec.image_size
    with torch.no_grad():
        out = teacher(torch.zeros(1, 3, side, side))
    return out.embeds, out.patches


def write_noise(folder: Path, count: int) -> None:
    """Pictures of noise, a few of which a bootstrap holds out."""
    from sparse_vlm.photos import Photo
    from sparse_vlm.train.lessons import held_out

    folder.mkdir()
    names = [f"{i:04d}.png" for i in range(1000)]
    kept = set(held_out([Photo(name, folder, 0, 0) for name in names]))
    names = [names[i] for i in sorted(kept)[:4]] + [name for i, name in enumerate(names) if i not in kept][: count - 4]
    for i, name in enumerate(names):
        noise((28, 28), i).save(folder / name)


def run_command(folder: Path) -> list[str]:
    """A short bootstrap of the example in a folder."""
    steps = ["--views", "64", "--set", "batch_size=16", "--set", "views_per_photo=2", "--set", "dropped=1"]
    places = ["--cache", str(folder / "cache"), "--out", str(folder / "run")]
    return ["bootstrap", "--recipe", "tiny", "--teacher", f"local-dir:{folder / 'teacher'}", "--data", str(folder / "photos"), *steps, *places]


def _make_run(folder: Path) -> None:
    save_teacher(folder)
    write_noise(folder / "photos", 48)
    command(*run_command(folder))


def _make_unfinished(folder: Path) -> None:
    """A run that was stopped after its second of four steps."""
    _make_run(folder)
    for path in (folder / "run").iterdir():
        if path.name not in ("settings.json", "checkpoints"):
            path.unlink()
    for step in (3, 4):
        shutil.rmtree(folder / "run" / "checkpoints" / f"checkpoint-{step}", ignore_errors=True)


def read_cache(folder: Path) -> Any:
    """A run that finds the teacher's answers cached."""
    shutil.rmtree(folder / "run")
    command(*run_command(folder))
    return weights(folder / "run")


def read_run(folder: Path) -> Any:
    """The same command again."""
    command(*run_command(folder))
    return weights(folder / "run")


def weights(folder: Path) -> list[torch.Tensor]:
    """All tensors of a folder's files."""
    from safetensors.torch import load_file

    return [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in load_file(path).values()]


def _train(folder: Path, name: str) -> list[str]:
    parts = ["--tower", str(folder / "tower"), "--llm", str(folder / "llm"), "--data", str(folder / "photos.tar")]
    return ["train", "--stage", "align", *parts, "--batch-size", "2", "--cache", str(folder / "tokens"), "--out", str(folder / name)]


def _make_tokens(folder: Path) -> None:
    _make_llm(folder)
    write_photos(folder / "photos.tar", 4)
    command(*_train(folder, "run"))


def read_tokens(folder: Path) -> Any:
    """A run that finds the tower's tokens cached."""
    command(*_train(folder, "again"))
    return weights(folder / "again")


# ---- documents


def _make_reports(folder: Path) -> None:
    from report_files import bench_of, eval_of, right

    (folder / "bench.json").write_text(json.dumps(bench_of({"vit": (49, 80.0, 6.0), "tiny": (49, 30.0, 1.6)}, batches=(1,))))
    (folder / "report.json").write_text(json.dumps(eval_of({"vit": (49, right(0.6)), "tiny": (49, right(0.7))})))


def read_reports(folder: Path) -> None:
    """By `report`."""
    command("report", "--bench", folder / "bench.json", "--eval", folder / "report.json", "--out", folder / "out")


def _make_zoo(folder: Path) -> None:
    from sparse_vlm.store import zoo_folder

    (folder / "home").mkdir()
    shutil.copytree(zoo_folder(), folder / "zoo", ignore=lambda at, names: [name for name in names if name.endswith((".safetensors", ".gguf"))])
    os.environ["SPARSE_VLM_HOME"] = str(folder / "home")
    command("zoo", "list")
    path = str((zoo_folder() / "tiny" / "config.json").resolve())
    stat = os.stat(path)
    (folder / "home" / "verified.json").write_text(json.dumps({path: [stat.st_size, stat.st_mtime_ns, "0" * 64]}))


def read_zoo(folder: Path) -> None:
    """By `zoo list` and `zoo show`."""
    from sparse_vlm import store

    os.environ["SPARSE_VLM_HOME"] = str(folder / "home")
    store.zoo_folder = lambda: folder / "zoo"
    command("zoo", "list")
    command("zoo", "show", "tiny")
    command("zoo", "show", "tiny", "--json")


def read_deepspeed(folder: Path) -> None:
    """As a run reads it that torchrun starts."""
    from sparse_vlm.train.zero import find_config, shares_weights

    os.environ["LOCAL_RANK"] = "0"
    shares_weights(find_config(str(folder / "own.json")))


def _make_deepspeed(folder: Path) -> None:
    from sparse_vlm.train.zero import CONFIGS

    (folder / "own.json").write_text(json.dumps(CONFIGS["zero3-offload"]))


def _make_ratios(folder: Path) -> None:
    shutil.copyfile(ROOT / "docs" / "ratios.json", folder / "ratios.json")


def read_ratios(folder: Path) -> Any:
    """As `make bench` reads it."""
    from sparse_vlm.bench.guard import bound, read

    for machine in read(folder / "ratios.json")["machines"].values():
        for name in {name for run in machine["runs"] for name in run}:
            yield bound(machine["runs"], name)


# ---- benchmarks


class Mute:
    """Stands for a VLM that says one word to everything: what is damaged is what it is asked."""

    tokens_per_image, dtype = 5, torch.float32

    class tower:
        class config:
            image_size = 32

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
    import sparse_vlm.vlm.reader
    from sparse_vlm.eval.report import as_json, as_tables, save
    from sparse_vlm.eval.run import evaluate

    sparse_vlm.eval.captions.java_usable = lambda: False
    sparse_vlm.vlm.VLM.from_pretrained = lambda *arguments, **options: Mute()
    sparse_vlm.vlm.reader.parts_of = lambda name: None
    report = evaluate(["mute"], tasks.split(","), folder, controls=["none"], on_result=lambda report: save(report, folder / "out"))
    json.dumps(as_json(report), allow_nan=False)
    for table in as_tables(report):
        Console(width=100).print(table)


IN_TAR = "captions,pope,pope-words,aokvqa,aokvqa-direct,existence,counting,vsr,sugarcrepe-captions,valse-captions"
IN_FILES = "vqav2,gqa,textvqa,pope-coco,aokvqa-val,aokvqa-val-direct,scienceqa,mmbench"
OF_TOWERS = "imagenet,flickr8k,coco,sugarcrepe,valse"


def _make_files(folder: Path) -> None:
    """Two or three questions in the layout of each benchmark's own files."""
    import base64
    import io

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


def _make_towers_data(folder: Path) -> None:
    save_tower(folder)
    _make_text(folder)
    for name in ("imagenet1k_one_per_class", "flickr8k_retrieval", "coco_vqa"):
        write_photos(folder / "eval" / f"{name}.tar", 4, asked)


def read_towers_data(folder: Path) -> None:
    """By `eval` with a tower."""
    parts = ["--model", folder / "tower", "--text", folder / "text", "--data", folder, "--control", "none"]
    command("eval", *parts, "--tasks", OF_TOWERS, "--out", folder / "out")


FORMATS: dict[str, Format] = {
    "jpeg": Format(
        _save_pictures("jpg", {"a": {}, "turned": {"turned": True}, "grey": {"mode": "L"}, "four": {"mode": "CMYK"}}), ("*",), read_pictures
    ),
    "png": Format(_save_pictures("png", {"a": {}, "rgba": {"mode": "RGBA"}, "p": {"mode": "P"}, "deep": {"mode": "I;16"}}), ("*",), read_pictures),
    "webp": Format(_save_pictures("webp", {"a": {}, "rgba": {"mode": "RGBA", "lossless": True}}), ("*",), read_pictures),
    "gif": Format(_save_pictures("gif", {"a": {}, "two": {"save_all": True, "append_images": [noise(seed=1)]}}), ("*",), read_pictures),
    "bmp": Format(_save_pictures("bmp", {"a": {}, "p": {"mode": "P"}}), ("*",), read_pictures),
    "tiff": Format(
        _save_pictures("tif", {"a": {}, "lzw": {"compression": "tiff_lzw"}, "jpeg": {"compression": "jpeg"}, "deep": {"mode": "I;16"}}),
        ("*",),
        read_pictures,
    ),
    "tar": Format(lambda folder: write_photos(folder / "photos.tar", 4, asked), ("photos.tar",), read_tar),
    "llava-json": Format(lambda folder: _write_llava(folder, "data.json"), ("data.json",), read_llava),
    "llava-jsonl": Format(lambda folder: _write_llava(folder, "data.jsonl"), ("data.jsonl",), read_llava),
    "tower": Format(save_tower, ("tower/config.json", "tower/model.safetensors"), read_tower),
    "vlm": Format(_make_vlm, ("vlm/*.*", "vlm/vlm.json", "vlm/tower_adapter/*.*"), read_vlm),
    "llm": Format(_make_llm, ("llm/*.json", "llm/config.json", "llm/*.jinja", "llm/*.safetensors"), read_llm),
    "gguf": Format(_make_gguf, ("llm/tiny.gguf",), read_llm),
    "text": Format(_make_text, ("text/*", "text-tower/config.json", "text-tower/model.safetensors"), read_text),
    "teacher": Format(_make_teacher, ("teacher/*",), lambda folder: ask_teacher(f"local-dir:{folder / 'teacher'}")),
    "teacher-transformers": Format(_make_vit, ("vit/*.json", "vit/*.safetensors"), lambda folder: ask_teacher(f"transformers:{folder / 'vit'}")),
    "teacher-cache": Format(_make_run, ("cache/*/*",), read_cache),
    "token-cache": Format(_make_tokens, ("tokens/*/*",), read_tokens),
    "run": Format(_make_unfinished, ("run/settings.json", "run/checkpoints/*/complete", "run/checkpoints/*/*"), read_run),
    "bench-report": Format(_make_reports, ("bench.json", "report.json"), read_reports),
    "zoo": Format(_make_zoo, ("zoo/index.json", "home/verified.json"), read_zoo),
    "deepspeed": Format(_make_deepspeed, ("own.json",), read_deepspeed),
    "ratios": Format(_make_ratios, ("ratios.json",), read_ratios),
    "benchmark-files": Format(_make_files, ("*/*.json", "*/*.tsv"), lambda folder: measure(folder, IN_FILES)),
    "benchmark-tar": Format(
        lambda folder: write_photos(folder / "eval" / "coco_vqa.tar", 4, asked), ("eval/*",), lambda folder: measure(folder, IN_TAR)
    ),
    "tower-benchmarks": Format(_make_towers_data, ("eval/*",), read_towers_data),
}


def finite(found: Any) -> Iterator[bool]:
    """Whether each number that a reader returns is finite."""
    if isinstance(found, torch.Tensor):
        yield bool(torch.isfinite(found.float()).all())
    elif isinstance(found, (int, float)):
        yield bool(np.isfinite(found))
    elif found is not None:
        for each in found:
            yield from finite(each)
