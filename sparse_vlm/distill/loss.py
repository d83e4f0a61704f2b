"""The objective of bootstrapping: the student's final representation follows the teacher's, and so does each of its tokens.

Shape legend: B batch, N latent tokens, d width, E embedding.
A ViT's embeddings share a large common part, which makes any two images look alike to a plain cosine; both sides are centred by the
teacher's mean first. What is left varies most in a few directions, which decide a cosine; a recipe may measure a share of it after
whitening, where all directions count alike. A third term, off unless a recipe turns it on, compares how the images of a batch lie among
each other.
Source: final-representation alignment of Bootstrapping SparseFormers (arXiv 2312.01987, section 3.3); the token term is ours.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.distill.shrink import put_patches, within
from sparse_vlm.images.preprocess import normalize
from sparse_vlm.roi import grid_rois_for, roi_average_weights
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.focus import plain_grid, variation
from sparse_vlm.tower.model import image_aspects, image_extent

TEMPERATURE = 0.1  # of similarities between images
FOCUS_WEIGHT = 0.1  # of the map's error: little of the gradient's norm, which is clipped; Adam makes up for it
FRESH = 0.02  # root mean square of a new linear layer
FAINTEST = 0.05  # of the mean variance of a direction, that any counts as having at least


class Statistics(NamedTuple):
    """What is known of a teacher's outputs before anything is learnt from them."""

    embed_mean: Tensor  # (E,)
    token_mean: Tensor  # (d,), of patch tokens
    covariance: Tensor  # (E, E), of embeddings
    token_variance: Tensor  # (), of patch tokens, over all dimensions

    @classmethod
    def of(cls, embeds: Tensor, token_mean: Tensor, token_square: Tensor) -> Statistics:
        """Of a sample.

        Args:
            embeds: (n, E).
            token_mean: (d,), mean of the sample's patch tokens.
            token_square: (), mean of their squared norms.
        """
        mean = embeds.mean(0)
        centred = (embeds - mean).double()
        return cls(mean, token_mean, centred.T @ centred / len(embeds), token_square - token_mean.square().sum())

    @property
    def whitening(self) -> Tensor:
        """(E, E): centred embeddings @ it have the same variance in every direction."""
        variances, directions = torch.linalg.eigh(self.covariance)
        scales = variances.clamp_min(FAINTEST * variances.mean()).rsqrt()
        return (directions * scales).to(self.embed_mean.dtype)


class Distillation(nn.Module):
    """A student with its objective.

    Args:
        tower: the student.
        known: of the teacher.
        dense_weight: weight of the token term.
        relation_weight: weight of the relation term.
        whitened: share of the embedding's term that is measured after whitening.
    """

    def __init__(
        self, tower: SparseFormer, known: Statistics, dense_weight: float, relation_weight: float = 0.0, whitened: float = 0.0
    ) -> None:
        super().__init__()
        self.tower = tower
        self.dense_weight, self.relation_weight, self.whitened = dense_weight, relation_weight, whitened
        self.register_buffer("embed_mean", known.embed_mean, persistent=False)
        self.register_buffer("token_mean", known.token_mean, persistent=False)
        self.register_buffer("whitening", known.whitening if whitened else None, persistent=False)
        self.register_buffer("token_variance", known.token_variance, persistent=False)

    def forward(
        self,
        pixels: Tensor,
        embeds: Tensor,
        tokens: Tensor,
        num_tokens: int | None = None,
        image_sizes: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Views (B, 3, H, W) uint8 with the teacher's embeddings (B, E) and patch tokens: (B, N, d) averaged over the student's cells, or
        all (B, G * G, d) for a student of several budgets, to be averaged over the cells of the budget.

        A focus learns beside the student, from how the teacher's patches vary. Some views have their cells where the teacher's map says, so
        that the student learns from good cells before there are predicted ones, and some have the plain grid.

        Args:
            num_tokens: the student's latent tokens, for a student of several budgets.
            image_sizes: (B, 2), height and width of each view on its canvas; by default views fill it.
            boxes: (B, 4), where in its image the view lies that the teacher answered to; by default it is the image.

        Returns:
            `loss`, and, detached, the centred cosines `cosine` and `token_cosine` (means over the batch) and, of a student with a focus,
            `focus`, the mean squared error of the predicted map.
        """
        config = self.tower.config
        shown = normalize(pixels, config.image_mean, config.image_std)
        counted, of_focus = None, None
        if config.budgets is None:
            out = self.tower(shown, num_tokens=num_tokens, image_sizes=image_sizes)
        else:
            extent = None if image_sizes is None else image_extent(image_sizes, shown)
            aspects = image_aspects(shown, extent)
            cells = grid_rois_for(num_tokens or config.num_latent_tokens, aspects)
            if self.tower.focus is not None:
                cells, of_focus = self._focused(shown, tokens, aspects, cells.shape[1], extent, boxes)
            out = self.tower(shown, image_sizes=image_sizes, cells=cells)
            grid = math.isqrt(tokens.shape[1])
            if boxes is not None:
                cells, inside = within(cells, boxes)
                counted = (inside > 0.5).float()  # the teacher says nothing of what lies around a view
            tokens = roi_average_weights(cells, grid, grid) @ tokens
        latents = out.last_hidden_state[:, -out.rois.shape[1] :]
        said, wanted = out.image_embeds.float() - self.embed_mean, embeds - self.embed_mean
        cosine = F.cosine_similarity(said, wanted, dim=-1).mean()
        token_cosine = F.cosine_similarity(latents.float() - self.token_mean, tokens - self.token_mean, dim=-1)
        token_cosine = token_cosine.mean() if counted is None else (token_cosine * counted).sum() / counted.sum().clamp_min(1)
        followed = cosine
        if self.whitened:
            with torch.autocast(said.device.type, enabled=False):  # scales differ by more than bfloat16 resolves
                alike = F.cosine_similarity(said @ self.whitening, wanted @ self.whitening, dim=-1).mean()
            followed = torch.lerp(cosine, alike, self.whitened)
        loss = (1 - followed) + self.dense_weight * (1 - token_cosine)
        if self.relation_weight:
            loss = loss + self.relation_weight * relation(said, wanted)
        measured = {"cosine": cosine.detach(), "token_cosine": token_cosine.detach()}
        if of_focus is not None:
            loss = loss + FOCUS_WEIGHT * of_focus
            measured["focus"] = of_focus.detach()
        return {"loss": loss} | measured

    def _focused(
        self, shown: Tensor, patches: Tensor, aspects: Tensor, count: int, extent: Tensor | None, boxes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cells (B, n, 4) of a student with a focus, and the error of the map that they are placed by."""
        focus = self.tower.focus
        patches = patches if boxes is None else put_patches(patches, boxes, self.token_mean)
        wanted = variation(patches, self.token_variance)
        maps = focus(shown, extent=extent)
        cells = focus.place(maps.detach(), aspects, count)
        if self.training:
            # of eight views, four as the focus says, three as the teacher says, and one on the grid that even images keep
            turn = torch.arange(len(maps), device=maps.device).view(-1, 1, 1) % 8
            cells = torch.where(turn % 2 == 1, focus.place(wanted, aspects, count), cells)
            cells = torch.where(turn == 7, plain_grid(count, aspects), cells)
        return cells, F.mse_loss(maps, wanted)


def relation(said: Tensor, wanted: Tensor) -> Tensor:
    """How differently a batch's images lie among each other for student and teacher: the Kullback-Leibler divergence of the student's
    similarities to the teacher's embeddings from the teacher's own (compare SEED, arXiv 2101.04731, section 3.2, with the batch as queue).

    Args:
        said, wanted: (B, E), centred.
    """
    said, wanted = F.normalize(said, dim=-1), F.normalize(wanted, dim=-1)
    ours, theirs = (F.log_softmax(side @ wanted.T / TEMPERATURE, dim=-1) for side in (said, wanted))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def parameter_groups(
    tower: SparseFormer, new: set[str], lr: float, new_boost: float, lr_rois: float, decay: float, lr_focus: float = 2e-3
) -> list[dict[str, Any]]:
    """AdamW groups of tensors about as large, because a rate is relative to the size of what it changes.

    Adam moves every number by about its rate, whatever the number's size. A ViT's tensors differ in size by a factor of twenty: what
    writes to the residual stream early, the patch embedding foremost, is tiny, and one rate for all either leaves the late blocks as
    they are or shakes the early ones. So a matrix moves by `lr` of its root mean square a step (compare Adafactor, arXiv 1804.04235,
    section 8). A new matrix counts as large as a fresh one at least, although it may begin at zero, and a vector as 0.01 at most. Sizes
    are rounded to a quarter of an octave, a tenth up or down: so 215 tensors are about twenty groups, each of which an optimizer launches
    by itself, and which ZeRO shares out by itself.

    Args:
        new: names of the student's tensors that were not inherited; their rate is `new_boost` times as high.
        lr_rois: absolute rate of all that moves a point or an RoI.
        decay: weight decay of matrices.
        lr_focus: absolute rate of the network that places cells.
    """
    sizes = {name: p.detach().square().mean().sqrt().item() for name, p in tower.named_parameters()}
    floor = min(sizes[name] for name, p in tower.named_parameters() if name not in new and p.ndim >= 2)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in tower.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2
        if any(part in name for part in ("roi_offset", "roi_adjust", "initial_roi")):
            rate, decays = lr_rois, False
        elif name.startswith("focus."):
            rate, decays = lr_focus, matrix
        else:
            size = max(sizes[name], FRESH if name in new else floor)
            size = size if matrix else min(size, 0.01)
            rate, decays = lr * 2 ** (round(4 * math.log2(size)) / 4) * (new_boost if name in new else 1.0), matrix
        groups.setdefault((rate, decays), []).append(parameter)
    return [{"params": some, "lr": rate, "weight_decay": decay if decays else 0.0} for (rate, decays), some in groups.items()]


@torch.no_grad()
def update_average(average: dict[str, Tensor], tower: SparseFormer, decay: float) -> None:
    """Move averaged weights one step towards the tower's: average = decay * average + (1 - decay) * weights."""
    own = dict(tower.named_parameters())
    torch._foreach_lerp_([average[name] for name in own], [p.detach() for p in own.values()], 1 - decay)
