"""Lesions and their mimics: answers to the decision tree are drawn first, then the region is painted as they say."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt
from skimage.measure import regionprops

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.synthesis.fields import PIXEL_MM, SLICE_MM, Canvas, Volume, uniform
from MedRationaleLib.synthesis.gland import bounding_box

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A place with a known rationale."""

    label: int
    """Value in SyntheticExam.regions."""
    answers: dict[str, str]
    """Node id -> concept id: the true rationale."""
    t2w_score: int
    dwi_score: int
    pirads: int
    is_lesion: bool
    """True from PI-RADS 3 up: only these are in the lesion mask; the others are mimics."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How often each answer occurs in one kind of region, per node."""

    zone: int
    odds: dict[str, dict[str, float]]
    fixed: dict[str, str] = field(default_factory=dict)


def _profile(zone: int, t2w, homogeneity, margin, shape, adc, dwi, pattern="diffusion_focal") -> Profile:
    """Odds in the order of the names below, so that a profile is one readable line."""
    names = {
        "t2w_signal": (
            "t2w_hyperintense",
            "t2w_mild_hypointense",
            "t2w_moderate_hypointense",
            "t2w_marked_hypointense",
        ),
        "homogeneity": ("homogeneous", "heterogeneous"),
        "margin": ("circumscribed", "non_circumscribed", "encapsulated", "mostly_encapsulated", "obscured"),
        "shape": ("round_oval", "lenticular", "linear_wedge", "diffuse"),
        "adc_signal": ("adc_normal", "adc_mild_hypointense", "adc_marked_hypointense"),
        "dwi_signal": ("dwi_normal", "dwi_mild_hyperintense", "dwi_marked_hyperintense"),
    }
    values = (t2w, homogeneity, margin, shape, adc, dwi)
    odds = {n: dict(zip(c, v, strict=False)) for (n, c), v in zip(names.items(), values, strict=True)}
    return Profile(zone=zone, odds=odds, fixed={"diffusion_pattern": pattern})


PROFILES: dict[str, Profile] = {
    # zone, T2W (hyper, mild, moderate, marked), (homogeneous, heterogeneous), margin (circumscribed, not, encapsulated,
    # mostly, obscured), shape (round, lenticular, wedge, diffuse), ADC (normal, mild, marked), DWI (the same)
    "cancer_pz": _profile(1, (0, 4, 5, 2), (7, 3), (6, 4), (7, 3), (0, 5, 5), (0, 5, 5)),
    "cancer_tz": _profile(2, (0, 1, 6, 3), (8, 2), (3, 4, 0, 1, 2), (4, 6), (0, 4, 6), (1, 4, 5)),
    "wedge_pz": _profile(1, (0, 6, 3, 1), (5, 5), (2, 8), (0, 0, 1, 0), (4, 5, 1), (6, 4, 0), "diffusion_linear_wedge"),
    "diffuse_pz": _profile(1, (0, 8, 2, 0), (4, 6), (0, 1), (0, 0, 0, 1), (4, 6, 0), (7, 3, 0), "diffusion_diffuse"),
    "haemorrhage_pz": _profile(1, (0, 2, 5, 3), (5, 5), (4, 6), (6, 2, 1, 1), (1, 0, 0), (1, 0, 0)),
    "nodule_tz": _profile(2, (2, 3, 3, 2), (4, 6), (2, 0, 5, 3, 1), (1, 0, 0), (5, 4, 1), (6, 3, 1)),
    "band_tz": _profile(
        2, (0, 7, 2, 0), (7, 3), (1, 6, 0, 0, 3), (0, 2, 0, 8), (6, 4, 0), (7, 3, 0), "diffusion_diffuse"
    ),
}  # fmt: skip


def draw_answers(profile: Profile, rng: np.random.Generator) -> dict[str, str]:
    """One answer a node, independent but for ADC and DWI, which are made to agree two times in three."""
    answers = {"lesion_presence": "lesion_present", "zone": "zone_pz" if profile.zone == 1 else "zone_tz"}
    for node, odds in profile.odds.items():
        weight = np.array(list(odds.values()), float)
        answers[node] = str(rng.choice(list(odds), p=weight / weight.sum()))
    if rng.random() < 0.66 and answers["adc_signal"] != "adc_normal":
        agreeing = answers["adc_signal"].replace("adc", "dwi").replace("hypo", "hyper")
        if profile.odds["dwi_signal"].get(agreeing, 0) > 0:
            answers["dwi_signal"] = agreeing
    if answers["adc_signal"] != "adc_normal" or answers["dwi_signal"] != "dwi_normal":
        answers.update(profile.fixed)
    return answers


def invent_shape(shape: str, zones: np.ndarray, zone: int, canvas: Canvas, *, extend_mm: float = 0.0) -> np.ndarray:
    """A mask of the given shape concept within the zone (a cancer with extension: beyond the gland by extend_mm)."""
    rng = canvas.rng
    allowed = zones == zone
    places = np.argwhere(allowed)
    if places.shape[0] < 60:
        return np.zeros_like(allowed)
    s, r, c = places[rng.integers(len(places))]
    cx, cy = float(canvas.x[0, 0, c]), float(canvas.y[0, r, 0])
    if extend_mm:
        allowed = allowed | binary_dilation(zones > 0, iterations=max(1, round(extend_mm / PIXEL_MM)))
    gland = np.argwhere(zones > 0)
    gx, gy = float(canvas.x[0, 0, gland[:, 2]].mean()), float(canvas.y[0, gland[:, 1], 0].mean())
    direction = np.arctan2(cy - gy, cx - gx)
    radius = float(np.clip(rng.lognormal(np.log(5.2), 0.42), 3.0, 16))
    along = np.arange(zones.shape[0])
    extent = np.sqrt(np.clip(1 - ((along - s) * SLICE_MM / (radius * uniform(rng, 0.9, 1.5))) ** 2, 0, 1))
    if shape in ("round_oval", "lenticular"):
        aspect = uniform(rng, 1.0, 1.45) if shape == "round_oval" else uniform(rng, 2.1, 3.2)
        # the long axis lies along the capsule (PZ), or across the anterior gland (TZ)
        angle = direction + np.pi / 2 if zone == 1 else uniform(rng, -0.5, 0.5)
        mask, box = canvas.ellipse(cx, cy, radius * aspect**0.5 * extent, radius / aspect**0.5 * extent, angle=angle,
                                   soft_mm=0.6, warp=uniform(rng, 0.0, 0.25))  # fmt: skip
        full = np.zeros_like(allowed)
        if mask.size:
            full[box] = mask > 0.5
        return full & allowed
    dx, dy = canvas.x - gx, canvas.y - gy
    offset = np.abs(np.angle(np.exp(1j * (np.arctan2(dy, dx) - direction)))).astype(np.float32)
    if shape == "linear_wedge":
        span = uniform(rng, 0.08, 0.28)
        near = np.abs(along - s)[:, None, None] * SLICE_MM <= uniform(rng, 4, 9)
        return (offset < span) & near & allowed
    near = np.abs(along - s)[:, None, None] * SLICE_MM <= uniform(rng, 8, 20)
    blotches = canvas.textures.sample(20.0) > -0.4
    return (offset < uniform(rng, 0.7, 1.8)) & near & blotches & allowed


def measured_answers(mask: np.ndarray, zones: np.ndarray) -> dict[str, str]:
    """Size from the greatest axial diameter; extension from the part of the mask beyond the gland (over 8 % of it)."""
    diameter = max(
        (p.feret_diameter_max * PIXEL_MM for plane in mask if plane.any() for p in regionprops(plane.astype(np.uint8))),
        default=0.0,
    )
    outside = (mask & (zones == 0)).sum() / max(1, mask.sum())
    return {
        "size": "size_15mm_or_more" if diameter >= 15 else "size_below_15mm",
        "epe": "epe_present" if outside > 0.08 else "epe_absent",
    }


def measured_shape(mask: np.ndarray) -> str:
    """Of a real lesion mask: lenticular from an axis ratio of 1.8 up in its largest slice, else round or oval."""
    plane = mask[mask.sum((1, 2)).argmax()].astype(np.uint8)
    props = regionprops(plane)[0]
    minor = max(props.axis_minor_length, 1e-3)
    return "lenticular" if props.axis_major_length / minor >= 1.8 else "round_oval"


# Measured over a lesion, signals are milder than the words sound: partial volume and noise are in them. PI-RADS v2.1
# names 0.75 to 0.9e-3 mm^2/s as ADC thresholds of significant cancer; at b = 800 to 1000 s/mm^2 a lesion that readers
# score 4 can be no brighter than 1.7 times its zone.
_T2W_FACTOR = {  # of the zone's reference: (PZ, TZ)
    "t2w_hyperintense": ((1.0, 1.25), (1.2, 1.8)),
    "t2w_mild_hypointense": ((0.72, 0.86), (0.78, 0.90)),
    "t2w_moderate_hypointense": ((0.46, 0.66), (0.54, 0.70)),
    "t2w_marked_hypointense": ((0.20, 0.36), (0.30, 0.44)),
}
_ADC = {  # 1e-3 mm^2/s: (PZ, TZ)
    "adc_normal": ((1.35, 1.75), (1.25, 1.6)),
    "adc_mild_hypointense": ((1.0, 1.25), (0.92, 1.1)),
    "adc_marked_hypointense": ((0.45, 0.92), (0.45, 0.82)),
}
_DWI = {"dwi_normal": (0.8, 1.1), "dwi_mild_hyperintense": (1.3, 1.6), "dwi_marked_hyperintense": (1.7, 3.8)}
_EDGE_MM = {
    "circumscribed": 0.7,
    "non_circumscribed": 3.2,
    "encapsulated": 0.6,
    "mostly_encapsulated": 0.8,
    "obscured": 3.6,
}


def paint_region(
    canvas: Canvas, mask: np.ndarray, answers: dict[str, str], reference_t2w: float
) -> tuple[Box, Volume, float]:
    """Render one region on T2W, S0 and ADC. Returns its box, soft mask and DWI ratio to the gland's median."""
    rng = canvas.rng
    zone = 0 if answers["zone"] == "zone_pz" else 1
    box = bounding_box(mask, margin=10)
    spacing = (SLICE_MM, PIXEL_MM, PIXEL_MM)
    depth = distance_transform_edt(mask[box], sampling=spacing) - distance_transform_edt(~mask[box], sampling=spacing)
    margin = answers["margin"]
    width = _EDGE_MM[margin] * uniform(rng, 0.8, 1.2)
    if margin in ("non_circumscribed", "obscured"):
        depth = depth + uniform(rng, 0.6, 1.4) * canvas.textures.sample(4.0, box)
    blend = (1 / (1 + np.exp(np.clip(-4 * depth / width, -30, 30)))).astype(np.float32)
    t2w = max(reference_t2w * uniform(rng, *_T2W_FACTOR[answers["t2w_signal"]][zone]), 0.07)
    adc = uniform(rng, *_ADC[answers["adc_signal"]][zone])
    heterogeneous = answers["homogeneity"] == "heterogeneous"
    amount = uniform(rng, 0.22, 0.38) if heterogeneous else uniform(rng, 0.01, 0.06)
    # A texture of zero mean within the region, so that heterogeneity does not change the signal level.
    grain = canvas.textures.sample(2.0 if rng.random() < 0.5 else 4.0)[box]
    grain = grain - (grain * blend).sum() / (blend.sum() + 1e-6)
    spread = amount * (abs(reference_t2w - t2w) * 0.5 + t2w)
    canvas.t2w[box] += blend * (t2w + spread * grain - canvas.t2w[box])
    canvas.adc[box] += blend * (adc * (1 + 0.3 * amount * grain) - canvas.adc[box])
    canvas.s0[box] += blend * (0.75 - canvas.s0[box])
    if margin in ("encapsulated", "mostly_encapsulated"):
        rim = np.exp(-(((depth - 0.2) / 0.9) ** 2)).astype(np.float32)
        if margin == "mostly_encapsulated":
            rows, columns = np.nonzero(mask[box].any(0))
            y = np.arange(rim.shape[1])[:, None] - rows.mean()
            x = np.arange(rim.shape[2])[None, :] - columns.mean()
            gap = np.abs(np.angle(np.exp(1j * (np.arctan2(y, x) - uniform(rng, -np.pi, np.pi)))))
            rim = rim * (gap > uniform(rng, 0.7, 1.1))
        canvas.t2w[box] += uniform(rng, 0.75, 1.0) * rim * (0.09 - canvas.t2w[box])
    return box, blend, uniform(rng, *_DWI[answers["dwi_signal"]])


def region_of(label: int, answers: dict[str, str], tree: DecisionTree) -> Region:
    """Walk the tree that inference walks, with the drawn answers; DCE is never at hand."""
    walk = tree.walk_answers(answers)
    return Region(
        label=label,
        answers=walk.answers,
        t2w_score=walk.t2w_score or 1,
        dwi_score=walk.dwi_score or 1,
        pirads=walk.pirads,
        is_lesion=walk.pirads >= 3,
    )
