"""Where in the prostate: the gland's own frame and the sectors of the PI-RADS v2.1 map (DICOM CID 6304).

The map's borders are drawings, not measures. What stands for them here:

- levels: thirds of the gland's extent across the T2W slices, apex lowest, base highest;
- right and left: the sides of the gland's own midline, a line fitted through the slices' left-right middles;
- anterior and posterior: the sides of the anterior-posterior middle of the gland (PZ) or of the TZ (TZ);
- posteromedial: the posterior PZ within half of the gland's half-width of the midline; posterolateral: beyond it.

Central zone, anterior fibromuscular stroma, seminal vesicles and urethral sphincter are not segmented, so never named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from MedRationaleLib.preprocessing import Grid

Array = npt.NDArray[np.float64]
Zone = Literal["PZ", "TZ"]
Level = Literal["apex", "mid", "base"]
Part = Literal["anterior", "posterior", "posteromedial", "posterolateral"]

LEVELS: tuple[Level, ...] = ("apex", "mid", "base")
ZONE_WORDS = {"PZ": "peripheral zone", "TZ": "transition zone"}
LEVEL_WORDS = {"apex": "apex", "mid": "mid gland", "base": "base"}
LEVEL_ADJECTIVES = {"apex": "apical", "mid": "middle", "base": "basal"}
MEDIAL_FRACTION = 0.5
TIE_MM = 1e-6
"""Voxels right on a border fall to one side, whatever the rounding noise of the stored geometry."""
MOST_POINTS = 1000
"""Points of a lesion that vote for its sector; more would change a share by less than a hundredth or so."""


@dataclass(frozen=True, kw_only=True)
class Sector:
    """One of the PI-RADS v2.1 map's PZ and TZ sectors."""

    side: Literal["right", "left"]
    """The patient's."""
    zone: Zone
    part: Part
    level: Level

    @property
    def text(self) -> str:
        """In words: "right peripheral zone posterolateral mid gland"."""
        return f"{self.side} {ZONE_WORDS[self.zone]} {self.part} {LEVEL_WORDS[self.level]}"

    @property
    def meaning(self) -> str:
        """The CID 6304 meaning: "Right posterolateral middle peripheral zone of prostate"."""
        level = LEVEL_ADJECTIVES[self.level]
        return f"{self.side.capitalize()} {self.part} {level} {ZONE_WORDS[self.zone]} of prostate"

    @property
    def code(self) -> tuple[str, str, str]:
        """(value, scheme, meaning) of CID 6304, as pydicom carries it."""
        from pydicom.sr.codedict import codes

        keyword = "".join(word.capitalize() for word in self.meaning.split())
        code = getattr(codes.cid6304, keyword)
        return code.value, code.scheme_designator, code.meaning


@dataclass(frozen=True, kw_only=True)
class GlandFrame:
    """The gland's own axes: left and posterior within the slice plane, superior across the slices.

    Left is the patient's left projected into the slice plane, so that an in-plane rotation of the stored grid changes
    nothing.
    """

    axes: Array
    """(3, 3), rows left, posterior, superior, unit vectors in LPS."""
    bottom: float
    """Lower end of the gland along superior, mm."""
    top: float
    """Upper end of the gland along superior, mm."""
    midline: Array
    """(2,) line superior -> left, mm: the midline's position."""
    middle: dict[str, Array]
    """Zone -> (2,) line superior -> posterior, mm: where anterior ends."""
    half_widths: Array
    """(3,) half of the gland's typical width at apex, mid and base, mm."""

    @classmethod
    def of(cls, gland: sitk.Image, tz: sitk.Image) -> GlandFrame:
        """From masks (non-zero is inside) on one grid; the gland must not be empty."""
        grid = Grid.of(gland)
        axes = frame_axes(grid)
        frame_points = mask_points(gland) @ axes.T
        slices = by_slice(frame_points)
        half_slice = grid.spacing[2] / 2
        bottom, top = slices[0][0, 2] - half_slice, slices[-1][0, 2] + half_slice
        heights = np.array([s[0, 2] for s in slices])
        levels = _level(heights, bottom, top)
        widths = np.array([np.ptp(s[:, 0]) for s in slices])
        typical = [np.median(widths[levels == i]) if (levels == i).any() else np.median(widths) for i in range(3)]
        tz_points = mask_points(tz) @ axes.T
        tz_slices = by_slice(tz_points) if len(tz_points) else slices
        return cls(
            axes=axes,
            bottom=float(bottom),
            top=float(top),
            midline=_fit(slices, lambda s: (s[:, 0].min() + s[:, 0].max()) / 2),
            middle={
                zone: _fit(chosen, lambda s: (s[:, 1].min() + s[:, 1].max()) / 2)
                for zone, chosen in (("PZ", slices), ("TZ", tz_slices))
            },
            half_widths=np.array(typical) / 2,
        )

    def sector(self, point_mm: npt.ArrayLike, zone: Zone) -> Sector:
        """The sector of a point (LPS) that is known to lie in `zone`."""
        left, posterior, superior = self.axes @ np.asarray(point_mm, dtype=float)
        superior = np.clip(superior, self.bottom, self.top)
        level = int(_level(np.array(superior), self.bottom, self.top))
        lateral = left - np.polyval(self.midline, superior)
        part: Part
        if posterior < np.polyval(self.middle[zone], superior) - TIE_MM:
            part = "anterior"
        elif zone == "TZ":
            part = "posterior"
        else:
            medial = abs(lateral) < MEDIAL_FRACTION * self.half_widths[level] - TIE_MM
            part = "posteromedial" if medial else "posterolateral"
        return Sector(side="left" if lateral > TIE_MM else "right", zone=zone, part=part, level=LEVELS[level])

    def shares(self, points: Array, zone: Zone) -> tuple[tuple[Sector, float], ...]:
        """(N, 3) LPS points of a lesion -> its sectors and their shares of the points, largest first."""
        sample = points[:: -(-len(points) // MOST_POINTS)]
        counts = Counter(self.sector(p, zone) for p in sample)
        return tuple((sector, count / len(sample)) for sector, count in counts.most_common())


def frame_axes(grid: Grid) -> Array:
    """(3, 3) rows left, posterior, superior: unit vectors in LPS; superior is the slices' normal."""
    superior = np.array(grid.direction).reshape(3, 3)[:, 2]
    left = np.array([1.0, 0.0, 0.0]) - superior[0] * superior
    left /= np.linalg.norm(left)
    return np.stack([left, np.cross(superior, left), superior])


def mask_points(mask: sitk.Image) -> Array:
    """(N, 3) centres of the non-zero voxels, mm LPS, from inferior to superior whatever the storage order."""
    indices = np.argwhere(sitk.GetArrayFromImage(sitk.DICOMOrient(mask, "LPS")))[:, ::-1]
    return Grid.of(mask).index_to_point(indices)


def by_slice(points: Array) -> list[Array]:
    """(N, 3) points in the frame -> one array a slice, lowest first."""
    points = points[np.argsort(points[:, 2], kind="stable")]
    return np.split(points, np.flatnonzero(np.diff(points[:, 2]) > 0.01) + 1)


def _level(heights: Array, bottom: float, top: float) -> npt.NDArray[np.int_]:
    return np.clip(np.floor(3 * (heights - bottom) / (top - bottom) + 1e-6), 0, 2).astype(int)


def _fit(slices: list[Array], position: Callable[[Array], Any]) -> Array:
    """Line (slope, offset) through a position in each slice, weighted by the slice's area; constant under 3 slices."""
    heights = np.array([s[0, 2] for s in slices])
    weights = np.sqrt([len(s) for s in slices])
    line = np.polyfit(heights, [float(position(s)) for s in slices], 1 if len(slices) > 2 else 0, w=weights)
    return np.concatenate([np.zeros(2 - len(line)), line])
