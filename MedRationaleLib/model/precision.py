"""Whether bfloat16 pays: emulated on a CPU without it, it is six to eight times slower than float32."""

from __future__ import annotations

import torch


def bf16_in_hardware(device: str | torch.device) -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: str | torch.device) -> torch.autocast:
    """A context that computes in bfloat16 where `bf16_in_hardware`, else in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16_in_hardware(device))
