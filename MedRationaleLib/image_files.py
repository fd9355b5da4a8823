"""Reading one image file, and the checks that every volume passes once, where it enters.

SimpleITK's own error texts quote C++ files and its readers warn on the process's stderr; neither reaches the user.
Silent repairs are refused: ITK mirrors negative spacings, pads truncated NIfTI files
with zeros and turns their NaNs into zeros without a word.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .errors import InputError

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
"""File name endings of the formats that are read: NIfTI, MetaImage, NRRD."""

SPACING_MM = (0.05, 20.0)
"""Plausible voxel sides of a pelvic MRI."""

EXTENT_MM = (10.0, 1000.0)
"""Plausible side lengths of the imaged block of a pelvic MRI."""

_HEADER_SPACING = re.compile(r"^(?:ElementSpacing|ElementSize|spacings)\s*[:=]\s*(.+?)\s*$", re.MULTILINE)
_PLANES = ("sagittal", "coronal", "axial")


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Silence ITK while it reads: its global warnings, and what its C libraries write to file descriptor 2.

    Both belong to the whole process, so what other threads write to stderr meanwhile is lost.
    """
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        saved: int | None = os.dup(2)
    except OSError:  # a windowed application may have no stderr
        saved = None
    if saved is not None:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        if saved is not None:
            os.dup2(saved, 2)
            os.close(saved)
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def plane_of(normal: np.ndarray) -> str:
    """Name of the anatomical plane that a slice normal (3,), LPS, is nearest to; up to 45 degrees oblique."""
    return _PLANES[int(np.argmax(np.abs(normal)))]


def acquisition_plane(image: sitk.Image) -> str:
    """Plane of acquisition: "axial", "sagittal", "coronal", or "isotropic" where no side of the voxel is the longest.

    Judged by the direction of the longest side of the voxel (at least 1.5 times the second), not by the order of
    storage, so that a re-oriented copy of an axial examination is still axial.
    """
    spacing = np.asarray(image.GetSpacing())
    longest = np.argsort(spacing)
    if spacing[longest[2]] < 1.5 * spacing[longest[1]]:
        return "isotropic"
    return plane_of(np.asarray(image.GetDirection()).reshape(3, 3)[:, longest[2]])


def read_image(path: str | Path, name: str) -> tuple[sitk.Image, str]:
    """Read and check one image file; `name` is the sequence's name in messages ("T2W").

    Returns the image (3-D, float32, geometry as stored) and the SHA-256 of the file (of the pixel file too, where a
    header names one beside it).
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(
            f"{name}: expected an image file, got the folder {path}; give a DICOM folder with --dicom, or in a table's "
            "column dicom."
        )
    if not path.is_file():
        raise InputError(f"{name}: expected an image file, got {path}, which does not exist; check the path.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{name}: expected a readable file, got {path} ({error.strerror}); check its access."
        ) from None
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    broken = (
        f"{name}: expected a complete image file, got {path}, which is truncated or damaged; copy or export it again."
    )
    with quiet_itk():
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise InputError(_unreadable(str(error), path, name, broken)) from None
        _check_header(reader, content, path, name, broken)
        try:
            image = reader.Execute()
        except (RuntimeError, MemoryError) as error:
            raise InputError(_unreadable(str(error), path, name, broken)) from None
    if image.GetDimension() == 4:
        image = image[:, :, :, 0]
    image = sitk.Cast(image, sitk.sitkFloat32)
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    check_volume(image, f"{name} ({path.name})")
    digest = hashlib.sha256(content)
    pixels = _pixel_file(path)
    if pixels is not None and pixels.is_file():
        digest.update(pixels.read_bytes())
    return image, digest.hexdigest()


def _pixel_file(header: Path) -> Path | None:
    """The file that a detached header (MHD, NHDR) names for its voxels; None for one file with both."""
    with header.open("rb") as file:
        start = file.read(10000)
    named = re.search(rb"^(?:ElementDataFile\s*=|data ?file:)\s*(\S+)\s*$", start, re.MULTILINE | re.IGNORECASE)
    return header.parent / os.fsdecode(named[1]) if named and named[1].upper() not in (b"LOCAL", b"LIST") else None


def _unreadable(error: str, path: Path, name: str, broken: str) -> str:
    """The sentence for a file whose header SimpleITK refused."""
    if "orthonormal" in error:
        return f"{name}: expected axes at right angles, got {path} with a sheared geometry; resample and save it again."
    if "pacing" in error:
        return f"{name}: expected a voxel spacing above 0 mm, got 0 or no number in {path}; correct its header."
    pixels = _pixel_file(path)
    if pixels is not None and not pixels.is_file():
        return f"{name}: expected the voxels of {path} beside it, got no file {pixels.name}; copy both files."
    known = path.name.lower().endswith(SUFFIXES)
    if "Unable to determine ImageIO" in error and not (known and path.stat().st_size == 0):
        return (
            f"{name}: expected an image ({', '.join(SUFFIXES)}), got {path}, which is not an image of these formats; "
            "convert it, or give a DICOM folder with --dicom."
        )
    return broken


def _check_header(reader: sitk.ImageFileReader, content: bytes, path: Path, name: str, broken: str) -> None:
    """Refuse what ITK would read without complaint: wrong dimensions, mirrored spacings, truncated NIfTI."""
    size = reader.GetSize()
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    if len(size) != 3 or min(size) < 2 or reader.GetDimension() > 4:
        many = "a 2-D image" if len(size) < 3 or min(size) < 2 else f"a {len(size)}-D image"
        hint = "a DICOM series is read with --dicom FOLDER" if len(size) < 4 else "give one volume of the series"
        raise InputError(
            f"{name}: expected a 3-D volume, got {many} of {' x '.join(map(str, size))} voxels in {path}; {hint}."
        )
    if reader.GetNumberOfComponents() != 1 or "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise InputError(
            f"{name}: expected one number per voxel, got {reader.GetNumberOfComponents()} components (colour, vector "
            f"or complex) in {path}; export a grey-scale volume."
        )
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error):
            raise InputError(broken) from None
    # By its first bytes, and not by its keys, which a MetaImage that was converted from NIfTI has kept.
    nifti = content[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c", b"\x1c\2\0\0", b"\0\0\2\x1c")
    found = None if nifti else _HEADER_SPACING.search(content[:10000].decode("latin-1"))
    stored = [float(v) for v in re.findall(r"[-+]?(?:\d[\d.eE+-]*|nan|inf)", found[1], re.IGNORECASE)] if found else []
    if nifti and content[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c"):  # NIfTI-1; a NIfTI-2 file is taken as ITK reads it
        order = "<" if content[0] else ">"
        stored = np.frombuffer(content, f"{order}f4", 3, 80).tolist()
        offset, count = int(np.frombuffer(content, f"{order}f4", 1, 108)[0]), int(np.prod(size, dtype=np.int64))
        if len(content) < offset + count * int(reader.GetMetaData("bitpix")) // 8:
            raise InputError(broken)
        kind = {16: "f4", 64: "f8"}.get(int(np.frombuffer(content, f"{order}i2", 1, 70)[0]))
        if kind:
            _check_finite(np.frombuffer(content, order + kind, count, offset), f"{name} ({path.name})")
    if any(not value > 0 for value in stored):
        raise InputError(f"{name}: expected a voxel spacing above 0 mm, got {stored} in {path}; correct its header.")


def _check_finite(values: np.ndarray, name: str) -> None:
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise InputError(
            f"{name}: expected finite numbers, got {bad} voxels that are NaN or infinite; replace them or export again."
        )


LABELS, LOOKED_AT = 8, 200_000
"""Different values of a map of labels, at most, and how many of its voxels are looked at."""


def check_volume(image: sitk.Image, name: str) -> None:
    """Refuse a 3-D float32 image with an absurd geometry, with values that are not finite, or without contrast."""
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"{name}: expected a 3-D volume of single numbers, got {image.GetDimension()} dimensions and "
            f"{image.GetNumberOfComponentsPerPixel()} components; give one volume."
        )
    spacing, size = np.asarray(image.GetSpacing()), np.asarray(image.GetSize())
    words = " x ".join(f"{value:g}" for value in spacing)
    if not np.all((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])):
        raise InputError(
            f"{name}: expected a voxel spacing of {SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm, got {words} mm; correct "
            "the header."
        )
    extent = spacing * size
    if not np.all((extent >= EXTENT_MM[0]) & (extent <= EXTENT_MM[1])):
        sides = " x ".join(f"{value:.0f}" for value in extent)
        raise InputError(
            f"{name}: expected an imaged block of {EXTENT_MM[0]:g} to {EXTENT_MM[1]:g} mm a side, got {sides} mm "
            f"(voxels of {words} mm); give the whole volume, or correct the header."
        )
    values = sitk.GetArrayViewFromImage(image)
    _check_finite(values, name)
    if values.min() == values.max():
        raise InputError(
            f"{name}: expected an image with contrast, got the constant value {values.min():g} in every voxel; check "
            "that the right file was given."
        )
    some = values.reshape(-1)[:: max(1, values.size // LOOKED_AT)]
    if len(np.unique(some)) <= LABELS:
        raise InputError(
            f"{name}: expected an image, got one of at most {LABELS} different values, which looks like a mask or a "
            "map of labels; check that the right file was given."
        )
