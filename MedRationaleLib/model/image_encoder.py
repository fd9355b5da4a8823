"""f_img: SAM's image encoder, with optional mixing across neighbouring slices and a pyramid of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from MedRationaleLib.model.attention import Block
from MedRationaleLib.model.config import ModelConfig
from MedRationaleLib.model.torchvision_guard import sam_modeling

_sam = sam_modeling()


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all weights at zero: what it joins starts as if it were not there."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with pre-activation; the identity at initialisation (He et al., 2016)."""

    def __init__(self, dim: int, dilation: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(4, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, bias=False),
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

    def __init__(self, dim: int, levels: int = 4) -> None:
        super().__init__()
        widths = (3, *(dim * 2**i for i in range(levels)))
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
        """(N, 3, H, W) -> (N, 2^i dim, H / 2^(i + 1), W / 2^(i + 1)) for i = 0, 1, ... levels - 1."""
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


class ImageEncoder(_sam.ImageEncoderViT):  # type: ignore[name-defined]
    """segment_anything's ImageEncoderViT (same state_dict keys), plus `axial.*` where slices are mixed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            img_size=config.pixels,
            patch_size=config.patch,
            embed_dim=config.embed_dim,
            depth=0,
            out_chans=config.neck_dim,
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        side = config.pixels // config.patch
        self.blocks.extend(
            Block(config.embed_dim, config.heads, 0 if i in config.global_attention else config.window, side)
            for i in range(config.depth)
        )
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
        # The patch embedding's channels come first in memory; every sum and norm after it would pay for that.
        x = self.patch_embed(images.flatten(0, 1)).contiguous() + self.pos_embed
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

    Without detail (the paper's model) one value a patch; with it, a 4 x 4 finer grid that the pyramid sharpens. With
    `reason_dim` convolutions of its own join, which begin as if they were not there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.detailed = config.detail_dim > 0
        self.own = DetailPyramid(config.reason_dim, 2) if config.reason_dim else None
        if self.detailed:
            hidden = config.shared_dim // 2
            self.up = nn.ConvTranspose2d(config.neck_dim, hidden, 4, stride=4)
            self.detail = nn.Conv2d(2 * config.detail_dim, hidden, 3, padding=1)
            if self.own is not None:
                self.join = zeroed(nn.Conv2d(2 * config.reason_dim, hidden, 3, padding=1))
                self.blocks = nn.Sequential(ResidualBlock(hidden), ResidualBlock(hidden, dilation=2))
            self.fuse = nn.Sequential(
                nn.GroupNorm(4, hidden), nn.GELU(), nn.Conv2d(hidden, config.shared_dim, 3, padding=1)
            )
        else:
            self.fuse = nn.Sequential(nn.Conv2d(config.neck_dim, config.shared_dim, 1))

    def forward(self, embedding: Tensor, detail: Sequence[Tensor], images: Tensor) -> Tensor:
        """(N, neck_dim, h, w), the pyramid or nothing, (N, 3, H, W) -> (N, shared_dim, h', w')."""
        if detail:
            embedding = self.up(embedding) + self.detail(detail[1])
        if self.own is not None:
            embedding = self.blocks(embedding + self.join(self.own(images)[1]))
        return self.fuse(embedding)
