"""The objective of bootstrapping: the student's final representation follows the teacher's, and so does each of its tokens.

Shape legend: B batch, N latent tokens, d width, E embedding.
A ViT's embeddings share a large common part, which makes any two pictures look alike to a plain cosine; both sides are centred by the
teacher's mean first. What is left varies most in a few directions, which decide a cosine; a recipe may measure a share of it after
whitening, where all directions count alike. A third term, off unless a recipe turns it on, compares how the pictures of a batch lie among
each other.
Source: final-representation alignment of Bootstrapping SparseFormers (arXiv 2312.01987, section 3.3); the token term is ours.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.geometry import grid_rois, roi_average_weights
from sparse_vlm.preprocess import normalize
from sparse_vlm.tower import SparseFormer

TEMPERATURE = 0.1  # of similarities between pictures
FRESH = 0.02  # root mean square of a new linear layer
FAINTEST = 0.05  # of the mean variance of a direction, that any counts as having at least


class Statistics(NamedTuple):
    """What is known of a teacher's answers before anything is learnt from them."""

    embed_mean: Tensor  # (E,)
    token_mean: Tensor  # (d,), of patch tokens
    covariance: Tensor  # (E, E), of embeddings

    @classmethod
    def of(cls, embeds: Tensor, token_mean: Tensor) -> Statistics:
        """Of a sample of embeddings (n, E)."""
        mean = embeds.mean(0)
        centred = (embeds - mean).double()
        return cls(mean, token_mean, centred.T @ centred / len(embeds))

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

    def forward(self, pixels: Tensor, embeds: Tensor, tokens: Tensor, num_tokens: int | None = None) -> dict[str, Tensor]:
        """Views (B, 3, S, S) uint8 with the teacher's embeddings (B, E) and patch tokens: (B, N, d) averaged over the student's cells, or
        all (B, G * G, d) for a student of several budgets, to be averaged over the cells of the budget.

        Args:
            num_tokens: the student's latent tokens, for a student of several budgets.

        Returns:
            `loss`, and the centred cosines `cosine` and `token_cosine` (means over the batch, detached).
        """
        config = self.tower.config
        shown = normalize(pixels, config.image_mean, config.image_std)
        if config.budgets is None:
            out = self.tower(shown, num_tokens=num_tokens)
        else:
            cells = grid_rois(num_tokens or config.num_latent_tokens)
            out = self.tower(shown, num_tokens=num_tokens)
            grid = math.isqrt(tokens.shape[1])
            tokens = roi_average_weights(cells.to(tokens.device), grid, grid) @ tokens
        latents = out.last_hidden_state[:, -out.rois.shape[1] :]
        said, wanted = out.image_embeds.float() - self.embed_mean, embeds - self.embed_mean
        cosine = F.cosine_similarity(said, wanted, dim=-1).mean()
        token_cosine = F.cosine_similarity(latents.float() - self.token_mean, tokens - self.token_mean, dim=-1).mean()
        followed = cosine
        if self.whitened:
            with torch.autocast(said.device.type, enabled=False):  # scales differ by more than bfloat16 resolves
                alike = F.cosine_similarity(said @ self.whitening, wanted @ self.whitening, dim=-1).mean()
            followed = torch.lerp(cosine, alike, self.whitened)
        loss = (1 - followed) + self.dense_weight * (1 - token_cosine)
        if self.relation_weight:
            loss = loss + self.relation_weight * relation(said, wanted)
        return {"loss": loss, "cosine": cosine.detach(), "token_cosine": token_cosine.detach()}


def relation(said: Tensor, wanted: Tensor) -> Tensor:
    """How differently a batch's pictures lie among each other for student and teacher: the Kullback-Leibler divergence of the student's
    similarities to the teacher's embeddings from the teacher's own (compare SEED, arXiv 2101.04731, section 3.2, with the batch as queue).

    Args:
        said, wanted: (B, E), centred.
    """
    said, wanted = F.normalize(said, dim=-1), F.normalize(wanted, dim=-1)
    ours, theirs = (F.log_softmax(side @ wanted.T / TEMPERATURE, dim=-1) for side in (said, wanted))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def parameter_groups(tower: SparseFormer, new: set[str], lr: float, new_boost: float, lr_rois: float, decay: float) -> list[dict[str, Any]]:
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
