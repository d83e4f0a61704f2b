"""The tower of LLaVA's `build_vision_tower` for `sparse-vlm:tiny`: a SparseFormer with the interface of its CLIPVisionTower.

Shape legend: B batch, S side of the input in pixels, n latent tokens, T tokens of an image for LLaVA, d width.

Notable: needs torch, numpy, Pillow and safetensors alone, because LLaVA needs transformers 4.37. The tower's name contains all that is
needed to build it again; LLaVA saves it in the model's configuration. LLaVA may build models inside contexts that change initialisation
(accelerate's empty weights, DeepSpeed's zero.Init, a half-precision default): the tower is loaded outside of them.
Source: haotian-liu/LLaVA 1.2.2, llava/model/multimodal_encoder/clip_encoder.py (Apache-2.0).
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import torch
from PIL import Image
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.hub.store import locate
from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.roi import sizes_on
from sparse_vlm.tower import SparseFormer, SparseFormerConfig
from sparse_vlm.utils.devices import own_device

PREFIX = "sparse-vlm:"
_register_parameter = nn.Module.register_parameter


# ---- the name


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError("expected a number, as 25")
    return int(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("expected true or false")
    return text == "true"


OPTIONS: dict[str, Callable[[str], Any]] = {"tokens": _number, "unfreeze": _flag}


@dataclass(frozen=True)
class TowerName:
    """A parsed name `sparse-vlm:NAME-OR-PATH?tokens=25&unfreeze=true`.

    Attributes:
        source: a folder, or a name of the zoo.
        tokens: token budget, for a tower of several; its own by default.
        unfreeze: whether LLaVA's training tunes the tower.
    """

    source: str
    tokens: int | None = None
    unfreeze: bool = False

    @classmethod
    def parse(cls, name: str) -> TowerName:
        """Read a name that begins with `PREFIX`.

        Raises:
            UserError: no source, an unknown option, or an invalid value.
        """
        source, mark, query = name[len(PREFIX) :].partition("?")
        options: dict[str, Any] = {}
        try:
            pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if mark else []
        except ValueError:
            raise UserError(f"vision tower {name}: what follows '?' is not of the form tokens=25&unfreeze=true") from None
        for key, value in pairs:
            if key not in OPTIONS:
                raise UserError(f"vision tower {name}: unknown option {key!r}; there are {', '.join(OPTIONS)}")
            try:
                options[key] = OPTIONS[key](value)
            except ValueError as error:
                raise UserError(f"vision tower {name}: {key}={value}: {error}") from None
        if not source:
            raise UserError(f"vision tower {name}: name a folder or a tower of the zoo, as {PREFIX}tiny")
        return cls(source, **options)

    def config(self) -> SparseFormerConfig:
        """The tower's configuration, without its weights.

        Raises:
            UserError: no such tower, or an unsupported number of tokens.
        """
        folder = locate(self.source, kind="tower")
        try:
            config = SparseFormerConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.source}: not a tower folder ({error})") from error
        try:
            return config if self.tokens is None else config.at_budget(self.tokens)
        except ValueError as error:
            raise UserError(f"{self.source}: {error}") from error


def requested_name(args: Any) -> Any:
    """The tower's name in a model's configuration or in training arguments, as in LLaVA's own builder."""
    return getattr(args, "mm_vision_tower", getattr(args, "vision_tower", None))


def _is_tuned(args: Any, name: TowerName) -> bool:
    return name.unfreeze or bool(getattr(args, "unfreeze_mm_vision_tower", False))


# ---- the images


class LlavaImageProcessor:
    """An image processor with the interface that LLaVA uses; images are preprocessed by `sparse_vlm.images.preprocess`.

    Whole images are at the top left of square canvases that are zero beyond them; the tower recovers their sizes from the canvases,
    because LLaVA passes pixels alone.

    Attributes:
        size, crop_size: S, in the forms that LLaVA reads.
        image_mean, image_std: of each channel, for values in 0..1.
    """

    def __init__(self, config: SparseFormerConfig) -> None:
        side = config.image_size
        self.size, self.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
        self.image_mean, self.image_std = list(config.image_mean), list(config.image_std)
        self.fit = config.fit

    def preprocess(self, images: Image.Image | Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        """Images to `pixel_values` (B, 3, S, S), normalised float32: centre squares, or whole images for a tower of `fit` whole.

        Raises:
            UserError: an input that is no PIL image, or another `return_tensors`.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        if strange := [type(image).__name__ for image in images if not isinstance(image, Image.Image)]:
            raise UserError(f"the image processor of {PREFIX}NAME takes PIL images, not {strange[0]}; open them with PIL.Image.open")
        if return_tensors != "pt":
            raise UserError(
                f"the image processor of {PREFIX}NAME returns torch tensors only; use return_tensors='pt', not {return_tensors!r}"
            )
        prepare = Preprocessor(self.crop_size["height"], tuple(self.image_mean), tuple(self.image_std), self.fit)
        return {"pixel_values": prepare(images, square=True).pixels}

    __call__ = preprocess


# ---- the tower


@dataclass(frozen=True)
class LlavaVisionConfig:
    """The attributes of a tower's configuration that LLaVA reads, and the complete `tower` configuration."""

    hidden_size: int
    image_size: int
    tower: SparseFormerConfig


class SparseFormerVisionTower(nn.Module):
    """A SparseFormer with the interface of LLaVA's CLIPVisionTower.

    Args:
        vision_tower: `sparse-vlm:NAME-OR-PATH`, with options behind a `?` (see `TowerName`).
        args: LLaVA's model configuration or training arguments.
        delay_load: read only the configuration; `load_model` loads the weights. A tuned tower is loaded regardless, because its weights are
            in the checkpoint.

    Raises:
        UserError: no such tower, or a setting that it does not support.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.name = TowerName.parse(vision_tower)
        self.tuned = _is_tuned(args, self.name)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        tower = self.name.config()
        self.config = LlavaVisionConfig(tower.width, tower.image_size, tower)
        self.image_processor = LlavaImageProcessor(tower)
        self._check(args)
        if self.tuned or not delay_load:
            self.load_model()

    def _check(self, args: Any) -> None:
        config, who = self.config.tower, f"vision tower {self.vision_tower_name}"
        layer, feature = getattr(args, "mm_vision_select_layer", -1), self.select_feature
        if layer != -1:
            raise UserError(f"{who}: has its last layer only; set --mm_vision_select_layer -1, not {layer}")
        if feature not in ("patch", "cls_patch"):
            raise UserError(f"{who}: --mm_vision_select_feature is patch or cls_patch, not {feature}")
        if feature == "cls_patch" and config.cls_before_unit is None:
            raise UserError(f"{who}: has no CLS token; set --mm_vision_select_feature patch")
        if getattr(args, "s2", False):
            raise UserError(
                f"{who}: does not support S2; set --s2 False; a tower of several token budgets can give more tokens, as ?tokens=64"
            )
        if str(getattr(args, "mm_patch_merge_type", "flat")).startswith("spatial"):
            self._check_grid()
        if str(getattr(args, "image_aspect_ratio", "square")).startswith("anyres"):
            points = getattr(args, "image_grid_pinpoints", None)
            try:
                sides = [side for pair in (ast.literal_eval(points) if isinstance(points, str) else points) for side in pair]
                fits = bool(sides) and all(side > 0 and side % config.image_size == 0 for side in sides)
            except (ValueError, SyntaxError, TypeError):
                fits = False
            if not fits:
                raise UserError(
                    f"{who}: anyres needs image_grid_pinpoints of multiples of {config.image_size} pixels, as "
                    f"[({config.image_size}, {2 * config.image_size})], not {points}"
                )

    def _check_grid(self) -> int:
        """Latent tokens a side of the initial square grid; an error where the tokens for LLaVA are not such a grid."""
        config = self.config.tower
        side = math.isqrt(config.num_latent_tokens)
        if side**2 != config.num_latent_tokens or config.rois_init != "grid" or self.select_feature != "patch":
            raise UserError(
                f"vision tower {self.vision_tower_name}: its {self.num_patches} tokens are not a square grid, which spatial merging and "
                "num_patches_per_side need; set --mm_patch_merge_type flat"
            )
        return side

    def load_model(self, device_map: Any = None) -> None:
        """Load the weights, once: frozen, or with gradients where the tower is tuned.

        Args:
            device_map: None for the CPU, `auto` for this process's GPU if there is one, a device, or {"": device}.

        Raises:
            UserError: weights that do not fit, or a device map of several devices.
        """
        if self.is_loaded:
            return
        if isinstance(device_map, dict):
            if len(set(device_map.values())) != 1:
                raise UserError(f"vision tower {self.vision_tower_name}: cannot be split; give one device, not the map {device_map}")
            device_map = next(iter(device_map.values()))
        with _outside_of_init_contexts():
            tower = SparseFormer.from_pretrained(self.name.source, num_tokens=self.name.tokens)
            for part in (*tower.modules(), *tower.parameters()):
                part._is_hf_initialized = True  # else transformers initialises what a checkpoint lacks with random numbers
        # a tuple, so that it is not registered as a parameter of this module
        self._rois = (tower.initial_roi.weight, tower.initial_roi.weight.detach().clone())
        self.vision_tower = tower
        self.is_loaded = True
        self._set_tuning()
        if device_map is not None:
            self.to(own_device() if device_map == "auto" else device_map)

    def _set_tuning(self) -> None:
        tower = self.vision_tower
        tower.requires_grad_(self.tuned)
        # initial RoIs are not tuned: optimizers that flatten parameters cannot mix float32 with half precision
        tower.initial_roi.requires_grad_(False)
        for part in (tower.proj, tower.pool):  # tokens do not depend on these, and distributed training would wait for their gradients
            if part is not None:
                part.requires_grad_(False)

    def resume(self, args: Any) -> None:
        """Continue in a further training, which may tune a frozen tower.

        Raises:
            UserError: the arguments name another tower than the model has.
        """
        requested = requested_name(args)
        name = TowerName.parse(requested) if isinstance(requested, str) and requested.startswith(PREFIX) else None
        if name is None or (name.source, name.tokens) != (self.name.source, self.name.tokens):
            raise UserError(f"--vision_tower {requested}: the model has {self.vision_tower_name}; give that name")
        self.tuned = self.tuned or _is_tuned(args, name)
        if self.is_loaded:
            self._set_tuning()

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Encode images for LLaVA's projector.

        Args:
            images: (B, 3, h, w), or a list of (3, h, w) of any sizes.

        Returns:
            (B, T, d), or a list of (1, T, d), in the dtype of the images; with gradients where parameters of the tower require them.
        """
        weights = self._loaded()
        self._restore_rois()
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            if isinstance(images, list):
                return [self._encode(image.unsqueeze(0), weights) for image in images]
            return self._encode(images, weights)

    def _encode(self, images: Tensor, weights: Tensor) -> Tensor:
        images_here = images.to(device=weights.device, dtype=weights.dtype)
        out = self.vision_tower(images_here, image_sizes=sizes_on(images_here, self.config.tower.fit))
        return out.last_hidden_state[:, -self.num_patches :].to(images.dtype)

    def _restore_rois(self) -> None:
        """Restore the float32 RoIs: transformers replaces parameters by tensors in the model's dtype when it loads with little memory."""
        registered, rois = self._rois
        weight = self.vision_tower.initial_roi.weight
        if weight is not registered:
            weight.data = rois.to(weight.device)
            self._rois = (weight, rois)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state dict, with RoIs in float32."""
        if self.is_loaded:
            self._restore_rois()
        return super().state_dict(*args, **kwargs)

    def _loaded(self) -> Tensor:
        """A tensor of the tower's device and dtype."""
        if not self.is_loaded:
            raise RuntimeError(f"vision tower {self.vision_tower_name} is not loaded; call load_model() first")
        return self.vision_tower.norm.weight

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, d)."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tower; RoIs are float32."""
        return self._loaded().dtype

    @property
    def device(self) -> torch.device:
        """Device of the tower."""
        return self._loaded().device

    @property
    def hidden_size(self) -> int:
        """Width of the features (d)."""
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        """Tokens of an image (T): latent tokens, and CLS with `cls_patch`."""
        return self.config.tower.num_latent_tokens + (self.select_feature == "cls_patch")

    @property
    def num_patches_per_side(self) -> int:
        """Tokens a side of the initial grid.

        Raises:
            UserError: the tokens are not a square grid.
        """
        return self._check_grid()


@contextlib.contextmanager
def _outside_of_init_contexts() -> Iterator[None]:
    """Create modules with complete float32 parameters on the CPU, inside any context of initialisation."""
    outer, dtype = nn.Module.register_parameter, torch.get_default_dtype()
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float32)
    if zero is not None:
        zero.shutdown_init_context()
    try:
        with torch.device("cpu"):
            yield
    finally:
        if zero is not None:
            zero.restore_init_context()
        torch.set_default_dtype(dtype)
        nn.Module.register_parameter = outer  # type: ignore[method-assign]
