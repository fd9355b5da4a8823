"""From a model's probabilities to masks: clean gland and zones, and lesion candidates with their likelihood.

Everything is computed in the T2W's canonical orientation and returned on the grid as it came, so that storage order
changes nothing. Lengths in mm, volumes in ml; arrays are (z, y, x), superior, posterior, left upwards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

from MedRationaleLib.assessment import UnshownCandidate
from MedRationaleLib.preprocessing import Grid
from MedRationaleLib.sectors import Array, Zone

Mask = npt.NDArray[np.bool_]
logger = logging.getLogger(__name__)

TOUCHING = np.ones((3, 3, 3), bool)
"""Voxels belong together by face, edge or corner, as in picai_eval."""
DIFFUSION = ("adc", "dwi")
"""Sequences that a candidate's likelihood looks at beside its mask, where they were imaged."""
OF_MASK = ("peak", "volume", "tz")
"""Features of a candidate that need no other sequence, see Candidate.features."""
UNFITTED = {"intercept": 0.0, "peak": 1.0}
"""Weights of the likelihood where none were fitted: it is then the highest mask probability."""
Sequences = Mapping[str, tuple[Array, Mask]]
"""Sequence -> its (z, y, x) values, and where they are data."""


@dataclass(frozen=True, kw_only=True)
class PostprocessingConfig:
    """From probabilities to masks. Thresholds belong to a model: its folder may carry other values."""

    gland_threshold: float = 0.5
    """Probability from which a voxel is gland."""
    gland_opening_mm: float = 1.5
    """Erosion, then dilation of the gland by this (paper, Appendix D); severs bridges to its neighbours. 0: none."""
    zone_island_ml: float = 0.1
    """Pieces of a zone smaller than this become the other zone."""
    lesion_likelihood: float = 0.5
    """A candidate is shown from this likelihood up; see Candidate.likelihood."""
    likelihood: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the candidate was seen on, "mask+adc+dwi" where on all, -> weights of Candidate.likelihood."""
    lesion_floor: float = 0.25
    """No voxel of a candidate is below this."""
    lesion_fraction_of_peak: float = 0.5
    """A candidate ends where the probability falls below this fraction of its peak (cf. picai_eval's "dynamic")."""
    lesion_opening_mm: float = 0.0
    """Erosion, then dilation of the lesions by this (paper, Appendix D). 0: none; most lesions are few voxels wide."""
    lesion_minimum_ml: float = 0.05
    """Smaller candidates are dropped; 5 % of the PI-CAI expert lesions are under 0.16 ml."""
    lesion_in_gland: float = 0.5
    """Candidates with less than this fraction of their volume in the gland are dropped (paper, Appendix D)."""
    lesion_reach_mm: float = 8.0
    """Candidates are cut off at this distance from the gland, so that none runs on into its neighbours."""
    lesion_maximum: int = 4
    """At most so many, the likeliest first (PI-RADS v2.1: up to four findings)."""
    presence_margin: float = 0.0
    """A slice has a lesion by retrieval where its presence is nearer than its absence by more than this; see
    evidence.asked_of_slices."""
    epe_extent_mm: float = 5.0
    """Extension is called where a lesion reaches at least this far beyond the gland's contour; see Extension."""
    epe_volume_ml: float = 0.2
    """... and has at least this volume outside the gland."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Clean masks on the grid of the probabilities, as that was stored; all uint8."""

    gland: sitk.Image
    """{0, 1}, one piece without holes."""
    pz: sitk.Image
    """{0, 1}; pz and tz share no voxel and together are the gland."""
    tz: sitk.Image
    """{0, 1}."""
    lesions: sitk.Image
    """0 or the candidate's label, 1 the likeliest."""
    likelihood: tuple[float, ...]
    """Of the candidates with the labels 1, 2, ..."""
    not_shown: tuple[UnshownCandidate, ...] = ()
    """The likeliest of the others, at most PostprocessingConfig.lesion_maximum."""

    def on(self, reference: sitk.Image) -> Masks:
        """The same masks on the grid of `reference`, by nearest neighbour; 0 beyond their own grid."""

        def moved(image: sitk.Image) -> sitk.Image:
            return sitk.Resample(image, reference, interpolator=sitk.sitkNearestNeighbor)

        return replace(self, gland=moved(self.gland), pz=moved(self.pz), tz=moved(self.tz), lesions=moved(self.lesions))


def clean_masks(
    probabilities: Mapping[str, sitk.Image],
    config: PostprocessingConfig | None = None,
    sequences: Mapping[str, tuple[sitk.Image, sitk.Image]] | None = None,
) -> Masks:
    """Probabilities -> masks (paper, Appendix D), all on one grid.

    Args:
        probabilities: "gland", "pz", "tz", "lesion" in [0, 1].
        config: thresholds and weights of the model.
        sequences: "adc" and "dwi" -> image, and where it has data; candidates are judged without what is not there.
    """
    config = config or PostprocessingConfig()
    reference = probabilities["gland"]
    grid = Grid.of(reference)
    arrays = {name: canonical_array(image) for name, image in probabilities.items()}
    seen = {
        name: (canonical_array(image), canonical_array(valid) > 0) for name, (image, valid) in (sequences or {}).items()
    }
    spacing = grid.spacing[::-1]
    gland = clean_gland(arrays["gland"], spacing, config)
    pz, tz = split_zones(arrays["pz"], arrays["tz"], gland, spacing, config)
    candidates = lesion_candidates(arrays["lesion"], pz, tz, seen, spacing, config)
    lesions, likelihood = label_lesions(candidates, gland.shape, config)
    images = (grid.to_reference(a, reference, nearest=True) for a in (gland, pz, tz, lesions))
    return Masks(
        likelihood=likelihood,
        not_shown=_not_shown(candidates, grid, config),
        **dict(zip(("gland", "pz", "tz", "lesions"), images, strict=True)),
    )


def _not_shown(
    candidates: Sequence[Candidate], grid: Grid, config: PostprocessingConfig
) -> tuple[UnshownCandidate, ...]:
    """Those below the threshold, the likeliest first."""
    found = []
    for candidate in candidates:
        likelihood = candidate.likelihood(config)
        if likelihood < config.lesion_likelihood:
            x, y, z = grid.index_to_point(np.argwhere(candidate.mask).mean(axis=0)[::-1]).tolist()
            found.append(
                UnshownCandidate(
                    zone="TZ" if candidate.features["tz"] else "PZ",
                    volume_ml=round(float(candidate.mask.sum() * np.prod(grid.spacing)) / 1000, 3),
                    center_mm=(round(x, 2), round(y, 2), round(z, 2)),
                    likelihood=round(likelihood, 4),
                )
            )
    return tuple(sorted(found, key=lambda c: c.likelihood, reverse=True)[: config.lesion_maximum])


def clean_gland(probability: Array, spacing: tuple[float, ...], config: PostprocessingConfig) -> Mask:
    """(z, y, x) probability -> the largest piece after opening, one piece a slice, without holes."""
    whole = probability >= config.gland_threshold
    if not whole.any():
        return whole
    box = bounding_box(whole, spacing, 2 * config.gland_opening_mm)
    opened = opening(whole[box], spacing, config.gland_opening_mm)
    mask = ndimage.binary_fill_holes(_largest(opened if opened.any() else whole[box]))
    cleaned = np.zeros_like(whole)
    cleaned[box] = _largest(np.stack([ndimage.binary_fill_holes(_largest(plane)) for plane in mask]))
    return cleaned


def split_zones(
    pz: Array, tz: Array, gland: Mask, spacing: tuple[float, ...], config: PostprocessingConfig
) -> tuple[Mask, Mask]:
    """(z, y, x) probabilities -> PZ and TZ masks: every gland voxel has the likelier zone, small islands swallowed."""
    if not gland.any():
        return gland, gland
    box = bounding_box(gland, spacing, 0.0)
    inside, whole = gland[box], np.zeros_like(gland)
    minimum = config.zone_island_ml * 1000 / float(np.prod(spacing))
    is_tz = inside & (tz[box] > pz[box])
    for zone in (is_tz, inside & ~is_tz):
        labels, _ = ndimage.label(zone)
        sizes = np.bincount(labels.ravel())
        small = (sizes < minimum) & (sizes < sizes[1:].max(initial=0))
        islands = small[labels] & zone
        is_tz = is_tz ^ islands
    whole[box] = is_tz
    return gland & ~whole, whole


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A piece of the lesion probability that may be a lesion."""

    mask: Mask
    """(z, y, x)."""
    features: Mapping[str, float]
    """"peak": logit of its highest probability; "volume": log of its ml; "tz": 1 in the transition zone, 0 in the
    peripheral. "adc", "dwi", where imaged: log of its mean over the median of its zone outside every candidate."""

    @property
    def seen_on(self) -> str:
        """ "mask+adc+dwi", or less where a sequence has no data there."""
        return "+".join(("mask", *(name for name in DIFFUSION if name in self.features)))

    def likelihood(self, config: PostprocessingConfig) -> float:
        """1 / (1 + exp(-(intercept + sum of weight x feature))), by the config's weights for what it was seen on.

        A logistic regression fitted on candidates of synthetic examinations: what a true lesion is there.
        """
        weights = config.likelihood.get(self.seen_on, UNFITTED)
        logit = weights["intercept"] + sum(weights.get(name, 0.0) * value for name, value in self.features.items())
        return float(1 / (1 + np.exp(-logit)))


def lesion_candidates(
    probability: Array,
    pz: Mask,
    tz: Mask,
    sequences: Sequences,
    spacing: tuple[float, ...],
    config: PostprocessingConfig,
) -> list[Candidate]:
    """Every candidate that is large enough and lies in the gland, however unlikely; all arrays (z, y, x)."""
    gland, shape = pz | tz, probability.shape
    if not gland.any():
        return []
    box = bounding_box(gland, spacing, config.lesion_reach_mm)
    probability, gland, pz, tz = probability[box], gland[box], pz[box], tz[box]
    sequences = {name: (values[box], valid[box]) for name, (values, valid) in sequences.items()}
    near = ndimage.distance_transform_edt(~gland, sampling=spacing) <= config.lesion_reach_mm
    voxel_ml = float(np.prod(spacing)) / 1000
    kept = []
    for piece in _pieces(near & (probability >= config.lesion_floor)):
        floor = config.lesion_fraction_of_peak * probability[piece].max()
        for lesion in _pieces(opening(piece & (probability >= floor), spacing, config.lesion_opening_mm)):
            inside = (lesion & gland).sum() / lesion.sum()
            if lesion.sum() * voxel_ml >= config.lesion_minimum_ml and inside >= config.lesion_in_gland:
                kept.append(lesion)
    beside = ~np.logical_or.reduce(kept) if kept else gland
    candidates = []
    for lesion in kept:
        peak = np.clip(float(probability[lesion].max()), 1e-6, 1 - 1e-6)
        in_tz = zone_of(lesion, pz, tz, spacing)[0] == "TZ"
        features = {
            "peak": float(np.log(peak / (1 - peak))),
            "volume": float(np.log(lesion.sum() * voxel_ml)),
            "tz": float(in_tz),
        }
        zone = tz if in_tz else pz
        for name, (inside, rest) in zone_signal(lesion, zone & beside, sequences).items():
            if rest > 0:
                features[name] = float(np.log(np.clip(inside / rest, 0.05, 20)))
        mask = np.zeros(shape, bool)
        mask[box] = lesion
        candidates.append(Candidate(mask=mask, features=features))
    return candidates


def zone_signal(lesion: Mask, rest: Mask, sequences: Sequences) -> dict[str, tuple[float, float]]:
    """Sequence -> its mean over a lesion, its median over the rest of the lesion's zone; where it has data in both."""
    found = {}
    for name, (values, valid) in sequences.items():
        inside, beside = values[lesion & valid], values[rest & valid]
        if inside.size and beside.size:
            found[name] = float(inside.mean()), float(np.median(beside))
    return found


def label_lesions(
    candidates: Sequence[Candidate], shape: tuple[int, ...], config: PostprocessingConfig
) -> tuple[npt.NDArray[np.uint8], tuple[float, ...]]:
    """Labels of those that are shown, uint8 of `shape`, 1 the likeliest (then the largest), and their likelihoods."""
    shown = [(c.likelihood(config), int(c.mask.sum()), c.mask) for c in candidates]
    shown = sorted((s for s in shown if s[0] >= config.lesion_likelihood), key=lambda s: s[:2], reverse=True)
    if len(shown) > config.lesion_maximum:
        logger.info("%d lesion candidates; the %d likeliest are kept", len(shown), config.lesion_maximum)
    shown = shown[: config.lesion_maximum]
    result = np.zeros(shape, np.uint8)
    for label, (_, _, mask) in enumerate(shown, start=1):
        result[mask] = label
    return result, tuple(likelihood for likelihood, _, _ in shown)


def opening(mask: Mask, spacing: tuple[float, ...], radius_mm: float) -> Mask:
    """Erosion, then dilation by a ball of `radius_mm` in space; an axis with wider spacing than that is left alone."""
    if radius_mm <= 0 or not mask.any():
        return mask
    box = bounding_box(mask, spacing, 2 * radius_mm)
    core = ndimage.distance_transform_edt(mask[box], sampling=spacing) > radius_mm
    result = np.zeros_like(mask)
    if core.any():
        result[box] = mask[box] & (ndimage.distance_transform_edt(~core, sampling=spacing) <= radius_mm + 1e-6)
    return result


def zone_of(mask: Mask, pz: Mask, tz: Mask, spacing: tuple[float, ...]) -> tuple[Zone, float]:
    in_pz, in_tz = int((mask & pz).sum()), int((mask & tz).sum())
    if in_pz + in_tz:
        return ("PZ" if in_pz >= in_tz else "TZ"), max(in_pz, in_tz) / (in_pz + in_tz)
    to_pz, to_tz = (
        ndimage.distance_transform_edt(~zone, sampling=spacing)[mask].min() if zone.any() else np.inf
        for zone in (pz, tz)
    )
    return ("PZ" if to_pz <= to_tz else "TZ"), 0.0


def _largest(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask)
    return labels == np.bincount(labels.ravel())[1:].argmax() + 1 if count else mask


def _pieces(mask: Mask) -> list[Mask]:
    labels, count = ndimage.label(mask, TOUCHING)
    return [labels == label for label in range(1, count + 1)]


def bounding_box(mask: Mask, spacing: tuple[float, ...], margin_mm: float) -> tuple[slice, ...]:
    """Bounding box of a mask that is not empty, widened by the margin and a voxel."""
    margins = [int(margin_mm / s) + 1 for s in spacing]
    bounds = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(b.start - m, 0), b.stop + m) for b, m in zip(bounds, margins, strict=True))


def canonical_array(image: sitk.Image) -> npt.NDArray[Any]:
    """(z, y, x) in canonical orientation."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
