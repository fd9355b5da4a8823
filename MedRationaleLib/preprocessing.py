"""Study -> model tensor, and the exact way back (paper, Appendix D). Lengths in mm, points in LPS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

CHANNELS = ("t2w", "adc", "dwi")
"""Order of the tensor's channel axis."""

FWHM_PER_SIGMA = 2.3548
BLUR_FROM_RATIO = 1.2
"""Axes stored finer than the crop by more than this factor are low-pass filtered before they are sampled."""


class StudyLike(Protocol):
    """What prepare() needs of a Study (see study.py): all images on the T2W grid."""

    @property
    def t2w(self) -> sitk.Image: ...
    @property
    def adc(self) -> sitk.Image | None: ...
    @property
    def dwi(self) -> sitk.Image | None: ...
    @property
    def valid(self) -> Mapping[str, sitk.Image]: ...


@dataclass(frozen=True, kw_only=True)
class CropSpec:
    """The box that the model sees. Axis order (x, y, z) = (patient left, posterior, superior)."""

    spacing_mm: tuple[float, float, float] = (0.5, 0.5, 3.0)
    """Spacing after resampling (paper, Appendix D: 3.0 x 0.5 x 0.5 mm)."""
    size: tuple[int, int, int] = (384, 384, 24)
    """Voxels of the centre crop or pad (paper, Appendix D)."""
    pixels: int = 256
    """Rows and columns of the model's input, to which each slice is resized (paper: 1024; compact model: 256)."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Geometry of the crop in canonical orientation: indices (x, y, z) grow towards left, posterior and superior,
    along the T2W's own (oblique) axes. Arrays on it are (S, H, W) = (z, y, x)."""

    origin: tuple[float, float, float]
    """Centre of voxel (0, 0, 0), mm LPS."""
    spacing: tuple[float, float, float]
    """Millimetres (x, y, z)."""
    direction: tuple[float, ...]
    """Nine direction cosines, row by row, as SimpleITK has them."""
    size: tuple[int, int, int]
    """Voxels (x, y, z)."""

    @classmethod
    def for_study(cls, study: StudyLike, spec: CropSpec, center_mm: Sequence[float] | None = None) -> Grid:
        """The crop centred on the T2W's field of view or, where given, on `center_mm` (LPS)."""
        return cls.for_image(study.t2w, spec, center_mm)

    @classmethod
    def for_image(cls, image: sitk.Image, spec: CropSpec, center_mm: Sequence[float] | None = None) -> Grid:
        """As for_study. The lattice starts at the corner of the LPS-oriented image, not at its first voxel's centre, so
        it is the same however finely that field of view is stored; and the crop moves by whole voxels, so an image
        that has the spec's spacing already is copied, not interpolated."""
        stored = cls.of(image)
        if center_mm is None:
            center_mm = stored.index_to_point((np.array(stored.size) - 1) / 2).tolist()
        first = stored.index_to_point((np.array(spec.spacing_mm) / stored.spacing - 1) / 2)
        lattice = replace(stored, origin=_triple(first), spacing=spec.spacing_mm, size=spec.size)
        start = lattice.point_to_index(np.asarray(center_mm, dtype=float)) - (np.array(spec.size) - 1) / 2
        start = np.floor(start + 0.5 + 1e-6)  # ties go one way, whatever the rounding noise of the stored geometry
        return replace(lattice, origin=_triple(lattice.index_to_point(start)))

    @classmethod
    def of(cls, image: sitk.Image) -> Grid:
        """The image's own lattice, whatever its storage order, in canonical orientation."""
        lps = sitk.DICOMOrient(image, "LPS")
        x, y, z = lps.GetSize()
        return cls(
            origin=_triple(lps.GetOrigin()),
            spacing=_triple(lps.GetSpacing()),
            direction=tuple(lps.GetDirection()),
            size=(x, y, z),
        )

    def resized(self, height: int, width: int) -> Grid:
        """The grid of the same field of view with `height` x `width` pixels a slice."""
        spacing = np.array(self.spacing) * (self.size[0] / width, self.size[1] / height, 1.0)
        shift = (spacing / np.array(self.spacing) - 1) / 2  # from the centre of the first voxel to that of the new one
        return replace(
            self,
            origin=_triple(self.index_to_point(shift)),
            spacing=_triple(spacing),
            size=(width, height, self.size[2]),
        )

    def coarsened(self, other: Grid) -> Grid:
        """This grid, but along each axis where `other`, whose axes are parallel, is coarser, that one's lattice."""
        coarser = np.array(other.spacing) > np.array(self.spacing) * (1 + 1e-3)
        origin = np.where(coarser, self.point_to_index(other.origin), 0.0)
        x, y, z = (int(n) for n in np.where(coarser, other.size, self.size))
        return replace(
            self,
            origin=_triple(self.index_to_point(origin)),
            spacing=_triple(np.where(coarser, other.spacing, self.spacing)),
            size=(x, y, z),
        )

    def index_to_point(self, index: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """(..., 3) continuous voxel indices (x, y, z) -> (..., 3) points, mm LPS."""
        scaled = np.asarray(index, dtype=float) * np.array(self.spacing)
        return np.array(self.origin) + scaled @ self._axes().T

    def point_to_index(self, point: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """(..., 3) points, mm LPS -> (..., 3) continuous voxel indices (x, y, z)."""
        return (np.asarray(point, dtype=float) - self.origin) @ np.linalg.inv(self._axes()).T / np.array(self.spacing)

    def image(self, array: npt.NDArray[Any]) -> sitk.Image:
        """(S, h, w) array that covers the grid's field of view, at any in-plane resolution -> image in space."""
        if array.ndim != 3 or array.shape[0] != self.size[2]:
            raise ValueError(f"expected an array of ({self.size[2]}, h, w), got {array.shape}")
        grid = self.resized(array.shape[1], array.shape[2])
        image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
        image.SetOrigin(grid.origin)
        image.SetSpacing(grid.spacing)
        image.SetDirection(grid.direction)
        return image

    def to_reference(
        self, array: npt.NDArray[Any], reference: sitk.Image, nearest: bool = False, outside: float = 0.0
    ) -> sitk.Image:
        """(S, h, w) array on this field of view -> image on the grid of `reference`, as that is stored.

        Linear gives float32; nearest keeps the array's type (bool becomes uint8). Voxels of the reference that the
        crop does not cover become `outside`.
        """
        image = self.image(array if nearest else array.astype(np.float32))
        interpolator = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
        return sitk.Resample(image, reference, sitk.Transform(), interpolator, float(outside), image.GetPixelID())

    def from_reference(
        self, image: sitk.Image, nearest: bool = False, pixels: int | None = None, outside: float = 0.0
    ) -> npt.NDArray[Any]:
        """Any image in space -> (S, h, w) array on this grid, or on `pixels` x `pixels` of its field of view.

        Linear gives float32, averaged over the pixel's area where `pixels` is coarser than the grid; nearest keeps
        the image's type. Voxels that the image does not cover become `outside`.
        """
        if nearest:
            target = self.resized(pixels, pixels) if pixels else self
            return sitk.GetArrayFromImage(target._sample(image, sitk.sitkNearestNeighbor, outside))
        array = sitk.GetArrayFromImage(self._sample(sitk.Cast(image, sitk.sitkFloat32), sitk.sitkLinear, outside))
        return resize(array, pixels, pixels) if pixels else array

    def _sample(self, image: sitk.Image, interpolator: int, outside: float = 0.0) -> sitk.Image:
        return sitk.Resample(
            image,
            self.size,
            sitk.Transform(),
            interpolator,
            self.origin,
            self.spacing,
            self.direction,
            float(outside),
            image.GetPixelID(),
        )

    def _axes(self) -> npt.NDArray[np.float64]:
        return np.array(self.direction, dtype=float).reshape(3, 3)


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What the model is given. S slices run from inferior to superior, rows from anterior to posterior, columns from
    the patient's right to left; channels are T2W, ADC, DWI."""

    images: npt.NDArray[np.float32]
    """(S, 3, H, W) float32, z-scored per slice and channel over the valid pixels, 0 elsewhere."""
    valid: npt.NDArray[np.bool_]
    """(S, 3, H, W) bool: the sequence has data there; False in padding."""
    present: npt.NDArray[np.bool_]
    """(3,) bool: the Study has the sequence within the crop."""
    grid: Grid
    """The crop at the spec's spacing; arrays of any in-plane resolution go back through Grid.to_reference."""


def prepare(study: StudyLike, spec: CropSpec, center_mm: Sequence[float] | None = None) -> ModelInput:
    """Resample, crop or pad, resize and z-score the three sequences (paper, Appendix D).

    Args:
        study: its images lie on the T2W grid, `valid` says where ADC and DWI have data.
        spec: the box and the model's resolution.
        center_mm: centre of the box, LPS; the centre of the T2W's field of view where None.
    """
    grid = Grid.for_study(study, spec, center_mm)
    shape = (spec.size[2], len(CHANNELS), spec.pixels, spec.pixels)
    images, valid = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for channel, name in enumerate(CHANNELS):
        image: sitk.Image | None = getattr(study, name)
        if image is not None:
            images[:, channel], valid[:, channel] = _resampled(image, study.valid.get(name), grid, spec.pixels)
    return ModelInput(
        images=zscore(images, valid), valid=valid, present=np.asarray(valid.any(axis=(0, 2, 3))), grid=grid
    )


def zscore(images: npt.NDArray[np.floating[Any]], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """(..., H, W) images -> float32 with mean 0 and standard deviation 1 in each (H, W) plane.

    Statistics are taken over the valid pixels only; invalid pixels, and planes that are constant, become 0.
    """
    count = np.maximum(valid.sum(axis=(-2, -1), keepdims=True), 1)
    values = np.where(valid, images, 0)
    mean = values.sum(axis=(-2, -1), keepdims=True, dtype=np.float64) / count
    centred = np.where(valid, values - mean.astype(values.dtype), 0)
    std = np.sqrt(np.square(centred).sum(axis=(-2, -1), keepdims=True, dtype=np.float64) / count)
    varies = std > 1e-6 * np.maximum(np.abs(mean), 1e-6)
    scale = np.divide(1.0, std, out=np.zeros_like(std), where=varies)
    return (centred * scale).astype(np.float32)


def resize(array: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.float32]:
    """(..., h, w) -> (..., height, width) float32, bilinear; shrinking averages over the new pixel's area.

    Pixel edges coincide, as in torch's `interpolate(mode="bilinear", antialias=True, align_corners=False)`.
    """
    rows, columns = (_bilinear_weights(n, m) for n, m in zip(array.shape[-2:], (height, width), strict=True))
    return np.matmul(np.matmul(rows, array.astype(np.float32)), columns.T)


def _bilinear_weights(old: int, new: int) -> npt.NDArray[np.float32]:
    """(new, old) matrix of triangle weights; the triangle is as wide as the coarser of the two pixels."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale - 0.5
    if scale < 1:
        centres = centres.clip(0, old - 1)
    weights = np.maximum(1 - np.abs(np.arange(old) - centres[:, None]) / max(scale, 1.0), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _resampled(
    image: sitk.Image, valid: sitk.Image | None, grid: Grid, pixels: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """One sequence as (S, pixels, pixels) values and validity.

    Values are averages over valid voxels only (Σ w v / Σ w), so neither padding nor a sequence's edge bleeds in.
    """
    weight = sitk.Cast(valid, sitk.sitkFloat32) if valid is not None else _ones_like(image)
    image = sitk.Cast(image, sitk.sitkFloat32) * weight
    summed, weights = (grid.from_reference(_low_pass(i, grid), pixels=pixels) for i in (image, weight))
    inside = weights >= 0.5
    return np.divide(summed, weights, out=np.zeros_like(summed), where=inside), inside


def _low_pass(image: sitk.Image, grid: Grid) -> sitk.Image:
    """Blur each axis that is stored finer than `grid` to about the grid's resolution (thin-slice T2W)."""
    to_grid = np.abs(np.linalg.inv(grid._axes()) @ np.array(image.GetDirection()).reshape(3, 3))
    for axis, (old, count) in enumerate(zip(image.GetSpacing(), image.GetSize(), strict=True)):
        new = grid.spacing[int(to_grid[:, axis].argmax())]
        if new > BLUR_FROM_RATIO * old and count >= 4:  # four samples is the least that the recursive filter takes
            image = sitk.RecursiveGaussian(image, np.sqrt(new**2 - old**2) / FWHM_PER_SIGMA, direction=axis)
    return image


def _ones_like(image: sitk.Image) -> sitk.Image:
    ones = sitk.Image(image.GetSize(), sitk.sitkFloat32) + 1.0
    ones.CopyInformation(image)
    return ones


def _triple(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z
