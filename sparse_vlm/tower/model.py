"""SparseFormer: a vision encoder of a few dozen latent tokens, each of which samples the image in its own region of interest (RoI).

Shape legend: B batch, n latent tokens, N tokens with CLS, P sampling points, C channels of the map, d width, E embedding, h x w pixels.

Notable: needs torch alone (safetensors only to load and save folders). One class covers the published families and bootstrapped towers,
because a tower is a list of units, and a unit a list of operations. The number of tokens does not depend on the image's size.
Sources: SparseFormer (arXiv 2304.03768); Bootstrapping SparseFormers from Vision Foundation Models (arXiv 2312.01987).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_vlm.errors import UserError
from sparse_vlm.roi import grid_rois, grid_rois_for, image_aspects, image_extent, image_mask, released_rois
from sparse_vlm.tower.config import SparseFormerConfig, read_config
from sparse_vlm.tower.focus import Focus, area_bias
from sparse_vlm.tower.layers import AttentionPool, EarlyConvolution, RoIPatchEmbedding, Unit, embedding_rows
from sparse_vlm.tower.released import check_names, load_strictly
from sparse_vlm.utils.files import atomic_path, write_text

if TYPE_CHECKING:
    from sparse_vlm.tower.open_clip import OpenClipVisual


class SparseFormerOutput(NamedTuple):
    """Outputs of a tower for a batch of images."""

    last_hidden_state: Tensor  # (B, N, d), after the final LayerNorm, CLS first
    image_embeds: Tensor  # (B, E), not normalised
    rois: Tensor  # (B, n, 4), latent tokens only
    rois_per_unit: tuple[Tensor, ...] | None = None  # each (B, n, 4)
    sampling_points: tuple[Tensor, ...] | None = None  # each (B, n, P, 2)


class SparseFormer(nn.Module):
    """The tower.

    Args:
        config: the architecture. Weights are initialised as in the paper: small random weights, zeros in the last layers of sampling
            offsets and RoI adjustment. `sparse_vlm.distill.inherit` copies a teacher's weights.
    """

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        first = config.units[0].width
        samples = any("SAMPLING_M" in unit.ops for unit in config.units)
        self.feat_extractor = EarlyConvolution(config.conv_dim) if samples else None
        self.focus = None if config.focus is None else Focus(config.focus)
        self.initial_roi = nn.Embedding(config.num_latent_tokens, 4)
        if config.glance is None:
            self.initial_embedding = nn.Embedding(1 if config.token_init == "shared" else config.num_latent_tokens, first)
            self.glance = None
        else:
            self.initial_embedding = None
            self.glance = RoIPatchEmbedding(config.glance, first, config.ln_eps)
        self.cls_embedding = None
        layers: list[nn.Module] = []
        width = first
        for index, unit in enumerate(config.units):
            if unit.width != width:
                norm = [nn.LayerNorm(unit.width, eps=config.ln_eps)] if config.transition_norm else []
                layers.append(nn.Sequential(nn.Linear(width, unit.width), *norm))
                width = unit.width
            if index == config.cls_before_unit:
                self.cls_embedding = nn.Embedding(1, width)
            layers.append(Unit(config, unit))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width, eps=config.ln_eps)
        pooled = config.head == "map"
        self.pool = AttentionPool(width, config.heads(width), config.ln_eps, config.units[-1].activation) if pooled else None
        self.proj = nn.Linear(width, config.embed_dim, bias=config.head_bias)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
        rois = grid_rois if self.config.rois_init == "grid" else released_rois
        with torch.no_grad():
            self.initial_roi.weight.copy_(rois(self.config.num_latent_tokens))
            # with several token budgets, each has its own grid
            self.initial_roi.weight.requires_grad_(self.config.budgets is None)
            for unit in self.units():
                if "SAMPLING_M" in unit.ops:
                    unit.roi_offset_bias.copy_(_regular_offsets(self.config.num_points).flatten())
                    nn.init.zeros_(unit.roi_offset_module[-1].weight)
                if "ROI_ADJ" in unit.ops:
                    nn.init.zeros_(unit.roi_adjust_module[-1].weight)

    def units(self) -> list[Unit]:
        """The units in order, without the transitions between them."""
        return [layer for layer in self.layers if isinstance(layer, Unit)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseFormer:
        """Called by `to`, `half` and `cuda`: the initial RoIs change device but stay float32; bfloat16 resolves one pixel in 256."""
        rois = self.initial_roi.weight.data
        super()._apply(fn, recurse)
        weight = self.initial_roi.weight
        if weight.dtype != rois.dtype:
            weight.data = rois.to(weight.device)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the map and each unit's inputs for the backward pass and recompute the rest: less memory, a third more time."""
        self.grad_checkpointing = enable

    def forward(
        self,
        pixels: Tensor,
        output_rois: bool = False,
        num_tokens: int | None = None,
        region: tuple[float, float, float, float] | Tensor | None = None,
        image_sizes: Tensor | None = None,
        cells: Tensor | None = None,
    ) -> SparseFormerOutput:
        """Encode images.

        Args:
            pixels: (B, 3, h, w), normalised with the configuration's mean and std; any h and w of at least 8.
            output_rois: also return the RoIs after every unit and all sampling points.
            num_tokens: token budget, where the configuration gives `budgets`; the configuration's by default.
            region: (x0, y0, x1, y1) relative to the image, or (B, 4): the initial RoIs tile this region instead of the image, which
                zooms in with the same number of tokens.
            image_sizes: (B, 2), height and width in pixels of each image at the top left of its canvas; by default images fill it.
                Pixels beyond have no influence. RoIs and regions are relative to the image.
            cells: (B, n, 4), initial RoIs relative to the region; by default those of the tower's grid or focus.

        Raises:
            ValueError: pixels of a wrong shape, an unsupported number of tokens, or an invalid region.
        """
        rois_per_unit: list[Tensor] | None = [] if output_rois else None
        points: list[Tensor] | None = [] if output_rois else None
        for unit_output in self.run_units(pixels, num_tokens, region, points, image_sizes, cells):
            if rois_per_unit is not None:
                rois_per_unit.append(unit_output[1])
        x, rois = unit_output
        tokens = self.norm(x)
        if self.config.head == "cls":
            embeds = self.proj(tokens[:, 0])
        elif self.pool is not None:
            embeds = self.proj(self.pool(tokens))
        else:
            embeds = self.proj(self.norm(x.mean(dim=1)))
        if rois_per_unit is None:
            return SparseFormerOutput(tokens, embeds, rois)
        return SparseFormerOutput(tokens, embeds, rois, tuple(rois_per_unit), tuple(points))

    def run_units(
        self,
        pixels: Tensor,
        num_tokens: int | None = None,
        region: tuple[float, float, float, float] | Tensor | None = None,
        points_seen: list[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        cells: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Encode images, unit by unit: tokens (B, N, d), not normalised, and RoIs (B, n, 4) after each.

        Args:
            pixels, num_tokens, region, image_sizes, cells: as in `forward`.
            points_seen: a list to which the sampling points (B, n, P, 2) of each SAMPLING_M are appended, relative to the image.

        Raises:
            ValueError: as `forward`.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[-2:]) < 8:
            raise ValueError(f"pixels are {tuple(pixels.shape)}, expected (B, 3, h, w) with h and w of at least 8")
        batch = pixels.shape[0]
        pixels = pixels.to(next(self.norm.parameters()).dtype)  # RoIs stay float32 in a bfloat16 tower
        # recomputing a unit would append its sampling points twice
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and points_seen is None
        run = partial(checkpoint, use_reentrant=False) if recompute else _call
        # coordinates stay float32 in a bfloat16 tower as well
        box = None if region is None else self._box(region, batch, pixels.device)
        extent = None if image_sizes is None else image_extent(image_sizes, pixels)
        feature_map = None
        if self.feat_extractor is not None:  # zeros beyond the image, as a convolution's padding
            feature_map = run(self.feat_extractor, pixels if extent is None else pixels * image_mask(extent, pixels))
        initial = self._initial_cells(pixels, num_tokens, box, extent) if cells is None else self._checked_cells(cells, num_tokens, batch)
        rois = initial.expand(batch, -1, -1)
        bias = None if self.focus is None else area_bias(rois, self.config.focus.area_bias)
        if box is not None:
            corner, size = box[:, None, :2].repeat(1, 1, 2), (box[:, None, 2:] - box[:, None, :2]).repeat(1, 1, 2)
            rois = corner + rois * size
        if self.glance is not None:
            x = self.glance(pixels, initial, rois, extent)
        else:
            x = embedding_rows(self.initial_embedding).expand(batch, initial.shape[-2], -1)
        index = 0
        for layer in self.layers:
            if not isinstance(layer, Unit):
                x = layer(x)
                continue
            if index == self.config.cls_before_unit:
                x = torch.cat([embedding_rows(self.cls_embedding).expand(batch, 1, -1).to(x.dtype), x], dim=1)
            if index == 0 and self.glance is not None:
                x = self.glance.norm_pre(x)
            x, rois = run(layer, x, rois, feature_map, points_seen, extent, bias)
            yield x, rois
            index += 1

    def initial_rois(self, num_tokens: int | None = None, aspect: float = 1.0) -> Tensor:
        """Initial RoIs without a focus, (n, 4) float32.

        Args:
            aspect: width of the image by its height; with several token budgets the grid follows it, so that cells are nearly square.

        Raises:
            ValueError: an unsupported number of tokens.
        """
        weight = self.initial_roi.weight.float()
        config = self.config if num_tokens is None else self.config.at_budget(num_tokens)
        if config.budgets is None or (config is self.config and aspect == 1.0):
            return weight
        return grid_rois(config.num_latent_tokens, aspect).to(weight.device)

    def _initial_cells(self, pixels: Tensor, num_tokens: int | None, box: Tensor | None, extent: Tensor | None) -> Tensor:
        """Initial RoIs relative to the region: (n, 4) where they are the same for all images, else (B, n, 4)."""
        config = self.config if num_tokens is None else self.config.at_budget(num_tokens)
        if config.budgets is None or (self.focus is None and box is None and extent is None):
            return self.initial_rois(num_tokens, pixels.shape[-1] / pixels.shape[-2])
        aspects = image_aspects(pixels, extent)
        if box is not None:
            aspects = aspects * (box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1])
        if self.focus is None:
            return grid_rois_for(config.num_latent_tokens, aspects)
        with torch.no_grad():  # placement has no gradient; the focus is trained on `focus.variation`
            return self.focus.place(self.focus(pixels, box, extent), aspects, config.num_latent_tokens)

    @torch.no_grad()
    def first_cells(self, pixels: Tensor, image_sizes: Tensor | None = None, num_tokens: int | None = None) -> Tensor:
        """Initial RoIs of each image, (B, n, 4) float32; arguments as in `forward`."""
        extent = None if image_sizes is None else image_extent(image_sizes, pixels)
        cells = self._initial_cells(pixels.to(next(self.norm.parameters()).dtype), num_tokens, None, extent)
        return cells.detach().expand(pixels.shape[0], -1, -1)

    def _checked_cells(self, cells: Tensor, num_tokens: int | None, batch: int) -> Tensor:
        """Initial RoIs given by the caller, (B, n, 4) float32."""
        if cells.ndim != 3 or cells.shape[0] != batch or cells.shape[2] != 4 or cells.shape[1] != (num_tokens or cells.shape[1]):
            raise ValueError(f"cells are {tuple(cells.shape)}, expected ({batch}, {num_tokens or 'n'}, 4)")
        if not self.config.zooms:
            raise ValueError("this tower's patch embedding has kind 'pool', so cells cannot be chosen; take a tower of kind 'crop'")
        self.config.at_budget(cells.shape[1])
        return cells.float()

    def _box(self, region: tuple[float, float, float, float] | Tensor, batch: int, device: torch.device) -> Tensor:
        """A region for each image, (B, 4) float32."""
        if not self.config.zooms:
            raise ValueError("this tower's patch embedding has kind 'pool', so it cannot encode a region; take a tower of kind 'crop'")
        box = torch.as_tensor(region, dtype=torch.float32, device=device).expand(batch, 4)
        if not bool(((box >= 0) & (box <= 1)).all() and (box[:, :2] < box[:, 2:]).all()):
            raise ValueError(f"region {region}: expected 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")
        return box

    def visual_tokens(self, pixels: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """The tokens for a language model: (B, `config.visual_tokens`, d), the end of `last_hidden_state`; arguments as in `forward`."""
        return self(pixels, image_sizes=image_sizes).last_hidden_state[:, -self.config.visual_tokens :]

    def optimize_for_inference(self) -> SparseFormer:
        """Optimize this tower in place for inference on a CPU: the same outputs up to rounding (float32: 1e-4), faster.

        Afterwards it cannot be trained, saved, moved, converted, compiled or exported. The first call on a machine compiles the C++
        kernels (`sparse_vlm.kernels.cpu.native`) in about ten seconds, where there is a compiler. On other devices it only sets eval mode.

        Returns:
            Itself, in eval mode.

        Raises:
            RuntimeError: it is optimized already, or a layer has adapters, parametrizations or hooks.
        """
        self.eval().requires_grad_(False)
        if self.norm.weight.device.type == "cpu":
            from sparse_vlm.tower.inference import optimize

            optimize(self)
        return self

    def for_open_clip(self, model: nn.Module | None = None) -> OpenClipVisual:
        """Wrap this tower, not copied, as an image tower of open_clip: `model.visual = tower.for_open_clip(model)`.

        Args:
            model: of open_clip, to check that the tower fits it and to take over its device and dtype.

        Raises:
            UserError: the model has another embedding width or another mean and std.
        """
        from sparse_vlm.tower.open_clip import adapt

        return adapt(self, model)

    @classmethod
    def from_released(cls, config: SparseFormerConfig, state_dict: Mapping[str, Tensor]) -> SparseFormer:
        """Build a tower from a released state dict.

        Raises:
            ValueError: tensors that are missing, unexpected or misshapen, by name.
        """
        tower = cls(config)
        load_strictly(tower, state_dict, "released state dict")
        return tower.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors`, each atomically.

        Args:
            dtype: of the stored weights; their own by default. RoIs stay float32.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: (tensor if dtype is None or name == "initial_roi.weight" else tensor.to(dtype)).detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
        }
        with atomic_path(folder / "model.safetensors") as part:
            save_file(state, part, metadata={"format": "pt"})
        write_text(folder / "config.json", json.dumps(self.config.to_dict(), indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, dtype: torch.dtype = torch.float32, num_tokens: int | None = None) -> SparseFormer:
        """Load a tower from a folder, or from the zoo by name; in eval mode.

        The folder may also be in transformers' format, or a LLaVA of transformers with such a tower inside.

        Args:
            num_tokens: the default token budget of the loaded tower, for one of several budgets.

        Raises:
            UserError: no such folder or name, not a tower, weights that do not fit, or an unsupported number of tokens.
        """
        from sparse_vlm.hub.host_format import TOWER_PREFIXES
        from sparse_vlm.hub.store import locate
        from sparse_vlm.hub.weights import part_shapes, part_tensors

        folder = locate(name_or_path)
        config = read_config(folder, str(name_or_path))
        with torch.device("meta"):
            empty = cls(config)
        try:  # before the weights are allocated
            check_names(empty, part_shapes(folder, TOWER_PREFIXES), str(name_or_path))
        except UserError as error:
            raise UserError(f"{name_or_path}: not a tower folder ({error})") from error
        except ValueError as error:
            raise UserError(str(error)) from error
        state = part_tensors(folder, TOWER_PREFIXES)
        if num_tokens is not None and num_tokens != config.num_latent_tokens:
            try:
                config = config.at_budget(num_tokens)
            except ValueError as error:
                raise UserError(f"{name_or_path}: {error}") from error
            state["initial_roi.weight"] = grid_rois(num_tokens)
        tower = cls(config)
        load_strictly(tower, state, str(name_or_path))
        return tower.to(dtype).eval()


def _call(module: Callable[..., Any], *inputs: Any) -> Any:
    return module(*inputs)


def _regular_offsets(num_points: int) -> Tensor:
    """A near-square grid of points in a unit box around 0, (P, 2)."""
    centres = grid_rois(num_points)
    return (centres[:, :2] + centres[:, 2:]) / 2 - 0.5
