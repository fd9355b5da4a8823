"""What the network computes in. bfloat16 emulated on a CPU without it is six to eight times slower than float32."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from MedRationaleLib.model.rationale_model import RationaleModel


def bf16_in_hardware(device: str | torch.device) -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: str | torch.device, precision: str = "auto") -> torch.autocast:
    """A context that computes in bfloat16: "auto" where `bf16_in_hardware`, "bfloat16" anyhow, else not."""
    enabled = precision == "bfloat16" or (precision == "auto" and bf16_in_hardware(device))
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def faster(model: RationaleModel, precision: str, *, compiled: bool = False) -> RationaleModel:
    """The model, or a copy of it with its image encoder in int8 or compiled."""
    if precision != "int8" and not compiled:
        return model
    model = copy.copy(model)
    model._modules = dict(model._modules)
    encoder: nn.Module = model.f_img
    if precision == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its successor, torchao, is one more dependency
            encoder = torch.ao.quantization.quantize_dynamic(copy.deepcopy(encoder), {nn.Linear}, dtype=torch.qint8)
    model._modules["f_img"] = cast(nn.Module, torch.compile(encoder)) if compiled else encoder
    return model
