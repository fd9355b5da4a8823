"""Does making and loading examples outrun the model, and what does its attention gain? Times all of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType

import numpy as np
from torch import nn

from MedRationaleLib.model.torchvision_guard import sam_modeling
from MedRationaleLib.synthesis import phantom_anatomy, synthesize
from MedRationaleTraining.config import FitConfig
from MedRationaleTraining.data.stacks import StackDataset
from MedRationaleTraining.data.synthetic import SynthesisConfig, make_set
from MedRationaleTraining.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one process."""

    slices: int
    """Slices of a stack."""
    exams: float
    """Examinations synthesised a second (a phantom with a procedural pelvis, 24 slices)."""
    stacks: float
    """Training examples loaded a second."""
    steps: tuple[float, ...]
    """Seconds of each optimiser step, stationarity and checkpoints left out."""
    stock: tuple[float, ...]
    """The same with segment_anything's own attention, taken in turn with `steps`."""
    batch: int
    """Stacks a step."""

    @property
    def trained(self) -> float:
        """Stacks a second that the training takes, of the median step."""
        return self.batch / float(np.median(self.steps))

    @property
    def gain(self) -> float:
        """Median step with segment_anything's own attention over the median step."""
        return float(np.median(self.stock) / np.median(self.steps))


def measure(config: FitConfig, *, examples: int = 20, exams: int = 3, rounds: int = 5) -> Speed:
    """Time synthesis, loading and training steps of a configuration.

    Args:
        config: `train` names the sets to load from; where none of them is there, three phantoms are made.
        examples: stacks to load.
        exams: examinations to synthesise.
        rounds: steps with each attention; the first of either is not counted.
    """

    def make(index: int) -> object:
        rng = np.random.default_rng((config.seed, index))
        return synthesize(phantom_anatomy(rng), rng)

    with tempfile.TemporaryDirectory() as folder:
        if not any(Path(name).exists() for name in config.train):
            make_set(Path(folder) / "phantoms", SynthesisConfig(cases=3, seed=config.seed))
            config = replace(config, train=[str(Path(folder) / "phantoms")])
        dataset = StackDataset(config.train, config.sampling, length=examples, seed=config.seed)
        stacks = examples / _seconds(dataset.__getitem__, examples)
        trainer = Trainer(replace(config, out=str(Path(folder) / "run"), val=None, initial=None, workers=0))
        batch = next(trainer.batches())
        with stock_attention(trainer.model):
            trainer.train_step(batch)
        trainer.train_step(batch)
        steps, stock = [], []
        for _ in range(rounds):
            steps.append(_seconds(lambda _: trainer.train_step(batch), 1))
            with stock_attention(trainer.model):
                stock.append(_seconds(lambda _: trainer.train_step(batch), 1))
    return Speed(
        slices=config.sampling.slices,
        exams=exams / _seconds(make, exams),
        stacks=stacks,
        steps=tuple(steps),
        stock=tuple(stock),
        batch=config.batch,
    )


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[None]:
    """The image encoder's blocks as segment_anything computes them, on the same weights."""
    stock = sam_modeling().image_encoder
    layers = [m for m in model.modules() if isinstance(m, (stock.Attention, stock.Block))]
    for layer in layers:
        own = stock.Block if isinstance(layer, stock.Block) else stock.Attention
        layer.forward = MethodType(own.forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _seconds(make: Callable[[int], object], count: int) -> float:
    begin = time.perf_counter()
    for index in range(count):
        make(index)
    return time.perf_counter() - begin
