"""Language models under test: of the zoo, a folder, or a published shape with random weights. A shape is one more entry in `SHAPES`.

Shape legend: B requests, T tokens, D width, L layers.

Notable: a time does not depend on the weights, so a shape is as good as a model for it, and the output says which it was. A model that does
not fit the machine is measured block by block: a few of its decoder layers and its head, each with random weights of the right size, and
the time of the layers times L over their number.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_vlm.bench.machine import memory_bytes
from sparse_vlm.errors import UserError
from sparse_vlm.tower.cost import Work, attention, linear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BLOCKS = 2  # decoder layers that stand for all of a model that does not fit
FITS = 0.5  # share of the memory that weights of LLM and towers may take


@dataclass(frozen=True)
class Shape:
    """The dimensions of a published decoder of LLaMA's architecture.

    Attributes:
        summary: whose they are.
    """

    summary: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool

    def config(self) -> PreTrainedConfig:
        """As transformers has it."""
        from transformers import LlamaConfig

        numbers = {name: value for name, value in vars(self).items() if name != "summary"}
        return LlamaConfig(max_position_embeddings=32768, **numbers)


SHAPES: dict[str, Shape] = {
    "135m": Shape("SmolLM2-135M", 49152, 576, 1536, 30, 9, 3, True),
    "360m": Shape("SmolLM2-360M", 49152, 960, 2560, 32, 15, 5, True),
    "1b": Shape("Llama-3.2-1B", 128256, 2048, 8192, 16, 32, 8, True),
    "1.7b": Shape("SmolLM2-1.7B", 49152, 2048, 8192, 24, 32, 32, True),
    "3b": Shape("Llama-3.2-3B", 128256, 3072, 8192, 28, 24, 8, True),
    "7b": Shape("LLaMA-2-7B, Vicuna-7B", 32000, 4096, 11008, 32, 32, 32, False),
    "13b": Shape("LLaMA-2-13B, Vicuna-13B", 32000, 5120, 13824, 40, 40, 40, False),
}


@dataclass(frozen=True)
class LLMPlan:
    """What is known of an LLM before its weights are made.

    Attributes:
        trained: whether there are weights to load.
    """

    name: str
    summary: str
    config: PreTrainedConfig
    trained: bool

    @property
    def text(self) -> Any:
        """The part of the configuration that tells of text."""
        return self.config.get_text_config()

    @property
    def layers(self) -> int:
        """L."""
        return self.text.num_hidden_layers

    @property
    def width(self) -> int:
        """D."""
        return self.text.hidden_size

    def ghost(self, layers: int) -> nn.Module:
        """The model with this number of layers, without weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(_cut(self.config, layers), trust_remote_code=False)

    @cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        one, two = (sum(p.numel() for p in self.ghost(layers).parameters()) for layers in (1, 2))
        return one + (self.layers - 1) * (two - one)


def plan_llm(name: str) -> LLMPlan:
    """An LLM by its name: a key of `SHAPES`, a name of the zoo, or a folder.

    Raises:
        UserError: no such LLM.
    """
    from sparse_vlm.hub.pretrained import model_errors
    from sparse_vlm.hub.store import locate
    from sparse_vlm.vlm.llm import load_tokenizer

    if name in SHAPES:
        return LLMPlan(name, SHAPES[name].summary, SHAPES[name].config(), trained=False)
    try:
        locate(name, kind="llm")
    except UserError as error:
        raise UserError(f"--llm {error}; shapes of random weights are {', '.join(SHAPES)}") from error
    _, config, _ = load_tokenizer(name)
    plan = LLMPlan(name, "a language model", config, trained=True)
    with model_errors(f"--llm {name}"):  # a model of images and text, for one, is none
        _ = plan.parameters
    return plan


class Language:
    """An LLM to be timed.

    Args:
        taken: bytes that other models hold beside it.
        memory: bytes that it must fit into, where they are fewer than the device's own.

    Attributes:
        built: layers that there are; fewer than `plan.layers` where it does not fit.
        weights: `trained` or `random`.
    """

    def __init__(self, plan: LLMPlan, dtype: torch.dtype, device: torch.device, taken: int = 0, memory: int | None = None) -> None:
        from transformers import AutoModelForCausalLM

        from sparse_vlm.vlm.llm import load_llm

        self.plan, self.device, self.dtype = plan, device, dtype
        self.parameters = plan.parameters
        self.built = layers_that_fit(plan, dtype, device, taken, memory)
        whole = self.built == plan.layers
        if plan.trained and whole:
            self.model = load_llm(plan.name, dtype).model
        else:
            with device:  # a GPU draws billions of random weights sooner than a CPU
                self.model = AutoModelForCausalLM.from_config(_cut(plan.config, self.built), dtype=dtype, trust_remote_code=False)
        self.weights = "trained" if plan.trained and whole else "random"
        self.model.requires_grad_(False).eval().to(device)
        self._cache_shapes = self._probe()

    @property
    def scale(self) -> float:
        """What the time of the layers that there are is to be multiplied with."""
        return self.plan.layers / self.built

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, as they lie in the cache after a token was read."""
        numbers = sum(2 * heads * size for heads, size in self._cache_shapes)
        return round(numbers * self.dtype.itemsize * self.scale)

    def missing_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of this number of tokens in the layers that are not loaded."""
        return round(tokens * self.kv_bytes_per_token * (1 - 1 / self.scale))

    @torch.inference_mode()
    def decode(self, embeds: Tensor, cache: Any = None) -> Tensor:
        """(B, T, D) through the layers that there are, to the last token's (B, 1, D).

        Args:
            cache: keys and values of what stands before; what is read is added to it.
        """
        out = self.model.base_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        return out.last_hidden_state[:, -1:]

    @torch.inference_mode()
    def choose(self, hidden: Tensor) -> Tensor:
        """(B, 1, D) to the most likely next token (B, 1)."""
        return self.model.get_output_embeddings()(hidden).argmax(dim=-1)

    def embeds(self, batch: int, tokens: int) -> Tensor:
        """What stands for a prompt: (B, T, D)."""
        return torch.randn(batch, tokens, self.plan.width, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

    def filled_cache(self, batch: int, tokens: int) -> Any:
        """A cache that holds this number of tokens of each request; it is written to, so that its memory is allocated."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer, (heads, size) in enumerate(self._cache_shapes):
            key, value = (torch.full((batch, heads, tokens, size), 0.01, dtype=self.dtype, device=self.device) for _ in range(2))
            cache.update(key, value, layer)
        return cache

    def _probe(self) -> list[tuple[int, int]]:
        """(heads of keys and values, their size) of each layer, from reading one token."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.decode(self.embeds(1, 1), cache)
        return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]

    def work(self, new: int, past: int = 0) -> Work:
        """What reading `new` tokens after `past` others does for a request, in all L layers, and choosing a token after the last.

        Linear layers are read off the model; causal attention is counted as the pairs of tokens that see each other.
        """
        layers = Work()
        for module in self.model.base_model.modules():
            if isinstance(module, nn.Linear):
                layers += linear(new, module.in_features, module.out_features)
        text = self.plan.text
        heads = text.num_attention_heads
        kv_heads, size = self._cache_shapes[0]
        seen = attention(new, past + new, heads * size, kv_heads * size, pairs=new * past + new * (new + 1) // 2)
        layers += seen * self.built
        head = linear(1, text.hidden_size, text.vocab_size)
        return Work(round(layers.macs * self.scale), round(layers.weights * self.scale), round(layers.activations * self.scale)) + head

    def described(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.plan.name,
            "summary": self.plan.summary,
            "weights": self.weights,
            "parameters": self.parameters,
            "layers": self.plan.layers,
            "measured_layers": self.built,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_bytes": self.parameters * self.dtype.itemsize,
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }


def layers_that_fit(plan: LLMPlan, dtype: torch.dtype, device: torch.device, taken: int, memory: int | None) -> int:
    """All layers of a model that fits beside what is taken, else `BLOCKS`; as `Language` takes them."""
    own = memory_bytes(device)  # which cannot be made more
    fits = taken + plan.parameters * dtype.itemsize <= FITS * min(own, memory or own)
    return plan.layers if fits else min(BLOCKS, plan.layers)


def _cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The configuration with its first few layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return config
