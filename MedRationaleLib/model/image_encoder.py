"""f_img: SAM's image encoder, with optional mixing across neighbouring slices and a high-resolution stem."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from MedRationaleLib.model.config import ModelConfig
from MedRationaleLib.model.torchvision_guard import sam_modeling

_sam = sam_modeling()


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
        every = config.axial_every
        self.axial = nn.ModuleDict(
            {
                str(i): AxialMixer(config.embed_dim, config.axial_dim)
                for i in range(config.depth)
                if every and i % every == every - 1
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, S, 3, H, W) stacks of neighbouring slices -> (B * S, neck_dim, H / patch, W / patch)."""
        slices = images.shape[1]
        x = self.patch_embed(images.flatten(0, 1)) + self.pos_embed
        for index, block in enumerate(self.blocks):
            x = block(x)
            if str(index) in self.axial:
                x = self.axial[str(index)](x, slices)
        return self.neck(x.permute(0, 3, 1, 2))


class DetailStem(nn.Module):
    """Two strided convolutions on the image itself: what a patch embedding is too coarse to keep."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, dim, 5, stride=2, padding=2), nn.GroupNorm(4, dim), nn.GELU())
        self.coarse = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * dim),
            nn.GELU(),
            nn.Conv2d(2 * dim, 2 * dim, 3, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> (N, dim, H / 2, W / 2) and (N, 2 dim, H / 4, W / 4)."""
        fine = self.fine(images)
        return fine, self.coarse(fine)


class SharedProjection(nn.Module):
    """The image embedding brought into the space that it shares with the text.

    Without detail (the paper's model) one value a patch; with it, a 4 x 4 finer grid that the stem sharpens.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.detailed = config.detail_dim > 0
        if self.detailed:
            hidden = config.shared_dim // 2
            self.up = nn.ConvTranspose2d(config.neck_dim, hidden, 4, stride=4)
            self.detail = nn.Conv2d(2 * config.detail_dim, hidden, 1)
            self.fuse = nn.Sequential(
                nn.GroupNorm(4, hidden), nn.GELU(), nn.Conv2d(hidden, config.shared_dim, 3, padding=1)
            )
        else:
            self.fuse = nn.Sequential(nn.Conv2d(config.neck_dim, config.shared_dim, 1))

    def forward(self, embedding: Tensor, detail: Tensor | None) -> Tensor:
        """(N, neck_dim, h, w), (N, 2 detail_dim, 4h, 4w) or None -> (N, shared_dim, h', w')."""
        if detail is not None:
            embedding = self.up(embedding) + self.detail(detail)
        return self.fuse(embedding)
