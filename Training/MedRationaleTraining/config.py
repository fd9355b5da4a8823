"""What a training run is made of; one dataclass becomes the command line and the YAML file. No torch at import."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from MedRationaleLib.errors import InputError
from MedRationaleLib.model.config import ModelConfig
from MedRationaleLib.synthesis.fields import SLICES


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which slices are seen, and how they are varied (paper, Appendix D, and MA-SAM's neighbouring slices)."""

    slices: int = 8
    """Neighbouring slices of one stack."""
    lesion_stacks: float = 0.55
    """Share of stacks that are placed on a lesion, where the examination has one."""
    move: float = 0.6
    """Share of stacks that are rotated (8 degrees), scaled (10 %) and shifted (8 mm)."""
    contrast: float = 0.7
    """Share of sequences whose contrast curve, noise or sharpness is varied."""
    drop_adc: float = 0.12
    """Share of stacks without ADC: modality drop-out, so that a missing sequence is no surprise."""
    drop_dwi: float = 0.12
    """Share of stacks without DWI."""
    drop_both: float = 0.08
    """Share of stacks with T2W alone, besides those that lose both by chance."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms."""

    focal_alpha: float = 0.97
    """Weight of the positive class (paper, section 5.1)."""
    focal_gamma: float = 2.0
    """(paper, section 5.1)."""
    focal_weight: float = 1.0
    """(paper, Eq. 2: the two terms are added as they are)."""
    dice_weight: float = 1.0
    """(paper, Eq. 2)."""
    lesion_weight: float = 1.0
    """Of the lesion against the three anatomical classes, in both terms."""
    node_weight: float = 0.3
    """InfoNCE of a region against the candidate concepts of each node."""
    slice_weight: float = 0.1
    """The same with an embedding of every slice."""
    slice_unit: Literal["whole", "likeliest"] = "whole"
    """The mean over the whole slice (the paper), or over a typical lesion's area where it looks most like one, which is
    what inference asks: lesions there, and the rest of every slice's gland, which has none. A question's answers then
    count alike, however common each is."""
    slice_margin: float = 0.0
    """By how much, in cosine, a lesion there shall be nearer to the presence of one than to its absence, and all else
    not: a benign nodule's own rationale says that something is there, a slice's not."""
    rationale_weight: float = 0.1
    """InfoNCE of regions against whole rationales within the batch."""
    text_every: int = 1
    """f_txt is trained at every so many steps; in between, the concept embeddings it last gave stand."""


Distance = Literal["l2", "cosine", "iou"]


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """Constraints on the heatmaps (paper, Eq. 3) and how they are solved (Eq. 4)."""

    disentangle: bool = True
    """Heatmaps of one finding's concepts stay apart."""
    localise: bool = True
    """Together they cover what they describe, and nothing else."""
    solver: Literal["augmented", "lagrangian", "penalty"] = "augmented"
    """Augmented Lagrangian, plain Lagrangian, or fixed penalties."""
    distance: Distance = "l2"
    """D: squared difference per pixel of the structure, 1 - cosine, or 1 - soft intersection over union."""
    disentangle_share: float = 0.4
    """epsilon_1 as a share of the distance that concepts can have while their sum is still the mask."""
    localise_share: float = 0.4
    """epsilon_2 as a share of |M|; an empty sum has 1, less where M is small or blurred by the embedding's grid."""
    contain_share: float = 0.5
    """Share of a concept's heat, of each of its maps by itself, that may lie off what it describes; 1 allows all."""
    heat: tuple[float, float] | None = None
    """a and b of the heat sigmoid(a cos + b) at the first step, untrained by Eq. 2. None: the initial model's; after a
    warm-up (`start`), b is such that heatmaps begin as bright, on average, as lesions are large."""
    start: int = 0
    """Step from which the constraints count; the warm-up before it is Eq. 2 alone."""
    rho: float = 0.2
    """Weight of the augmented Lagrangian's squared term."""
    rate: float = 0.01
    """Step of the dual ascent."""
    cap: float = 20.0
    """Largest multiplier."""
    margin: float = 0.0
    """How far within its bound each constraint is held, in units of its epsilon, so that it holds on other examples."""
    weight: float = 0.3
    """Of every constraint where penalties are fixed."""
    report_every: int = 200
    """Steps between KKT reports."""


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
class TuningConfig:
    """Which weights are trained. The exported model is the same in any case: low-rank updates are merged into it."""

    image_encoder: Literal["full", "lora", "frozen"] = "full"
    """All of it (the paper), low-rank updates of query and value (as SAMed), or none; what MedRationale adds to SAM's
    encoder (context across slices, fine detail) is trained in any case."""
    lora_rank: int = 4
    """Rank of the updates (SAMed's)."""
    masks: Literal["full", "frozen"] = "full"
    """Whether all that makes masks is trained (f_img, what is added to it, f_mask); frozen, the projection into the
    shared space, f_txt and the heat alone are, so that heatmaps change, and the initial model's masks, with the
    thresholds that belong to them, stay as they are."""
    text: Literal["full", "frozen"] = "full"
    """Whether f_txt is trained; frozen, every phrasing is embedded once."""
    spread: bool = False
    """Whether f_txt ("clip" only) begins with concepts at right angles to each other, and InfoNCE at CLIP's first
    temperature. In a tower from random weights all texts have nearly the same embedding, and what is to tell them apart
    in an image has next to no gradient; trained, it goes back there for a long time, so that `text: frozen` belongs to
    it."""
    layer_decay: float = 1.0
    """Learning rate of each layer of the image encoder, against that of the layer above it."""
    projection: float = 1.0
    """Learning rate of the projection into the shared space, against that of the run: heatmaps are made there, so that
    it has to change the most where they are constrained, and masks are not."""
    checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, more time."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """A training run. `fit` again with the same `out` goes on where it stopped."""

    out: str
    """Folder for checkpoints, logs and the exported model."""
    train: list[str]
    """Synthetic sets (folders made by `synthesize`)."""
    val: str | None = None
    """Synthetic set of other patients, for the curves and the thresholds."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the network; the defaults are `compact`."""
    baseline: Literal["unet", "swin_unetr"] | None = None
    """Train MONAI's network of that name instead of the model, to compare with; it segments and gives no reason."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Which slices are seen, and how they are varied."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the terms of Eq. 2."""
    constraints: ConstraintConfig = field(default_factory=ConstraintConfig)
    """Disentanglement and localisation of the heatmaps."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam and the learning rate."""
    tuning: TuningConfig = field(default_factory=TuningConfig)
    """Which weights are trained."""
    steps: int = 4000
    """Optimiser steps."""
    batch: int = 2
    """Stacks a step, over all processes."""
    micro_batch: int | None = None
    """Stacks that go through the model at once, `batch` where None; Dice and InfoNCE are formed over these. Their
    gradients are averaged, whether they come one after the other or from several processes."""
    devices: int = 1
    """Devices of this machine to train on; torchrun and `fabric run` say it themselves."""
    seed: int = 0
    """Of weights, examples and phrasings."""
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    """Lightning Fabric's precision; bf16-mixed becomes 32-true on a device that only emulates bfloat16."""
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FitConfig:
        """The inverse of dataclasses.asdict, after JSON or YAML."""
        optimizer = dict(data["optimizer"])
        constraints = data.get("constraints", {"disentangle": False, "localise": False})
        parts = {
            "model": ModelConfig.from_dict(data["model"]),
            "sampling": SamplingConfig(**data["sampling"]),
            "loss": LossConfig(**data["loss"]),
            "constraints": ConstraintConfig(**{"contain_share": 1.0} | constraints),  # earlier runs knew none
            "tuning": TuningConfig(**data.get("tuning", {})),
            "optimizer": OptimizerConfig(**(optimizer | {"betas": tuple(optimizer["betas"])})),
        }
        return cls(**{**data, **parts})


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is measured."""

    out: str
    """Folder for cpu.json or gpu.json and its plot."""
    pixels: int = 1024
    """Rows and columns of the large model's input."""
    depth: int = 12
    """Its layers; with fewer than ViT-B's 12 the figures are those of another network, and say so."""
    rounds: int = 5
    """Times that everything is measured, in turn; the figures are medians."""
    device: str = "cpu"
    """Of torch."""
    compiled: bool = True
    """Measure the compiled encoder, too, which needs a C++ compiler."""
    memory: bool = True
    """Measure the peak memory of each encoder, too, in a process of its own."""
    study: bool = True
    """Measure a whole study: some minutes a round on a CPU."""
    case: str | None = None
    """Folder of an examination in PI-CAI naming for the study and the shipped model; a phantom where None."""
    training: str | None = None
    """YAML file of `fit`, such as Training/configs/paper.yaml, whose training step is measured, too."""
    batches: list[int] = field(default_factory=lambda: [1, 2])
    """Stacks that go through that step at once; a GPU takes more."""
    steps: int = 3
    """Training steps that are measured of each; fewer than rounds, for each takes three forward passes or more."""


def check(config: FitConfig) -> None:
    """Refuse what cannot be trained, before any data is read."""
    m, s, o, loss, c = config.model, config.sampling, config.optimizer, config.loss, config.constraints
    shares = (s.lesion_stacks, s.move, s.contrast, s.drop_adc, s.drop_dwi, s.drop_both)
    weights = (loss.focal_weight, loss.dice_weight, loss.node_weight, loss.slice_weight, loss.rationale_weight,
               loss.lesion_weight)  # fmt: skip
    endless = [name for name, value in _numbers(asdict(config)) if not math.isfinite(value)]
    rules: tuple[tuple[bool, str, object], ...] = (
        (bool(config.train), "at least one synthetic set in train (make one with `synthesize`)", config.train),
        (not endless, "finite numbers", ", ".join(endless)),
        (config.seed >= 0, "a seed of 0 or more", config.seed),
        (config.baseline is None or config.initial is None, "no initial model for a baseline, which has other weights",
         config.initial),
        (config.steps >= 1, "steps of at least 1", config.steps),
        (config.batch >= 1, "batch of at least 1", config.batch),
        (config.devices >= 1, "devices of at least 1", config.devices),
        (config.micro_batch is None or (config.micro_batch >= 1 and config.batch % config.micro_batch == 0),
         "a batch that is a multiple of micro_batch", (config.batch, config.micro_batch)),
        (loss.slice_margin >= 0, "loss.slice_margin of at least 0", loss.slice_margin),
        (loss.slice_margin == 0 or loss.slice_unit == "likeliest", "loss.slice_unit likeliest, for slice_margin",
         loss.slice_unit),
        (loss.text_every >= 1, "loss.text_every of at least 1", loss.text_every),
        (config.workers >= 0, "workers of 0 or more", config.workers),
        (config.save_every >= 1, "save_every of at least 1", config.save_every),
        (config.validate_every >= 1, "validate_every of at least 1", config.validate_every),
        (config.validation_cases >= 1, "validation_cases of at least 1", config.validation_cases),
        (m.problem() is None, "a model that can be built", m.problem()),
        (m.text.kind != "biomedclip" or bool(m.text.folder or config.initial),
         "model.text.folder with a tokenizer, or an imported model as initial", None),
        (1 <= s.slices <= SLICES, f"sampling.slices from 1 to {SLICES}, which synthetic sets have", s.slices),
        (all(0 <= share <= 1 for share in shares), "shares from 0 to 1 in sampling", shares),
        (all(weight >= 0 for weight in weights), "weights of 0 or more in loss", weights),
        (0 < loss.focal_alpha < 1 and loss.focal_gamma >= 0, "focal_alpha from 0 to 1 and focal_gamma of 0 or more",
         (loss.focal_alpha, loss.focal_gamma)),
        (0 < c.disentangle_share <= 1, "constraints.disentangle_share above 0 up to 1", c.disentangle_share),
        (c.localise_share > 0, "a positive constraints.localise_share", c.localise_share),
        (0 < c.contain_share <= 1, "constraints.contain_share in (0, 1]", c.contain_share),
        (min(c.rho, c.rate, c.cap, c.weight) > 0 and c.margin >= 0,
         "positive constraints.rho, rate, cap and weight, and no negative margin",
         (c.rho, c.rate, c.cap, c.weight, c.margin)),
        (c.heat is None or c.heat[0] > 0, "a positive first number in constraints.heat", c.heat),
        (c.start >= 0 and c.report_every >= 1, "constraints.start of 0 or more and report_every of at least 1",
         (c.start, c.report_every)),
        (config.tuning.masks == "full" or config.initial is not None,
         "an initial model whose masks stay as they are (tuning.masks)", config.initial),
        (not config.tuning.spread or m.text.kind == "clip",
         "a text tower of kind \"clip\" for tuning.spread", m.text.kind),
        (config.tuning.lora_rank >= 1, "tuning.lora_rank of at least 1", config.tuning.lora_rank),
        (0 < config.tuning.layer_decay <= 1, "tuning.layer_decay above 0 up to 1", config.tuning.layer_decay),
        (config.tuning.projection > 0, "a positive tuning.projection", config.tuning.projection),
        (o.lr > 0, "a positive optimizer.lr", o.lr),
        (o.clip > 0, "a positive optimizer.clip", o.clip),
        (o.weight_decay >= 0, "an optimizer.weight_decay of 0 or more", o.weight_decay),
        (o.warmup_steps >= 0, "optimizer.warmup_steps of 0 or more", o.warmup_steps),
        (all(0 <= b < 1 for b in (*o.betas, o.ema)) and 0 < o.final_lr <= 1,
         "optimizer.betas and ema from 0 to below 1 and final_lr above 0 up to 1", (o.betas, o.ema, o.final_lr)),
    )  # fmt: skip
    for holds, expected, got in rules:
        if not holds:
            raise InputError(f"Expected {expected}, got {got}; correct the configuration.")


def _numbers(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name, value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield from _numbers({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield prefix + name, value
