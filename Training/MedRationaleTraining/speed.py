"""Does making and loading examples outrun the model? Times both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from MedRationaleLib.synthesis import phantom_anatomy, synthesize
from MedRationaleTraining.data.stacks import SamplingConfig, StackDataset


@dataclass(frozen=True, kw_only=True)
class Speed:
    """In one process."""

    stacks: float | None
    """Training examples a second from a stored set; None without one."""
    slices: float | None
    """The same in slices."""
    exams: float
    """Examinations synthesised a second (a phantom with a procedural pelvis, 24 slices)."""


def measure(folder: str | Path | None, examples: int = 20, exams: int = 3, seed: int = 0) -> Speed:
    """Time `examples` of StackDataset and `exams` of synthesize()."""
    config = SamplingConfig()
    stacks = None
    if folder is not None:
        dataset = StackDataset([folder], config, length=examples, seed=seed)
        stacks = examples / _seconds(dataset.__getitem__, examples)

    def make(index: int) -> object:
        rng = np.random.default_rng((seed, index))
        return synthesize(phantom_anatomy(rng), rng)

    return Speed(stacks=stacks, slices=stacks and stacks * config.slices, exams=exams / _seconds(make, exams))


def _seconds(make: Callable[[int], object], count: int) -> float:
    begin = time.perf_counter()
    for index in range(count):
        make(index)
    return time.perf_counter() - begin
