"""For hosts: parameter groups for freezing and weight decay, and a square grid of tokens; torch alone."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_vlm.roi import grid_rois
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.layers import Unit


def square_grid(tower: SparseFormer, batch: int) -> Tensor | None:
    """Initial RoIs for hosts that arrange tokens as maps, (B, n, 4): one grid for all images; None where the tower has no other."""
    config = tower.config
    if (config.fit == "crop" and config.focus is None) or config.budgets is None:
        return None
    return grid_rois(config.num_latent_tokens).to(tower.initial_roi.weight.device).expand(batch, -1, -1)


def layer_groups(tower: SparseFormer) -> list[list[nn.Parameter]]:
    """Parameters from input to output: the stem, each unit with the transition before it, and the head.

    The final LayerNorm is in the group of the last unit, as in open_clip's ViTs. The initial RoIs of a tower with several token budgets
    are in no group: they are a grid and not trained.
    """
    stem = [module for name, module in tower.named_children() if name not in ("layers", "norm", "pool", "proj")]
    groups: list[list[nn.Module]] = [stem]
    leading: list[nn.Module] = []
    for layer in tower.layers:
        leading.append(layer)
        if isinstance(layer, Unit):
            groups.append(leading)
            leading = []
    groups[-1] = [*groups[-1], tower.norm]
    groups.append([module for module in (tower.pool, tower.proj) if module is not None])
    fixed = tower.initial_roi.weight if tower.config.budgets is not None else None
    return [[p for module in group for p in module.parameters() if p is not fixed] for group in groups]


def undecayed(tower: SparseFormer) -> set[str]:
    """Names of parameters without weight decay: RoIs, embeddings and positions."""
    embeddings = {f"{name}.weight" for name, module in tower.named_modules() if isinstance(module, nn.Embedding)}
    return embeddings | ({"glance.pos_embed"} if tower.glance is not None else set())
