"""The smallest model and run that go through every part of the trainer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from MedRationaleTraining.config import FitConfig, SamplingConfig

from MedRationaleLib.model.config import ModelConfig, TextConfig

TINY = ModelConfig(
    name="tiny",
    embed_dim=16,
    depth=2,
    heads=2,
    window=4,
    global_attention=(1,),
    neck_dim=32,
    axial_dim=4,
    decoder_depth=1,
    decoder_heads=2,
    decoder_mlp=16,
    detail_dim=4,
    reason_dim=4,
    shared_dim=8,
    text=TextConfig(width=16, layers=1, heads=2),
)


def tiny_run(out: Path, data: Path, **changes: Any) -> FitConfig:
    """Six steps of two stacks of two slices, in float32 on the CPU."""
    config = FitConfig(
        out=str(out),
        train=[str(data)],
        model=TINY,
        sampling=SamplingConfig(slices=2),
        steps=6,
        batch=2,
        workers=0,
        save_every=2,
        precision="32-true",
        accelerator="cpu",
    )
    return replace(config, **changes)


def small_networks(patch: pytest.MonkeyPatch) -> None:
    """MONAI's networks with few channels: theirs take half a second a slice."""
    from monai.networks.nets import BasicUNet, SwinUNETR

    networks = "MedRationaleTraining.baselines"
    patch.setattr(f"{networks}.BasicUNet", partial(BasicUNet, features=(4, 4, 8, 8, 8, 4)))
    patch.setattr(f"{networks}.SwinUNETR", lambda feature_size, **sizes: SwinUNETR(feature_size=12, **sizes))
