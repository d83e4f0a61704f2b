"""SparseFormers as models of timm: `timm.create_model("sparseformer_tiny", pretrained=True)`.

    import sparse_vlm, timm

Shape legend: B batch, n latent tokens, N tokens with CLS, d width, K classes, h x w pixels.

Notable: importing both packages imports this module, which registers every published configuration and every tower of the zoo. The
classifier is `head`, outside the tower, and loads the `proj` of a tower's file. Features follow timm's `VisionTransformer`
(timm/models/vision_transformer.py): normalised tokens, except that an average is taken before the norm. The input of a tower for whole
images is canvases that are zero beyond their images (`sparse_vlm.images.preprocess.Preprocessor`), or squares to which timm's own
transform squashes whole images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.roi import sizes_on
from sparse_vlm.tower import SparseFormer, SparseFormerConfig
from sparse_vlm.tower.groups import square_grid, undecayed
from sparse_vlm.tower.layers import Unit
from sparse_vlm.tower.released import PUBLISHED

WEIGHTS = "model.safetensors"
SOURCES = ("file", "url", "hf_hub_id", "state_dict")  # entries of timm's pretrained_cfg that locate weights
HEAD_POOLS = {"cls": "token", "avg": "avg", "map": "map"}
"""A tower's head to timm's name of its pooling."""

default_cfgs: dict[str, Any] = {}
"""timm's `DefaultCfg` by model; `register_model` looks for a variable of this name in the module of the function."""


def initial_grid(config: SparseFormerConfig) -> int | None:
    """Tokens a side of the initial square grid; None where their number is not a square."""
    side = math.isqrt(config.num_latent_tokens)
    return side if side**2 == config.num_latent_tokens else None


class SparseFormerClassifier(nn.Module):
    """A tower with timm's interface.

    Args:
        num_classes: outputs of the head (K); 0 for no head; the width of the tower's embedding by default.
        global_pool: `token`, `avg`, `map` or an empty string for none; that of the tower's head by default.
        drop_rate: dropout before the head.

    Raises:
        UserError: other than 3 channels, or a pooling that this tower does not have.
    """

    def __init__(
        self,
        config: SparseFormerConfig,
        num_classes: int | None = None,
        global_pool: str | None = None,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if in_chans != 3:
            raise UserError(f"in_chans is {in_chans}; a SparseFormer needs 3 channels")
        self.tower = SparseFormer(config)
        self.num_features = self.head_hidden_size = self.embed_dim = config.width
        self.num_prefix_tokens = config.num_tokens - config.num_latent_tokens
        self.grid = initial_grid(config)
        reduction = config.image_size // math.isqrt(config.num_latent_tokens)
        indices = [index for index, layer in enumerate(self.tower.layers) if isinstance(layer, Unit)]
        self.feature_info = [
            {"num_chs": unit.width, "reduction": reduction, "module": f"tower.layers.{index}"}
            for index, unit in zip(indices, config.units, strict=True)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = HEAD_POOLS[config.head]
        self.tower.proj = nn.Identity()
        self.reset_classifier(config.embed_dim if num_classes is None else num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with random weights.

        Raises:
            UserError: a pooling that this tower does not have.
        """
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        config, reference = self.tower.config, self.tower.norm.weight
        bias = config.head_bias or num_classes != config.embed_dim
        self.head = nn.Linear(self.num_features, num_classes, bias=bias, device=reference.device, dtype=reference.dtype)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.head.bias)

    def _set_pool(self, global_pool: str) -> None:
        has = {"token": self.num_prefix_tokens > 0, "avg": True, "map": self.tower.pool is not None, "": True}
        if not has.get(global_pool, False):
            known = ", ".join(repr(pool) for pool, there in has.items() if there)
            raise UserError(f"global_pool {global_pool!r}: this tower has {known}")
        if global_pool != "map":
            self.tower.pool = None  # unused weights would stop distributed training
        self.global_pool = global_pool

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.tower.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {f"tower.{name}" for name in undecayed(self.tower)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of parameter groups from stem to head, for layer-wise learning rate decay."""
        return {
            "stem": r"^tower\.(?:feat_extractor|initial_|glance|cls_embedding)",
            "blocks": [(r"^tower\.layers\.(\d+)", None), (r"^tower\.norm", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) to tokens (B, N, d), CLS first where there is one; normalised, except before an average."""
        for unit_output in self.tower.run_units(x, image_sizes=sizes_on(x, self.tower.config.fit)):
            tokens = unit_output[0]
        return tokens if self.global_pool == "avg" else self.tower.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` to (B, K); (B, d) with `pre_logits`; (B, N, K) or (B, N, d) without pooling."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = self.tower.norm(x[:, self.num_prefix_tokens :].mean(dim=1))
        elif self.global_pool == "map":
            x = self.tower.pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) normalised pixels to (B, K)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Latent tokens after chosen units.

        Args:
            x: (B, 3, h, w) normalised pixels.
            indices: of units; the last so many for an int, all for None.
            return_prefix_tokens: return (latent tokens, CLS token (B, 1 or 0, d)) of each.
            norm: apply the final LayerNorm.
            stop_early: do not run the units after the last of them.
            output_fmt: `NLC` for (B, n, d); `NCHW` for (B, d, n^0.5, n^0.5), by initial RoI.
            intermediates_only: without the final tokens.

        Returns:
            The final tokens (B, N, d) and the chosen ones; the latter alone with `intermediates_only`.

        Raises:
            UserError: `NCHW` of tokens without a square grid, or `norm` of a unit whose width is not the LayerNorm's.
        """
        config = self.tower.config
        # with several token budgets the grid follows the image's aspect; with whole images a square grid is requested instead
        rectangular = config.budgets is not None and config.fit == "crop" and x.shape[-2] != x.shape[-1]
        cells = square_grid(self.tower, len(x)) if output_fmt == "NCHW" else None
        if output_fmt == "NCHW" and (self.grid is None or rectangular):
            what = f"{self.tower.config.num_latent_tokens} tokens of an image of {x.shape[-1]} x {x.shape[-2]} pixels"
            raise UserError(f"{what} are not a square grid; take them as a list: forward_intermediates(..., output_fmt='NLC')")
        chosen = self._unit_indices(indices)
        intermediates: list[Any] = []
        for index, (tokens, _) in enumerate(self.tower.run_units(x, image_sizes=sizes_on(x, config.fit), cells=cells)):
            if index in chosen:
                features = self._normalized(tokens, index) if norm else tokens
                prefix, latents = features.tensor_split([features.shape[1] - self.tower.config.num_latent_tokens], dim=1)
                if output_fmt == "NCHW":
                    latents = latents.mT.unflatten(-1, (self.grid, self.grid)).contiguous()
                intermediates.append((latents, prefix) if return_prefix_tokens else latents)
            if stop_early and index == max(chosen):
                break
        return intermediates if intermediates_only else (self._normalized(tokens, index), intermediates)

    def _unit_indices(self, indices: int | list[int] | None) -> list[int]:
        """Indices of units from timm's argument: the number of last units, or indices that may be negative."""
        count = len(self.feature_info)
        requested = list(range(-indices, 0)) if isinstance(indices, int) else list(range(count) if indices is None else indices)
        if not requested or not all(-count <= index < count for index in requested):
            raise UserError(f"units {indices}: this tower has {count}, 0 to {count - 1}")
        return [index % count for index in requested]

    def _normalized(self, tokens: Tensor, index: int) -> Tensor:
        if tokens.shape[-1] != self.num_features:
            raise UserError(f"unit {index} has width {tokens.shape[-1]} and the final LayerNorm {self.num_features}; use norm=False")
        return self.tower.norm(tokens)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the units after the last chosen one, and the head.

        Args:
            prune_norm: freeze the final LayerNorm, which stays because the tower's dtype is read from it.
        """
        chosen = self._unit_indices(indices)
        last = max(chosen)
        end = int(self.feature_info[last]["module"].rpartition(".")[2]) + 1
        self.tower.layers = self.tower.layers[:end]
        if (self.tower.config.cls_before_unit or 0) > last:
            self.tower.cls_embedding = None
        if prune_norm:
            self.tower.norm.requires_grad_(False)
        if prune_head:
            self.reset_classifier(0, "")
        return chosen


@dataclass(frozen=True)
class Entry:
    """One model of timm's registry.

    Attributes:
        zoo: the zoo's name of its weights; None for a configuration without weights.
    """

    config: SparseFormerConfig
    zoo: str | None = None

    def cfg(self) -> dict[str, Any]:
        """timm's `pretrained_cfg`: preprocessing as in `sparse_vlm.images.preprocess`, and the location of weights."""
        config = self.config
        cfg: dict[str, Any] = {
            "input_size": (3, config.image_size, config.image_size),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            **({} if config.fit == "crop" else {"crop_mode": "squash"}),
            "mean": config.image_mean,
            "std": config.image_std,
            "num_classes": config.embed_dim,
            "classifier": "head",
            "paper_ids": ("arXiv:2304.03768", "arXiv:2312.01987"),
        }
        if self.zoo is not None:
            model = store.entry(self.zoo)
            cfg |= {"file": str(store.zoo_folder() / self.zoo / WEIGHTS), "license": model.license, "description": model.summary}
        return cfg


def known_models() -> dict[str, Entry]:
    """Every SparseFormer by its name in timm: `sparseformer_` and a tower's name in the zoo, and the published names.

    Towers without a configuration beside the zoo's index are left out.
    """
    found = {}
    for model in store.entries().values():
        path = store.zoo_folder() / model.name / "config.json"
        if model.kind == "tower" and path.is_file():
            config = SparseFormerConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
            found[f"sparseformer_{model.name}".replace("-", "_")] = Entry(config, model.name)
    return {**found, **{name: Entry(config) for name, config in PUBLISHED.items()}}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: SparseFormerClassifier) -> dict[str, Tensor]:
    """Rename the tensors of a tower's file, or of one that timm saved, to the model's names.

    Raises:
        UserError: the tower's tensors do not match the model; timm checks the head.
    """
    state = dict(state_dict)
    if not any(name.startswith("tower.") for name in state):
        state = {f"head.{name[5:]}" if name.startswith("proj.") else f"tower.{name}": tensor for name, tensor in state.items()}
    if model.tower.pool is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("tower.pool.")}
    own = {name: tensor.shape for name, tensor in model.tower.state_dict(prefix="tower.").items()}
    given = {name: tensor.shape for name, tensor in state.items() if not name.startswith("head.")}
    if own != given:
        different = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise UserError(
            f"these weights are of another tower: {len(different)} tensors differ, {different[0]} for one; give those of this model"
        )
    return state


def _entrypoint(name: str, entry: Entry) -> Callable[..., nn.Module]:
    """The function that timm calls to create the model."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        if kwargs.get("features_only") and initial_grid(entry.config) is None:
            raise UserError(
                f"{name}: its {entry.config.num_latent_tokens} tokens are not a square grid, so there are no feature maps; "
                "take tokens with create_model(...).forward_intermediates(..., output_fmt='NLC')"
            )
        given = kwargs.get("pretrained_cfg")
        overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
        # the caller's cfg or overlay takes precedence over the zoo
        if pretrained and not overlay.keys() & set(SOURCES) and (given is None or isinstance(given, str)):
            if entry.zoo is None:
                raise UserError(
                    f"{name}: has no weights in the zoo; give the authors' file with pretrained_cfg_overlay=dict(file=PATH), "
                    "or leave pretrained out"
                )
            overlay["file"] = str(store.locate(entry.zoo, kind="tower") / WEIGHTS)
        return build_model_with_cfg(
            SparseFormerClassifier,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            config=entry.config,
            **kwargs,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}: {entry.config.num_latent_tokens} tokens with an RoI, {len(entry.config.units)} units."
    return create


def register() -> None:
    """Register every SparseFormer with timm; called when this module is imported and timm is installed."""
    from timm.models import generate_default_cfgs, is_model, model_entrypoint, register_model

    for name, entry in known_models().items():
        if is_model(name) and model_entrypoint(name).__module__ == __name__:
            continue  # timm warns of a name that is registered twice
        default_cfgs.update(generate_default_cfgs({name: entry.cfg()}))
        register_model(_entrypoint(name, entry))


if find_spec("timm") is not None:
    register()
