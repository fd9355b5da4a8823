"""Where things are: gland, zones and lesions on the canonical synthesis grid, from real label maps or procedural."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from MedRationaleLib.synthesis.fields import PIXEL_MM, PIXELS, SLICE_MM, SLICES, smooth_curve, smooth_noise, uniform


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Label maps on the synthesis grid (24, 256, 256) at 3.0 x 0.75 x 0.75 mm, canonical LPS orientation."""

    zones: np.ndarray
    """uint8: 0 background, 1 PZ, 2 TZ."""
    lesions: np.ndarray
    """uint8: 0, or the number of the lesion, 1..n; empty where lesions are to be invented."""
    source: str
    """Case id of the label map, or "phantom"."""

    @property
    def gland(self) -> np.ndarray:
        """bool (S, H, W)."""
        return self.zones > 0


def random_placement(
    zones: np.ndarray,
    lesions: np.ndarray,
    rng: np.random.Generator,
    *,
    source: str,
    pixel_mm: float = 0.5,
    augment: bool = True,
) -> Anatomy:
    """Bring label maps of (24, 256, 256) at 3.0 x 0.5 x 0.5 mm onto the synthesis grid, moved as patients differ.

    Flip, rotation (8 degrees), scale (12 %), shift (8 mm in plane, 2 slices along) and a smooth elastic field of about
    2 mm. Small shifts along the axis put slices well beyond apex and base into view.
    """
    shape = (SLICES, PIXELS, PIXELS)
    angle = np.deg2rad(rng.normal(0, 6)) if augment else 0.0
    scale = np.exp(rng.normal(0, 0.10)) if augment else 1.0
    flip = -1.0 if augment and rng.random() < 0.5 else 1.0
    shift = rng.normal(0, 6, 2) if augment else np.zeros(2)
    gland_slices = np.flatnonzero((zones > 0).any((1, 2)))
    centring = (gland_slices.mean() if gland_slices.size else (zones.shape[0] - 1) / 2) - (SLICES - 1) / 2
    along = round(float(rng.normal(0, 2.5) + rng.choice([0.0, 1.0]) * centring)) if augment else 0

    axis = (np.arange(PIXELS) + 0.5) * PIXEL_MM - PIXELS * PIXEL_MM / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    z = np.arange(SLICES) + along
    x, y = (np.broadcast_to(v, shape) for v in (x, y))
    if augment:
        x = x + 1.8 * smooth_noise(rng, (4, 7, 7), shape)
        y = y + 1.8 * smooth_noise(rng, (4, 7, 7), shape)
    x, y = x - shift[0], y - shift[1]
    u = flip * (np.cos(angle) * x + np.sin(angle) * y) / scale
    v = (-np.sin(angle) * x + np.cos(angle) * y) / scale
    centre = (zones.shape[1] - 1) / 2
    # Only points that may lie in the label map are interpolated.
    rows, columns = v / pixel_mm + centre, u / pixel_mm + centre
    inside = (rows > 0) & (rows < zones.shape[1] - 1) & (columns > 0) & (columns < zones.shape[2] - 1)
    depth = np.broadcast_to(z[:, None, None], shape)
    inside &= (depth >= 0) & (depth < zones.shape[0])
    foot = np.argwhere((zones > 0).any(0))
    if foot.size:
        (r0, c0), (r1, c1) = foot.min(0) - 4, foot.max(0) + 4
        inside &= (rows > r0) & (rows < r1) & (columns > c0) & (columns < c1)
    points = np.stack([depth[inside], rows[inside], columns[inside]])

    def warp(mask: np.ndarray) -> np.ndarray:
        smooth = gaussian_filter(mask.astype(np.float32), (0, 1.0, 1.0))
        out = np.zeros(shape, np.float32)
        out[inside] = map_coordinates(smooth, points, order=1, mode="nearest")
        return out

    gland, tz = warp(zones > 0), warp(zones == 2)
    new_zones = np.where(gland > 0.5, np.where(tz > 0.5, 2, 1), 0).astype(np.uint8)
    new_lesions = np.zeros(shape, np.uint8)
    for label in np.unique(lesions[lesions > 0]):
        new_lesions[(warp(lesions == label) > 0.5) & (new_zones > 0)] = label
    return Anatomy(zones=new_zones, lesions=new_lesions, source=source)


def phantom_anatomy(rng: np.random.Generator, *, volume_ml: float | None = None) -> Anatomy:
    """A procedural gland: a flattened egg with a TZ egg inside it, so that no data is needed. No lesion yet."""
    volume = volume_ml or uniform(rng, 28, 75)
    width = (volume * 1000 / (0.52 * 0.80 * 0.85)) ** (1 / 3)
    height, length = 0.80 * width, 0.85 * width
    z = (np.arange(SLICES) - (SLICES - 1) / 2 + uniform(rng, -1.5, 1.5)) * SLICE_MM
    axis = (np.arange(PIXELS) + 0.5) * PIXEL_MM - PIXELS * PIXEL_MM / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    position = z / (length / 2)
    egg = np.sqrt(np.clip(1 - position**2, 0, 1)) * (1 + 0.10 * position)
    wobble = 1 + 0.04 * smooth_noise(rng, (4, 5, 5), (SLICES, PIXELS, PIXELS))
    cy = 2.0 * position + uniform(rng, -3, 3) + 0.6 * smooth_curve(rng, 4, SLICES)
    cx = uniform(rng, -3, 3) + 0.5 * smooth_curve(rng, 4, SLICES)
    dx, dy = x[None] - cx[:, None, None], y[None] - cy[:, None, None]
    rx, ry = (np.maximum(egg * r / 2, 1e-3)[:, None, None] for r in (width, height))
    gland = (np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2) * wobble < 1) & (egg > 0.12)[:, None, None]
    share = uniform(rng, 0.62, 0.80)
    tz_shift = uniform(rng, 0.16, 0.24) * height
    tz_x, tz_y = share * rx, share * ry
    towards_base = np.clip((position + 0.75) / 0.5, 0, 1)[:, None, None]
    tz = np.sqrt((dx / tz_x) ** 2 + ((dy + tz_shift * egg[:, None, None]) / tz_y) ** 2) * wobble < towards_base
    zones = np.where(gland, np.where(tz, 2, 1), 0).astype(np.uint8)
    return Anatomy(zones=zones, lesions=np.zeros_like(zones), source="phantom")
