"""What a training run is made of; one dataclass becomes the command line and the YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field

from MedRationaleLib.model.config import ModelConfig
from MedRationaleTraining.data.stacks import SamplingConfig
from MedRationaleTraining.losses import LossConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with decoupled weight decay and an exponential learning rate (paper, section 5.1)."""

    lr: float = 1e-3
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """(paper, section 5.1)."""
    weight_decay: float = 1e-3
    """(paper, section 5.1); decoupled, as coupled decay swamps the small gradients of a model trained from scratch."""
    warmup_steps: int = 200
    """Linear warm-up."""
    final_lr: float = 0.03
    """Share of lr that the exponential schedule has come down to at the last step."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones exported."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """A training run. `fit` again with the same `out` goes on where it stopped."""

    out: str
    """Folder for checkpoints, logs and the exported model."""
    train: list[str] = field(default_factory=list)
    """Synthetic sets (folders made by `synthesize`)."""
    val: str | None = None
    """Synthetic set of other patients, for the curves and the thresholds."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 4000
    """Optimiser steps."""
    batch: int = 2
    """Stacks a step."""
    seed: int = 0
    """Of weights, examples and phrasings."""
    precision: str = "bf16-mixed"
    """Lightning Fabric's precision."""
    accelerator: str = "auto"
    """Lightning Fabric's accelerator."""
    workers: int = 1
    """Processes that prepare examples."""
    save_every: int = 100
    """Steps between checkpoints."""
    validate_every: int = 500
    """Steps between validations."""
    validation_cases: int = 10
    """Examinations of a validation."""
    initial: str | None = None
    """Model folder to start from instead of random weights."""
