"""A tower and an LLM small enough for tests, with everything real about them: safetensors, a byte-level tokenizer, a ChatML template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparse_vlm.tower import FocusConfig, RoIPatchConfig, SparseFormer, SparseFormerConfig, UnitConfig
from sparse_vlm.vlm import VLM

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")


def save_tokenizer(folder: Path, template: str = CHATML) -> None:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1], chat_template=template
    )
    tokenizer.save_pretrained(folder)


def save_llm(folder: Path, template: str = CHATML) -> str:
    """A LLaMA of two layers."""
    save_tokenizer(folder, template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def tower_config(tokens: int = 5) -> SparseFormerConfig:
    """A unit that looks and one that thinks; with a CLS token."""
    return SparseFormerConfig(
        units=(UnitConfig(64, ("SAMPLING_M", "PE_INJECT", "ATTN", "MLP", "ROI_ADJ")), UnitConfig(64, ("ATTN", "MLP"))),
        num_latent_tokens=tokens - 1,
        embed_dim=16,
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.3, 0.25),
        image_size=32,
        conv_dim=8,
        num_points=4,
        generator_dim=8,
        cls_before_unit=1,
    )


def save_tower(folder: Path, tokens: int = 5) -> str:
    """A tower of random weights."""
    torch.manual_seed(1)
    SparseFormer(tower_config(tokens)).save_pretrained(folder)
    return str(folder)


def whole_config(looks: bool = True) -> SparseFormerConfig:
    """A tower that sees whole images on canvases of 96 pixels, and places its 7 cells by content."""
    first = (*["SAMPLING_M"] * looks, "ATTN", "MLP")
    return SparseFormerConfig(
        units=(UnitConfig(64, first), UnitConfig(64, ("ATTN", "MLP"))),
        num_latent_tokens=7,
        embed_dim=16,
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.3, 0.25),
        image_size=96,
        fit="whole",
        conv_dim=8,
        num_points=4,
        generator_dim=8,
        cls_before_unit=0,
        token_init="glance",
        glance=RoIPatchConfig(16, 2, 1, norm_pre=True, kind="crop"),
        budgets=(4, 9),
        focus=FocusConfig(32, (4, 8, 8, 16)),
    )


def save_whole_tower(folder: Path, looks: bool = True) -> str:
    """One of `whole_config`, of random weights large enough that tokens differ."""
    torch.manual_seed(1)
    tower = SparseFormer(whole_config(looks))
    torch.nn.init.normal_(tower.glance.patch_embed.weight, std=0.1)
    torch.nn.init.normal_(tower.glance.pos_embed)
    torch.nn.init.normal_(tower.focus.head.weight, std=1.0)
    tower.save_pretrained(folder)
    return str(folder)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of several scales, so that every part of it differs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    fine = rng.integers(-30, 31, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def picture(color: str, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A plain image."""
    return Image.new("RGB", size, color)


def ask(text: str, *images: Image.Image) -> list[dict]:
    """A conversation of one question."""
    return [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]}]


def stir(vlm: VLM, size: float) -> None:
    """Fill adapters and projector with numbers that change what the model says, as if both had learnt."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_" in name or "projector" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    vlm.new_projector = False
