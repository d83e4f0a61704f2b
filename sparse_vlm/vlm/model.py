"""`VLM`: a tower, a projector and an LLM that answers questions about images.

Shape legend: B images, M tokens of the tower, N tokens per image in the LLM (M unless a projector reduces them), d width of the tower, D
width of the LLM.
A folder holds `vlm.json`, `projector.safetensors`, and what training changed. Of the LLM: PEFT's `adapter_config.json` and
`adapter_model.safetensors`, or `llm.safetensors` after full fine-tuning; of the tower: a folder `tower_adapter` of the same two files, or
`tower.safetensors`. Tower and LLM are referred to by name, not copied.

Notable: give `VLM.model`, the stock `LlavaForConditionalGeneration`, and `VLM.processor`, the stock `LlavaProcessor`, to TRL, PEFT or any
trainer. Both save and load without this class. For inference, adapters are merged into the weights and kept for saving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sparse_vlm.errors import UserError, naming
from sparse_vlm.hub.host_format import PROJECTOR_PREFIXES
from sparse_vlm.hub.weights import check_shapes, part_tensors, read_tensors, write_tensors
from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.tower import SparseFormer
from sparse_vlm.utils.devices import native_dtype
from sparse_vlm.vlm import adapters
from sparse_vlm.vlm.config import ADAPTERS, AS_NAMED, TUNED, VLMConfig, read
from sparse_vlm.vlm.llm import greedy_generation, load_llm
from sparse_vlm.vlm.projectors import DEFAULT_TOKENS, MLP, Projector, make_projector
from sparse_vlm.vlm.prompts import IMAGE_TOKEN, Message, Renderer, extend_template, images_of
from sparse_vlm.vlm.quantize import keep_differentiable, quantization
from sparse_vlm.vlm.scoring import Score, score
from sparse_vlm.vlm.stream import PrefixCache, Stream
from sparse_vlm.vlm.vocabulary import add_image_row, check_llm

TOWER_ADAPTER = "tower_adapter"  # folder of the tower's adapters
# Prefix of each part's tensors in `VLM.model`. An LLM whose head is not tied to its embeddings also has `HEAD`.
TENSORS = {"projector": "model.multi_modal_projector.", "llm": "model.language_model.", "tower": "model.vision_tower.tower."}
HEAD = "lm_head.weight"


class VLM:
    """A vision-language model.

    Attributes:
        model: the stock `LlavaForConditionalGeneration`, in eval mode.
        processor: the stock `LlavaProcessor`; its chat template is the LLM's own, extended to images.
        renderer: conversations to tokens and label masks.
        tower_name, llm_name: names or folders that tower and LLM were loaded from.
        peft, tower_peft: PEFT's wrapper around `model` while the LLM has adapters that are not merged, and around `tower`; else None.
        merged: merged adapters by part, `llm` and `tower`, kept for saving.
        llm_changed, tower_changed: whether the part was fully fine-tuned and is saved with the model.
        projector_kind: `mlp`, or a key of `sparse_vlm.vlm.projectors.PROJECTORS`.
        quantized: `4bit` or `8bit` if the LLM's weights are quantized, else None.
        new_projector: whether the projector is untrained; set it to False after training it without `sparse_vlm.train`.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, tower_name: str, llm_name: str) -> None:
        self.model, self.processor = model, processor
        model.save_pretrained = partial(adapters.save_merged, model)
        self.tower_name, self.llm_name = tower_name, llm_name
        self.peft: Any = None
        self.tower_peft: Any = None
        self.merged: dict[str, adapters.Merged] = {}
        self.llm_changed = self.tower_changed = False
        self.quantized: str | None = None
        self.projector_kind = MLP
        self.new_projector = True
        self.renderer = Renderer(processor.tokenizer, processor.chat_template, self.tokens_per_image)
        self._prefix_cache = PrefixCache()

    @property
    def tower(self) -> SparseFormer:
        """The vision tower."""
        return self.model.model.vision_tower.tower

    @property
    def projector(self) -> LlavaMultiModalProjector | Projector:
        """From (B, M, d) to (B, N, D): LLaVA's two-layer MLP, or one of `sparse_vlm.vlm.projectors`."""
        return self.model.model.multi_modal_projector

    @property
    def tokens_per_image(self) -> int:
        """Tokens per image in the LLM (N)."""
        return self.model.config.image_seq_length

    @property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer, with the image token added."""
        return self.processor.tokenizer

    @classmethod
    def build(
        cls,
        tower: str | Path,
        llm: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        num_tokens: int | None = None,
        quantize: str | None = None,
        projector: str = MLP,
    ) -> VLM:
        """A new VLM with an untrained projector.

        Args:
            tower: a folder or zoo name.
            llm: a folder or zoo name.
            dtype: of all weights; by default bfloat16 if the device has fast bfloat16 products, else float32.
            seed: of the projector's weights.
            num_tokens: tokens per image: the token budget of the tower, or the number that a projector reduces the tower's tokens to
                (`DEFAULT_TOKENS` by default).
            quantize: `4bit` or `8bit`: quantize the LLM's weights with bitsandbytes.
            projector: `mlp`, LLaVA's own, or a key of `PROJECTORS`, which reduce the number of tokens.

        Raises:
            UserError: either cannot be loaded, the tower does not serve that token budget, or bitsandbytes is not installed.
        """
        from sparse_vlm.hf.model import SparseFormerHostModel, SparseFormerImageProcessor, llava_config, processor_counts

        dtype = dtype or native_dtype(device)
        plain = projector == MLP
        host = SparseFormerHostModel.wrap(SparseFormer.from_pretrained(tower, dtype, num_tokens if plain else None))
        packed = {} if quantize is None else {"quantization_config": quantization(quantize, dtype), "device_map": {"": device}}
        language = load_llm(llm, dtype=dtype, **packed)
        tokenizer, text_model = language.tokenizer, language.model
        if quantize is not None:
            keep_differentiable(text_model)
        config = host.tower.config
        tokens = config.visual_tokens if plain else num_tokens or DEFAULT_TOKENS
        check_llm(text_model, str(llm))
        unused_ids = add_image_row(tokenizer, text_model)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

        template = extend_template(tokenizer.chat_template, language.spec.system)
        with naming(str(llm)):
            renderer = Renderer(tokenizer, template, tokens)
            end_id = renderer.end_id()
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(llava_config(host.config, text_model.config, renderer.image_id, tokens))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = config.width, text_model.config.hidden_size, config.visual_tokens, tokens
            made = LlavaMultiModalProjector(model.config) if plain else make_projector(projector, *sizes)
            model.model.multi_modal_projector = made.to(dtype)
        model.model.vision_tower = host
        model.model.language_model = text_model.base_model
        model.lm_head = text_model.get_output_embeddings()

        model.generation_config = greedy_generation(text_model.generation_config, tokenizer, end_id, unused_ids)
        processor = LlavaProcessor(
            image_processor=SparseFormerImageProcessor.of(config),
            tokenizer=tokenizer,
            chat_template=template,
            image_token=IMAGE_TOKEN,
            **processor_counts(config, tokens),
        )
        model.requires_grad_(False).eval().to(device)
        vlm = cls(model, processor, str(tower), str(llm))
        vlm.projector_kind = projector
        if quantize is not None:
            vlm.quantized = quantize
            setattr(model, f"is_loaded_in_{quantize}", True)  # PEFT reads it
        return vlm

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's dtype. The model's first parameter may be the tower's RoIs, which are always float32."""
        return self.model.get_input_embeddings().weight.dtype

    @classmethod
    def from_pretrained(
        cls,
        path_or_zoo_name: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        fold: bool = True,
        new_tower: str | Path | None = None,
        keep_projector: bool = False,
        num_tokens: int | None = None,
        quantize: str | None = None,
        projector: str = MLP,
    ) -> VLM:
        """Load a VLM from a folder (also of a LLaVA of transformers with our tower, or of PEFT's adapters of one) or from the zoo by name.

        Args:
            fold: merge adapters into the weights, which is faster; set it to False to train them.
            new_tower: a folder or zoo name of a tower that replaces the VLM's own; the projector is then replaced by an untrained one.
            keep_projector: with a new tower, keep the projector; students of one teacher have tokens alike enough for it.
            num_tokens: token budget of the tower; the one that it was trained with by default.
            projector: kind of the new projector of a new tower.
            quantize: `4bit` or `8bit`: quantize the LLM's weights with bitsandbytes; adapters are then not merged.

        Raises:
            UserError: no such folder or name, not a VLM, a part that cannot be found, weights that do not fit, an untrained projector
                with `fold`, or a fully fine-tuned LLM with `quantize`.
        """
        folder, config = read(path_or_zoo_name)
        holds, keeps_projector = config.holds, new_tower is None or keep_projector
        if fold and (config.new_projector or not keeps_projector):
            raise UserError(f"{path_or_zoo_name}: its projector is untrained; `sparse-vlm train --stage align --init` trains it")
        if quantize is not None and holds["llm"] == TUNED:
            raise UserError(f"{path_or_zoo_name}: its LLM was fully fine-tuned and cannot be loaded in {quantize}")
        kind = config.projector_kind if keeps_projector else projector
        budget = num_tokens or (None if new_tower else config.num_tokens)
        tower = new_tower or config.tower
        with naming(str(path_or_zoo_name)):
            vlm = cls.build(tower, config.llm, device, dtype, num_tokens=budget, quantize=quantize, projector=kind)
        if keeps_projector:
            vlm.new_projector = config.new_projector
            # a projector serves any number of tokens; they must match unless another number was chosen
            ignored = {} if num_tokens is None and new_tower is None else {"tokens": config.projector["tokens"]}
            if config.projector != vlm._projector_shape() | ignored:
                needed = vlm._projector_shape()
                raise UserError(f"{path_or_zoo_name}: projector {config.projector}, but tower {tower} and LLM {config.llm} need {needed}")
            vlm._load("projector", config.projector_folder or folder)
        if holds["llm"] == TUNED:
            vlm.llm_changed = True
            vlm._load("llm", folder)
        elif holds["llm"] == ADAPTERS:
            vlm.peft = adapters.read(vlm.model, folder, trainable=not fold)
            if fold and quantize is None:  # before the tower's adapters are loaded, which would be merged with them
                vlm.merge_adapter()
        if new_tower is None and holds["tower"] == TUNED:
            vlm.tower_changed = True
            vlm._load("tower", folder)
        elif new_tower is None and holds["tower"] == ADAPTERS:
            vlm.tower_peft = adapters.read(vlm.tower, folder / TOWER_ADAPTER, trainable=not fold)
            if fold:
                vlm._merge_tower()
        vlm.model.eval()
        return vlm

    def save_pretrained(
        self, path: str | Path, dtype: torch.dtype | None = None, tower: str | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the folder that `from_pretrained` loads.

        Args:
            dtype: to store projector, adapters and tuned weights in; their own by default.
            tower: name of the tower to write instead of the one it was loaded from, such as its name in the zoo.
            tensors: gathered `own_tensors`, where the model is sharded over processes.

        Raises:
            UserError: the model has adapters that were added from outside, which this VLM does not save.
        """
        folder = Path(path)
        for part, module, own in (("LLM", self.model.model.language_model, self.peft), ("tower", self.tower, self.tower_peft)):
            if own is None:
                adapters.refuse_foreign(part, module)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.own_tensors() if tensors is None else tensors
        for part in ("projector", *["llm"] * self.llm_changed, *["tower"] * self.tower_changed):
            write_tensors(self._part(part, tensors), folder / f"{part}.safetensors", dtype)
        prefix = TENSORS["tower"]
        if (llm_adapters := self._adapters("llm")) is not None:
            own = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
            adapters.write(llm_adapters, folder, own, self.llm_name, dtype)
        if (tower_adapters := self._adapters("tower")) is not None:
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            adapters.write(tower_adapters, folder / TOWER_ADAPTER, own, self.tower_name, dtype)
        holds = {
            "tower": TUNED if self.tower_changed else AS_NAMED if tower_adapters is None else ADAPTERS,
            "projector": "new" if self.new_projector else "trained",
            "llm": TUNED if self.llm_changed else AS_NAMED if llm_adapters is None else ADAPTERS,
        }
        chosen = self.tower.config.budgets is not None or self.projector_kind != MLP
        tokens = self.tokens_per_image if chosen else None
        VLMConfig(tower or self.tower_name, self.llm_name, self._projector_shape(), tokens, holds, self.new_projector).save(folder)

    def _projector_shape(self) -> dict[str, int | str]:
        return {
            **({} if self.projector_kind == MLP else {"kind": self.projector_kind}),
            "tokens": self.tokens_per_image,
            "tower_width": self.tower.config.width,
            "llm_width": self.model.config.text_config.hidden_size,
        }

    def own_tensors(self) -> dict[str, Tensor]:
        """Tensors that a folder holds, by their names in `model`: projector, adapters, and LLM or tower if they were fully fine-tuned."""
        kept = (TENSORS["projector"], *[TENSORS["llm"]] * self.llm_changed, *[TENSORS["tower"]] * self.tower_changed)
        state = self.model.state_dict(keep_vars=True)
        own = {name: tensor for name, tensor in state.items() if name.startswith(kept) or "lora_" in name}
        if self.llm_changed and self.model.lm_head.weight is not self.model.get_input_embeddings().weight:
            own[HEAD] = state[HEAD]
        return own

    def _part(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A part's tensors by the names in its file."""
        prefix = TENSORS[part]
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return {**own, HEAD: tensors[HEAD]} if part == "llm" and HEAD in tensors else own

    @torch.no_grad()
    def _load(self, part: str, folder: Path) -> None:
        path = folder / f"{part}.safetensors"
        state = read_tensors(path) if path.exists() or part != "projector" else part_tensors(folder, PROJECTOR_PREFIXES)
        own = self._part(part, self.own_tensors())
        check_shapes(path, adapters.shapes(own), adapters.shapes(state))
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def add_adapters(self, rank: int, seed: int = 0) -> None:
        """Add a new, trainable LoRA adapter of this rank to every linear layer of the LLM; the initial output is unchanged."""
        self.peft = adapters.create(self.model, adapters.language_layers(self.model), rank, seed, task="CAUSAL_LM")

    def add_tower_adapters(self, rank: int, seed: int = 0) -> None:
        """Add LoRA adapters to the linear layers of the tower's units."""
        self.tower_peft = adapters.create(self.tower, adapters.tower_layers(self.tower), rank, seed)

    def merge_adapter(self) -> None:
        """Merge the adapters of LLM and tower into their weights and keep them for saving.

        Afterwards PEFT can add another adapter to `model`. Save that one with PEFT; load it onto `VLM.from_pretrained(FOLDER).model`.

        Raises:
            UserError: the LLM is quantized.
        """
        if self.peft is not None:
            if self.quantized is not None:
                raise UserError(f"adapters cannot be merged into an LLM in {self.quantized}; load it without quantization")
            if self.tower_peft is not None:  # PEFT would merge them, too
                self._merge_tower()
            self.merged["llm"], self.peft = adapters.merge(self.peft), None
        if self.tower_peft is not None:
            self._merge_tower()

    def _merge_tower(self) -> None:
        self.merged["tower"], self.tower_peft = adapters.merge(self.tower_peft), None

    def _adapters(self, part: str) -> Any:
        """A part's adapters, merged or not; None if it has none."""
        wrapper = self.peft if part == "llm" else self.tower_peft
        return self.merged.get(part) if wrapper is None else wrapper

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images to tokens of the LLM's width, (B, N, D)."""
        tokens = self.tower.visual_tokens(*Preprocessor.of(self.tower.config)(images).to(self.model.device))
        return self.projector(tokens.to(self.projector.linear_1.weight.dtype))

    @torch.inference_mode()
    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int = 64, **options: Any) -> list[str]:
        """Answer each conversation's last message; greedy by default.

        Args:
            conversations: images are PIL images in `{"type": "image", "image": ...}`.
            options: passed on to transformers' `generate`.

        Raises:
            UserError: a conversation has another number of placeholders than images, or is too long.
        """
        if not conversations:
            return []
        rows = [self.renderer.tokens(self.renderer.text(conversation, answer_next=True)) for conversation in conversations]
        for i, (row, conversation) in enumerate(zip(rows, conversations, strict=True)):
            self.renderer.check_count(row, len(images_of(conversation)), f"conversation {i}")
        inputs = self.tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt")
        if images := [image for conversation in conversations for image in images_of(conversation)]:
            inputs["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        self.check_length(inputs["input_ids"].shape[1] + max_new_tokens)
        if self.projector_kind != MLP:  # with sizes, Llava concatenates the tokens of all images, which a reducing projector cannot split
            inputs.pop("image_sizes", None)
        out = self.model.generate(**inputs.to(self.model.device), max_new_tokens=max_new_tokens, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]

    def stream(self, messages: Sequence[Message], max_new_tokens: int = 64) -> Stream:
        """Answer the last message as a stream of text pieces; `Stream.timings` holds measurements."""
        return Stream(self, messages, max_new_tokens, self._prefix_cache)

    def score(self, conversations: Sequence[Sequence[Message]], answers: Sequence[Sequence[str]], batch_size: int = 4) -> list[list[Score]]:
        """Log-likelihoods of candidate answers, for multiple choice and yes/no questions.

        Conversations about the same image objects share one forward pass (`vlm.tree`).

        Args:
            conversations: each ends with a user's message.
            answers: the candidates of each conversation.

        Returns:
            A `Score` for each candidate of each conversation.
        """
        return score(self, conversations, answers, batch_size)

    def check_length(self, tokens: int) -> None:
        """Check a conversation's number of tokens, its answer included.

        Raises:
            UserError: more than the LLM's context length.
        """
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)  # absent in LLMs without a limit
        if limit is not None and tokens > limit:
            raise UserError(f"the conversation is too long: {tokens} tokens with its answer, the model reads {limit}; start a new one")
