"""Every file format that the project reads: a small whole example, which of its files are damaged, and how it is read.

A reader returns numbers that must be finite. It reads as users do: by the command where there is one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import IN_FILES, IN_TAR, make_files, measure
from fixtures import COLOURS, EVIL, ROOT, asked, noise, save_llm, save_teacher, save_tower, write_noise, write_photos
from PIL import Image

OF_TOWERS = "imagenet,flickr8k,coco,sugarcrepe,valse"


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        make: writes a whole example into an empty folder.
        damaged: patterns of the files that are damaged, one at a time.
        read: reads the example in a folder and returns numbers.
        every: turns of the others to one of this, for what takes seconds to read.
    """

    make: Callable[[Path], None]
    damaged: tuple[str, ...]
    read: Callable[[Path], Any]
    every: int = 1


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


# ---- images and photos


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
    """As an image that is shown, and as a photo that is learnt from, cropped and whole; each file may be refused for itself."""
    from sparse_vlm.errors import UserError
    from sparse_vlm.images.decode import load_image
    from sparse_vlm.images.photos import PhotoSet
    from sparse_vlm.images.preprocess import Preprocessor

    refused = None
    for path in sorted(folder.iterdir()):
        for fit in ("crop", "whole"):
            preprocessor = Preprocessor(32, (0.5,) * 3, (0.25,) * 3, fit)
            for bring in (load_image, lambda path: PhotoSet(str(path))[0]):
                try:
                    yield preprocessor(bring(path)).pixels
                except UserError as error:
                    refused = error
    if refused:
        raise refused


def read_tar(folder: Path) -> Any:
    """Photos with what is said about them, as stage `instruct` learns from them."""
    from sparse_vlm.data.conversations import MIXTURES, examples_of_photos
    from sparse_vlm.errors import UserError
    from sparse_vlm.images.photos import PhotoSet
    from sparse_vlm.images.preprocess import load_crop, preprocess

    photos = PhotoSet(str(folder / "photos.tar"))
    refused = None
    for photo in photos:
        try:
            yield preprocess(load_crop(photo, 32), 32, (0.5,) * 3, (0.25,) * 3)
        except UserError as error:
            refused = error
    for mix in MIXTURES.values():
        examples_of_photos(list(photos), mix)
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


def read_tower(folder: Path) -> Any:
    """Load it and look at an image."""
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
    """What a VLM says about an image, and how likely."""
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

    from sparse_vlm.teachers.text import TextConfig, TextEncoder

    save_tokenizer(folder / "text-tower")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = BertModel(BertConfig(vocab_size=258, max_position_embeddings=64, **sizes))
    tower.save_pretrained(folder / "text-tower")
    TextEncoder(TextConfig(str(folder / "text-tower"), 16, 32), tower, None).save_pretrained(folder / "text")


def read_text(folder: Path) -> Any:
    """Load it and read a sentence."""
    from sparse_vlm.teachers.text import TextEncoder

    return TextEncoder.from_pretrained(folder / "text").encode(["a red wall"])


# ---- teachers, caches and runs


def _make_teacher(folder: Path) -> None:
    save_teacher(folder)


def _make_vit(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 64}, vision_config=sizes | {"image_size": 28, "patch_size": 14}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder / "vit")
    about = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}}
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(about))
    (folder / "vit" / "evil.py").write_text(EVIL)


def ask_teacher(name: str) -> Any:
    """Load a teacher and show it an image."""
    from sparse_vlm.teachers import load_teacher

    teacher = load_teacher(name)
    side = teacher.spec.image_size
    with torch.no_grad():
        out = teacher(torch.zeros(1, 3, side, side))
    return out.embeds, out.patches


def run_command(folder: Path) -> list[str]:
    """A short bootstrap of the example in a folder."""
    steps = ["--views", "64", "--set", "batch_size=16", "--set", "views_per_photo=2", "--set", "dropped=1"]
    places = ["--cache", str(folder / "cache"), "--out", str(folder / "run")]
    return [
        "bootstrap",
        "--recipe",
        "tiny",
        "--teacher",
        f"local-dir:{folder / 'teacher'}",
        "--data",
        str(folder / "photos"),
        *steps,
        *places,
    ]


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
    """A run that finds the teacher's outputs cached."""
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
    from sparse_vlm.hub.store import zoo_folder

    (folder / "home").mkdir()
    shutil.copytree(
        zoo_folder(), folder / "zoo", ignore=lambda at, names: [name for name in names if name.endswith((".safetensors", ".gguf"))]
    )
    os.environ["SPARSE_VLM_HOME"] = str(folder / "home")
    command("zoo", "list")
    path = str((zoo_folder() / "tiny" / "config.json").resolve())
    stat = os.stat(path)
    (folder / "home" / "verified.json").write_text(json.dumps({path: [stat.st_size, stat.st_mtime_ns, "0" * 64]}))


def read_zoo(folder: Path) -> None:
    """By `zoo list` and `zoo show`."""
    from sparse_vlm.hub import store

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
    from guard_ratios import bound, read

    for machine in read(folder / "ratios.json")["machines"].values():
        for name in {name for run in machine["runs"] for name in run}:
            yield bound(machine["runs"], name)


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
    "png": Format(
        _save_pictures("png", {"a": {}, "rgba": {"mode": "RGBA"}, "p": {"mode": "P"}, "deep": {"mode": "I;16"}}), ("*",), read_pictures
    ),
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
    "teacher-transformers": Format(
        _make_vit, ("vit/*.json", "vit/*.safetensors"), lambda folder: ask_teacher(f"transformers:{folder / 'vit'}")
    ),
    "teacher-cache": Format(_make_run, ("cache/*/*",), read_cache, every=3),
    "token-cache": Format(_make_tokens, ("tokens/*/*",), read_tokens, every=3),
    "run": Format(_make_unfinished, ("run/settings.json", "run/checkpoints/*/complete", "run/checkpoints/*/*"), read_run, every=3),
    "bench-report": Format(_make_reports, ("bench.json", "report.json"), read_reports),
    "zoo": Format(_make_zoo, ("zoo/index.json", "home/verified.json"), read_zoo),
    "deepspeed": Format(_make_deepspeed, ("own.json",), read_deepspeed),
    "ratios": Format(_make_ratios, ("ratios.json",), read_ratios),
    "benchmark-files": Format(make_files, ("*/*.json", "*/*.tsv"), lambda folder: measure(folder, IN_FILES)),
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
