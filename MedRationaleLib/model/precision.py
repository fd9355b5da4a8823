"""What the network computes in. bfloat16 emulated on a CPU without it is six to eight times slower than float32."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from MedRationaleLib.errors import InputError

if TYPE_CHECKING:
    from MedRationaleLib.model.rationale_model import RationaleModel

COMPILERS = ("g++", "clang++", "cl")
"""What torch.compile calls on a CPU, on Linux, macOS and Windows; the environment's CXX comes first."""


def bf16_in_hardware(device: str | torch.device) -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_device(device: str) -> None:
    """Raises InputError where torch has no such device here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"Expected a device that is here, got '{device}' ({reason}); choose cpu.") from error


def uses_bf16(device: str | torch.device, precision: str = "auto") -> bool:
    """Whether it is computed in bfloat16: "auto" where `bf16_in_hardware`, "bfloat16" anyhow, else not."""
    return precision == "bfloat16" or (precision == "auto" and bf16_in_hardware(device))


def autocast(device: str | torch.device, precision: str = "auto") -> torch.autocast:
    """A context that computes in bfloat16 where `uses_bf16`, else in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=uses_bf16(device, precision))


def faster(
    model: RationaleModel, device: str | torch.device, precision: str = "auto", *, compiled: bool = False
) -> RationaleModel:
    """The model with its image encoder's matrices stored in what they are multiplied in, and compiled if asked for.

    In plain float32 that is the model itself; else all but the encoder is shared with the model, which stays as it is.
    In bfloat16 it says bit by bit what autocast alone would, which makes these copies at every call. int8 is torch's
    dynamic quantisation.

    Raises InputError where it is to be compiled for a CPU and there is no C++ compiler.
    """
    on_cpu = torch.device(device).type == "cpu"
    if compiled and on_cpu and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise InputError(
            f"Expected a C++ compiler to compile the image encoder with, found none of {', '.join(COMPILERS)}; "
            "install one, name it in the environment's CXX, or leave --compile out."
        )
    bf16 = uses_bf16(device, precision)
    if not (bf16 or precision == "int8" or compiled):
        return model
    encoder = copy.deepcopy(model.f_img)
    if bf16:
        for layer in encoder.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.to(torch.bfloat16)
    elif precision == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its successor, torchao, is one more dependency
            encoder = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8)
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made._modules["f_img"] = cast(nn.Module, torch.compile(encoder)) if compiled else encoder
    return made
