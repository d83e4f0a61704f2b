"""What hosts ask of a tower: its parameters in the groups by which they freeze and decay them, tokens in a square; torch alone."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_vlm.roi import grid_rois
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.layers import Unit


def square_grid(tower: SparseFormer, batch: int) -> Tensor | None:
    """Where tokens begin for a host that makes maps of them, (B, n, 4): one grid for all images, whatever their aspect and content.

    None where they always begin so.
    """
    config = tower.config
    if (config.fit == "crop" and config.focus is None) or config.budgets is None:
        return None
    return grid_rois(config.num_latent_tokens).to(tower.initial_roi.weight.device).expand(batch, -1, -1)


def layer_groups(tower: SparseFormer) -> list[list[nn.Parameter]]:
    """From the image to the embedding: where tokens begin, each unit with the transition that leads to it, and the head.

    The final LayerNorm goes with the last unit, as in open_clip's ViTs. The initial RoIs of a tower of several budgets are in no group:
    it lays its grid anew at each of them, so they are not learnt.
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
    """Names of the parameters that weight decay would pull to where they mean nothing: RoIs, embeddings and positions."""
    embeddings = {f"{name}.weight" for name, module in tower.named_modules() if isinstance(module, nn.Embedding)}
    return embeddings | ({"glance.pos_embed"} if tower.glance is not None else set())
