"""One synthetic examination: anatomy and a seed in, images, masks and rationales out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.synthesis.acquisition import DiffusionTarget, acquire_diffusion, acquire_t2w, field_of_view
from MedRationaleLib.synthesis.anatomy import Anatomy
from MedRationaleLib.synthesis.fields import Canvas, Volume, uniform
from MedRationaleLib.synthesis.gland import paint_calcifications, paint_gland, soft
from MedRationaleLib.synthesis.pelvis import paint_pelvis
from MedRationaleLib.synthesis.regions import (
    PROFILES,
    Region,
    draw_answers,
    invent_shape,
    measured_answers,
    measured_shape,
    paint_region,
    region_of,
)


@dataclass(frozen=True, kw_only=True)
class RealBackground:
    """A real examination bent to a new gland; every array (S, H, W) float32 on the synthesis grid or None."""

    t2w: Volume | None = None
    """On the canvas's scale: muscle about 0.16, fat about 0.75."""
    adc: Volume | None = None
    """1e-3 mm^2/s."""
    dwi: Volume | None = None
    """Relative to the gland's median."""
    interior: Literal["t2w", "diffusion"] | None = None
    """Which real sequence stands within the gland, too, not only around it (the zones are then the real ones)."""
    zones: np.ndarray | None = None
    """uint8 zones of the real examination whose interior is kept, after bending."""
    valid: np.ndarray | None = None
    """(3, S, H, W) bool: where the real sequences have data."""


@dataclass(frozen=True, kw_only=True)
class SyntheticExam:
    """Synthetic, and called so wherever it is shown."""

    images: np.ndarray
    """(3, S, H, W) float32: T2W (arbitrary), ADC (1e-6 mm^2/s), DWI (arbitrary)."""
    valid: np.ndarray
    """(3, S, H, W) bool."""
    anatomy: Anatomy
    regions: np.ndarray
    """(S, H, W) uint8: 0 or Region.label; the true place of every rationale."""
    rationales: tuple[Region, ...]
    b_value: float

    @property
    def lesions(self) -> np.ndarray:
        """(S, H, W) bool: regions that count as lesions (PI-RADS 3 and up)."""
        return np.isin(self.regions, [r.label for r in self.rationales if r.is_lesion])


@lru_cache(maxsize=1)
def _tree() -> DecisionTree:
    return DecisionTree.load("pirads_v2_1")


def synthesize(
    anatomy: Anatomy,
    rng: np.random.Generator,
    *,
    background: Callable[[Anatomy, np.random.Generator], RealBackground | None] | None = None,
    cancers: int | None = None,
    crop_field_of_view: bool = True,
) -> SyntheticExam:
    """Render one examination.

    Args:
        anatomy: zones, and real lesions where the label map has them (their shape is measured, the rest is drawn).
        rng: the only source of randomness; the same state gives the same examination.
        background: gives real surroundings for this anatomy, or None for a procedural pelvis.
        cancers: how many lesions to invent; None draws 0 to 2, fewer where the anatomy brings real ones.
        crop_field_of_view: whether sequences may cover less than the crop.
    """
    real = background(anatomy, rng) if background else None
    if real is not None and real.zones is not None:
        anatomy = Anatomy(zones=real.zones, lesions=anatomy.lesions * (real.zones > 0), source=anatomy.source)
    canvas = Canvas.blank(rng, anatomy.zones.shape[0])
    paint_pelvis(canvas, anatomy.gland)
    around = 1 - soft(anatomy.gland, 0.9)
    if real is not None and real.t2w is not None:
        canvas.t2w = real.t2w.copy()
        kept = canvas.t2w.copy() if real.interior == "t2w" else None
        reference, nodules = paint_gland(canvas, anatomy)
        if kept is not None:
            canvas.t2w, nodules = kept, []
            reference = {
                z: float(np.median(kept[anatomy.zones == z])) if (anatomy.zones == z).any() else reference[z]
                for z in (1, 2)
            }
    else:
        reference, nodules = paint_gland(canvas, anatomy)
    regions, rationales, targets = _paint_regions(canvas, anatomy, reference, nodules, cancers)
    voids = rng.spawn(1)[0]
    for box, mask in paint_calcifications(canvas, anatomy, regions > 0, voids):
        targets.append((box, mask, uniform(voids, 0.02, 0.3)))

    diffusion = None
    if real is not None and real.adc is not None and real.dwi is not None:
        where = np.ones_like(around) if real.interior == "diffusion" else around
        for box, mask, _ratio in targets:
            where[box] *= 1 - mask
        diffusion = (where, real.adc, real.dwi)
    adc, dwi, b_value = acquire_diffusion(canvas, targets, anatomy.gland, rng, diffusion)
    images = np.stack([acquire_t2w(canvas.t2w, rng), adc, dwi]).astype(np.float32)
    valid = field_of_view(rng, anatomy.zones.shape) if crop_field_of_view else np.ones(images.shape, bool)
    if real is not None and real.valid is not None:
        valid &= real.valid
    return SyntheticExam(
        images=images, valid=valid, anatomy=anatomy, regions=regions, rationales=tuple(rationales), b_value=b_value
    )


def _paint_regions(canvas: Canvas, anatomy: Anatomy, reference, nodules, cancers):
    """Real lesions first, then invented ones, then mimics; later regions keep clear of earlier ones."""
    rng = canvas.rng
    plan: list[tuple[str, np.ndarray | None]] = []
    for label in np.unique(anatomy.lesions[anatomy.lesions > 0]):
        mask = anatomy.lesions == label
        zone = 1 if (anatomy.zones[mask] == 1).mean() >= 0.5 else 2
        plan.append(("cancer_pz" if zone == 1 else "cancer_tz", mask))
    invented = (
        cancers
        if cancers is not None
        else int(rng.choice([0, 1, 2], p=[0.45, 0.4, 0.15] if not plan else [0.7, 0.3, 0]))
    )
    plan += [(str(rng.choice(["cancer_pz", "cancer_tz"], p=[0.6, 0.4])), None) for _ in range(invented)]
    for kind, odds in (
        ("wedge_pz", 0.35),
        ("diffuse_pz", 0.2),
        ("haemorrhage_pz", 0.25),
        ("nodule_tz", 0.5),
        ("band_tz", 0.2),
    ):
        if rng.random() < odds:
            plan.append((kind, None))
    plan += [("nodule_tz", mask) for mask, _ in nodules[:3]]

    regions = np.zeros(anatomy.zones.shape, np.uint8)
    rationales: list[Region] = []
    targets: list[DiffusionTarget] = []
    for kind, given in plan:
        profile = PROFILES[kind]
        answers = draw_answers(profile, rng)
        mask = given
        if mask is None:
            extend = float(rng.uniform(2, 5)) if kind.startswith("cancer") and rng.random() < 0.12 else 0.0
            mask = invent_shape(answers["shape"], anatomy.zones, profile.zone, canvas, extend_mm=extend)
        clear = mask & (regions == 0)
        if clear.sum() < 40 or clear.sum() < 0.7 * mask.sum():
            continue
        mask = clear
        if answers["shape"] in ("round_oval", "lenticular"):  # real masks, and what the zone's border left of others
            answers["shape"] = measured_shape(mask)
        answers.update(measured_answers(mask, anatomy.zones))
        region = region_of(len(rationales) + 1, answers, _tree())
        if region.is_lesion and not kind.startswith("cancer") and rng.random() < 0.5:
            continue  # mimics that score 3 are rarer than lesions
        targets.append(paint_region(canvas, mask, answers, reference[profile.zone]))
        regions[mask] = region.label
        rationales.append(region)
    return regions, rationales, targets
