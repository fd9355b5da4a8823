"""RationaleModel: what is there (masks) and why (similarity to concepts), from one image embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from MedRationaleLib.model.config import ModelConfig
from MedRationaleLib.model.image_encoder import DetailPyramid, ImageEncoder, SharedProjection
from MedRationaleLib.model.mask_decoder import ClassMaskDecoder


@dataclass(kw_only=True)
class ModelOutput:
    """One forward pass over B stacks of S slices."""

    mask_logits: Tensor
    """(B, S, classes, h, w) float32."""
    embedding: Tensor
    """(B, S, shared_dim, h', w'): f_img in the shared space, one vector a patch, not yet of unit length."""
    inverse_norm: Tensor
    """(B, S, h', w') float32: 1 / |f_img|. Apart, because normalising the whole embedding costs a third of a step."""

    def pool(self, weights: Tensor) -> Tensor:
        """Mean unit embedding of R regions a stack: weights (B, R, S, h', w') >= 0 -> (B, R, shared_dim) float32."""
        weights = weights / weights.sum((2, 3, 4), keepdim=True).clamp(min=1e-6)
        scaled = (weights * self.inverse_norm[:, None]).to(self.embedding.dtype)
        flat = self.embedding.permute(0, 1, 3, 4, 2).flatten(1, 3)
        return torch.bmm(scaled.flatten(2), flat).float()

    def slice_means(self) -> Tensor:
        """Mean unit embedding of every whole slice, (B, S, shared_dim) float32: the paper's unit of retrieval."""
        share = (self.inverse_norm / self.inverse_norm[0, 0].numel()).to(self.embedding.dtype)
        return torch.einsum("bsdhw,bshw->bsd", self.embedding, share).float()

    def likeliest_means(self, direction: Tensor, inside: Tensor, count: int) -> Tensor:
        """Mean unit embedding of the `count` patches of every slice that lie furthest along a direction.

        As evidence.asked_of_slices has it; which patches these are has no gradient.

        Args:
            direction: (shared_dim,), such as one concept's embedding less another's.
            inside: (B, S, h', w') bool, where to look; slices that are nowhere inside are taken as a whole.
            count: patches; all that are inside where these are fewer.

        Returns:
            (B, S, shared_dim) float32.
        """
        flat, norm = self.embedding.flatten(3), self.inverse_norm.flatten(2)
        with torch.no_grad():
            along = torch.einsum("bsdp,d->bsp", flat, direction.to(flat.dtype)).float() * norm
            found = along.masked_fill(~inside.flatten(2), -math.inf).topk(count, 2)
            weights = torch.zeros_like(norm).scatter(2, found.indices, found.values.isfinite().float())
            weights[~inside.flatten(2).any(2)] = 1
            weights /= weights.sum(2, keepdim=True)
        return torch.einsum("bsdp,bsp->bsd", flat, (weights * norm).to(flat.dtype)).float()

    def similarity(self, stack: int, concepts: Tensor) -> Tensor:
        """Cosine similarity of every patch of one stack with (K, shared_dim) unit vectors -> (K, S, h', w') float32."""
        product = torch.einsum("sdhw,kd->kshw", self.embedding[stack], concepts.to(self.embedding.dtype)).float()
        return product * self.inverse_norm[stack]


class RationaleModel(nn.Module):
    """f_img, f_mask, a projection into the shared space and, for training, f_txt.

    `concept_embeddings` holds f_txt of every concept, so that inference needs no text tower:
    similarity(x, c_k) = f_img(x) . f_txt(c_k), and the heatmap h_k is that, upsampled (paper, Eq. 1).
    """

    def __init__(self, config: ModelConfig, concepts: Sequence[str]) -> None:
        """Build with random weights; `concepts` are the concept ids, in the order of `concept_embeddings`."""
        super().__init__()
        self.config = config
        self.concepts = tuple(concepts)
        self.f_img = ImageEncoder(config)
        self.detail = DetailPyramid(config.detail_dim) if config.detail_dim else None
        self.projection = SharedProjection(config)
        self.f_mask = ClassMaskDecoder(config)
        self.f_txt: nn.Module | None = None
        self.concept_embeddings: Tensor
        self.register_buffer("concept_embeddings", torch.zeros(len(self.concepts), config.shared_dim))
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        """log of the inverse temperature of InfoNCE; CLIP's starting value is 1 / 0.07, learned."""

        self.heat_scale = nn.Parameter(torch.tensor(15.0).log())
        """log of a in sigmoid(a cos + b)."""
        self.heat_bias = nn.Parameter(torch.tensor(-8.0))
        """b; negative, so that most of the image is dark from the start."""
        # As CPUs and tensor cores want convolutions: less time than with channels first in memory.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out

    def heat(self, cosine: Tensor) -> Tensor:
        """Cosine similarity -> heat of the same shape, in [0, 1] unless the configured form is "raw"."""
        if self.config.heatmap == "sigmoid":
            return torch.sigmoid(self.heat_scale.exp() * cosine + self.heat_bias)
        return cosine.clamp(min=0) if self.config.heatmap == "relu" else cosine

    @torch.no_grad()
    def start_heat(self, scale: float, bias: float) -> None:
        """Set a and b of sigmoid(a cos + b)."""
        self.heat_scale.fill_(math.log(scale))
        self.heat_bias.fill_(bias)

    def attach_text(self, vocabulary: Sequence[int] = ()) -> None:
        """Build f_txt (random weights). Only training and re-computing concept embeddings need it."""
        from MedRationaleLib.model.text_encoder import TextEncoder

        self.f_txt = TextEncoder(self.config.text, self.config.shared_dim, vocabulary)

    def forward(self, images: Tensor) -> ModelOutput:
        """(B, S, 3, H, W) float32, z-scored per slice and channel; S neighbouring slices from inferior to superior.

        Images of another size than the model's are resized bilinearly (paper, Appendix D).
        """
        batch, slices = images.shape[:2]
        if images.shape[-1] != self.config.pixels:
            resized = nn.functional.interpolate(images.flatten(0, 1), (self.config.pixels,) * 2, mode="bilinear")
            images = resized.unflatten(0, (batch, slices))
        detail = self.detail(images.flatten(0, 1)) if self.detail is not None else ()
        encoded = self.f_img(images, detail)
        logits = self.f_mask(encoded, detail).float()
        shared = self.projection(encoded, detail, images.flatten(0, 1))
        inverse_norm = shared.float().square().sum(1).clamp(min=1e-12).rsqrt()
        return ModelOutput(
            mask_logits=logits.unflatten(0, (batch, slices)),
            embedding=shared.unflatten(0, (batch, slices)),
            inverse_norm=inverse_norm.unflatten(0, (batch, slices)),
        )

    @property
    def patch_mm(self) -> float:
        """Side in mm of the image patch that one shared embedding stands for, on a 192 mm crop."""
        finer = 4 if self.config.detail_dim else 1
        return 192.0 / (self.config.pixels / self.config.patch * finer)
