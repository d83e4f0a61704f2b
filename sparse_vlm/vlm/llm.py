"""Load a causal LM with its tokenizer and chat template, by zoo name or from a folder.

Notable: a GGUF file is converted once to a transformers folder, because loading it takes 18 seconds, and the folder half a second. The
folder's name holds the file's sha256, and it is written atomically. The converted model is not quantized; it can be trained and saved.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.hub.host_format import is_llava
from sparse_vlm.hub.pretrained import from_pretrained, load_complete, model_errors, quiet
from sparse_vlm.hub.weights import refuse_lfs_pointers
from sparse_vlm.utils.devices import native_dtype

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONVERSION = 1  # version of `_convert_gguf`; increase it to ignore folders that older code wrote


@dataclass(frozen=True)
class LLMSpec:
    """Settings of a language model that its files do not hold.

    Attributes:
        system: the system message of conversations that bring none; None leaves that to the model's chat template.
    """

    system: str | None = None


LLMS: dict[str, LLMSpec] = {
    # its template's default system message costs 20 tokens
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
        name_or_path: a name of the zoo, or a folder that holds a transformers model, a single GGUF file, or a LLaVA with our tower.
        dtype: `native_dtype()` by default.
        options: passed on to transformers' `from_pretrained`, such as `quantization_config`.

    Raises:
        UserError: unknown name, not available from any source, not a language model, custom code, no chat template, or missing or
            unexpected weights.
    """
    from transformers import AutoModelForCausalLM

    folder = _folder(name_or_path)
    tokenizer = _tokenizer(name_or_path, folder)
    with model_errors(name_or_path), quiet():
        load = _load_from_llava if _is_llava(folder) else partial(load_complete, AutoModelForCausalLM)
        model = load(folder, dtype=dtype or native_dtype(), **options)
    ends = model.generation_config.eos_token_id
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        raise UserError(
            f"{name_or_path}: eos_token_id in generation_config.json is {str(ends)[:40]}; it must be a token id or a list of them"
        )
    return LLM(str(name_or_path), model.eval(), tokenizer, LLMS.get(str(name_or_path), LLMSpec()))


def _is_llava(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # loading says what is wrong
    return isinstance(config, dict) and is_llava(config)


def _load_from_llava(folder: Path, **options: Any) -> PreTrainedModel:
    """The LLM inside a LLaVA of transformers with our tower."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if "quantization_config" in options:
        raise UserError(f"{folder}: a LLaVA of transformers is not quantized while it is loaded; quantize a VLM that names its LLM")
    llava = load_complete(AutoModelForImageTextToText, folder, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llava.config.text_config, trust_remote_code=False)
    setattr(model, model.base_model_prefix, llava.model.language_model)
    model.set_output_embeddings(llava.lm_head)
    model.generation_config = llava.generation_config
    return model


def greedy_generation(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, end_id: int, unused_ids: list[int]) -> GenerationConfig:
    """An LLM's generation configuration, changed in place: greedy, so that answers are reproducible, and ending at the template's token.

    Args:
        end_id: the token that ends an assistant's turn.
        unused_ids: tokens that must never be generated.
    """
    ends = {end_id, tokenizer.eos_token_id}
    ends |= set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    config.eos_token_id = sorted(end for end in ends if end is not None)
    config.pad_token_id = tokenizer.pad_token_id
    config.suppress_tokens = unused_ids
    config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    return config


def load_tokenizer(name_or_path: str | Path) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig, LLMSpec]:
    """A language model's tokenizer, configuration and settings, without its weights.

    Args:
        name_or_path: as in `load_llm`.

    Raises:
        UserError: as `load_llm`.
    """
    from transformers import AutoConfig

    folder = _folder(name_or_path)
    tokenizer = _tokenizer(name_or_path, folder)
    with model_errors(name_or_path), quiet():
        config = from_pretrained(AutoConfig, folder)
    if _is_llava(folder):
        config = config.text_config
    return tokenizer, config, LLMS.get(str(name_or_path), LLMSpec())


def _tokenizer(name_or_path: str | Path, folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer; it must have a chat template."""
    from transformers import AutoTokenizer

    plain = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if plain and find_spec("sentencepiece") is None:  # transformers would ask for tiktoken
        raise UserError(f"{name_or_path}: reading tokenizer.model needs the package sentencepiece; pip install 'sparse-vlm[sentencepiece]'")
    with model_errors(name_or_path), quiet():
        tokenizer = from_pretrained(AutoTokenizer, folder)
        tokenizer.decode(tokenizer("a")["input_ids"])  # settings of a wrong type fail at first use
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise UserError(f"{name_or_path}: its chat template must be text, not {type(tokenizer.chat_template).__name__}")
    if not tokenizer.chat_template:
        raise UserError(
            f"{name_or_path}: its tokenizer has no chat template; take an instruction-tuned model, or write the template that this one was "
            f"tuned with to {folder / 'chat_template.jinja'}"
        )
    return tokenizer


def _folder(name_or_path: str | Path) -> Path:
    """A folder in transformers' format."""
    folder = store.locate(name_or_path, kind="llm")
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) > 1:
        raise UserError(f"{folder}: holds {len(packed)} GGUF files; leave one")
    if not packed:
        return folder
    refuse_lfs_pointers(folder)
    with model_errors(name_or_path):
        return _converted(packed[0])


def _converted(gguf: Path) -> Path:
    folder = store.home() / "unpacked" / f"{gguf.stem}-{store.sha256(gguf)[:16]}-{CONVERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as aside:
            staging = Path(aside) / "model"
            _convert_gguf(gguf, staging)
            try:
                os.replace(staging, folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
                shutil.rmtree(staging)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write weights (bfloat16), tokenizer and chat template as transformers files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        tokenizer = from_pretrained(AutoTokenizer, gguf.parent, gguf_file=gguf.name)
        model = load_complete(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_dequantize_option(gguf))
        for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, attribute):
                delattr(model, attribute)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # it names the repository of the quantized model
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _dequantize_option(gguf: Path) -> dict[str, object]:
    """The option that dequantizes GGUF weights; transformers before about 5.20 has none and always does."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(gguf_file=gguf.name, dequantize=True)}
