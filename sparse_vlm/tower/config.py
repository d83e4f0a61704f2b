"""The configuration of a SparseFormer as frozen dataclasses: units of operations, initial tokens and RoIs, input.

Notable: stdlib only, so that a configuration can be read without torch. All values are checked and bounded on construction, so that no
configuration file can request excessive memory or time. A new tower is one more `SparseFormerConfig`; nothing branches on a model's name.
Sources: SparseFormer (arXiv 2304.03768) and Bootstrapping SparseFormers (arXiv 2312.01987, section 3).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sparse_vlm.errors import UserError
from sparse_vlm.tower.limits import one_of, product, triple, truth, whole, within

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
Head = Literal["cls", "avg", "map"]
TokenInit = Literal["shared", "each", "glance"]
RoisInit = Literal["grid", "released"]
RoIPatchKind = Literal["pool", "crop"]
Padding = Literal["border", "zeros"]
Fit = Literal["crop", "whole"]
OPS = ("SAMPLING_M", "PE_INJECT", "ATTN", "MLP", "ROI_ADJ")
FORMAT = "sparse-vlm/tower/1"

Triple = tuple[float, float, float]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class UnitConfig:
    """One unit: operations in order, at one width, run `repeats` times with the same weights."""

    width: int
    ops: tuple[str, ...]
    repeats: int = 1
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        whole("a unit's width", self.width, 1, 16384)
        unknown = [op for op in self.ops if op not in OPS]
        if unknown:
            raise ValueError(f"unknown operation {', '.join(map(str, unknown))}; known are {', '.join(OPS)}")
        if not self.ops or len(set(self.ops)) < len(self.ops):
            raise ValueError(f"a unit's operations are {', '.join(self.ops) or 'none'}; it needs at least one, and each at most once")
        whole("a unit's repeats", self.repeats, 1, 64)
        one_of("a unit's activation", self.activation, get_args(Activation))
        if "PE_INJECT" in self.ops and self.width % 8:
            raise ValueError(f"a unit's width {self.width} is no multiple of 8, which the RoI encoding needs")


@dataclass(frozen=True)
class RoIPatchConfig:
    """RoI patch embedding: the initial tokens are the teacher's patch and position embeddings of their RoIs.

    Attributes:
        patch_size: pixels a side of a patch.
        grid: position embeddings a side; with kind `pool` also patches a side.
        points_per_side: points a side in each RoI, over which embeddings are averaged.
        kind: `pool` embeds the patches of the image, scaled to patch_size * grid pixels, and averages them over the RoI; `crop` scales
            each RoI to one patch, for any size of RoI and image.
        norm_pre: whether the teacher normalises tokens before its first block (CLIP's ln_pre).
    """

    patch_size: int
    grid: int
    points_per_side: int = 4
    norm_pre: bool = False
    kind: RoIPatchKind = "pool"

    def __post_init__(self) -> None:
        whole("the glance's patch_size", self.patch_size, 1, 512)
        whole("the glance's grid", self.grid, 1, 512)
        whole("the glance's points_per_side", self.points_per_side, 1, 64)
        truth("the glance's norm_pre", self.norm_pre)
        one_of("the glance's kind", self.kind, get_args(RoIPatchKind))
        product("the glance's pixels a side", 4096, self.patch_size, self.grid)


FOCUS_MAP = 8  # rows and columns of the map that a focus predicts
FOCUS_SCALES = (1 / 2, 1 / 4, 1 / 8)  # sides of the windows whose feature variance it predicts, relative to the image


@dataclass(frozen=True)
class FocusConfig:
    """Content-dependent initial RoIs, predicted for each image by a small network (`tower.focus`).

    Attributes:
        size: pixels a side of its input, a thumbnail.
        channels: of its three strided convolutions, and of the convolutions on the map.
        area_bias: weight of a cell's log area in attention scores: 0 for none, 1 for attention in proportion to area.
        evenness: an image keeps the regular grid where the standard deviation of its predicted log variance is below this.
    """

    size: int = 112
    channels: tuple[int, int, int, int] = (16, 32, 64, 96)
    area_bias: float = 0.5
    evenness: float = 0.45

    def __post_init__(self) -> None:
        whole("the focus' size", self.size, 16, 1024)
        if not isinstance(self.channels, Sequence) or isinstance(self.channels, str) or len(self.channels) != 4:
            raise ValueError(f"the focus' channels are {self.channels!r:.60}, expected four numbers")
        for channels in self.channels:
            whole("a number of the focus' channels", channels, 1, 1024)
        object.__setattr__(self, "channels", tuple(self.channels))  # a list in JSON
        within("the focus' area_bias", self.area_bias, 0, 4)
        within("the focus' evenness", self.evenness, 0, 100)


@dataclass(frozen=True)
class SparseFormerConfig:
    """A tower.

    Attributes:
        units: focusing and cortex units in order; a linear transition stands wherever the width changes.
        num_latent_tokens: tokens with a RoI (n); `num_tokens` includes the CLS token (N).
        embed_dim: width of `image_embeds`.
        conv_dim: channels of the feature map (C).
        num_points: sampling points a token (P).
        cls_before_unit: the unit before which the CLS token is inserted; None for towers without one.
        head: input of the head: the CLS token, the mean of all tokens, or all tokens through attention (SigLIP's `map`).
        token_init: one embedding shared by all tokens, one each, or a RoI patch embedding (`glance`).
        budgets: range of supported token budgets, as (9, 64), where the number of latent tokens can be chosen at each call.
        image_size: side of the input in pixels: of the square crop, or of the canvas for whole images.
        fit: `crop` for the centre square (as CLIP), `whole` for the whole image at its own aspect, at the top left of a canvas and never
            enlarged.
        focus: content-dependent initial RoIs, for towers with `budgets` and a RoI patch embedding of kind `crop`.
        rois_init: `grid` (distinct cells that tile the image) or `released` (half-size boxes, and whole images for the rest).
        num_heads: attention heads; None means heads of size 64.
        generator_dim: inner width of the generator of mixing parameters; below 1 it is relative to the unit's width.
        adjust_hidden: whether RoI adjustment has a hidden layer.
        clamp_coordinate_grad: clamp the gradient of sampling coordinates to one cell of the map (v1's `restrict_grad_norm`).
    """

    units: tuple[UnitConfig, ...]
    num_latent_tokens: int
    embed_dim: int
    image_mean: Triple
    image_std: Triple
    image_size: int = 224
    fit: Fit = "crop"
    conv_dim: int = 64
    num_points: int = 16
    cls_before_unit: int | None = None
    head: Head = "cls"
    head_bias: bool = False
    token_init: TokenInit = "shared"
    rois_init: RoisInit = "grid"
    budgets: tuple[int, int] | None = None
    glance: RoIPatchConfig | None = None
    focus: FocusConfig | None = None
    num_heads: int | None = None
    generator_dim: float = 128
    mixing_bias: bool = False
    transition_norm: bool = False
    stage_embedding: bool = True
    adjust_hidden: bool = True
    padding: Padding = "border"
    clamp_coordinate_grad: bool = False
    ln_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check_fields()
        if (self.token_init == "glance") != (self.glance is not None):
            raise ValueError("token_init 'glance' and a RoIPatchConfig go together")
        if (self.head == "cls") != (self.cls_before_unit is not None):
            raise ValueError("head 'cls' and cls_before_unit go together")
        if self.budgets is not None:
            if not 1 <= self.budgets[0] <= self.num_latent_tokens <= self.budgets[1]:
                raise ValueError(f"{self.num_latent_tokens} tokens are outside of the budgets {self.budgets}")
            if self.token_init == "each" or self.rois_init != "grid":
                raise ValueError("budgets need rois_init 'grid', and a token_init other than 'each'")
        if self.focus is not None and (self.budgets is None or not self.zooms):
            raise ValueError("a focus needs budgets, and a glance of kind 'crop'")
        for unit in self.units:
            if self.num_heads is None and unit.width % 64:
                raise ValueError(f"width {unit.width} is no multiple of the head size 64")
            if self.num_heads is not None and unit.width % self.num_heads:
                raise ValueError(f"width {unit.width} is no multiple of the {self.num_heads} heads")
            if self.generator_width(unit.width) < 1:
                raise ValueError(f"generator_dim {self.generator_dim} leaves nothing of a unit's width {unit.width}")
        if self.cls_before_unit is not None:
            whole("cls_before_unit", self.cls_before_unit, 0, len(self.units) - 1)
        self._check_sizes()

    def _check_fields(self) -> None:
        if not isinstance(self.units, Sequence) or not self.units or not all(isinstance(unit, UnitConfig) for unit in self.units):
            raise ValueError("units must be a list of one or more units")
        whole("the number of units", len(self.units), 1, 1024)
        whole("the repeats of all units", sum(unit.repeats for unit in self.units), 1, 1024)
        for name, high in (("num_latent_tokens", 4096), ("embed_dim", 1 << 17), ("conv_dim", 1024)):
            whole(name, getattr(self, name), 1, high)
        whole("image_size", self.image_size, 8, 4096)
        whole("num_points", self.num_points, 2, 4096)  # offsets are divided by their standard deviation
        if self.num_heads is not None:
            whole("num_heads", self.num_heads, 1, 1024)
        triple("image_mean", self.image_mean, -1e4, 1e4)
        triple("image_std", self.image_std, 1e-4, 1e4)
        within("ln_eps", self.ln_eps, 1e-12, 1)
        within("generator_dim", self.generator_dim, 1e-4, 1 << 16)
        for name, kind in (("head", Head), ("fit", Fit), ("token_init", TokenInit), ("rois_init", RoisInit), ("padding", Padding)):
            one_of(name, getattr(self, name), get_args(kind))
        for name in ("head_bias", "mixing_bias", "transition_norm", "stage_embedding", "adjust_hidden", "clamp_coordinate_grad"):
            truth(name, getattr(self, name))
        if self.budgets is not None:
            if not isinstance(self.budgets, Sequence) or len(self.budgets) != 2:
                raise ValueError(f"budgets are {self.budgets!r}, expected the fewest and the most tokens")
            for number in self.budgets:
                whole("a number of budgets", number, 1, 4096)
        if self.glance is not None and not isinstance(self.glance, RoIPatchConfig):
            raise ValueError(f"glance is {self.glance!r}, no description of one")

    def _check_sizes(self) -> None:
        """Bound the memory of one image, in numbers."""
        most, tokens = 1 << 26, self.num_latent_tokens if self.budgets is None else self.budgets[1]
        product("the tokens' numbers", most, tokens, max(unit.width for unit in self.units), 4)
        if any("SAMPLING_M" in unit.ops for unit in self.units):
            product("the map's numbers (image_size, conv_dim)", most, self.conv_dim, -(-self.image_size // 2), -(-self.image_size // 2))
            product("samples (tokens, num_points, conv_dim)", most, tokens, self.num_points, self.conv_dim)
            mixed = self.conv_dim**2 + self.num_points * self.mixing_out_points
            product("mixing parameters (tokens, conv_dim, num_points)", most, tokens, mixed)
        if self.glance is not None:
            product("weights of position embeddings (tokens, grid)", most, tokens, self.glance.grid, self.glance.grid)

    @property
    def width(self) -> int:
        """Width of `last_hidden_state` (d)."""
        return self.units[-1].width

    @property
    def num_tokens(self) -> int:
        """Output tokens (N), including the CLS token."""
        return self.num_latent_tokens + (self.cls_before_unit is not None)

    @property
    def keeps_cls(self) -> bool:
        """Whether the visual tokens for a language model include the CLS token.

        A CLS token that is inserted later is part of the published budget (48 + 1 = 49). One that is there from the first unit, as in a
        ViT, comes on top of a full budget of latent tokens and is dropped, as LLaVA drops CLIP's.
        """
        return self.cls_before_unit is not None and self.cls_before_unit > 0

    @property
    def visual_tokens(self) -> int:
        """Visual tokens for a language model."""
        return self.num_latent_tokens + self.keeps_cls

    @property
    def zooms(self) -> bool:
        """Whether initial RoIs can be chosen: a patch embedding of kind `pool` encodes whole images at one size."""
        return self.glance is None or self.glance.kind == "crop"

    @property
    def mixing_out_points(self) -> int:
        """Points after spatial mixing (O)."""
        return max(self.num_points, 32)

    def at_budget(self, num_tokens: int) -> SparseFormerConfig:
        """The same tower with another token budget.

        Raises:
            ValueError: an unsupported number of tokens.
        """
        if num_tokens == self.num_latent_tokens:
            return self
        if self.budgets is None:
            raise ValueError(f"this tower supports {self.num_latent_tokens} tokens only, not {num_tokens}")
        if not self.budgets[0] <= num_tokens <= self.budgets[1]:
            raise ValueError(f"this tower supports {self.budgets[0]} to {self.budgets[1]} tokens, not {num_tokens}")
        return dataclasses.replace(self, num_latent_tokens=num_tokens)

    def heads(self, width: int) -> int:
        """Attention heads of a unit of this width."""
        return self.num_heads if self.num_heads is not None else width // 64

    def generator_width(self, width: int) -> int:
        """Inner width (g) of the mixing generator in a unit of this width."""
        return int(self.generator_dim * width) if self.generator_dim < 1 else int(self.generator_dim)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json, with a `format` mark."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SparseFormerConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another format, an unknown or missing field, or an invalid value.
        """
        if not isinstance(data, dict):
            raise ValueError(f"not a tower configuration but a {type(data).__name__}")
        data = dict(data)
        mark = data.pop("format", None)
        if mark != FORMAT:
            raise ValueError(f"not a tower configuration: format is {mark!r}, expected {FORMAT!r}")
        unknown = set(data) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown field {', '.join(sorted(unknown))} in the tower's configuration")
        if not isinstance(units := data.get("units"), list | tuple):
            raise ValueError("units must be a list of one or more units")
        data["units"] = tuple(_unit(unit) for unit in units)
        for name in ("image_mean", "image_std", "budgets"):
            if isinstance(data.get(name), list):
                data[name] = tuple(data[name])
        if data.get("glance") is not None:
            data["glance"] = _build(RoIPatchConfig, data["glance"], "the glance")
        if data.get("focus") is not None:
            data["focus"] = _build(FocusConfig, data["focus"], "the focus")
        return _build(cls, data, "the tower's configuration")

    @classmethod
    def named(cls, name: str) -> SparseFormerConfig:
        """A published configuration by its name.

        Raises:
            ValueError: no such name; the message lists them.
        """
        from sparse_vlm.tower.released import PUBLISHED

        if name not in PUBLISHED:
            raise ValueError(f"no published SparseFormer is called {name!r}; known are {', '.join(PUBLISHED)}")
        return PUBLISHED[name]

    @classmethod
    def from_released(cls, data: dict[str, Any]) -> SparseFormerConfig:
        """Read the json that accompanies a released checkpoint.

        Raises:
            ValueError: an unknown field or value.
        """
        from sparse_vlm.tower.released import config_from_released

        return config_from_released(data)


def read_config(folder: Path, name: str) -> SparseFormerConfig:
    """The configuration of a tower's folder, in our own format or in that of transformers, also of a LLaVA with a tower inside.

    Args:
        name: what to call the tower in errors.

    Raises:
        UserError: no configuration, or not one of a tower.
    """
    from sparse_vlm.hub.host_format import tower_config

    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return SparseFormerConfig.from_dict((tower_config(document) if isinstance(document, dict) else None) or document)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: not a tower folder ({error})") from error


def serves_budgets(name: str) -> bool:
    """Whether a tower (folder or zoo name) serves several token budgets; only its configuration is read."""
    from sparse_vlm.hub.store import locate

    try:
        return read_config(locate(name, kind="tower"), name).budgets is not None
    except UserError:
        return False  # loading the tower says what is wrong


def _unit(data: dict[str, Any]) -> UnitConfig:
    if not isinstance(data, dict) or not isinstance(data.get("ops"), list | tuple):
        raise ValueError(f"a unit is {data!r:.60}, expected its width and a list of its operations")
    data = {**data, "ops": tuple(data["ops"])}
    if "quick_gelu" in data:  # early folders of this format
        data["activation"] = "quick_gelu" if data.pop("quick_gelu") else "gelu"
    return _build(UnitConfig, data, "a unit")


def _build(kind: type[Any], data: Any, what: str) -> Any:
    """A dataclass from plain data; missing and unknown fields are errors."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} is {data!r:.60}, no object")
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    for name in sorted(fields.keys() ^ data.keys()):
        if name not in fields:
            raise ValueError(f"unknown field {name} in {what}")
        if fields[name]:
            raise ValueError(f"{what} lacks {name}")
    return kind(**data)
