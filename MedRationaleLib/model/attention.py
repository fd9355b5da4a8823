"""SAM's transformer blocks on the same weights, with fused relative positions and without work on padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from MedRationaleLib.model.torchvision_guard import sam_modeling

_sam = sam_modeling().image_encoder
FEW_TOKENS = 1024
"""Up to so many a window, two plain products are faster on a CPU than torch's fused attention, which needs values as
wide as keys (256 tokens with the backward pass: 1.4 times; 4,096: 0.8 times)."""


class FoldedAttention(_sam.Attention):  # type: ignore[name-defined]
    """segment_anything's attention with its decomposed relative positions as further features of query and key.

    q k^T / sqrt(d) + r_h + r_w = [q / sqrt(d), r_h, r_w] [k, onehot(row), onehot(column)]^T, so that one product gives
    it all, and no bias of tokens by tokens is built. Same weights, same state_dict keys.
    """

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        """(B, h, w, D) -> the same shape, within windows of `window` x `window` tokens, or over all where that is 0.

        Query, key and value are taken before the windows are cut: what pads the last ones is 0, whose query, key and
        value are the projection's bias.
        """
        batch, h, w, dim = x.shape
        side = (window, window) if window else (h, w)
        qkv = self.qkv(x)
        beyond = (-h % side[0], -w % side[1])
        if any(beyond):
            padded = self.qkv(x.new_zeros(1, dim)).expand(batch, h + beyond[0], w + beyond[1], -1).clone()
            padded[:, :h, :w] = qkv
            qkv = padded
        rows, columns = qkv.shape[1] // side[0], qkv.shape[2] // side[1]
        windows = qkv.view(batch, rows, side[0], columns, side[1], 3, self.num_heads, -1)
        windows = windows.permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = windows.reshape(3, batch * rows * columns, self.num_heads, side[0] * side[1], -1).unbind(0)
        out = self._attend(q, k, v, side)
        out = out.reshape(batch, rows, columns, self.num_heads, *side, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.proj(out.reshape(batch, rows * side[0], columns * side[1], dim)[:, :h, :w])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, side: tuple[int, int]) -> Tensor:
        """Three of (windows, heads, tokens, d) -> the same shape."""
        h, w = side
        grid = q.unflatten(2, side)
        by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, _sam.get_rel_pos(h, h, self.rel_pos_h).to(q.dtype))
        by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, _sam.get_rel_pos(w, w, self.rel_pos_w).to(q.dtype))
        q = torch.cat([q * self.scale, by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)
        row = torch.eye(h, dtype=k.dtype, device=k.device).repeat_interleave(w, 0)
        column = torch.eye(w, dtype=k.dtype, device=k.device).repeat(h, 1)
        k = torch.cat([k, torch.cat([row, column], 1).expand(*k.shape[:2], -1, -1)], -1)
        if h * w <= FEW_TOKENS and q.device.type == "cpu":
            return (q @ k.transpose(-2, -1)).softmax(-1) @ v
        out = nn.functional.scaled_dot_product_attention(q, k, nn.functional.pad(v, (0, h + w)), scale=1.0)
        return out[..., : v.shape[-1]]


class Block(_sam.Block):  # type: ignore[name-defined]
    """segment_anything's block of the same sizes, with FoldedAttention."""

    def __init__(self, dim: int, heads: int, window: int, side: int) -> None:
        super().__init__(dim, heads, use_rel_pos=True, window_size=window, input_size=(side, side))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        size = (window or side,) * 2
        self.attn = FoldedAttention(dim, heads, use_rel_pos=True, input_size=size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> the same shape."""
        x = x + self.attn(self.norm1(x), self.window_size)
        return x + self.mlp(self.norm2(x))
