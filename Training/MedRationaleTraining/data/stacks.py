"""Training examples: stacks of neighbouring slices with masks, regions and rationales, sampled and augmented."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import Dataset

from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.preprocessing import zscore
from MedRationaleTraining.config import SamplingConfig
from MedRationaleTraining.data.synthetic import LESION_BIT, VALID_SHIFT, StoredExam, stored_exams

MASK_PIXELS = 128
REGION_PIXELS = 64
DIFFUSION_NODES = ("adc_signal", "dwi_signal", "diffusion_pattern")
"""Nodes whose answers cannot be seen where neither ADC nor DWI is there."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One training example; collated as a list, because the number of regions differs."""

    images: Tensor
    """(S, 3, 256, 256) float32, z-scored."""
    masks: Tensor
    """(S, 4, 128, 128) float32 in [0, 1]: gland, PZ, TZ, lesion."""
    regions: Tensor
    """(R, S, 64, 64) float32 weights in [0, 1]."""
    answers: tuple[dict[str, str], ...]
    """R rationales: node id -> concept id."""
    is_lesion: tuple[bool, ...]
    """R flags."""
    known: Tensor = field(default_factory=lambda: torch.ones(len(CLASSES), dtype=torch.bool))
    """(4,) bool: which of the masks somebody drew; an unknown mask is all zero and says nothing."""


def _area_mean(x: np.ndarray, pixels: int) -> np.ndarray:
    factor = x.shape[-1] // pixels
    return x.reshape(*x.shape[:-2], pixels, factor, pixels, factor).mean((-3, -1), dtype=np.float32)


def make_stack(exam: StoredExam, start: int, slices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """images (3, S, H, W) float32, valid (3, S, H, W) bool, labels and regions (S, H, W) uint8 of some slices."""
    part = slice(start, start + slices)
    labels = np.asarray(exam.labels[part])
    valid = np.stack([(labels >> (VALID_SHIFT + channel)) & 1 for channel in range(3)]).astype(bool)
    return np.asarray(exam.images[:, part], np.float32), valid, labels, np.asarray(exam.regions[part])


def targets(labels: np.ndarray) -> np.ndarray:
    """(S, H, W) packed labels -> (S, 4, 128, 128) float32 masks in [0, 1]."""
    zone = labels & 3
    lesion = (labels & LESION_BIT) > 0
    return np.stack([_area_mean(m, MASK_PIXELS) for m in (zone > 0, zone == 1, zone == 2, lesion)], 1)


class StackDataset(Dataset):
    """Example i is drawn from (seed, i) alone, so that training resumes exactly and workers do not matter."""

    def __init__(self, folders: Sequence[str | Path], config: SamplingConfig, *, length: int, seed: int) -> None:
        """Lists the examinations of the sets; reads none."""
        self._exams = [path for folder in folders for path in stored_exams(folder)]
        self._config, self._length, self._seed = config, length, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Stack:
        rng = np.random.default_rng((self._seed, index))
        exam = StoredExam.open(self._exams[rng.integers(len(self._exams))])
        return self.draw(exam, rng)

    def draw(self, exam: StoredExam, rng: np.random.Generator) -> Stack:
        """One augmented stack of an examination."""
        config, depth = self._config, exam.labels.shape[0]
        lesions = [r.label for r in exam.rationales if r.is_lesion]
        start = int(rng.integers(0, depth - config.slices + 1))
        if lesions and rng.random() < config.lesion_stacks:
            on = np.flatnonzero((exam.regions == rng.choice(lesions)).any((1, 2)))
            start = int(np.clip(rng.choice(on) - rng.integers(config.slices), 0, depth - config.slices))
        images, valid, labels, regions = make_stack(exam, start, config.slices)
        if rng.random() < 0.5:
            images, valid, labels, regions = (a[..., ::-1] for a in (images, valid, labels, regions))
        if rng.random() < config.move:
            images, valid, labels, regions = _move(images, valid, labels, regions, rng)
        images = zscore(images, valid)
        for channel in range(3):
            if rng.random() < config.contrast:
                images[channel] = _vary(images[channel], rng)
        images = zscore(images, valid)
        drop = rng.random(3) < (config.drop_adc, config.drop_dwi, config.drop_both)
        if drop[0] or drop[2]:
            images[1] = 0
        if drop[1] or drop[2]:
            images[2] = 0
        stack = _assemble(images, labels, regions, exam)
        if images[1:].any():
            return stack
        # What was not imaged in any way is not asked for: it could only be guessed.
        return replace(
            stack, answers=tuple({n: c for n, c in a.items() if n not in DIFFUSION_NODES} for a in stack.answers)
        )


def whole_exam(exam: StoredExam) -> Stack:
    """All slices of an examination as they are, for evaluation."""
    images, valid, labels, regions = make_stack(exam, 0, exam.labels.shape[0])
    return _assemble(zscore(images, valid), labels, regions, exam)


def slice_lesions(stack: Stack) -> list[int | None]:
    """Index of each slice's largest lesion among the stack's regions."""
    areas = stack.regions.sum((2, 3))  # (R, S)
    largest: list[int | None] = []
    for s in range(stack.images.shape[0]):
        lesions = [r for r, lesion in enumerate(stack.is_lesion) if lesion and areas[r, s] > 1]
        largest.append(max(lesions, key=lambda r: float(areas[r, s]), default=None))
    return largest


def absence(stack: Stack) -> dict[str, str]:
    """What is true where no lesion is marked, as far as it is known."""
    return {"lesion_presence": "lesion_absent"} if stack.known[CLASSES.index("lesion")] else {}


def slice_answers(stack: Stack) -> list[dict[str, str]]:
    """What is true of each slice: its largest lesion's rationale, or that there is no lesion, as far as it is known."""
    return [absence(stack) if r is None else stack.answers[r] for r in slice_lesions(stack)]


def _assemble(images: np.ndarray, labels: np.ndarray, regions: np.ndarray, exam: StoredExam) -> Stack:
    """Masks, the regions with their rationales, and what is healthy in each zone as regions without a lesion."""
    weights, answers, flags = [], [], []
    for region in exam.rationales:
        mask = regions == region.label
        if mask.sum() >= 12:
            weights.append(mask)
            answers.append(region.answers)
            flags.append(region.is_lesion)
    absent = {"lesion_presence": "lesion_absent"} if "lesion" in exam.classes else {}
    for zone, concept in ((1, "zone_pz"), (2, "zone_tz")):
        healthy = ((labels & 3) == zone) & (regions == 0)
        if healthy.sum() >= 400:
            weights.append(healthy)
            answers.append({**absent, "zone": concept})
            flags.append(False)
    pooled = (
        np.stack([_area_mean(w, REGION_PIXELS) for w in weights])
        if weights
        else np.zeros((0, images.shape[1], REGION_PIXELS, REGION_PIXELS), np.float32)
    )
    return Stack(
        images=torch.from_numpy(np.ascontiguousarray(images.transpose(1, 0, 2, 3), np.float32)),
        masks=torch.from_numpy(targets(labels)),
        regions=torch.from_numpy(pooled),
        answers=tuple(answers),
        is_lesion=tuple(flags),
        known=torch.tensor([name in exam.classes for name in CLASSES]),
    )


def _move(images, valid, labels, regions, rng):
    """One rotation, scaling and shift of the whole stack."""
    angle, scale = math.radians(rng.normal(0, 5)), math.exp(rng.normal(0, 0.07))
    shift = rng.normal(0, 0.05, 2)
    matrix = torch.tensor(
        [
            [math.cos(angle) / scale, -math.sin(angle) / scale, shift[0]],
            [math.sin(angle) / scale, math.cos(angle) / scale, shift[1]],
        ],
        dtype=torch.float32,
    )
    slices, size = images.shape[1], images.shape[-2:]
    grid = torch.nn.functional.affine_grid(matrix[None], (1, 1, *size), align_corners=False)

    def sample(array: np.ndarray, mode: str) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32)).reshape(1, -1, *size)
        moved = torch.nn.functional.grid_sample(tensor, grid, mode=mode, align_corners=False)
        return moved.reshape(array.shape).numpy()

    both = sample(np.stack([labels, regions]), "nearest").astype(np.uint8)
    images = sample(images, "bilinear")
    valid = np.stack([(both[0] >> (VALID_SHIFT + c)) & 1 for c in range(3)]).astype(bool).reshape(3, slices, *size)
    return images, valid, both[0], both[1]


def _vary(channel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast curve, brightness, noise and sharpness of one z-scored sequence (S, H, W)."""
    low, high = float(channel.min()), float(channel.max())
    if high > low:
        unit = (channel - low) / (high - low)
        channel = unit ** math.exp(rng.normal(0, 0.25)) * (high - low) + low
    if rng.random() < 0.3:
        channel = np.clip(channel, -9, rng.uniform(1.5, 3.5))
    if rng.random() < 0.3:
        channel = channel + rng.uniform(0.05, 0.3) * rng.standard_normal(channel.shape, dtype=np.float32)
    if rng.random() < 0.25:
        sigma = rng.uniform(0.3, 1.2)
        channel = gaussian_filter(channel, (0, sigma, sigma))
    return channel
