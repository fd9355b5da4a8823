"""From tissue to images: diffusion, echo-planar distortion, resolution, noise, ghosts, coil, field of view."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from MedRationaleLib.synthesis.fields import PIXEL_MM, Canvas, Volume, smooth_noise, uniform

DiffusionTarget = tuple[tuple[slice, slice, slice], Volume, float]
"""Box, soft mask, and the ratio of the high-b signal to the gland's median."""


def half(volume: Volume) -> Volume:
    """Area mean of 2 x 2 pixels: 1.5 mm, finer than diffusion images are."""
    s, h, w = volume.shape
    return volume.reshape(s, h // 2, 2, w // 2, 2).mean((2, 4))


def double(volume: Volume) -> Volume:
    """Linear interpolation back to the full grid: the inverse of `half` for linear images."""
    for axis in (1, 2):
        before = np.concatenate([volume.take([0], axis), volume.take(range(volume.shape[axis] - 1), axis)], axis)
        after = np.concatenate([volume.take(range(1, volume.shape[axis]), axis), volume.take([-1], axis)], axis)
        pair = np.stack([0.75 * volume + 0.25 * before, 0.75 * volume + 0.25 * after], axis + 1)
        shape = list(volume.shape)
        shape[axis] *= 2
        volume = pair.reshape(shape)
    return volume


def _mix_slices(volume: Volume, weight: float) -> Volume:
    """Slice profile: each slice takes `weight` of either neighbour."""
    padded = np.concatenate([volume[:1], volume, volume[-1:]])
    return (1 - 2 * weight) * volume + weight * (padded[:-2] + padded[2:])


def _rician(volume: Volume, sigma: float, rng: np.random.Generator) -> Volume:
    real = volume + sigma * rng.standard_normal(volume.shape, dtype=np.float32)
    return np.hypot(real, sigma * rng.standard_normal(volume.shape, dtype=np.float32))


def _bias(volume: Volume, rng: np.random.Generator, strength: float) -> Volume:
    return volume * np.exp(strength * smooth_noise(rng, (2, 3, 3), volume.shape))


def acquire_t2w(t2w: Volume, rng: np.random.Generator) -> Volume:
    """T2W image in arbitrary units."""
    sigma = uniform(rng, 0.2, 0.85)
    image = gaussian_filter(np.maximum(t2w, 0.01), (0, sigma, sigma))
    image = _mix_slices(image, uniform(rng, 0, 0.12))
    if rng.random() < 0.2:  # motion ghosts along the phase direction
        image = image + uniform(rng, 0.02, 0.07) * np.roll(
            image, int(rng.choice([64, 85, 128])), axis=2 if rng.random() < 0.5 else 1
        )
    image = _bias(image, rng, uniform(rng, 0.05, 0.3))
    image = _rician(image, uniform(rng, 0.006, 0.045), rng)
    return image * uniform(rng, 200, 1200)


def acquire_diffusion(
    canvas: Canvas,
    targets: list[DiffusionTarget],
    gland: np.ndarray,
    rng: np.random.Generator,
    real: tuple[Volume, Volume, Volume] | None = None,
) -> tuple[Volume, Volume, float]:
    """(ADC in 1e-6 mm^2/s, high-b DWI in arbitrary units, b in s/mm^2) on the full grid.

    signal = s0 exp(-b ADC); lesions are set to their ratio of the gland's median. `real` gives a real background:
    (soft mask of where it stands, ADC in 1e-3 mm^2/s, DWI relative to the gland's median).
    """
    b = uniform(rng, 800, 2000)
    s0, adc = half(canvas.s0), np.maximum(half(canvas.adc), 0)
    dwi = s0 * np.exp(-b / 1000 * adc)
    inside = half(gland.astype(np.float32)) > 0.5
    level = float(np.median(dwi[inside])) if inside.any() else 0.15
    if targets:
        full = double(dwi)
        for box, mask, ratio in targets:
            full[box] += mask * (ratio * level - full[box])
        dwi = half(full)
    if real is not None:
        where, real_adc, real_dwi = (half(v) for v in real)
        adc = adc + where * (real_adc - adc)
        dwi = dwi + where * (real_dwi * level - dwi)
    sigma = uniform(rng, 0.45, 1.0)
    s, h, w = adc.shape
    shift = rng.normal(0, 1.0, 2) / (2 * PIXEL_MM)
    warp = uniform(rng, 0, 1.2) * smooth_noise(rng, (3, 5, 5), (s, h, w))
    grid = list(
        np.meshgrid(
            np.arange(s, dtype=np.float32),
            np.arange(h, dtype=np.float32),
            np.arange(w, dtype=np.float32),
            indexing="ij",
        )
    )
    grid[1] = grid[1] + shift[0] + warp
    grid[2] = grid[2] + shift[1]
    noise = uniform(rng, 0.03, 0.22) * level
    images = []
    for image in (adc, dwi):
        image = map_coordinates(image, grid, order=1, mode="nearest")
        image = _mix_slices(gaussian_filter(image, (0, sigma, sigma)), uniform(rng, 0, 0.15))
        images.append(image)
    adc, dwi = images
    # Where there is no signal, the fit is noise; some scanners mask it.
    unreliable = np.clip(noise / (np.maximum(dwi, 0.3 * level) + 1e-6), 0, 1)
    adc = adc + (0.05 + 0.5 * unreliable) * uniform(rng, 0.1, 0.6) * rng.standard_normal(adc.shape, dtype=np.float32)
    if rng.random() < 0.35:
        adc = np.where(dwi < uniform(rng, 0.15, 0.5) * level, 0, adc)
    dwi = _bias(_rician(dwi, noise, rng), rng, uniform(rng, 0.05, 0.35))
    return np.maximum(double(adc), 0) * 1000, double(dwi) * uniform(rng, 100, 1000), b


def field_of_view(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """(3, S, H, W) bool: what each sequence covers. Stacks are shorter than the crop, fields of view may be smaller."""
    valid = np.ones((3, *shape), bool)
    if rng.random() < 0.5:
        low, high = (int(v) for v in rng.integers(0, 5, 2))
        valid[:, :low] = False
        valid[:, shape[0] - high :] = False
    for channels, odds in (((0,), 0.25), ((1, 2), 0.3)):
        if rng.random() < odds:
            inset = [int(rng.uniform(0, 44)) for _ in range(2)]
            keep = np.zeros(shape, bool)
            keep[:, inset[0] : shape[1] - inset[0], inset[1] : shape[2] - inset[1]] = True
            valid[list(channels)] &= keep
    return valid
