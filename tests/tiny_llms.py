"""Language models of the families that people use, with random weights: each family's own configuration, kind of tokenizer, special tokens
and published chat template."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import chat_templates
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TEXT = (
    "What is in this picture? There is a cat in the image. Sure? Yes. No. USER: ASSISTANT: [INST] [/INST] system user assistant model\n\n"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
    "the user's questions. You are a helpful AI assistant.\nTheir roles alternate. 0123456789"
)


@dataclass(frozen=True)
class Family:
    """A family of language models.

    Attributes:
        model_type: of its configuration in transformers.
        template: its published chat template.
        special: its special tokens: the first of a text, the end of a turn, and the rest.
        kind: of its tokenizer: `bytes` (byte-level BPE), `plain` (a SentencePiece model and nothing else, which transformers makes a fast
            tokenizer of) or `slow` (SentencePiece itself).
        tied: whether the output layer is the embeddings.
        spare: rows of the embeddings that no token has.
        swallowing: special tokens that take the blanks after them.
        config: of its configuration beside the sizes.
    """

    model_type: str
    template: str
    special: tuple[str, ...] = ("<s>", "</s>")
    kind: str = "bytes"
    tied: bool = False
    spare: int = 0
    swallowing: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TURNS = ("<bos>", "<end_of_turn>", "<start_of_turn>", "<eos>")
FAMILIES: dict[str, Family] = {
    "llama-2": Family("llama", chat_templates.LLAMA2, kind="plain"),
    "llama-2-slow": Family("llama", chat_templates.LLAMA2, kind="slow"),
    "vicuna": Family("llama", chat_templates.VICUNA, kind="plain"),
    "vicuna-slow": Family("llama", chat_templates.VICUNA, kind="slow"),
    "llama-3": Family(
        "llama",
        chat_templates.LLAMA3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        tied=True,
    ),
    "qwen2": Family("qwen2", chat_templates.QWEN2, CHATML, tied=True, spare=70),
    "qwen3": Family("qwen3", chat_templates.QWEN3, CHATML, spare=70, config={"head_dim": 16}),
    "phi3": Family(
        "phi3",
        chat_templates.PHI3,
        ("<s>", "<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
        kind="plain",
        spare=3,
        swallowing=("<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "gemma2": Family("gemma2", chat_templates.GEMMA2, TURNS, kind="plain", tied=True, config={"head_dim": 16}),
    "gemma3": Family("gemma3_text", chat_templates.GEMMA3, TURNS, kind="plain", tied=True, config={"head_dim": 16, "sliding_window": 64}),
    "mistral": Family("mistral", chat_templates.MISTRAL, kind="plain", config={"sliding_window": None}),
    "smollm2": Family("llama", chat_templates.SMOLLM2, CHATML, tied=True),
    "smollm3": Family("smollm3", chat_templates.SMOLLM3, CHATML, tied=True),
}


@cache
def sentencepiece_model() -> bytes:
    """A SentencePiece model as Llama's: BPE with bytes for what it does not know, a space before the first word."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 4), model_writer=written, vocab_size=380, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def save_family_tokenizer(family: Family, folder: Path) -> None:
    """The files that such a model is published with."""
    folder.mkdir(parents=True)
    first, end = family.special[:2]
    extra = [AddedToken(token, special=True, normalized=False, rstrip=token in family.swallowing) for token in family.special]
    if family.kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(alphabet), show_progress=False))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=first, eos_token=end, chat_template=family.template)
        tokenizer.add_special_tokens({"additional_special_tokens": extra})
        tokenizer.save_pretrained(folder)
        return
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    classes = {"plain": "LlamaTokenizer", "slow": "SentencePieceBackend"}
    names = {"bos_token": first, "eos_token": end, "unk_token": "<unk>", "tokenizer_class": classes[family.kind], "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": family.template}))
    if family.special[2:]:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": extra})
        tokenizer.save_pretrained(folder)


def save_family(family: Family, folder: Path, **config: Any) -> str:
    """A model of two layers with its tokenizer."""
    save_family_tokenizer(family, folder)
    settings = CONFIG_MAPPING[family.model_type](
        **{
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 768,
            "initializer_range": 0.2,
            "tie_word_embeddings": family.tied,
            "pad_token_id": 0,
            **family.config,
            **config,
        }
    )
    settings.save_pretrained(folder)  # the tokenizer's kind can depend on it
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings.vocab_size = max(tokenizer.get_vocab().values()) + 1 + family.spare
    settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folder)
    return str(folder)
