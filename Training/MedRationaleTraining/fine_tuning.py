"""Which weights a run trains and how fast: all of them, low-rank updates (LoRA), or none of the image encoder's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleTraining.config import FitConfig, TuningConfig

HEAT_FASTER = 10.0
"""Learning rate of the heatmaps' a and b, against the rest's: two numbers that have far to go."""
ADDED = ("f_img.axial.", "f_img.detail.")
"""Parts of the image encoder that SAM does not have; they are trained in any case."""


class LowRankUpdate(nn.Module):
    """W + B A on the query's and the value's rows of a joint projection (Hu et al., 2022, placed as SAMed does).

    B begins at zero, so that the encoder begins as it was.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(2, rank, dim))
        self.up = nn.Parameter(torch.zeros(2, dim, rank))
        for matrix in self.down.data:
            nn.init.kaiming_uniform_(matrix, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """(3 dim, dim) of q, k, v -> the same shape."""
        query, value = self.up @ self.down
        return weight + torch.cat([query, torch.zeros_like(query), value])


def prepare(model: RationaleModel, tuning: TuningConfig) -> RationaleModel:
    """Leave trainable what `tuning` says; returns the model."""
    encoder = model.f_img
    if tuning.image_encoder != "full":
        for name, parameter in model.named_parameters():
            if name.startswith("f_img.") and not name.startswith(ADDED):
                parameter.requires_grad_(False)
    if tuning.image_encoder == "lora":
        for block in encoder.blocks:
            qkv = block.attn.qkv
            register_parametrization(qkv, "weight", LowRankUpdate(qkv.in_features, tuning.lora_rank))
    if tuning.masks == "frozen":
        for part in (encoder, model.detail, model.f_mask):
            if part is not None:
                part.requires_grad_(False)
    if tuning.text == "frozen" and model.f_txt is not None:
        model.f_txt.requires_grad_(False)
    encoder.checkpointing = tuning.checkpointing
    return model


def merge(model: RationaleModel, tuning: TuningConfig) -> RationaleModel:
    """Put low-rank updates into the weights that they belong to: a model like any other."""
    if tuning.image_encoder == "lora":
        for block in model.f_img.blocks:
            remove_parametrizations(block.attn.qkv, "weight")
    return model


def optimizer_of(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW; no decay of biases and norms, smaller steps of the image encoder's first layers where asked for.

    Each group has "faster", its learning rate against that of the run.
    """
    o, depth = config.optimizer, config.model.depth
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    heat: dict[str, Any] = {"params": [], "weight_decay": 0.0, "faster": HEAT_FASTER}
    for name, parameter in _trained(model):
        if name.startswith("heat_"):
            heat["params"].append(parameter)
            continue
        rate = config.tuning.layer_decay ** (depth - _layer(name, depth))
        rate *= config.tuning.projection if name.startswith("projection.") else 1.0
        group = groups.setdefault((rate, parameter.ndim > 1), {"params": [], "faster": rate})
        group["params"].append(parameter)
        if parameter.ndim <= 1:
            group["weight_decay"] = 0.0
    ordered = [groups[key] for key in sorted(groups, key=lambda key: (-key[0], not key[1]))]
    return torch.optim.AdamW([*ordered, heat], lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _layer(name: str, depth: int) -> int:
    """0 for the patch embedding, i + 1 for block i, and `depth` for the last block and all that follows it."""
    if name.startswith(("f_img.patch_embed.", "f_img.pos_embed")):
        return 0
    parts = name.split(".")
    return int(parts[2]) + 1 if parts[:2] in (["f_img", "blocks"], ["f_img", "axial"]) else depth
