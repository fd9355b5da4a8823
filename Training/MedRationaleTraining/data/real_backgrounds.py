"""Real surroundings for synthetic glands: a few real examinations, bent so that their gland takes a new shape.

The bending is polar about the gland's centre in each slice and linear from apex to base along the axis: the real
gland's outline falls on the new one, and the displacement fades away from it, so the rest of the pelvis stays real.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
import yaml
from scipy.ndimage import gaussian_filter1d, map_coordinates

from MedRationaleLib.errors import InputError
from MedRationaleLib.preprocessing import CropSpec, Grid
from MedRationaleLib.synthesis.anatomy import Anatomy
from MedRationaleLib.synthesis.exam import RealBackground
from MedRationaleLib.synthesis.fields import PIXEL_MM, PIXELS, smooth_noise

ANGLES = 72
_CROP = CropSpec(size=(384, 384, 32), pixels=PIXELS)
_SUFFIX = ".nii.gz"


@dataclass(frozen=True, kw_only=True)
class RealCase:
    """One real examination on 32 slices of the synthesis grid."""

    name: str
    zones: np.ndarray
    t2w: np.ndarray | None
    adc: np.ndarray | None
    dwi: np.ndarray | None
    valid: np.ndarray


@lru_cache(maxsize=1)
def _outlines() -> dict[str, dict[int, list[float]]]:
    return yaml.safe_load(resources.files(__package__).joinpath("outlines.yaml").read_text(encoding="utf-8"))


def outlined_zones(name: str, t2w: sitk.Image) -> sitk.Image:
    """Zones (1 PZ, 2 TZ) drawn from outlines.yaml on the grid of a volume that has no masks; uint8."""
    rows = _outlines()[name]
    width, height, depth = t2w.GetSize()
    y, x = np.mgrid[:height, :width]
    zones = np.zeros((depth, height, width), np.uint8)
    for index in range(min(rows), max(rows) + 1):
        values = [np.interp(index, list(rows), [row[k] for row in rows.values()]) for k in range(8)]
        gland, tz = (
            (np.abs(x - cx) / rx) ** 2.3 + (np.abs(y - cy) / ry) ** 2.3 < 1
            for cx, cy, rx, ry in (values[:4], values[4:])
        )
        zones[index] = np.where(gland, np.where(tz, 2, 1), 0)
    image = sitk.GetImageFromArray(zones)
    image.CopyInformation(t2w)
    return image


def load_case(folder: Path) -> RealCase:
    """Read a folder with zones.nii.gz (1 PZ, 2 TZ) and t2w.nii.gz and/or adc.nii.gz with dwi.nii.gz.

    The volumes of outlines.yaml need no zones.nii.gz.
    """

    def read(name: str) -> sitk.Image | None:
        path = folder / (name + _SUFFIX)
        return sitk.ReadImage(str(path), sitk.sitkFloat32) if path.exists() else None

    zones, t2w, adc, dwi = (read(n) for n in ("zones", "t2w", "adc", "dwi"))
    if zones is None and t2w is not None and folder.name in _outlines():
        zones = outlined_zones(folder.name, t2w)
    if zones is None or (t2w is None and (adc is None or dwi is None)):
        raise InputError(
            f"Expected zones{_SUFFIX} with t2w{_SUFFIX}, or with adc{_SUFFIX} and dwi{_SUFFIX}, in {folder}; add them."
        )
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(sitk.Cast(zones > 0, sitk.sitkUInt8))
    reference = next(image for image in (t2w, adc) if image is not None)
    grid = Grid.for_image(reference, _CROP, shape.GetCentroid(1))
    inside = grid.from_reference(sitk.Cast(reference * 0 + 1, sitk.sitkFloat32), pixels=PIXELS)
    labels = grid.from_reference(sitk.Cast(zones, sitk.sitkUInt8), nearest=True, pixels=PIXELS)

    def sample(image: sitk.Image | None) -> np.ndarray | None:
        return None if image is None else grid.from_reference(image, pixels=PIXELS)

    t2w_array, adc_array, dwi_array = sample(t2w), sample(adc), sample(dwi)
    valid = inside > 0.99
    if t2w_array is not None:
        low, high = np.percentile(t2w_array[valid], (10, 90))
        t2w_array = np.maximum(0.13 + (t2w_array - low) / (high - low) * 0.65, 0.01).astype(np.float32)
    if adc_array is not None and dwi_array is not None:
        adc_array = adc_array / 1000
        dwi_array = dwi_array / np.median(dwi_array[labels > 0])
    return RealCase(name=folder.name, zones=labels, t2w=t2w_array, adc=adc_array, dwi=dwi_array, valid=valid)


def _outline(gland: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first and last slice), (S, 2) centres (row, column), (S, ANGLES) radii in pixels; 0 where there is no gland."""
    slices = np.flatnonzero(gland.any((1, 2)))
    centres = np.zeros((gland.shape[0], 2))
    radii = np.zeros((gland.shape[0], ANGLES))
    for s in slices:
        rows, columns = np.nonzero(gland[s])
        centres[s] = rows.mean(), columns.mean()
        dy, dx = rows - centres[s, 0], columns - centres[s, 1]
        sector = ((np.arctan2(dy, dx) / (2 * np.pi)) % 1 * ANGLES).astype(int) % ANGLES
        np.maximum.at(radii[s], sector, np.hypot(dx, dy) + 0.5)
        empty = radii[s] == 0
        if empty.any():
            index = np.arange(ANGLES)
            radii[s, empty] = np.interp(index[empty], index[~empty], radii[s, ~empty], period=ANGLES)
        radii[s] = gaussian_filter1d(radii[s], 1.2, mode="wrap")
    for axis in (0, 1):
        centres[:, axis] = np.interp(np.arange(gland.shape[0]), slices, centres[slices, axis])
    return slices[[0, -1]], centres, radii


def bend(
    case: RealCase, gland: np.ndarray, rng: np.random.Generator, *, wobble_mm: float = 1.5
) -> dict[str, np.ndarray]:
    """The case's arrays, bent so that its gland falls on `gland` (S, H, W) bool: zones, valid and its sequences.

    A smooth random displacement of up to `wobble_mm` comes on top, so that no two bent copies are alike; it takes the
    Dice of the bent outline and the new one from about 0.97 down to 0.90 in small glands.
    """
    flip = rng.random() < 0.5

    def oriented(array: np.ndarray) -> np.ndarray:
        return array[:, :, ::-1] if flip else array

    (a_new, b_new), centre_new, radius_new = _outline(gland)
    (a_old, b_old), centre_old, radius_old = _outline(oriented(case.zones) > 0)
    index = np.arange(gland.shape[0], dtype=float)
    inner = a_old + (index - a_new) * (b_old - a_old) / max(1, b_new - a_new)
    source = np.where(index < a_new, a_old + (index - a_new), np.where(index > b_new, b_old + (index - b_new), inner))
    depth = np.arange(case.zones.shape[0])
    centre = np.stack([np.interp(source, depth, centre_old[:, k]) for k in (0, 1)], 1)
    low = np.clip(np.floor(source).astype(int), 0, len(depth) - 1)
    high = np.clip(low + 1, 0, len(depth) - 1)
    share = np.clip(source - low, 0, 1)[:, None]
    radius = np.where(radius_old[high] > 0, (1 - share) * radius_old[low] + share * radius_old[high], radius_old[low])
    radius = np.where((index >= a_new)[:, None] & (index <= b_new)[:, None], radius, 0)

    rows, columns = np.meshgrid(np.arange(PIXELS), np.arange(PIXELS), indexing="ij")
    dy = rows[None] - centre_new[:, 0, None, None]
    dx = columns[None] - centre_new[:, 1, None, None]
    r = np.hypot(dx, dy) + 1e-6
    place = (np.arctan2(dy, dx) / (2 * np.pi)) % 1 * ANGLES - 0.5
    first = np.floor(place).astype(int)
    part = place - first

    def around(table: np.ndarray) -> np.ndarray:
        s = np.arange(table.shape[0])[:, None, None]
        return (1 - part) * table[s, first % ANGLES] + part * table[s, (first + 1) % ANGLES]

    outline_new, outline_old = around(radius_new), around(radius)
    change = np.where(outline_new > 0, outline_old - outline_new, 0)
    reach = np.maximum(32 / PIXEL_MM, 1.5 * np.abs(change))
    outside = r + change * np.exp(-np.maximum(r - outline_new, 0) / reach)
    bent = np.where((r <= outline_new) & (outline_new > 0), r * outline_old / np.maximum(outline_new, 1e-6), outside)
    scale = bent / r
    wobble = [rng.uniform(0, wobble_mm) / PIXEL_MM * smooth_noise(rng, (4, 7, 7), gland.shape) for _ in range(2)]
    points = [
        np.broadcast_to(source[:, None, None], gland.shape),
        centre[:, 0, None, None] + dy * scale + wobble[0],
        centre[:, 1, None, None] + dx * scale + wobble[1],
    ]
    result = {}
    for name, order in (("t2w", 1), ("adc", 1), ("dwi", 1), ("zones", 0), ("valid", 0)):
        array = getattr(case, name)
        if array is not None:
            moved = map_coordinates(oriented(array).astype(np.float32), points, order=order, mode="constant", cval=0.0)
            result[name] = moved.astype(array.dtype)
    return result


class RealBackgrounds:
    """Draws a real background for a synthetic gland (see MedRationaleLib.synthesis.synthesize)."""

    def __init__(self, folder: str | Path, *, share: float, keep_gland: float) -> None:
        """`share`: how often a background is real; `keep_gland`: how often a real gland's interior stays, too."""
        with_zones = {p.parent for p in Path(folder).glob("*/zones" + _SUFFIX)}
        outlined = {p.parent for p in Path(folder).glob("*/t2w" + _SUFFIX) if p.parent.name in _outlines()}
        folders = sorted(with_zones | outlined)
        if not folders:
            raise InputError(f"Expected folders with zones{_SUFFIX} in {folder}, found none; give such a folder.")
        cases = [load_case(f) for f in folders]
        self._t2w = [c for c in cases if c.t2w is not None]
        self._diffusion = [c for c in cases if c.adc is not None and c.dwi is not None]
        self._share, self._keep = share, keep_gland
        self.names = [c.name for c in cases]

    def __call__(self, anatomy: Anatomy, rng: np.random.Generator) -> RealBackground | None:
        """None for a procedural pelvis."""
        if not anatomy.gland.any() or rng.random() > self._share:
            return None
        t2w = self._draw(self._t2w, anatomy, rng) if rng.random() < 0.85 else {}
        diffusion = self._draw(self._diffusion, anatomy, rng) if rng.random() < 0.7 or not t2w else {}
        if not t2w and not diffusion:
            return None
        interior: Literal["t2w", "diffusion"] | None = None
        if rng.random() < self._keep:  # of one sequence alone, for no real patient here has all three
            interior = "t2w" if t2w and (not diffusion or rng.random() < 0.65) else "diffusion"
        whole = np.ones(anatomy.zones.shape, bool)
        t2w_valid, diffusion_valid = (d.get("valid", whole) for d in (t2w, diffusion))
        curve = float(np.exp(rng.normal(0, 0.15)))
        return RealBackground(
            t2w=t2w["t2w"] ** curve if t2w else None,
            adc=diffusion.get("adc"),
            dwi=diffusion.get("dwi"),
            interior=interior,
            zones=(t2w if interior == "t2w" else diffusion)["zones"] if interior else None,
            valid=np.stack([t2w_valid, diffusion_valid, diffusion_valid]),
        )

    @staticmethod
    def _draw(cases: list[RealCase], anatomy: Anatomy, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return bend(cases[rng.integers(len(cases))], anatomy.gland, rng) if cases else {}
