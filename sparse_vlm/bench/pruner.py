"""Token pruning by attention, as its authors do it: the whole ViT first, then the patches that its CLS token looked at most.

Shape legend: B images, M tokens of the ViT without CLS, N kept, d width.
Sources: VisionZip (arXiv 2412.04467; `visionzip/clip_encoder.py`), which ranks patches by the attention that the CLS token pays them in the
second to last block, summed over heads, and FasterVLM (arXiv 2412.01818), which ranks by CLS attention as well. VisionZip's merging of what
is left over into contextual tokens is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.cost import Work, linear


class ClsPruner(nn.Module):
    """The N tokens of a ViT with the highest CLS attention, in their own order.

    Args:
        tower: a ViT as a tower, whose CLS token is there from the first block on.
        tokens: N.

    Raises:
        UserError: a tower without such a CLS token, or with fewer tokens.
    """

    def __init__(self, tower: SparseFormer, tokens: int) -> None:
        super().__init__()
        config = tower.config
        attending = [index for index, unit in enumerate(tower.units()) if "ATTN" in unit.ops]
        if config.cls_before_unit != 0 or len(attending) < 3:
            raise UserError("pruning by CLS attention needs a ViT with a CLS token from its first block on, and three blocks or more")
        if tokens > config.visual_tokens:
            raise UserError(f"pruning to {tokens} tokens: the tower has {config.visual_tokens}")
        self.tower, self.tokens = tower, tokens
        self.block = attending[-2]

    def forward(self, pixels: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """(B, 3, h, w), and the sizes of whole images (B, 2), to (B, N, d)."""
        before = None
        for index, (x, _) in enumerate(self.tower.run_units(pixels, image_sizes=image_sizes)):
            if index == self.block - 1:
                before = x
        assert before is not None, "a block stands before the second to last"
        attended = cls_attention(self.tower.units()[self.block], before)
        kept = attended.topk(self.tokens, dim=-1).indices.sort(dim=-1).values  # (B, N)
        tokens = self.tower.norm(x)[:, 1:]
        return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

    def work(self) -> Work:
        """What choosing takes on top of the ViT: queries of one token and keys of all are made once more."""
        config = self.tower.config
        d, count = config.width, config.num_tokens
        return linear(1, d, d) + linear(count, d, d) + Work(count * d, 0, count * d)


def cls_attention(unit: nn.Module, x: Tensor) -> Tensor:
    """How much the CLS token attends to each other token in a block, averaged over heads: (B, 1 + M, d) before the block to (B, M)."""
    attention = unit.attn
    (query, key, _), (query_bias, key_bias, _) = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    normed = unit.norm1(x)
    q = (
        nn.functional.linear(normed[:, :1], query, query_bias).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    )  # (B, heads, 1, head size)
    k = nn.functional.linear(normed, key, key_bias).unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (B, heads, 1 + M, head size)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return torch.softmax(scores.float(), dim=-1).mean(1)[:, 0, 1:]


PRUNERS: dict[str, Callable[[SparseFormer, int], ClsPruner]] = {"prune": ClsPruner}
