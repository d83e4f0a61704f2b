"""The loss of bootstrapping: the student's embedding follows the teacher's, and each of its tokens the teacher's patch tokens of its cell.

Shape legend: B batch, N latent tokens, d width, E embedding, G x G the teacher's patches.
Embeddings of a ViT share a large common component, so that a plain cosine finds any two images alike: both sides are centred by the
teacher's mean first. The variance that is left lies mostly in a few directions, which dominate a cosine; a recipe may compute a share of
the embedding's term after whitening, where all directions weigh the same.
Source: final-representation alignment of Bootstrapping SparseFormers (arXiv 2312.01987, section 3.3); the token term is ours.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.distill.shrink import clip_to_boxes, place_patches
from sparse_vlm.images.preprocess import normalize
from sparse_vlm.roi import grid_rois_for, image_aspects, image_extent, roi_average_weights
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.focus import plain_grid, variation

FOCUS_WEIGHT = 0.1  # of the focus' error: a small part of the gradient's norm, which is clipped; Adam rescales it
INIT_RMS = 0.02  # root mean square of a new linear layer
MIN_VARIANCE = 0.05  # lower bound of a direction's variance in whitening, as a share of the mean


class Statistics(NamedTuple):
    """Means and variances of a teacher's outputs, over a sample of the photos."""

    embed_mean: Tensor  # (E,)
    token_mean: Tensor  # (d,), of patch tokens
    covariance: Tensor  # (E, E), of embeddings
    token_variance: Tensor  # (), of patch tokens, summed over dimensions

    @classmethod
    def of(cls, embeds: Tensor, token_mean: Tensor, token_square: Tensor) -> Statistics:
        """Statistics of a sample.

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
        """(E, E); centred embeddings times this matrix have the same variance in every direction."""
        variances, directions = torch.linalg.eigh(self.covariance)
        scales = variances.clamp_min(MIN_VARIANCE * variances.mean()).rsqrt()
        return (directions * scales).to(self.embed_mean.dtype)


class Distillation(nn.Module):
    """A student and its loss.

    Args:
        tower: the student.
        statistics: of the teacher's outputs.
        dense_weight: weight of the token term.
        whitened: share of the embedding's term that is computed after whitening.
    """

    def __init__(self, tower: SparseFormer, statistics: Statistics, dense_weight: float, whitened: float = 0.0) -> None:
        super().__init__()
        self.tower = tower
        self.dense_weight, self.whitened = dense_weight, whitened
        self.register_buffer("embed_mean", statistics.embed_mean, persistent=False)
        self.register_buffer("token_mean", statistics.token_mean, persistent=False)
        self.register_buffer("whitening", statistics.whitening if whitened else None, persistent=False)
        self.register_buffer("token_variance", statistics.token_variance, persistent=False)

    def forward(
        self,
        pixels: Tensor,
        embeds: Tensor,
        tokens: Tensor,
        num_tokens: int | None = None,
        image_sizes: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss and metrics of a batch.

        A focus is trained on how the teacher's patches vary. Of eight views, four take their cells from the predicted map, three from the
        teacher's, so that the student sees good cells before the focus predicts them, and one takes the plain grid.

        Args:
            pixels: (B, 3, H, W) uint8, the views.
            embeds: (B, E), the teacher's embeddings.
            tokens: the teacher's patch tokens: (B, N, d), averaged over the student's cells, or all of them, (B, G * G, d), for a student
                of several token budgets.
            num_tokens: token budget of this batch, for a student of several.
            image_sizes: (B, 2), height and width of each view on its canvas; by default views fill it.
            boxes: (B, 4), where in its image the view lies of which the teacher's outputs are; by default it is the image.

        Returns:
            `loss`, and, detached, the centred cosines `cosine` and `token_cosine` (means over the batch) and, of a student with a focus,
            `focus`, the mean squared error of the predicted map.
        """
        config = self.tower.config
        images = normalize(pixels, config.image_mean, config.image_std)
        counted, focus_error = None, None
        if config.budgets is None:
            out = self.tower(images, num_tokens=num_tokens, image_sizes=image_sizes)
        else:
            extent = None if image_sizes is None else image_extent(image_sizes, images)
            aspects = image_aspects(images, extent)
            cells = grid_rois_for(num_tokens or config.num_latent_tokens, aspects)
            if self.tower.focus is not None:
                cells, focus_error = self._place_cells(images, tokens, aspects, cells.shape[1], extent, boxes)
            out = self.tower(images, image_sizes=image_sizes, cells=cells)
            grid = math.isqrt(tokens.shape[1])
            if boxes is not None:
                cells, inside = clip_to_boxes(cells, boxes)
                counted = (inside > 0.5).float()  # the teacher has no outputs outside of the view
            tokens = roi_average_weights(cells, grid, grid) @ tokens
        latents = out.last_hidden_state[:, -out.rois.shape[1] :]
        student, teacher = out.image_embeds.float() - self.embed_mean, embeds - self.embed_mean
        cosine = F.cosine_similarity(student, teacher, dim=-1).mean()
        token_cosine = F.cosine_similarity(latents.float() - self.token_mean, tokens - self.token_mean, dim=-1)
        token_cosine = token_cosine.mean() if counted is None else (token_cosine * counted).sum() / counted.sum().clamp_min(1)
        similarity = cosine
        if self.whitened:
            with torch.autocast(student.device.type, enabled=False):  # scales differ by more than bfloat16 resolves
                whitened = F.cosine_similarity(student @ self.whitening, teacher @ self.whitening, dim=-1).mean()
            similarity = torch.lerp(cosine, whitened, self.whitened)
        loss = (1 - similarity) + self.dense_weight * (1 - token_cosine)
        metrics = {"cosine": cosine.detach(), "token_cosine": token_cosine.detach()}
        if focus_error is not None:
            loss = loss + FOCUS_WEIGHT * focus_error
            metrics["focus"] = focus_error.detach()
        return {"loss": loss} | metrics

    def _place_cells(
        self, images: Tensor, patches: Tensor, aspects: Tensor, count: int, extent: Tensor | None, boxes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cells (B, n, 4) of a student with a focus, and the mean squared error of its predicted map."""
        focus = self.tower.focus
        patches = patches if boxes is None else place_patches(patches, boxes, self.token_mean)
        target = variation(patches, self.token_variance)
        predicted = focus(images, extent=extent)
        cells = focus.place(predicted.detach(), aspects, count)
        if self.training:  # of eight views four use the prediction, three the target, and one the plain grid
            turn = torch.arange(len(predicted), device=predicted.device).view(-1, 1, 1) % 8
            cells = torch.where(turn % 2 == 1, focus.place(target, aspects, count), cells)
            cells = torch.where(turn == 7, plain_grid(count, aspects), cells)
        return cells, F.mse_loss(predicted, target)


def parameter_groups(
    tower: SparseFormer, new: set[str], lr: float, new_boost: float, lr_rois: float, decay: float, lr_focus: float = 2e-3
) -> list[dict[str, Any]]:
    """AdamW parameter groups: the learning rate of a tensor is relative to the size of its values.

    Adam moves every value by about its rate, whatever the value's size, and a ViT's tensors differ in size by a factor of twenty: those
    that write to the residual stream early, the patch embedding foremost, are tiny. One rate for all either leaves the late blocks as they
    are or destroys the early ones. So a matrix moves by `lr` of its root mean square a step (compare Adafactor, arXiv 1804.04235, section
    8); a new matrix counts as at least as large as an initialized one, although it may start at zero, and a vector as at most 0.01. Sizes
    are rounded to a quarter of an octave, so that 215 tensors form about twenty groups: an optimizer launches kernels, and ZeRO
    partitions, by group.

    Args:
        new: names of the student's tensors that were not inherited; their rate is `new_boost` times as high.
        lr_rois: absolute rate of what moves sampling points and RoIs.
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
            size = max(sizes[name], INIT_RMS if name in new else floor)
            size = size if matrix else min(size, 0.01)
            rate, decays = lr * 2 ** (round(4 * math.log2(size)) / 4) * (new_boost if name in new else 1.0), matrix
        groups.setdefault((rate, decays), []).append(parameter)
    return [{"params": some, "lr": rate, "weight_decay": decay if decays else 0.0} for (rate, decays), some in groups.items()]


@torch.no_grad()
def update_average(average: dict[str, Tensor], tower: SparseFormer, decay: float) -> None:
    """One step of the exponential moving average: average = decay * average + (1 - decay) * weights."""
    own = dict(tower.named_parameters())
    torch._foreach_lerp_([average[name] for name in own], [p.detach() for p in own.values()], 1 - decay)
