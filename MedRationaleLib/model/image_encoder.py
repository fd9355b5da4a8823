"""f_img: SAM's image encoder, with optional mixing across neighbouring slices and a pyramid of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from MedRationaleLib.model.config import ModelConfig
from MedRationaleLib.model.torchvision_guard import sam_modeling

_sam = sam_modeling()
FEW_TOKENS = 256
"""Up to so many, segment_anything's own attention is as fast as FoldedAttention or faster."""


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all weights at zero: what it joins starts as if it were not there."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with pre-activation; the identity at initialisation (He et al., 2016)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(4, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.GroupNorm(4, dim),
            nn.GELU(),
            zeroed(nn.Conv2d(dim, dim, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim, h, w) -> the same shape."""
        return x + self.body(x)


class DetailPyramid(nn.Module):
    """Convolutions on the image itself: what patch embeddings are too coarse to keep, or learn late.

    Early convolutions help transformers see (Xiao et al., 2021); SAM 2's mask decoder joins fine levels in this way.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = (3, dim, 2 * dim, 4 * dim, 8 * dim)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3 + 2 * (before == 3), stride=2, padding=1 + (before == 3)),
                nn.GroupNorm(4, width),
                nn.GELU(),
                *(ResidualBlock(width) for _ in range(1 if before == 3 else 2)),
            )
            for before, width in pairwise(widths)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) -> (N, 2^i dim, H / 2^(i + 1), W / 2^(i + 1)) for i = 0, 1, 2, 3."""
        found = []
        for level in self.levels:
            images = level(images)
            found.append(images)
        return tuple(found)


class AxialMixer(nn.Module):
    """Residual convolution over three neighbouring slices at each patch; the identity at initialisation.

    The same shape as MA-SAM's adapters (Chen et al., 2023): down-projection, convolution along the axis, up-projection.
    """

    def __init__(self, dim: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, bottleneck)
        self.mix = nn.Conv1d(bottleneck, bottleneck, kernel_size=3, padding=1)
        self.up = nn.Linear(bottleneck, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, slices: int) -> Tensor:
        """(B * slices, h, w, D) -> the same shape."""
        batch, h, w, _ = x.shape
        y = self.down(self.norm(x))
        y = y.view(batch // slices, slices, h * w, -1).permute(0, 2, 3, 1).flatten(0, 1)
        y = nn.functional.gelu(self.mix(y))
        y = y.view(batch // slices, h * w, -1, slices).permute(0, 3, 1, 2).reshape(batch, h, w, -1)
        return x + self.up(y)


class FoldedAttention(_sam.image_encoder.Attention):  # type: ignore[name-defined]
    """segment_anything's attention with its decomposed relative positions as further features of query and key.

    q k^T / sqrt(d) + r_h + r_w = [q / sqrt(d), r_h, r_w] [k, onehot(row), onehot(column)]^T, so that fused attention
    does it all, and no map of tokens by tokens is built. Same weights, same state_dict keys.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> the same shape."""
        batch, h, w, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        get_rel_pos = _sam.image_encoder.get_rel_pos
        grid = q.unflatten(2, (h, w))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, get_rel_pos(h, h, self.rel_pos_h).to(q.dtype))
        by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, get_rel_pos(w, w, self.rel_pos_w).to(q.dtype))
        q = torch.cat([q * self.scale, by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)
        row = torch.eye(h, dtype=k.dtype, device=k.device).repeat_interleave(w, 0)
        column = torch.eye(w, dtype=k.dtype, device=k.device).repeat(h, 1)
        k = torch.cat([k, torch.cat([row, column], 1).expand(batch, self.num_heads, -1, -1)], -1)
        out = nn.functional.scaled_dot_product_attention(q, k, nn.functional.pad(v, (0, h + w)), scale=1.0)
        out = out[..., : v.shape[-1]].transpose(1, 2).reshape(batch, h, w, -1)
        return self.proj(out)


class ImageEncoder(_sam.ImageEncoderViT):  # type: ignore[name-defined]
    """segment_anything's ImageEncoderViT (same state_dict keys), plus `axial.*` where slices are mixed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            img_size=config.pixels,
            patch_size=config.patch,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=4,
            out_chans=config.neck_dim,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window,
            global_attn_indexes=config.global_attention,
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            side = block.window_size or config.pixels // config.patch
            if side**2 > FEW_TOKENS:
                block.attn = FoldedAttention(config.embed_dim, config.heads, use_rel_pos=True, input_size=(side, side))
        self.checkpointing = False
        """Compute each block again in the backward pass instead of keeping what it held."""
        every = config.axial_every
        if config.detail_dim:
            self.detail = zeroed(nn.Conv2d(8 * config.detail_dim, config.embed_dim, 1))
        self.axial = nn.ModuleDict(
            {
                str(i): AxialMixer(config.embed_dim, config.axial_dim)
                for i in range(config.depth)
                if every and i % every == every - 1
            }
        )

    def forward(self, images: Tensor, detail: Sequence[Tensor] = ()) -> Tensor:
        """(B, S, 3, H, W) stacks of neighbouring slices -> (B * S, neck_dim, H / patch, W / patch)."""
        slices = images.shape[1]
        x = self.patch_embed(images.flatten(0, 1)) + self.pos_embed
        if detail:
            x = x + self.detail(detail[3]).permute(0, 2, 3, 1)
        for index, block in enumerate(self.blocks):
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
            if str(index) in self.axial:
                x = self.axial[str(index)](x, slices)
        return self.neck(x.permute(0, 3, 1, 2))


class SharedProjection(nn.Module):
    """The image embedding brought into the space that it shares with the text.

    Without detail (the paper's model) one value a patch; with it, a 4 x 4 finer grid that the pyramid sharpens.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.detailed = config.detail_dim > 0
        if self.detailed:
            hidden = config.shared_dim // 2
            self.up = nn.ConvTranspose2d(config.neck_dim, hidden, 4, stride=4)
            self.detail = nn.Conv2d(2 * config.detail_dim, hidden, 3, padding=1)
            self.fuse = nn.Sequential(
                nn.GroupNorm(4, hidden), nn.GELU(), nn.Conv2d(hidden, config.shared_dim, 3, padding=1)
            )
        else:
            self.fuse = nn.Sequential(nn.Conv2d(config.neck_dim, config.shared_dim, 1))

    def forward(self, embedding: Tensor, detail: Sequence[Tensor] = ()) -> Tensor:
        """(N, neck_dim, h, w) and the pyramid or nothing -> (N, shared_dim, h', w')."""
        if detail:
            embedding = self.up(embedding) + self.detail(detail[1])
        return self.fuse(embedding)
