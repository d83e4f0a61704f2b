"""Towers and VLMs as folders of transformers' own classes.

Shape legend: B images, N tokens, d width, E embedding, T tokens of a prompt, V words of the LLM.

Notable: what is written is what `AutoModel`, `AutoModelForImageTextToText` and the Auto CPUs load; nothing of peft or of our own VLM
folder remains. The name that a part was loaded by on this machine is no business of the one who loads the export, and is taken out.
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
from sparse_vlm.export.exporter import TOLERANCE, Comparison, Exporter, TowerExporter, compared
from sparse_vlm.hf.model import SparseFormerHostModel, SparseFormerImageProcessor
from sparse_vlm.utils.files import write_text
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.projectors import MLP

QUESTION = "What is in this picture?"
NEW_TOKENS = 24  # of an answer that is compared


class HostedTower(TowerExporter):
    """A tower for `AutoModel` and `AutoImageProcessor`."""

    library = "transformers"
    holds = "the tower as a model of transformers"

    def write(self, folder: Path) -> None:
        SparseFormerHostModel.wrap(self.tower).save_pretrained(folder)
        SparseFormerImageProcessor.of(self.config).save_pretrained(folder)
        _state_dtype(folder, self.dtype)

    def load(self, folder: Path) -> Callable[..., Sequence[Tensor]]:
        model = _loaded(AutoModel, folder)

        def run(pixels: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            out = model(pixels)  # with sizes it would pack the tokens of all images; it tells them from the canvas
            return out.hidden_states[-1], out.pooler_output

        return run

    def compare(self, folder: Path) -> list[Comparison]:
        pixels = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)(self.pictures, return_tensors="pt")["pixel_values"]
        return [
            _weights(SparseFormerHostModel.wrap(self.tower), _loaded(AutoModel, folder)),
            compared("pixel_values", len(self.pictures), self.inputs[0], pixels, 0.0),
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
    """A stock `LlavaForConditionalGeneration` with its `LlavaProcessor`."""

    task, library = "image-text-to-text", "transformers"
    holds = "the whole model as transformers' own LlavaForConditionalGeneration, its adapters merged"

    @torch.inference_mode()
    def __init__(self, model: str, dtype: str, tokens: int | None, pictures: Sequence[Image.Image]) -> None:
        self.vlm = VLM.from_pretrained(model, dtype=getattr(torch, dtype), num_tokens=tokens)
        if self.vlm.projector_kind != MLP:
            raise UserError(f"{model}: its projector ({self.vlm.projector_kind}) is none that transformers' LLaVA knows; only mlp is")
        self.config = self.vlm.tower.config
        self.dtype, self.pictures = dtype, list(pictures)
        # asked as `sparse-vlm chat` asks
        self.logits, self.answers = [], []
        for picture in self.pictures:
            text = self.vlm.renderer.text([_question(picture)], answer_next=True)
            inputs = self.vlm.processor(text=[text], images=[picture], add_special_tokens=False, return_tensors="pt")
            self.logits.append(self.vlm.model(**inputs).logits)
            self.answers += self.vlm.generate([[_question(picture)]], NEW_TOKENS)

    def write(self, folder: Path) -> None:
        vlm = self.vlm
        vlm.model.config.text_config._name_or_path = vlm.model.config._name_or_path = ""
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
        _state_dtype(folder, self.dtype)

    @torch.inference_mode()
    def compare(self, folder: Path) -> list[Comparison]:
        model, processor = _loaded(AutoModelForImageTextToText, folder), AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        found, wrong = [_weights(self.vlm.model, model)], 0
        for number, (picture, logits, answer) in enumerate(zip(self.pictures, self.logits, self.answers, strict=True), 1):
            inputs = processor.apply_chat_template(
                [_question(picture)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            found.append(compared(f"logits, image {number}", 1, logits, model(**inputs).logits, TOLERANCE[self.dtype]))
            said = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
            wrong += processor.decode(said, skip_special_tokens=True).strip() != answer
        found.append(Comparison("answers that differ", 1, wrong, len(self.answers), 0.0, wrong == 0))
        return found

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


def _question(picture: Image.Image) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}


def _state_dtype(folder: Path, dtype: str) -> None:
    """Write into `config.json` what dtype to load in: transformers wrote the first tensor's, which may be that of the RoIs."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("vision_config", {})):
        part["dtype"] = dtype
    write_text(path, json.dumps(config, indent=2) + "\n")


def _loaded(auto: Any, folder: Path) -> Any:
    """The model of a folder as its users get it.

    Raises:
        UserError: a tensor that is missing, unexpected or misshapen; transformers itself would fill it in and go on.
    """
    model, report = auto.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    if wrong := [f"{what} {', '.join(sorted(map(str, names)))}" for what, names in report.items() if names]:
        raise UserError(f"what was written does not load whole ({'; '.join(wrong)}); nothing was kept")
    return model.eval()


def _weights(expected: nn.Module, found: nn.Module) -> Comparison:
    """Every tensor, bit by bit."""
    ours, theirs = expected.state_dict(), found.state_dict()
    largest = max(tensor.abs().max().item() for tensor in ours.values())
    if {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} != {
        name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()
    }:
        return Comparison("weights", 0, float("inf"), largest, 0.0, False)
    difference = max((tensor.float() - theirs[name].float()).abs().max().item() for name, tensor in ours.items())
    return Comparison("weights", 0, difference, largest, 0.0, all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()))
