"""The prostate itself: peripheral zone, transition zone with its nodules, stroma, capsule, urethra, central zone."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

from MedRationaleLib.synthesis.anatomy import Anatomy
from MedRationaleLib.synthesis.fields import PIXEL_MM, SLICE_MM, Box, Canvas, Tissue, Volume, uniform
from MedRationaleLib.synthesis.pelvis import gland_frame

PERIPHERAL = Tissue(t2w=0.70, s0=0.85, adc=1.65, t2w_texture=0.09, adc_texture=0.14, grain_mm=4)
TRANSITION = Tissue(t2w=0.36, s0=0.68, adc=1.28, t2w_texture=0.08, adc_texture=0.12, grain_mm=4)
STROMAL = Tissue(t2w=0.22, s0=0.62, adc=1.02, t2w_texture=0.03, adc_texture=0.07, grain_mm=3)
GLANDULAR = Tissue(t2w=0.64, s0=0.80, adc=1.65, t2w_texture=0.13, adc_texture=0.15, grain_mm=2.5)
FIBROMUSCULAR = Tissue(t2w=0.14, s0=0.36, adc=1.05, t2w_texture=0.02, adc_texture=0.08)
CENTRAL = Tissue(t2w=0.27, s0=0.60, adc=1.12, t2w_texture=0.04, adc_texture=0.08)


def bounding_box(mask: np.ndarray, margin: int = 6) -> tuple[slice, slice, slice]:
    """The part of the volume that holds `mask`, with `margin` voxels around it in plane and one slice along."""
    where = np.argwhere(mask)
    low, high = where.min(0), where.max(0) + 1
    pad = np.array([1, margin, margin])
    low, high = np.maximum(low - pad, 0), np.minimum(high + pad, mask.shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def soft(mask: np.ndarray, sigma_mm: float = 0.6) -> Volume:
    """Edges as wide as the partial volume of a voxel."""
    return gaussian_filter(mask.astype(np.float32), (0.3, sigma_mm / 0.75, sigma_mm / 0.75))


def paint_gland(canvas: Canvas, anatomy: Anatomy) -> tuple[dict[int, float], list[tuple[np.ndarray, bool]]]:
    """Paint PZ and TZ. Returns each zone's T2W reference {1: PZ, 2: TZ} and the larger nodules (mask, glandular)."""
    rng = canvas.rng
    if not anatomy.gland.any():
        return {1: PERIPHERAL.t2w, 2: TRANSITION.t2w}, []
    box = bounding_box(anatomy.gland)
    gland, tz = soft(anatomy.gland[box]), soft((anatomy.zones == 2)[box])
    pz_tissue, tz_tissue = PERIPHERAL.jittered(rng), TRANSITION.jittered(rng)
    if rng.random() < 0.2:  # a dark PZ, as after inflammation or with age
        pz_tissue = Tissue(**{**vars(pz_tissue), "t2w": pz_tissue.t2w * uniform(rng, 0.55, 0.85)})
    # capsule and the surgical capsule between the zones
    edge = np.clip(4 * gland * (1 - gland), 0, 1)
    canvas.t2w[box] *= 1 - uniform(rng, 0.2, 0.8) * edge
    canvas.paint(gland, pz_tissue, box)
    septa = np.clip(canvas.textures.sample(2.0, box) - 0.8, 0, 1)
    canvas.t2w[box] *= 1 - uniform(rng, 0, 0.35) * septa * gland
    canvas.paint(tz, tz_tissue, box)
    canvas.t2w[box] += tz * uniform(rng, 0.01, 0.09) * canvas.textures.sample(8.0, box)
    canvas.t2w[box] *= 1 - uniform(rng, 0, 0.6) * np.clip(4 * tz * (1 - tz), 0, 1) * gland
    canvas.t2w[box] *= 1 - uniform(rng, 0.1, 0.6) * edge
    nodules = _paint_nodules(canvas, anatomy, soft((anatomy.zones == 2), 0.4))
    _paint_midline(canvas, anatomy)
    return {1: pz_tissue.t2w, 2: tz_tissue.t2w}, nodules


def _paint_nodules(canvas: Canvas, anatomy: Anatomy, inside: Volume) -> list[tuple[np.ndarray, bool]]:
    """BPH: ellipsoids within the TZ, glandular (bright) or stromal (dark), many with a dark rim; returns the larger."""
    rng = canvas.rng
    tz = np.argwhere(anatomy.zones == 2)
    if tz.shape[0] == 0:
        return []
    large = []
    volume_ml = tz.shape[0] * 3 * 0.75**2 / 1000
    for _ in range(int(rng.integers(0, int(4 + min(14, volume_ml / 3))))):
        s, r, c = tz[rng.integers(len(tz))]
        radius = float(np.clip(rng.lognormal(np.log(5.0), 0.45), 2, 14))
        extent = np.sqrt(np.clip(1 - ((np.arange(inside.shape[0]) - s) * 3.0 / radius) ** 2, 0, 1))
        cx, cy = float(canvas.x[0, 0, c]), float(canvas.y[0, r, 0])
        rx, ry = radius * uniform(rng, 0.75, 1.2) * extent, radius * uniform(rng, 0.75, 1.2) * extent
        mask, box = canvas.ellipse(cx, cy, rx, ry, angle=uniform(rng, 0, 3), soft_mm=0.8, warp=uniform(rng, 0, 0.25))
        if mask.size == 0:
            continue
        mask = mask * inside[box]
        glandular = bool(rng.random() < 0.55)
        canvas.paint(mask * uniform(rng, 0.6, 1.0), (GLANDULAR if glandular else STROMAL).jittered(rng, 0.18), box)
        if rng.random() < 0.6:
            canvas.t2w[box] *= 1 - uniform(rng, 0.2, 0.7) * np.clip(4 * mask * (1 - mask), 0, 1)
        if radius > 5:
            full = np.zeros(anatomy.zones.shape, bool)
            full[box] = mask > 0.5
            large.append((full, glandular))
    return large


def _paint_midline(canvas: Canvas, anatomy: Anatomy) -> None:
    """Anterior fibromuscular stroma, urethra, and the central zone around the ejaculatory ducts at the base."""
    rng = canvas.rng
    frame = gland_frame(anatomy.gland, canvas)
    inside = soft(anatomy.gland, 0.5)
    live = anatomy.gland.any((1, 2)).astype(float)

    def put(tissue: Tissue, *shape, **options) -> None:
        mask, box = canvas.ellipse(*shape, **options)
        if mask.size:
            canvas.paint(mask * inside[box], tissue.jittered(rng), box)

    cx, cy, rx, ry = (frame[k] for k in ("cx", "cy", "rx", "ry"))
    if rng.random() < 0.8:
        put(
            FIBROMUSCULAR,
            cx,
            cy - ry * uniform(rng, 0.85, 1.0),
            rx * uniform(rng, 0.25, 0.6) * live,
            ry * uniform(rng, 0.1, 0.3),
            warp=0.3,
            soft_mm=1.5,
        )
    if rng.random() < 0.6:
        put(GLANDULAR, cx, cy - ry * uniform(rng, -0.1, 0.25), 1.8 * live, 2.6 * live)
    towards_base = np.clip(1 + (frame["base"] + 4) / 8, 0, 1) * live
    if rng.random() < 0.6:
        for side in (-1, 1):
            put(
                CENTRAL,
                cx + side * rx * 0.25,
                cy + ry * 0.5,
                rx * 0.3 * towards_base,
                ry * 0.28 * towards_base,
                angle=side * -0.3,
                warp=0.2,
                soft_mm=1.5,
            )


def paint_calcifications(
    canvas: Canvas, anatomy: Anatomy, taken: np.ndarray, rng: np.random.Generator
) -> list[tuple[Box, Volume]]:
    """Clumps of specks without signal on any sequence, in half of the glands; returns box and soft mask of each.

    They lie about the surgical capsule and the urethra; being dark on T2W and ADC they resemble a small lesion, and
    being dark on DWI they are none. `taken` (S, H, W) bool is kept clear of them.
    """
    tz = anatomy.zones == 2
    if rng.random() < 0.5 or not tz.any():
        return []
    spacing = (SLICE_MM, PIXEL_MM, PIXEL_MM)
    to_border = distance_transform_edt(tz, sampling=spacing) + distance_transform_edt(~tz, sampling=spacing)
    centre = abs(canvas.x - float(canvas.x[0, 0, np.argwhere(tz)[:, 2]].mean())) < 6
    places = np.argwhere((anatomy.zones > 0) & ~taken & ((to_border < 3) | centre))
    free = 1 - soft(taken, 0.9)
    painted = []
    for s, r, c in places[rng.integers(len(places), size=rng.integers(1, 7))] if len(places) else ():
        x, y = float(canvas.x[0, 0, c]), float(canvas.y[0, r, 0])
        along = (np.abs(np.arange(tz.shape[0]) - s) <= rng.integers(0, 2)).astype(float)
        for _ in range(int(rng.integers(1, 4))):
            radii = np.exp(rng.normal(np.log(2.0), 0.4, 2))
            dx, dy = rng.normal(0, 1.5, 2)
            mask, box = canvas.ellipse(
                x + dx, y + dy, radii[0] * along, radii[1] * along, angle=uniform(rng, 0, 3), soft_mm=0.6
            )
            if not mask.size:
                continue
            mask = mask * free[box] * soft(anatomy.gland, 0.5)[box]
            for image, value in ((canvas.t2w, (0.02, 0.14)), (canvas.s0, (0.01, 0.12)), (canvas.adc, (0.2, 1.0))):
                image[box] += mask * (uniform(rng, *value) - image[box])
            painted.append((box, mask))
    return painted
