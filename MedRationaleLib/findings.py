"""Masks and what is measured on them: clean gland and zones, lesion candidates, their size, place and extension.

Everything is computed in the T2W's canonical orientation and returned on the grid as it came, so that storage order
changes nothing. Lengths in mm, volumes in ml, points in LPS; arrays are (z, y, x), superior, posterior, left upwards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from MedRationaleLib.preprocessing import Grid
from MedRationaleLib.sectors import Array, GlandFrame, Sector, Zone, by_slice, frame_axes, mask_points

Mask = npt.NDArray[np.bool_]
logger = logging.getLogger(__name__)

TOUCHING = np.ones((3, 3, 3), bool)
"""Voxels belong together by face, edge or corner, as in picai_eval."""
ELLIPSOID = 0.52
"""PI-RADS v2.1: volume = 0.52 L W H."""
MIDSAGITTAL_MM = 2.5
"""Half the thickness of the slab in which length and height are measured."""
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

    def on(self, reference: sitk.Image) -> Masks:
        """The same masks on the grid of `reference`, by nearest neighbour; 0 beyond their own grid."""
        images = {n: i for n, i in vars(self).items() if n != "likelihood"}
        moved = {n: sitk.Resample(i, reference, interpolator=sitk.sitkNearestNeighbor) for n, i in images.items()}
        return Masks(likelihood=self.likelihood, **moved)


@dataclass(frozen=True, kw_only=True)
class GlandMeasurement:
    """PI-RADS v2.1 dimensions: width on the widest axial slice, length and height in the mid-sagittal plane."""

    length_mm: float
    """Superior-inferior, across the slices, the end slices in full."""
    width_mm: float
    """Left-right."""
    height_mm: float
    """Anterior-posterior."""
    ellipsoid_ml: float
    """0.52 L W H."""
    volume_ml: float
    """Segmented: voxels times their volume."""
    center_mm: tuple[float, float, float]
    """Centroid, LPS."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """How far a lesion reaches beyond the gland's contour: a measurement on two contours, not proof of EPE.

    The thresholds are high on purpose. In 175 expert lesions of PI-CAI (training patients) against its gland masks,
    the lesion's contour lies a median of 2 to 3 mm outside in every ISUP grade from 2 to 5: that is disagreement of
    contours and the thickness of a slice. 35 % of the lesions pass 3 mm and 0.1 ml, 12 % pass 5 mm and 0.2 ml.
    """

    extent_mm: float
    """Greatest distance of the lesion's voxels outside the gland to the gland; 0 where there are none."""
    volume_ml: float
    """Of the lesion outside the gland."""
    present: bool
    """Both at or above the configured thresholds."""


@dataclass(frozen=True, kw_only=True)
class LesionMeasurement:
    """One candidate. Axial means in the plane of the T2W slices."""

    label: int
    zone: Zone
    """The zone with the larger overlap."""
    zone_fraction: float
    """Fraction of the lesion's zoned voxels in that zone, 0.5-1; 0 where it overlaps neither (then the nearest)."""
    in_gland_fraction: float
    axial_mm: float
    """Greatest diameter within any one slice (Feret)."""
    greatest_mm: float
    """Greatest diameter in any plane (Feret in 3-D; slices count in full straight across them)."""
    size_mm: float
    """PI-RADS: axial_mm, or greatest_mm where that is larger by more than a slice (less cannot be told)."""
    size_plane: Literal["axial", "other"]
    """Where size_mm was measured."""
    volume_ml: float
    center_mm: tuple[float, float, float]
    """Centroid, or the lesion's point next to it where the lesion is bent around it, LPS."""
    likelihood: float
    """Highest probability in the lesion, [0, 1]."""
    sector: Sector
    """The sector with the largest share of the lesion."""
    sectors: tuple[tuple[Sector, float], ...]
    """All sectors touched and their shares, largest first."""
    extension: Extension


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
    arrays = {name: _array(image) for name, image in probabilities.items()}
    seen = {name: (_array(image), _array(valid) > 0) for name, (image, valid) in (sequences or {}).items()}
    spacing = grid.spacing[::-1]
    gland = clean_gland(arrays["gland"], spacing, config)
    pz, tz = split_zones(arrays["pz"], arrays["tz"], gland, spacing, config)
    candidates = lesion_candidates(arrays["lesion"], pz, tz, seen, spacing, config)
    lesions, likelihood = label_lesions(candidates, gland.shape, config)
    images = (grid.to_reference(a, reference, nearest=True) for a in (gland, pz, tz, lesions))
    return Masks(likelihood=likelihood, **dict(zip(("gland", "pz", "tz", "lesions"), images, strict=True)))


def clean_gland(probability: Array, spacing: tuple[float, ...], config: PostprocessingConfig) -> Mask:
    """(z, y, x) probability -> the largest piece after opening, one piece a slice, without holes."""
    mask = probability >= config.gland_threshold
    opened = opening(mask, spacing, config.gland_opening_mm)
    mask = ndimage.binary_fill_holes(_largest(opened if opened.any() else mask))
    return _largest(np.stack([ndimage.binary_fill_holes(_largest(plane)) for plane in mask]))


def split_zones(
    pz: Array, tz: Array, gland: Mask, spacing: tuple[float, ...], config: PostprocessingConfig
) -> tuple[Mask, Mask]:
    """(z, y, x) probabilities -> PZ and TZ masks: every gland voxel has the likelier zone, small islands swallowed."""
    minimum = config.zone_island_ml * 1000 / float(np.prod(spacing))
    is_tz = gland & (tz > pz)
    for zone in (is_tz, gland & ~is_tz):
        labels, _ = ndimage.label(zone)
        sizes = np.bincount(labels.ravel())
        small = (sizes < minimum) & (sizes < sizes[1:].max(initial=0))
        islands = small[labels] & zone
        is_tz = is_tz ^ islands
    return gland & ~is_tz, is_tz


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
    box = _box(gland, spacing, config.lesion_reach_mm)
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
        in_tz = _zone(lesion, pz, tz, spacing)[0] == "TZ"
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
    box = _box(mask, spacing, 2 * radius_mm)
    core = ndimage.distance_transform_edt(mask[box], sampling=spacing) > radius_mm
    result = np.zeros_like(mask)
    if core.any():
        result[box] = mask[box] & (ndimage.distance_transform_edt(~core, sampling=spacing) <= radius_mm + 1e-6)
    return result


def measure_gland(gland: sitk.Image) -> GlandMeasurement | None:
    """Non-zero is gland; None where there is none."""
    grid = Grid.of(gland)
    points = mask_points(gland)
    if not len(points):
        return None
    axes = frame_axes(grid)
    frame = points @ axes.T
    voxel = np.abs(axes @ np.array(grid.direction).reshape(3, 3)) @ np.array(grid.spacing)  # a voxel's own extent
    slab = frame[np.abs(frame[:, 0] - (frame[:, 0].min() + frame[:, 0].max()) / 2) <= MIDSAGITTAL_MM]
    slab = slab if len(slab) else frame
    length = float(np.ptp(slab[:, 2]) + voxel[2])
    width = float(max(np.ptp(s[:, 0]) for s in by_slice(frame)) + voxel[0])
    height = float(max(np.ptp(s[:, 1]) for s in by_slice(slab)) + voxel[1])
    return GlandMeasurement(
        length_mm=length,
        width_mm=width,
        height_mm=height,
        ellipsoid_ml=ELLIPSOID * length * width * height / 1000,
        volume_ml=len(points) * float(np.prod(grid.spacing)) / 1000,
        center_mm=_point(points.mean(axis=0)),
    )


def measure_lesions(
    lesions: sitk.Image,
    likelihood: Sequence[float],
    gland: sitk.Image,
    pz: sitk.Image,
    tz: sitk.Image,
    config: PostprocessingConfig | None = None,
) -> tuple[LesionMeasurement, ...]:
    """Each label of `lesions`, measured; all images on one grid, the gland not empty.

    `likelihood` is that of the labels 1, 2, ...; a reader's masks have 1.
    """
    config = config or PostprocessingConfig()
    grid = Grid.of(lesions)
    labels = _array(lesions).astype(int)
    if not labels.any():
        return ()
    frame = GlandFrame.of(gland, tz)
    inside, in_pz, in_tz = (_array(i) for i in (gland, pz, tz))
    box = _box((labels > 0) | (inside > 0), grid.spacing[::-1], 2 * max(grid.spacing))
    corner = np.array([s.start for s in box])
    labels = labels[box]
    inside, in_pz, in_tz = inside[box] > 0, in_pz[box] > 0, in_tz[box] > 0
    beyond = ndimage.distance_transform_edt(~inside, sampling=grid.spacing[::-1])
    voxel_ml = float(np.prod(grid.spacing)) / 1000

    def measure(label: int) -> LesionMeasurement:
        mask = labels == label
        indices = (np.argwhere(mask) + corner)[:, ::-1]
        points = grid.index_to_point(indices)
        zone, fraction = _zone(mask, in_pz, in_tz, grid.spacing[::-1])
        axial, greatest = _diameters(indices * np.array(grid.spacing), grid.spacing)
        through_plane = greatest > axial + grid.spacing[2] + 1e-6
        outside = float(beyond[mask].max()), float((mask & ~inside).sum() * voxel_ml)
        centroid = points.mean(axis=0)
        center = points[np.square(points - centroid).sum(axis=1).argmin()]
        nearest_is_self = np.square(grid.point_to_index(center) - grid.point_to_index(centroid)).max() <= 0.25 + 1e-6
        shares = frame.shares(points, zone)
        return LesionMeasurement(
            label=label,
            zone=zone,
            zone_fraction=fraction,
            in_gland_fraction=float((mask & inside).sum() / mask.sum()),
            axial_mm=axial,
            greatest_mm=greatest,
            size_mm=greatest if through_plane else axial,
            size_plane="other" if through_plane else "axial",
            volume_ml=len(points) * voxel_ml,
            center_mm=_point(centroid if nearest_is_self else center),
            likelihood=likelihood[label - 1],
            sector=shares[0][0],
            sectors=shares,
            extension=Extension(
                extent_mm=outside[0],
                volume_ml=outside[1],
                present=outside[0] >= config.epe_extent_mm and outside[1] >= config.epe_volume_ml,
            ),
        )

    return tuple(measure(int(label)) for label in np.unique(labels[labels > 0]))


def _zone(mask: Mask, pz: Mask, tz: Mask, spacing: tuple[float, ...]) -> tuple[Zone, float]:
    in_pz, in_tz = int((mask & pz).sum()), int((mask & tz).sum())
    if in_pz + in_tz:
        return ("PZ" if in_pz >= in_tz else "TZ"), max(in_pz, in_tz) / (in_pz + in_tz)
    to_pz, to_tz = (
        ndimage.distance_transform_edt(~zone, sampling=spacing)[mask].min() if zone.any() else np.inf
        for zone in (pz, tz)
    )
    return ("PZ" if to_pz <= to_tz else "TZ"), 0.0


def _diameters(mm: Array, spacing: tuple[float, float, float]) -> tuple[float, float]:
    """(N, 3) voxel centres along the grid's axes, mm -> greatest diameter within a slice and in space.

    In the slice a voxel counts to the middles of its edges, so a disc drawn on the grid measures its own diameter.
    Oblique to the slices a diameter runs from slice centre to slice centre (with the slices' thickness a ball of 12 mm
    would measure 14 mm); straight across them it is their number times their thickness.
    """
    x, y, _ = np.diag(spacing) / 2
    points = [(s[:, None] + np.stack([x, -x, y, -y])).reshape(-1, 3) for s in by_slice(mm)]
    axial = max(_feret(p[:, :2]) for p in points)
    across = np.ptp(mm[:, 2]) + spacing[2]
    oblique = _feret(np.concatenate(points)) if len(points) > 1 else axial
    return axial, float(max(axial, oblique, across))


def _feret(points: Array) -> float:
    """Greatest distance between two of the points: between two corners of their convex hull."""
    try:
        points = points[ConvexHull(points).vertices]
    except QhullError:
        logger.debug("flat region of %d points: greatest diameter without convex hull", len(points))
    return float(pdist(points).max())


def _largest(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask)
    return labels == np.bincount(labels.ravel())[1:].argmax() + 1 if count else mask


def _pieces(mask: Mask) -> list[Mask]:
    labels, count = ndimage.label(mask, TOUCHING)
    return [labels == label for label in range(1, count + 1)]


def _box(mask: Mask, spacing: tuple[float, ...], margin_mm: float) -> tuple[slice, ...]:
    """Bounding box of a mask that is not empty, widened by the margin and a voxel."""
    margins = [int(margin_mm / s) + 1 for s in spacing]
    bounds = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(b.start - m, 0), b.stop + m) for b, m in zip(bounds, margins, strict=True))


def _array(image: sitk.Image) -> npt.NDArray[Any]:
    """(z, y, x) in canonical orientation."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))


def _point(values: Array) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z
