"""Random smooth fields, soft shapes and the canvas that tissues are painted on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.ndimage import spline_filter1d

PIXEL_MM = 0.75
SLICE_MM = 3.0
PIXELS = 256
SLICES = 24
Box = tuple[slice, slice, slice]
WHOLE: Box = (slice(None), slice(None), slice(None))
Volume = np.ndarray
"""(S, H, W) float32; S from inferior to superior, H from anterior to posterior, W from the patient's right to left."""


@lru_cache(maxsize=256)
def _spline_matrix(cells: int, samples: int) -> np.ndarray:
    """(samples, cells) matrix of cubic B-spline interpolation, mirror at the ends."""
    identity = spline_filter1d(np.eye(cells), order=3, axis=0, mode="mirror") if cells > 1 else np.eye(1)
    position = np.linspace(0, cells - 1, samples)
    base = np.floor(position).astype(int)
    t = position - base
    weights = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    matrix = np.zeros((samples, cells))
    rows = np.arange(samples)
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        column = np.abs(base + offset)
        column = np.where(column > cells - 1, 2 * (cells - 1) - column, column) if cells > 1 else np.zeros_like(column)
        np.add.at(matrix, (rows, np.abs(column)), weight)
    return (matrix @ identity).astype(np.float32)


def smooth_noise(rng: np.random.Generator, cells: tuple[int, int, int], shape: tuple[int, int, int]) -> Volume:
    """Standard-normal values on a coarse grid of `cells` (z, y, x), cubic-interpolated to `shape`."""
    noise = rng.standard_normal(cells, dtype=np.float32)
    z, y, x = (_spline_matrix(c, s) for c, s in zip(cells, shape, strict=True))
    in_plane = np.matmul(np.matmul(y, noise), x.T)
    return np.tensordot(z, in_plane, axes=1)


def smooth_curve(rng: np.random.Generator, knots: int, samples: int) -> np.ndarray:
    """(samples,) smooth random curve of about unit variance."""
    return _spline_matrix(knots, samples) @ rng.standard_normal(knots).astype(np.float32)


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One number in [low, high)."""
    return float(rng.uniform(low, high))


class TextureBank:
    """Noise at several scales, made once a volume and reused by random shifts, because textures cost most of the time.

    `sample(scale_mm)` gives a unit-variance (S, N, N) field whose grain is about `scale_mm`.
    """

    SCALES_MM = (2.0, 4.0, 8.0, 20.0)

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int] = (SLICES, PIXELS, PIXELS)) -> None:
        self._rng = rng
        self._fields = {}
        extent = shape[1] * PIXEL_MM
        for scale in self.SCALES_MM:
            along = max(4, int(shape[0] * SLICE_MM / max(scale, SLICE_MM)))
            across = max(4, int(extent / scale))
            self._fields[scale] = smooth_noise(rng, (along, across, across), shape)

    def sample(self, scale_mm: float, box: Box = WHOLE) -> Volume:
        """The part `box` of a randomly shifted and flipped view of the noise of the nearest scale."""
        scale = min(self.SCALES_MM, key=lambda s: abs(np.log(s / scale_mm)))
        noise = self._fields[scale]
        _, height, width = noise.shape
        rows = np.arange(height)[box[1]] + int(self._rng.integers(height))
        columns = np.arange(width)[box[2]] + int(self._rng.integers(width))
        if self._rng.random() < 0.5:
            rows = -rows
        if self._rng.random() < 0.5:
            noise = noise[::-1]
        return noise[box[0]].take(rows, axis=1, mode="wrap").take(columns, axis=2, mode="wrap")


@dataclass(frozen=True, kw_only=True)
class Tissue:
    """Mean and spread of one tissue. Relative units but for adc (1e-3 mm^2/s)."""

    t2w: float
    """T2W signal; muscle about 0.16, fat about 0.75."""
    s0: float
    """Signal of the fat-suppressed echo-planar image at b = 0."""
    adc: float
    t2w_texture: float = 0.03
    adc_texture: float = 0.06
    grain_mm: float = 4.0

    def jittered(self, rng: np.random.Generator, spread: float = 0.12) -> Tissue:
        """The same tissue in another patient."""
        scale = np.exp(rng.normal(0, spread, 3))
        return Tissue(
            t2w=self.t2w * scale[0],
            s0=self.s0 * scale[1],
            adc=self.adc * scale[2],
            t2w_texture=self.t2w_texture * uniform(rng, 0.4, 1.6),
            adc_texture=self.adc_texture * uniform(rng, 0.4, 1.6),
            grain_mm=self.grain_mm * uniform(rng, 0.6, 1.6),
        )


@dataclass
class Canvas:
    """The three tissue properties while they are being painted, (S, H, W) float32 each."""

    rng: np.random.Generator
    t2w: Volume
    s0: Volume
    adc: Volume
    textures: TextureBank
    x: np.ndarray = field(init=False)
    """(1, 1, W) mm, + to the patient's left."""
    y: np.ndarray = field(init=False)
    """(1, H, 1) mm, + to posterior."""

    def __post_init__(self) -> None:
        axis = ((np.arange(PIXELS) + 0.5) * PIXEL_MM - PIXELS * PIXEL_MM / 2).astype(np.float32)
        self.x, self.y = axis[None, None, :], axis[None, :, None]

    @classmethod
    def blank(cls, rng: np.random.Generator, slices: int = SLICES) -> Canvas:
        """A canvas of zeros."""
        shape = (slices, PIXELS, PIXELS)
        t2w, s0, adc = (np.zeros(shape, np.float32) for _ in range(3))
        return cls(rng, t2w, s0, adc, TextureBank(rng, shape))

    def paint(self, mask: Volume, tissue: Tissue, box: Box = WHOLE) -> None:
        """Mix `tissue` in where the soft mask (in [0, 1], of the shape of `box`) says so."""
        texture = self.textures.sample(tissue.grain_mm, box)
        self.t2w[box] += mask * (tissue.t2w + tissue.t2w_texture * texture - self.t2w[box])
        self.s0[box] += mask * (tissue.s0 * (1 + 0.5 * tissue.adc_texture * texture) - self.s0[box])
        self.adc[box] += mask * (tissue.adc + tissue.adc_texture * texture - self.adc[box])

    def ellipse(self, cx, cy, rx, ry, *, angle=0.0, soft_mm=1.0, warp: float = 0.0, power: float = 2.0):
        """Soft ellipse of per-slice centre and radii in mm -> (mask, box); arguments are numbers or (S,) arrays.

        The box bounds it, so that painting costs what the shape covers and not the whole volume.
        """
        slices = self.t2w.shape[0]
        cx, cy, rx, ry, angle = (np.broadcast_to(np.asarray(v, np.float32), (slices,)) for v in (cx, cy, rx, ry, angle))
        live = np.flatnonzero((rx > 0.3) & (ry > 0.3))
        if live.size == 0:
            return np.zeros((0, 0, 0), np.float32), (slice(0, 0),) * 3
        reach = np.maximum(rx, ry)[live] * (1 + abs(warp)) + 3 * soft_mm
        x, y = self.x[0, 0], self.y[0, :, 0]
        left, right = np.searchsorted(x, ((cx[live] - reach).min(), (cx[live] + reach).max()))
        top, bottom = np.searchsorted(y, ((cy[live] - reach).min(), (cy[live] + reach).max()))
        box = (slice(int(live[0]), int(live[-1]) + 1), slice(int(top), int(bottom)), slice(int(left), int(right)))
        cx, cy, rx, ry, angle = (v[box[0], None, None] for v in (cx, cy, rx, ry, angle))
        dx, dy = self.x[:, :, box[2]] - cx, self.y[:, box[1]] - cy
        cos, sin = np.cos(angle), np.sin(angle)
        u = np.abs(cos * dx + sin * dy) / np.maximum(rx, 0.3)
        v = np.abs(-sin * dx + cos * dy) / np.maximum(ry, 0.3)
        distance = np.sqrt(u * u + v * v) if power == 2.0 else (u**power + v**power) ** (1 / power)
        if warp:
            distance = distance * (1 + warp * 0.5 * self.textures.sample(20.0, box))
        depth = (1 - distance) * np.minimum(rx, ry) / soft_mm
        mask = 1 / (1 + np.exp(np.clip(-2 * depth, -30, 30)))
        return (mask * ((rx > 0.3) & (ry > 0.3))).astype(np.float32), box
