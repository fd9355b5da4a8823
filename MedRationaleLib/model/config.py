"""Sizes of the model; one code path builds every one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

CLASSES = ("gland", "pz", "tz", "lesion")
"""Order of the mask decoder's class tokens and of every mask axis."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """f_txt."""

    kind: Literal["clip", "biomedclip"] = "clip"
    """"clip": open_clip's TextTransformer with its bundled tokenizer cut to the words in use; "biomedclip": BERT."""
    width: int = 192
    layers: int = 4
    heads: int = 6
    context_length: int = 32
    """Tokens; BiomedCLIP has 256."""
    folder: str | None = None
    """"biomedclip": local folder with config.json and the tokenizer's files, stored relative to the model folder; None
    builds the architecture only."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """RationaleModel. The defaults are `compact`, the model that ships."""

    name: str = "compact"
    pixels: int = 256
    """Rows and columns of the input; the crop is 192 mm, so 0.75 mm a pixel."""
    patch: int = 16
    """Pixels a patch embedding covers (SAM: 16)."""
    embed_dim: int = 192
    """Width of the image encoder (SAM ViT-B: 768)."""
    depth: int = 8
    """Transformer blocks (SAM ViT-B: 12)."""
    heads: int = 6
    """Attention heads (SAM ViT-B: 12)."""
    window: int = 8
    """Side of the attention windows in patches (SAM: 14)."""
    global_attention: tuple[int, ...] = (1, 3, 5, 7)
    """Blocks that attend over the whole slice (SAM ViT-B: 2, 5, 8, 11)."""
    neck_dim: int = 192
    """Channels of the image embedding (SAM: 256)."""
    axial_every: int = 2
    """Mix neighbouring slices after every so many blocks, as MA-SAM's adapters do; 0 is the paper's 2-D encoder."""
    axial_dim: int = 48
    """Bottleneck of the axial mixing."""
    decoder_depth: int = 2
    """Two-way transformer layers of the mask decoder (SAM: 2)."""
    decoder_heads: int = 6
    """(SAM: 8)."""
    decoder_mlp: int = 768
    """(SAM: 2048)."""
    detail_dim: int = 16
    """Channels at half size of the pyramid of convolutions that joins encoder, decoder and shared space; each level
    doubles them; 0 is the paper's model, without it."""
    reason_dim: int = 16
    """Channels at half size of the shared space's own convolutions on the image, for what masks do not need to know of
    a lesion (texture, margin, how dark it is); 0 is without them, as in the paper's model. They need detail_dim."""
    shared_dim: int = 96
    """Dimensions of the space that image and text share (BiomedCLIP: 512)."""
    heatmap: Literal["sigmoid", "relu", "raw"] = "sigmoid"
    """How a cosine becomes heat: sigmoid(a cos + b) with learned a and b, max(cos, 0), or cos as it is."""
    text: TextConfig = field(default_factory=TextConfig)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The inverse of dataclasses.asdict, after JSON; KeyError or TypeError where fields are missing or unknown.

        Models and runs of before know no `reason_dim`.
        """
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        fields.setdefault("reason_dim", 0)
        return cls(**{**fields, "text": TextConfig(**fields["text"])})

    def problem(self) -> str | None:
        """Why no model of these sizes can be built, in words; None where one can."""
        rules = (
            (self.patch > 0 and self.pixels % self.patch == 0, "patch must divide pixels"),
            (self.heads > 0 and self.embed_dim % self.heads == 0, "heads must divide embed_dim"),
            (self.neck_dim % 8 == 0, "neck_dim must be a multiple of 8"),
            (
                self.decoder_heads > 0 and self.neck_dim // 2 % self.decoder_heads == 0,
                "decoder_heads must divide half of neck_dim",
            ),
            (
                self.depth > 0 and all(0 <= i < self.depth for i in self.global_attention),
                "depth must be positive and global_attention must name blocks below it",
            ),
            (self.axial_every >= 0 and self.window >= 0, "axial_every and window must not be negative"),
            (self.detail_dim == 0 or self.patch == 16, "detail_dim needs patches of 16 pixels"),
            (self.detail_dim % 4 == 0, "detail_dim must be a multiple of 4"),
            (self.reason_dim % 4 == 0, "reason_dim must be a multiple of 4"),
            (self.reason_dim == 0 or self.detail_dim > 0, "reason_dim needs a detail_dim"),
            (self.detail_dim == 0 or self.neck_dim % 32 == 0, "detail_dim needs a neck_dim that is a multiple of 32"),
            (self.detail_dim == 0 or self.shared_dim % 8 == 0, "shared_dim must be a multiple of 8"),
            (self.text.heads > 0 and self.text.width % self.text.heads == 0, "text.heads must divide text.width"),
        )
        return next((words for holds, words in rules if not holds), None)


def compact() -> ModelConfig:
    """The default that ships: under 12 million parameters, made for two CPU cores."""
    return ModelConfig()


def medsam_biomedclip() -> ModelConfig:
    """The paper's model: SAM ViT-B (MedSAM weights) and BiomedCLIP's text tower."""
    return ModelConfig(
        name="medsam_biomedclip",
        pixels=1024,
        embed_dim=768,
        depth=12,
        heads=12,
        window=14,
        global_attention=(2, 5, 8, 11),
        neck_dim=256,
        axial_every=0,
        decoder_heads=8,
        decoder_mlp=2048,
        detail_dim=0,
        reason_dim=0,
        shared_dim=512,
        text=TextConfig(kind="biomedclip", width=768, layers=12, heads=12, context_length=256),
    )


PRESETS = {"compact": compact, "medsam_biomedclip": medsam_biomedclip}
