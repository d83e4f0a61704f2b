"""`VLM`: a tower, a projector and an LLM that answers questions about images.

Shape legend: B images, M tokens of the tower, N tokens an image in the LLM (M unless a projector reduces them), d width of the tower, D
width of the LLM.
On disk it is `vlm.json`, `projector.safetensors`, and what training changed in the LLM: PEFT's `adapter_config.json` and
`adapter_model.safetensors`, or `vlm.llm.safetensors` after full training; in the tower: a folder `tower_adapter` of the same two files, or
`tower.safetensors`. Tower and LLM are named, not copied. `vlm.json` says under `holds` which of these there are.

Notable: `VLM.model` is the stock `LlavaForConditionalGeneration` and `VLM.processor` the stock `LlavaProcessor`; both save and load without
this class. Adapters are folded into the LLM's weights for use and stay at hand for saving.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sparse_vlm.errors import UserError, naming
from sparse_vlm.hub import store
from sparse_vlm.hub.weights import check_shapes, read_tensors
from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.tower import SparseFormer
from sparse_vlm.utils.devices import native_dtype
from sparse_vlm.utils.files import write_text
from sparse_vlm.vlm import adapters
from sparse_vlm.vlm.described import FORMAT, HELD, read
from sparse_vlm.vlm.files import write_tensors
from sparse_vlm.vlm.llm import load_llm
from sparse_vlm.vlm.projectors import DEFAULT_TOKENS, MLP, Projector, make_projector
from sparse_vlm.vlm.prompts import IMAGE_TOKEN, Message, Renderer, extend_template, images_of
from sparse_vlm.vlm.quantize import keep_differentiable, quantization
from sparse_vlm.vlm.scoring import Score, score
from sparse_vlm.vlm.stream import Memory, Stream
from sparse_vlm.vlm.vocabulary import check_llm, give_rows

TOWER_ADAPTER = "tower_adapter"  # PEFT's folder of the tower's
# Where the parts' tensors stand in `VLM.model`, and the file of each. An LLM whose head is not its table of embeddings has that as well.
TENSORS = {"projector": "model.multi_modal_projector.", "llm": "model.language_model.", "tower": "model.vision_tower.tower."}
HEAD = "lm_head.weight"


class VLM:
    """A vision-language model.

    Attributes:
        model: the stock `LlavaForConditionalGeneration`, in eval mode.
        processor: the stock `LlavaProcessor`; its chat template is the LLM's own, extended to images.
        renderer: conversations to tokens and label masks.
        tower_name, llm_name: what tower and LLM were loaded by.
        peft, tower_peft: PEFT's wrapper around `model` when the LLM has adapters that are not folded into its weights, and around `tower`
            when that has; else None.
        folded: the adapters of `llm` and `tower` that are, as they are saved.
        llm_changed, tower_changed: whether its own weights were trained and are saved with the model.
        projector_kind: `mlp`, or which of `sparse_vlm.vlm.projectors`.
        quantized: `4bit` or `8bit` when the LLM's weights are held so, else None.
        new_projector: whether the projector has learnt nothing yet; whoever trains it by other means than ours sets it to False.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, tower_name: str, llm_name: str) -> None:
        self.model, self.processor = model, processor
        model.save_pretrained = partial(adapters.save_plainly, model)
        self.tower_name, self.llm_name = tower_name, llm_name
        self.peft: Any = None
        self.tower_peft: Any = None
        self.folded: dict[str, adapters.Folded] = {}
        self.llm_changed = self.tower_changed = False
        self.quantized: str | None = None
        self.projector_kind = MLP
        self.new_projector = True
        self.renderer = Renderer(processor.tokenizer, processor.chat_template, self.tokens_per_image)
        self._memory = Memory()

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
        """Tokens that an image takes in the LLM (N)."""
        return self.model.config.image_seq_length

    @property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer, which knows the image token."""
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
            dtype: of all weights; bfloat16 where the device multiplies in it, else float32.
            seed: of the projector's weights.
            num_tokens: tokens an image: latent tokens of a tower that serves several budgets, or what a projector reduces the tower's to
                (`DEFAULT_TOKENS` unless given).
            quantize: `4bit` or `8bit`: hold the LLM's weights so, by bitsandbytes.
            projector: `mlp`, LLaVA's own, or a kind of `sparse_vlm.vlm.projectors` that reduces the tower's tokens.

        Raises:
            UserError: either cannot be loaded, the tower was not made for that number of tokens, or there is no bitsandbytes.
        """
        from sparse_vlm.hf.model import SparseFormerHostModel, SparseFormerImageProcessor, processor_counts

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
        never_said = give_rows(tokenizer, text_model)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

        template = extend_template(tokenizer.chat_template, language.spec.system)
        with naming(str(llm)):
            renderer = Renderer(tokenizer, template, tokens)
            end_id = renderer.end_id()  # asks the template
        llava_config = LlavaConfig(
            vision_config=host.config,
            text_config=text_model.config,
            image_token_index=renderer.image_id,
            image_seq_length=tokens,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            projector_hidden_act="gelu",
        )
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(llava_config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = config.width, text_model.config.hidden_size, config.visual_tokens, tokens
            made = LlavaMultiModalProjector(model.config) if plain else make_projector(projector, *sizes)
            model.model.multi_modal_projector = made.to(dtype)
        model.model.vision_tower = host
        model.model.language_model = text_model.base_model
        model.lm_head = text_model.get_output_embeddings()

        generation = text_model.generation_config
        ends = {end_id, tokenizer.eos_token_id}
        ends |= set(generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id])
        generation.eos_token_id = sorted(end for end in ends if end is not None)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.suppress_tokens = never_said
        # greedy unless asked otherwise: an answer about a photo should be the same tomorrow
        generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
        model.generation_config = generation
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
            setattr(model, f"is_loaded_in_{quantize}", True)  # PEFT asks this of the model that it wraps
        return vlm

    @property
    def dtype(self) -> torch.dtype:
        """What the LLM computes in. Not that of the model's first parameter, which may be a tower's RoIs, float32 in any tower."""
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
        """Load a VLM from a folder, or from the zoo by name.

        Args:
            fold: to use the model: adapters are added to the LLM's weights, which is faster. Training needs them apart.
            new_tower: a folder or zoo name of a tower to put in the place of its own; the projector is then new, too, and untrained.
            keep_projector: with a new tower, keep the projector: students of one teacher, whose tokens follow the same patch features,
                can take each other's place.
            num_tokens: latent tokens an image, for a tower that serves several budgets; those that it was trained with by default.
            projector: kind of the new projector under a new tower.
            quantize: `4bit` or `8bit`: hold the LLM's weights so, by bitsandbytes; its adapters then stay beside them, as they are.

        Raises:
            UserError: no such folder or name, not a VLM, a part that cannot be found, weights that do not fit, a model to use whose
                projector has learnt nothing, or a model to quantise whose LLM has weights of its own.
        """
        folder, described = read(path_or_zoo_name)
        tower, llm, shape, blank, held = described.tower, described.llm, described.shape, described.new_projector, described.holds
        keeps = new_tower is None or keep_projector
        if fold and (blank or not keeps):
            raise UserError(f"{path_or_zoo_name}: its projector has learnt nothing yet; `sparse-vlm train --stage align --init` teaches it")
        if quantize is not None and held["llm"] == "tuned":
            raise UserError(f"{path_or_zoo_name}: its LLM was trained in full, and only one as it is named can be loaded in {quantize}")
        kind = described.kind if keeps else projector
        budget = num_tokens or (None if new_tower else described.num_tokens)
        with naming(str(path_or_zoo_name)):
            vlm = cls.build(new_tower or tower, llm, device, dtype, num_tokens=budget, quantize=quantize, projector=kind)
        if keeps:
            vlm.new_projector = blank
            # a projector serves any number of tokens, if they are asked for
            others = {} if num_tokens is None and new_tower is None else {"tokens": shape["tokens"]}
            if shape != vlm._shape() | others:
                raise UserError(f"{path_or_zoo_name}: made for {shape}, but tower {new_tower or tower} and LLM {llm} are {vlm._shape()}")
            vlm._load("projector", folder)
        if held["llm"] == "tuned":
            vlm.llm_changed = True
            vlm._load("llm", folder)
        elif held["llm"] == "adapters":
            vlm.peft = adapters.read(vlm.model, folder, trainable=not fold)
            if fold and quantize is None:  # before the tower has its own, which would be folded with them
                vlm.merge_adapter()
        if new_tower is None and held["tower"] == "tuned":
            vlm.tower_changed = True
            vlm._load("tower", folder)
        elif new_tower is None and held["tower"] == "adapters":
            vlm.tower_peft = adapters.read(vlm.tower, folder / TOWER_ADAPTER, trainable=not fold)
            if fold:
                vlm._fold_tower()
        vlm.model.eval()
        return vlm

    def save_pretrained(
        self, path: str | Path, dtype: torch.dtype | None = None, tower: str | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the folder that `from_pretrained` loads.

        Args:
            dtype: store projector, adapters and what was tuned so; as they are by default.
            tower: name of the tower to record instead of what it was loaded by, such as its name in the zoo.
            tensors: `own_tensors` as they are to be written, where the model itself is spread over processes.

        Raises:
            UserError: somebody else put adapters on the model, which are not this VLM's to save.
        """
        folder = Path(path)
        self._refuse_foreign_adapters()
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.own_tensors() if tensors is None else tensors
        for part in ("projector", *["llm"] * self.llm_changed, *["tower"] * self.tower_changed):
            write_tensors(self._part(part, tensors), folder / f"{part}.safetensors", dtype)
        prefix = TENSORS["tower"]
        if (found := self._adapters("llm")) is not None:
            own = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
            adapters.write(found, folder, own, self.llm_name, dtype)
        if (found := self._adapters("tower")) is not None:
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            adapters.write(found, folder / TOWER_ADAPTER, own, self.tower_name, dtype)
        described = {"format": FORMAT, "tower": tower or self.tower_name, "llm": self.llm_name, "projector": self._shape()}
        described["holds"] = {
            "tower": _held(self.tower_changed, self._adapters("tower")),
            "projector": "new" if self.new_projector else "trained",
            "llm": _held(self.llm_changed, self._adapters("llm")),
        }
        ways = {described[part]: store.relative_path_to(described[part], folder) for part in ("tower", "llm")}
        if ways := {name: way for name, way in ways.items() if way is not None}:
            described["ways"] = ways
        if self.tower.config.budgets is not None or self.projector_kind != MLP:
            described["num_tokens"] = self.tokens_per_image
        if self.new_projector:
            described["new_projector"] = True
        write_text(folder / "vlm.json", json.dumps(described, indent=1) + "\n")

    def _shape(self) -> dict[str, int | str]:
        return {
            **({} if self.projector_kind == MLP else {"kind": self.projector_kind}),
            "tokens": self.tokens_per_image,
            "tower_width": self.tower.config.width,
            "llm_width": self.model.config.text_config.hidden_size,
        }

    def own_tensors(self) -> dict[str, Tensor]:
        """What a folder holds of the model, by names in `model`: projector, adapters, and LLM or tower where they were tuned themselves."""
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
        state = read_tensors(path)
        own = self._part(part, self.own_tensors())
        check_shapes(path, adapters.shapes(own), adapters.shapes(state))
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def add_adapters(self, rank: int, seed: int = 0) -> None:
        """Give every linear layer of the LLM a fresh LoRA adapter of this rank, trainable and without effect."""
        self.peft = adapters.fresh(self.model, adapters.language_layers(self.model), rank, seed, task="CAUSAL_LM")

    def add_tower_adapters(self, rank: int, seed: int = 0) -> None:
        """The same for the tower's units."""
        self.tower_peft = adapters.fresh(self.tower, adapters.tower_layers(self.tower), rank, seed)

    def merge_adapter(self) -> None:
        """Fold adapters into the weights of LLM and tower, where they have any; they stay at hand for saving.

        The layers are plain again, so that PEFT can put an adapter of somebody else's on `model`. That one is saved by PEFT, and goes on
        `VLM.from_pretrained(FOLDER).model`.

        Raises:
            UserError: an LLM in 4 or 8 bits, whose adapters stay beside its weights.
        """
        if self.peft is not None:
            if self.quantized is not None:
                raise UserError(f"an LLM in {self.quantized} keeps its adapters beside its weights; load it unquantised to fold them")
            if self.tower_peft is not None:  # PEFT folds whatever it finds inside
                self._fold_tower()
            self.folded["llm"], self.peft = adapters.fold(self.peft), None
        if self.tower_peft is not None:
            self._fold_tower()

    def _fold_tower(self) -> None:
        self.folded["tower"], self.tower_peft = adapters.fold(self.tower_peft), None

    def _adapters(self, part: str) -> Any:
        """A part's adapters, apart or folded; None where there are none."""
        apart = self.peft if part == "llm" else self.tower_peft
        return self.folded.get(part) if apart is None else apart

    def _refuse_foreign_adapters(self) -> None:
        inner = self.model.model
        for part, module, own in (("LLM", inner.language_model, self.peft), ("tower", inner.vision_tower, self.tower_peft)):
            if own is None and adapters.has_any(module):
                raise UserError(
                    f"the {part} has adapters that are not this VLM's; save them by PEFT's own save_pretrained (they go on "
                    "VLM.from_pretrained(FOLDER).model), or merge and unload them before"
                )

    # ---- use

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Images to tokens in the LLM's width: (B, N, D)."""
        tokens = self.tower.visual_tokens(*Preprocessor.of(self.tower.config)(images).to(self.model.device))
        return self.projector(tokens.to(self.projector.linear_1.weight.dtype))

    @torch.inference_mode()
    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int = 64, **options: Any) -> list[str]:
        """Answer each conversation's last message; greedy by default.

        Args:
            conversations: images are PIL images in `{"type": "image", "image": ...}`.
            options: passed on to transformers' `generate`.

        Raises:
            UserError: a conversation whose placeholders and images do not match, or that is too long.
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
        if self.projector_kind != MLP:  # one that reduces tokens cannot take those of all images in one row; the canvases tell the sizes
            inputs.pop("image_sizes", None)
        out = self.model.generate(**inputs.to(self.model.device), max_new_tokens=max_new_tokens, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]

    def stream(self, messages: Sequence[Message], max_new_tokens: int = 64) -> Stream:
        """Answer the last message piece by piece; see `Stream` for what it measures."""
        return Stream(self, messages, max_new_tokens, self._memory)

    def score(self, conversations: Sequence[Sequence[Message]], answers: Sequence[Sequence[str]], batch_size: int = 4) -> list[list[Score]]:
        """How likely each candidate answer is, for multiple choice and yes/no.

        Conversations about the same image objects share one forward pass.

        Args:
            conversations: each ends with a user's message.
            answers: the candidates of each conversation.

        Returns:
            A `Score` for each candidate of each conversation.
        """
        return score(self, conversations, answers, batch_size)

    def check_length(self, tokens: int) -> None:
        """Make sure that a conversation of so many tokens can be read.

        Raises:
            UserError: it is longer than the LLM's context.
        """
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)  # an LLM without positions has no limit
        if limit is not None and tokens > limit:
            raise UserError(f"the conversation is too long: {tokens} tokens with its answer, the model reads {limit}; start a new one")


def _held(changed: bool, peft: Any) -> str:
    return HELD[2] if changed else HELD[0] if peft is None else HELD[1]
