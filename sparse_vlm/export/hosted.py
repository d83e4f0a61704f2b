"""Exports of towers and VLMs for transformers.

Shape legend: B images, N tokens, d width, E embedding, T tokens of a prompt, V words of the LLM.

Notable: the folders load with `AutoModel`, `AutoModelForImageTextToText` and the Auto processors, without peft and without our VLM folder
format. Paths of this machine are removed from configurations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from sparse_vlm.errors import UserError
from sparse_vlm.export.exporter import TOLERANCE, Comparison, Exporter, TowerExporter, compare_tensors
from sparse_vlm.hf.model import SparseFormerHostModel, SparseFormerImageProcessor
from sparse_vlm.hub.host_format import CODE
from sparse_vlm.utils.files import write_text
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.projectors import MLP
from sparse_vlm.vlm.prompts import mark_answers

REMOTE_CODE = '''\
"""Loads sparse_vlm, which holds the code of this model: pip install sparse-vlm."""

import sparse_vlm  # noqa: F401 - registers the classes
from sparse_vlm.hub.host_format import CODE
from sparse_vlm.hf.model import (  # noqa: F401
    SparseFormerBackbone,
    SparseFormerHostConfig,
    SparseFormerHostModel,
    SparseFormerImageProcessor,
)
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor  # noqa: F401
'''
IMAGE_PROCESSOR = {"AutoImageProcessor": "SparseFormerImageProcessor"}
QUESTION = "What is in this picture?"
NEW_TOKENS = 24  # of a compared answer


class HostedTower(TowerExporter):
    """Exports a tower for `AutoModel` and `AutoImageProcessor`."""

    library = "transformers"
    holds = "the tower as a model of transformers"

    def write(self, folder: Path) -> None:
        SparseFormerHostModel.wrap(self.tower).save_pretrained(folder)
        SparseFormerImageProcessor.of(self.config).save_pretrained(folder)
        _write_dtype(folder, self.dtype)
        classes = {"AutoConfig": "SparseFormerHostConfig", "AutoModel": "SparseFormerHostModel", "AutoBackbone": "SparseFormerBackbone"}
        _write_auto_map(folder, "config.json", classes)
        _write_auto_map(folder, "preprocessor_config.json", IMAGE_PROCESSOR)

    def load(self, folder: Path) -> Callable[..., Sequence[Tensor]]:
        model = _load(AutoModel, folder)

        def run(pixels: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            out = model(pixels)  # without sizes, with which tokens would be packed; they are recovered from the canvas
            return out.hidden_states[-1], out.pooler_output

        return run

    def compare(self, folder: Path) -> list[Comparison]:
        pixels = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)(self.images, return_tensors="pt")["pixel_values"]
        return [
            _compare_weights(SparseFormerHostModel.wrap(self.tower), _load(AutoModel, folder)),
            compare_tensors("pixel_values", len(self.images), self.inputs[0], pixels, 0.0),
            *super().compare(folder),
        ]

    def example(self) -> str:
        return """\
import sparse_vlm  # makes the tower known to the Auto classes
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

path = "."  # this folder, or its name on the hub
model, processor = AutoModel.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
output = model(**processor(load_image("photo.jpg"), return_tensors="pt"))
print(output.hidden_states[-1].shape, output.pooler_output.shape)  # the visual tokens, and the embedding of the whole picture"""


class HostedVLM(Exporter):
    """Exports a VLM as a stock `LlavaForConditionalGeneration` with its `LlavaProcessor`."""

    task, library = "image-text-to-text", "transformers"
    holds = "the whole model as transformers' own LlavaForConditionalGeneration, its adapters merged"

    @torch.inference_mode()
    def __init__(self, model: str, dtype: str, tokens: int | None, images: Sequence[Image.Image]) -> None:
        self.vlm = VLM.from_pretrained(model, dtype=getattr(torch, dtype), num_tokens=tokens)
        if self.vlm.projector_kind != MLP:
            raise UserError(f"{model}: its projector ({self.vlm.projector_kind}) is not supported by transformers' LLaVA; only mlp is")
        self.config = self.vlm.tower.config
        self.dtype, self.images = dtype, list(images)
        # prompted as `sparse-vlm chat` prompts
        self.logits, self.answers = [], []
        for image in self.images:
            text = self.vlm.renderer.text([_question(image)], answer_next=True)
            inputs = self.vlm.processor(text=[text], images=[image], add_special_tokens=False, return_tensors="pt")
            self.logits.append(self.vlm.model(**inputs).logits)
            self.answers += self.vlm.generate([[_question(image)]], NEW_TOKENS)

    def write(self, folder: Path) -> None:
        vlm = self.vlm
        vlm.model.config.text_config._name_or_path = vlm.model.config._name_or_path = ""
        vlm.model.save_pretrained(folder)
        template, vlm.processor.chat_template = vlm.processor.chat_template, mark_answers(vlm.processor.chat_template)
        vlm.processor.save_pretrained(folder)
        vlm.processor.chat_template = template
        _write_dtype(folder, self.dtype)
        classes = {"AutoConfig": "LlavaConfig", "AutoModelForImageTextToText": "LlavaForConditionalGeneration"}
        _write_auto_map(folder, "config.json", classes)
        _write_auto_map(folder, "processor_config.json", {"AutoProcessor": "LlavaProcessor"})
        _write_auto_map(folder, "processor_config.json", IMAGE_PROCESSOR, "image_processor")

    @torch.inference_mode()
    def compare(self, folder: Path) -> list[Comparison]:
        model, processor = _load(AutoModelForImageTextToText, folder), AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        comparisons, different = [_compare_weights(self.vlm.model, model)], 0
        for number, (image, logits, answer) in enumerate(zip(self.images, self.logits, self.answers, strict=True), 1):
            inputs = processor.apply_chat_template(
                [_question(image)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            comparisons.append(compare_tensors(f"logits, image {number}", 1, logits, model(**inputs).logits, TOLERANCE[self.dtype]))
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
            different += processor.decode(tokens, skip_special_tokens=True).strip() != answer
        comparisons.append(Comparison("answers that differ", 1, different, len(self.answers), 0.0, different == 0))
        return comparisons

    def example(self) -> str:
        return f"""\
import sparse_vlm  # makes the tower known to the Auto classes
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

path = "."  # this folder, or its name on the hub
model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
content = [{{"type": "image", "image": load_image("photo.jpg")}}, {{"type": "text", "text": "{QUESTION}"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True).strip())"""


def _question(image: Image.Image) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}


def _write_dtype(folder: Path, dtype: str) -> None:
    """Set the dtype in `config.json`: transformers writes that of the first tensor, which may be the RoIs."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("vision_config", {})):
        part["dtype"] = dtype
    write_text(path, json.dumps(config, indent=2) + "\n")


def _write_auto_map(folder: Path, file: str, classes: dict[str, str], key: str | None = None) -> None:
    """Let the Auto classes import sparse_vlm with `trust_remote_code=True`.

    Args:
        file: a configuration in the folder.
        classes: class by Auto class.
        key: of the nested configuration, if it is one.
    """
    write_text(folder / f"{CODE}.py", REMOTE_CODE)
    document = json.loads((folder / file).read_text(encoding="utf-8"))
    config = document if key is None else document[key]
    config["auto_map"] = {auto: f"{CODE}.{name}" for auto, name in classes.items()}
    write_text(folder / file, json.dumps(document, indent=2) + "\n")


def _load(auto: Any, folder: Path) -> Any:
    """Load a model as its users do.

    Raises:
        UserError: missing, unexpected or misshapen tensors, which transformers itself would initialise randomly or ignore.
    """
    model, report = auto.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    if wrong := [f"{what} {', '.join(sorted(map(str, names)))}" for what, names in report.items() if names]:
        raise UserError(f"the written model does not load completely ({'; '.join(wrong)}); nothing was kept")
    return model.eval()


def _compare_weights(expected: nn.Module, actual: nn.Module) -> Comparison:
    """Compare every tensor for equality."""
    expected_state, actual_state = expected.state_dict(), actual.state_dict()
    largest = max(tensor.abs().max().item() for tensor in expected_state.values())
    if {name: (tensor.dtype, tensor.shape) for name, tensor in expected_state.items()} != {
        name: (tensor.dtype, tensor.shape) for name, tensor in actual_state.items()
    }:
        return Comparison("weights", 0, float("inf"), largest, 0.0, False)
    difference = max((tensor.float() - actual_state[name].float()).abs().max().item() for name, tensor in expected_state.items())
    return Comparison(
        "weights", 0, difference, largest, 0.0, all(torch.equal(tensor, actual_state[name]) for name, tensor in expected_state.items())
    )
