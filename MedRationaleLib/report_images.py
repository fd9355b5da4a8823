"""The pictures of the report: axial slices in radiological orientation, outlines and heatmaps, all as inline data.

Pictures are cropped to the gland and drawn in mm, so an SVG viewBox of (0, 0, width_mm, height_mm) shows one slice
whatever the voxel spacing is: x runs to the patient's left, y to posterior (LPS), slices from inferior to superior.
"""

from __future__ import annotations

import base64
import io
import math
from functools import cached_property

import numpy as np
import SimpleITK as sitk
from PIL import Image
from skimage.measure import find_contours

from MedRationaleLib.assessment import Assessment, Finding
from MedRationaleLib.errors import InputError

MARGIN_MM = 12.0
"""Surroundings shown around the gland: the rectal wall and the pelvic side wall help to find one's way."""
MIN_SIDE_MM = 60.0
"""Smallest crop, also where no gland was found."""
ADC_WINDOW = (300.0, 2200.0)
"""1e-6 mm^2/s. Fixed, because ADC is quantitative: the same grey means the same diffusion in every report."""
HEAT_STEP_MM = 1.5
"""Pixel of a heatmap picture: evidence comes from patches of several mm, finer pixels would only weigh more."""
FAINTEST_TOP = 0.02
"""Heatmaps that are nowhere above this stay dark."""
HEAT_LEVELS = 64
HEAT_STOPS = ((0.0, (60, 15, 110)), (0.45, (205, 45, 95)), (0.75, (250, 140, 35)), (1.0, (253, 238, 130)))
"""Dark violet to light yellow: brightness rises all the way, so it also reads in grey and with colour blindness."""
HEAT_OPACITY = 0.72
"""Opacity at 1.0; it falls to nothing at 0, so that the anatomy stays visible."""


class ReportPictures:
    """Crops, windows and encodes the images of one Assessment."""

    def __init__(self, assessment: Assessment) -> None:
        study = assessment.study
        if getattr(study, "t2w", None) is None:
            raise InputError(
                "Expected a Study with its images for the report, got one without voxels: "
                "read the study again and pass it to load_assessment(folder, study)."
            )
        self._assessment = assessment
        reference = sitk.DICOMOrient(study.t2w, "LPS")
        self.spacing: tuple[float, float, float] = reference.GetSpacing()
        """(x, y, z) in mm, canonical axes."""
        self._reference = reference
        self.masks = {name: _array(getattr(assessment, name)) > 0 for name in ("gland", "pz", "tz")}
        lesions = _array(assessment.lesions)
        self.masks |= {finding.id: lesions == finding.label for finding in assessment.findings}
        self._rows, self._columns = self._crop()
        self.masks = {name: self._cut(mask) for name, mask in self.masks.items()}
        self.width_mm = (self._columns.stop - self._columns.start) * self.spacing[0]
        self.height_mm = (self._rows.stop - self._rows.start) * self.spacing[1]
        self.count = reference.GetSize()[2]
        """Number of slices."""
        self.windows: dict[str, tuple[float, float]] = {}
        """Sequence -> (black, white) in the sequence's own units."""
        self._grey = {
            name: self._window(name, self._cut(_array(image)))
            for name in ("t2w", "adc", "dwi")
            if (image := getattr(study, name)) is not None
        }
        self.heat_tops = {
            key: max(FAINTEST_TOP, math.ceil(_highest(image) * 100) / 100) for key, image in assessment.evidence.items()
        }
        """Evidence key -> heat at the bright end of its colour scale: a constraint keeps some concepts far fainter than
        others, and on one scale they would not be seen."""

    @property
    def sequences(self) -> tuple[str, ...]:
        """Those that the Study has, of "t2w", "adc", "dwi"."""
        return tuple(self._grey)

    def grey(self, sequence: str, index: int) -> str:
        """One slice as a JPEG data URI, one pixel per voxel."""
        return _data_uri(Image.fromarray(self._grey[sequence][index]), "JPEG", quality=90)

    def heat(self, key: str) -> dict[int, str]:
        """Slice -> heatmap as a PNG data URI with opacity, where it shows anything; covers `heat_size_mm`."""
        step_x, step_y = self._heat_steps
        heat = self._cut(_array(self._assessment.evidence[key]))[:, step_y // 2 :: step_y, step_x // 2 :: step_x]
        levels = np.round(np.clip(np.nan_to_num(heat) / self.heat_tops[key], 0, 1) * (HEAT_LEVELS - 1)).astype(np.uint8)
        pictures = {}
        for index in np.flatnonzero((levels > HEAT_LEVELS // 16).any(axis=(1, 2))):
            picture = Image.fromarray(levels[index], mode="P")
            picture.putpalette(self._palette[0])
            pictures[int(index)] = _data_uri(picture, "PNG", transparency=self._palette[1])
        return pictures

    @property
    def heat_size_mm(self) -> tuple[float, float]:
        """Width and height that a heatmap picture covers from the crop's corner on."""
        step_x, step_y = self._heat_steps
        columns = len(range(step_x // 2, self._columns.stop - self._columns.start, step_x))
        rows = len(range(step_y // 2, self._rows.stop - self._rows.start, step_y))
        return columns * step_x * self.spacing[0], rows * step_y * self.spacing[1]

    def outline(self, name: str, index: int) -> str:
        """SVG path data, in mm, of a mask's border on one slice; empty where the mask is."""
        mask = self.masks[name][index]
        if not mask.any():
            return ""
        parts = []
        for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
            line = contour[:-1] - 0.5  # padded by one, and a voxel's centre lies half inside
            steps = np.diff(contour, axis=0)
            line = line[np.any(steps != np.roll(steps, 1, axis=0), axis=1)]  # only the corners
            points = " ".join(f"{x * self.spacing[0]:.1f},{y * self.spacing[1]:.1f}" for y, x in line)
            parts.append(f"M{points}Z")
        return "".join(parts)

    def key_slice(self, finding: Finding | None) -> int:
        """The slice with the lesion's largest area; without a finding (or with an empty mask), with the gland's."""
        mask = self.masks[finding.id] if finding is not None else self.masks["gland"]
        if not mask.any():
            mask = self.masks["gland"]
        areas = mask.sum(axis=(1, 2))
        return int(areas.argmax()) if areas.any() else self.count // 2

    def hottest(self, finding: Finding, key: str, otherwise: int) -> tuple[int, tuple[float, float]]:
        """Slice where a heatmap is highest within the lesion, and that heat with the highest anywhere."""
        heat = np.nan_to_num(self._cut(_array(self._assessment.evidence[key])))
        inside = np.where(self.masks[finding.id], heat, 0)
        top = float(inside.max(initial=0.0))
        at = int(inside.max(axis=(1, 2)).argmax()) if top > 0 else otherwise
        return at, (top, float(heat.max(initial=0.0)))

    def lesion_box(self, finding: Finding, index: int, side_mm: float) -> tuple[float, float, float, float]:
        """SVG viewBox of a square of at least `side_mm` around the lesion on one slice, kept inside the crop."""
        rows, columns = np.nonzero(self.masks[finding.id][index])
        if not len(rows):
            return 0.0, 0.0, self.width_mm, self.height_mm
        extent = max(np.ptp(columns) * self.spacing[0], np.ptp(rows) * self.spacing[1])
        side = min(max(side_mm, 1.5 * extent), self.width_mm, self.height_mm)
        left = (columns.min() + columns.max() + 1) / 2 * self.spacing[0] - side / 2
        top = (rows.min() + rows.max() + 1) / 2 * self.spacing[1] - side / 2
        left, top = np.clip(left, 0, self.width_mm - side), np.clip(top, 0, self.height_mm - side)
        return round(float(left), 2), round(float(top), 2), round(side, 2), round(side, 2)

    def slice_position(self, index: int) -> tuple[float, float, float]:
        """Centre of a slice's crop, LPS mm."""
        column = (self._columns.start + self._columns.stop - 1) / 2
        row = (self._rows.start + self._rows.stop - 1) / 2
        return self._reference.TransformContinuousIndexToPhysicalPoint((column, row, float(index)))

    @cached_property
    def _palette(self) -> tuple[list[int], bytes]:
        """Colours (r, g, b, r, ...) and opacities of the heatmap's levels."""
        value = np.linspace(0, 1, HEAT_LEVELS)
        stops = [stop for stop, _ in HEAT_STOPS]
        rgb = np.stack([np.interp(value, stops, [color[i] for _, color in HEAT_STOPS]) for i in range(3)], axis=1)
        opacity = HEAT_OPACITY * np.clip(value * 1.4, 0, 1)
        return np.round(rgb).astype(int).ravel().tolist(), bytes(np.round(opacity * 255).astype(np.uint8))

    @property
    def _heat_steps(self) -> tuple[int, int]:
        return max(1, round(HEAT_STEP_MM / self.spacing[0])), max(1, round(HEAT_STEP_MM / self.spacing[1]))

    def _crop(self) -> tuple[slice, slice]:
        """Rows and columns of the square around gland and lesions."""
        shown = np.any([mask.any(axis=0) for mask in self.masks.values()], axis=0)
        bounds = []
        for axis in (0, 1):
            filled = np.flatnonzero(shown.any(axis=1 - axis))
            low, high = (filled[0], filled[-1] + 1) if len(filled) else (0, shown.shape[axis])
            bounds.append((low, high, shown.shape[axis], self.spacing[1 - axis]))
        if shown.any():
            side = max(MIN_SIDE_MM, *((high - low) * step + 2 * MARGIN_MM for low, high, _, step in bounds))
        else:
            side = 2 * MIN_SIDE_MM
        result = []
        for low, high, size, step in bounds:
            length = min(size, round(side / step))
            start = int(np.clip(round((low + high - length) / 2), 0, size - length))
            result.append(slice(start, start + length))
        return result[0], result[1]

    def _cut(self, array: np.ndarray) -> np.ndarray:
        return array[:, self._rows, self._columns]

    def _window(self, name: str, array: np.ndarray) -> np.ndarray:
        """(S, H, W) uint8: ADC with the fixed window; the others so that nothing within the gland is cut off."""
        if name == "adc":
            low, high = ADC_WINDOW
        else:
            gland = array[self.masks["gland"]] if self.masks["gland"].any() else array[:, ::2, ::2]
            low, high = float(np.percentile(array[:, ::4, ::4], 1)), float(np.percentile(gland, 99.7))
        self.windows[name] = (low, high)
        scaled = (array - low) * (255 / max(high - low, 1e-6))
        return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)


def _highest(image: sitk.Image) -> float:
    return float(np.nan_to_num(sitk.GetArrayViewFromImage(image)).max(initial=0.0))


def _array(image: sitk.Image) -> np.ndarray:
    """(S, H, W) in canonical LPS orientation."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))


def _data_uri(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=kind == "PNG", **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
