"""SAM's transformer blocks on the same weights, with fused relative positions and without work on padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from MedRationaleLib.model.torchvision_guard import sam_modeling

_sam = sam_modeling().image_encoder
FEW_TOKENS = 1024
"""Up to so many a window, two plain products are faster on a CPU than torch's fused attention, which needs values as
wide as keys (256 tokens with the backward pass: 1.4 times; 4,096: 0.8 times)."""
TILE = 256
"""Queries that are taken through a head at once where nothing is kept for a backward pass: with 4,096 keys their
weights are 2 MB in bfloat16 and stay in the cache, which without AMX is faster than torch's fused attention (README.md
has what that gives)."""
PART = 2**22
"""Values of what is widest in between that are made at once, likewise: a part fits in the cache, and memory that the
process has is used again, where larger tensors are asked of the system anew each time."""


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
        if window and _on_cpu_for_good(x):  # a row of windows at a time: see PART
            return torch.cat([self._within(rows, (window, window)) for rows in x.split(window, 1)], 1)
        return self._within(x, (window, window) if window else (x.shape[1], x.shape[2]))

    def _within(self, x: Tensor, side: tuple[int, int]) -> Tensor:
        """(B, h, w, D) -> the same shape, within windows of `side` tokens."""
        batch, h, w, dim = x.shape
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
        rel_h, rel_w = (_sam.get_rel_pos(n, n, r).to(q.dtype) for n, r in ((h, self.rel_pos_h), (w, self.rel_pos_w)))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, rel_h).flatten(2, 3)
        by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, rel_w).flatten(2, 3)
        if h * w > FEW_TOKENS and _on_cpu_for_good(q) and not _fused_wins(q):
            tiled: Tensor = torch.ops.medrationale.tiled_attention(q * self.scale, k, v, by_row, by_column)
            return tiled
        q = torch.cat([q * self.scale, by_row, by_column], -1)
        row = torch.eye(h, dtype=k.dtype, device=k.device).repeat_interleave(w, 0)
        column = torch.eye(w, dtype=k.dtype, device=k.device).repeat(h, 1)
        k = torch.cat([k, torch.cat([row, column], 1).expand(*k.shape[:2], -1, -1)], -1)
        if h * w <= FEW_TOKENS and q.device.type == "cpu":
            return _in_parts(_plain, (q, k, v), self.num_heads * (h * w) ** 2)
        out = nn.functional.scaled_dot_product_attention(q, k, nn.functional.pad(v, (0, h + w)), scale=1.0)
        return out[..., : v.shape[-1]]


def _on_cpu_for_good(x: Tensor) -> bool:
    """Whether it is computed on a CPU, and nothing is kept for a backward pass."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def _in_parts(function: Callable[..., Tensor], given: tuple[Tensor, ...], width: int) -> Tensor:
    """function(*given), a few rows at a time where that is faster; each takes `width` values in between."""
    rows = max(1, PART // width)
    if len(given[0]) <= rows or not _on_cpu_for_good(given[0]):
        return function(*given)
    return torch.cat([function(*some) for some in zip(*(x.split(rows) for x in given), strict=True)])


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def _fused_wins(x: Tensor) -> bool:
    """Whether torch's fused attention multiplies in tiles of AMX."""
    return x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def _tiled(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """softmax(q k^T + r_h + r_w) v for a head and TILE queries at a time, so that all stays in the cache.

    Args:
        q, k, v: (windows, heads, tokens, d), q times 1 / sqrt(d).
        by_row: (windows, heads, tokens, h), r_h of every query.
        by_column: (windows, heads, tokens, w), r_w.
    """
    out = v.new_empty(v.shape)
    heads = zip(*(x.flatten(0, 1) for x in (q, k, v, by_row, by_column, out)), strict=True)
    for query, key, value, row, column, found in heads:
        tiles = zip(*(x.split(TILE) for x in (query, row, column, found)), strict=True)
        for some, rows, columns, place in tiles:
            bias = (rows[:, :, None] + columns[:, None]).flatten(1)
            torch.mm(torch.addmm(bias, some, key.T).softmax(-1), value, out=place)
    return out


# An operator, because torch.compile would unroll a function's loops. torch.compiler.disable and torch.library.custom_op
# would do, but import the compiler, which takes every process more than a second.
_operators = torch.library.Library("medrationale", "DEF")
_operators.define("tiled_attention(Tensor q, Tensor k, Tensor v, Tensor by_row, Tensor by_column) -> Tensor")
_operators.impl("tiled_attention", _tiled, "CPU")
_operators.impl("tiled_attention", lambda q, k, v, by_row, by_column: v.new_empty(v.shape), "Meta")


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
        tokens = self.norm2(x).flatten(0, 2)
        return x + _in_parts(self.mlp, (tokens,), self.mlp.lin1.out_features).view_as(x)
