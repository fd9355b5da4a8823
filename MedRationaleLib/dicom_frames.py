"""One DICOM frame: what it is by its tags, where it lies, its b-value, its pixels; classic and enhanced alike."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from .image_files import plane_of, quiet_itk

PRIVATE_B = (
    ("SIEMENS", "SIEMENS MR HEADER", 0x0019, 0x0C),
    ("GE", "GEMS_PARM_01", 0x0043, 0x39),
    ("PHILIPS", "PHILIPS IMAGING DD 001", 0x2001, 0x03),
)
"""Manufacturer, private creator, group and element offset of the vendors' b-values."""

GE_BIAS = 1_000_000_000
"""GE adds this to the b-value of multi-b and synthetic series (BIAS_FOR_BVALUE)."""

LOCALISER = {"LOCALIZER", "SCOUT", "SURVEY"}
NOT_ANATOMY = {
    *("EADC", "EXP", "FA", "COLFA", "TENSOR", "PHASE", "PHASE MAP", "P", "REAL", "IMAGINARY"),
    *("MIP", "PROJECTION IMAGE", "SUBTRACT", "SUBTRACTION", "SUB", "SCREEN SAVE", "PERFUSION", "T1 MAP", "T2 MAP"),
}
"""ImageType values of images that are none of the three sequences."""
USED = (
    *(
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "FrameOfReferenceUID",
        "SeriesNumber",
        "InstanceNumber",
    ),
    *("PatientID", "PatientName", "PatientSex", "PatientAge", "PatientBirthDate", "AccessionNumber", "StudyDate"),
    *("StudyDescription", "SeriesDescription", "Manufacturer", "ManufacturerModelName", "MagneticFieldStrength"),
    *("ScanOptions", "SliceThickness", "EchoTime", "RescaleSlope", "RescaleIntercept"),
)
"""Attributes that are asked for after reading."""
DIFFUSION = {"DIFFUSION", "TRACEW", "TRACE", "CALC_BVALUE", "CALC_BVAL", "ISODWI", "SE_DWI", "M_DWI"}
CALCULATED = {"CALC_BVALUE", "CALC_BVAL", "SYNTHETIC"}


def _words(text: object) -> str:
    """Lower case, everything but letters and digits turned into single spaces."""
    return re.sub(r"[^a-z0-9]+", " ", str(text or "").lower()).strip()


def number(value: object) -> float | None:
    """The first number of a DICOM value that may be a number, a list, text, or bytes (VR UN or OB); else None."""
    if isinstance(value, (bytes, bytearray)):
        text = bytes(value).strip(b" \0")
        if re.fullmatch(rb"[-+\d.eE\\ ]+", text):
            value = text.decode().split("\\")[0]
        elif len(value) in (4, 8):  # Philips FL, or FD, read as UN
            value = np.frombuffer(bytes(value), "<f4" if len(value) == 4 else "<f8")[0]
        else:
            return None
    elif not isinstance(value, (str, int, float)) and hasattr(value, "__getitem__"):
        value = value[0] if len(value) else None  # type: ignore[arg-type]
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return result if np.isfinite(result) else None


def b_from_text(text: str) -> float | None:
    """The b-value in a text such as "DWI b=1400 tra"; None where none or several are named ("b50_400_800")."""
    found = re.findall(r"(?<![a-z])b(?:[ _-]?(?:value|val))?[ _=-]*(\d{1,5})(?!\d)", text.lower())
    lists = re.search(r"(?<![a-z])b[ _=-]*\d+(?:[ _,/-]+b?\d{2,4}(?!\d))+", text.lower())
    return float(found[0]) if len(set(found)) == 1 and not lists else None


def b_from_sequence_name(name: str) -> tuple[float | None, bool]:
    """(b, whether two source b-values are named): "*ep_b800t" -> (800, False), "*ep_b50_800" -> (None, True)."""
    match = re.search(r"_b(\d+)(_\d+)?", name)
    if match is None:
        return None, False
    return (None, True) if match[2] else (float(match[1]), False)


def b_value(header: Dataset) -> tuple[float | None, str]:
    """(b in s/mm², the tag that told it): standard tag, vendor's private tag, SequenceName, comment, description."""
    value = number(header.get("DiffusionBValue"))
    if value is None and "MRDiffusionSequence" in header and header.MRDiffusionSequence:
        value = number(header.MRDiffusionSequence[0].get("DiffusionBValue"))
    if value is not None:
        return value, "DiffusionBValue"
    manufacturer = str(header.get("Manufacturer", "")).upper()
    for vendor, creator, group, offset in PRIVATE_B:
        blocks = [
            tag.element
            for tag in list(header.keys())  # iterating the Dataset itself would parse every element
            if tag.group == group and 0x10 <= tag.element <= 0xFF and str(header[tag].value).strip().upper() == creator
        ]
        if not blocks and manufacturer.startswith(vendor):
            blocks = [0x10]  # de-identification drops private creators at times
        for block in blocks:
            tag = (group, (block << 8) + offset)
            value = number(header[tag].value) if tag in header else None
            if value is not None and value >= 0:
                return value % GE_BIAS, f"{vendor.title()} private tag ({group:04x},{(block << 8) + offset:04x})"
    name = str(header.get("SequenceName") or header.get("PulseSequenceName") or "")
    value, _ = b_from_sequence_name(name)
    if value is not None:
        return value, f"SequenceName {name}"
    for keyword in ("ImageComments", "SeriesDescription"):
        value = b_from_text(str(header.get(keyword) or ""))
        if value is not None:
            return value, keyword
    return None, "no tag"


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One slice of a DICOM file. Positions and directions in LPS mm."""

    path: Path
    index: int
    """Frame number in the file, from 0."""
    header: Dataset
    """All attributes of this frame without pixels; of an enhanced file the functional groups laid flat."""

    @cached_property
    def kind(self) -> tuple[str, str]:
        """("t2w" | "adc" | "dwi" | "localiser" | "other", the reason), by tags first and the description last."""
        h = self.header
        tokens = self.image_type
        description = _words(h.get("SeriesDescription"))
        shown = "\\".join(str(token) for token in h.get("ImageType", []))
        scanning = {str(token).upper() for token in _values(h.get("ScanningSequence"))}
        scanning |= {"EP"} if h.get("EchoPlanarPulseSequence") == "YES" else set()  # enhanced files
        scanning |= {"SE"} if h.get("EchoPulseSequence") == "SPIN" else set()
        scanning |= {"GR"} if h.get("EchoPulseSequence") in ("GRADIENT", "BOTH") else set()
        name = str(h.get("SequenceName") or h.get("PulseSequenceName") or "")
        if tokens & LOCALISER:
            return "localiser", f"ImageType {shown}"
        if tokens & NOT_ANATOMY or any("eadc" in word or word == "exponential" for word in description.split()):
            return "other", f"ImageType {shown}"
        if any(token.startswith("ADC") for token in tokens):
            return "adc", f"ImageType {shown}"
        derived = "DERIVED" in tokens and not tokens & (DIFFUSION - {"DIFFUSION"})
        if derived and re.search(r"adc\b|apparent diffusion", description):
            return "adc", f"ImageType {shown} and description"
        if tokens & DIFFUSION:
            return "dwi", f"ImageType {shown}"
        if (self.b or 0) > 0 and self.b_source not in ("ImageComments", "SeriesDescription"):
            return "dwi", f"b-value in {self.b_source}"
        if "EP" in scanning and (self.b is not None or b_from_sequence_name(name)[1]):
            return "dwi", "echo-planar with a b-value"
        if re.search(r"(^| )(localizer|localiser|loc|scout|survey)( |$)", description):
            return "localiser", "description"
        echo, repetition = number(h.get("EchoTime")), number(h.get("RepetitionTime"))
        if scanning & {"SE", "RM"} and not scanning & {"EP", "GR"} and echo is not None:
            slow = repetition is None or repetition >= 1000
            return ("t2w", f"spin echo, TE {echo:g} ms") if 60 <= echo <= 300 and slow else ("other", "not T2-weighted")
        if re.search(r"adc\b|apparent diffusion", description) and "GR" not in scanning:
            return "adc", "description"
        if re.search(r"\b(dwi|diff\w*|ep2d|bval\w*)\b", description) and "GR" not in scanning:
            return "dwi", "description"
        if re.search(r"\bt2", description) and not scanning & {"EP", "GR"}:
            return "t2w", "description"
        return "other", "neither T2W nor diffusion"

    @property
    def instance(self) -> int:
        """InstanceNumber; 0 where there is none."""
        return int(number(self.header.get("InstanceNumber")) or 0)

    @cached_property
    def image_type(self) -> set[str]:
        return {str(token).upper().strip() for token in _values(self.header.get("ImageType"))}

    @cached_property
    def _b(self) -> tuple[float | None, str]:
        return b_value(self.header)

    @property
    def b(self) -> float | None:
        """b-value in s/mm²."""
        return self._b[0]

    @property
    def b_source(self) -> str:
        return self._b[1]

    @cached_property
    def calculated(self) -> bool:
        """Whether this DWI frame was computed from other b-values. Siemens leaves the two source b-values in the
        SequenceName ("ep_b50_800"), newer versions CALC_BVALUE in ImageType; else the description says so."""
        text = _words(f"{self.header.get('SeriesDescription')} {self.header.get('DerivationDescription')}")
        name = str(self.header.get("SequenceName") or "")
        return (
            bool(self.image_type & CALCULATED)
            or b_from_sequence_name(name)[1]
            or re.search(r"calc|synth|computed|extrapolat", text) is not None
        )

    @cached_property
    def trace(self) -> bool:
        """Whether this frame already is the mean over the directions."""
        directionality = self.header.get("DiffusionDirectionality")
        if directionality is None and (0x0019, 0x100D) in self.header:
            value = self.header[0x0019, 0x100D].value
            directionality = value.decode("latin-1") if isinstance(value, bytes) else value
        return bool(self.image_type & {"TRACEW", "TRACE", "ISODWI"}) or str(directionality).strip() == "ISOTROPIC"

    @cached_property
    def position(self) -> np.ndarray:
        """Centre of the first voxel, (3,)."""
        return np.array(self.header.ImagePositionPatient, dtype=float)

    @cached_property
    def axes(self) -> np.ndarray:
        """Columns: direction of increasing column, of increasing row, slice normal; (3, 3)."""
        row, column = np.array(self.header.ImageOrientationPatient, dtype=float).reshape(2, 3)
        return np.stack([row, column, np.cross(row, column)], axis=1)

    @cached_property
    def plane(self) -> str:
        return plane_of(self.axes[:, 2])

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """In-plane geometry that the slices of one volume share: orientation, pixel spacing (mm), rows, columns."""
        h = self.header
        return (
            *np.round(np.array(h.ImageOrientationPatient, dtype=float), 3).tolist(),
            *np.round(np.array(h.PixelSpacing, dtype=float), 3).tolist(),
            int(h.Rows),
            int(h.Columns),
        )


def _values(value: object) -> list[object]:
    """A DICOM value of any multiplicity as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, (str, int, float)) else list(value)  # type: ignore[call-overload]


def read_frames(path: Path) -> list[Frame]:
    """The MR frames of one DICOM file; empty where it is DICOM but no MR image (SR, SEG, CT ...).

    Raises InvalidDicomError where it is no DICOM, ValueError where it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's remarks on odd values
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            if header.get("Modality") != "MR" or "Rows" not in header or int(header.get("SamplesPerPixel", 1)) != 1:
                return []
            frames = [Frame(path=path, index=i, header=flat) for i, flat in enumerate(_flat_headers(header))]
            if any("ImagePositionPatient" not in f.header or "PixelSpacing" not in f.header for f in frames):
                return []
            for frame in frames:  # pydicom converts values when they are first asked for: meet bad ones here
                for keyword in USED:
                    frame.header.get(keyword)
                _ = (frame.kind, frame.grid, frame.calculated, frame.trace)
                spacing, axes = np.array(frame.header.PixelSpacing, dtype=float), frame.axes
                if frame.position.shape != (3,) or spacing.shape != (2,) or not np.isfinite(frame.position).all():
                    raise ValueError("image position or pixel spacing")
                if not (spacing > 0).all() or not np.allclose(axes.T @ axes, np.eye(3), atol=0.01):
                    raise ValueError("pixel spacing or image orientation")
            return frames
        except InvalidDicomError:
            raise
        except Exception as error:  # pydicom raises nearly anything on damaged files
            raise ValueError(str(error)) from error


def _flat_headers(header: Dataset) -> list[Dataset]:
    """One header per frame: the file's own, with an enhanced file's shared and per-frame groups laid over it."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        return [header] if "ImageOrientationPatient" in header else []
    base = Dataset()
    base.update(header)
    per_frame: list[Dataset] = list(base.PerFrameFunctionalGroupsSequence)
    shared: list[Dataset] = list(base.get("SharedFunctionalGroupsSequence") or [])
    for keyword in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        base.pop(keyword, None)
    headers = []
    for groups in per_frame:
        flat = Dataset()
        flat.update(base)
        for functional in [*shared, groups]:
            for element in functional:
                if element.VR == "SQ" and element.value:
                    flat.update(element.value[0])
        for name, source in (("ImageType", "FrameType"), ("EchoTime", "EffectiveEchoTime")):
            if source in flat:
                setattr(flat, name, flat[source].value)
        headers.append(flat)
    return headers if all("ImageOrientationPatient" in flat for flat in headers) else []


def read_pixels(path: Path) -> np.ndarray:
    """Stored values of one file as (frames, rows, columns) float32, rescale slope and intercept applied.

    Compressed files that pydicom has no decoder for are read by SimpleITK. Raises ValueError where it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(path)
            headers = _flat_headers(dataset)
            try:
                stored = np.asarray(dataset.pixel_array)
            except (RuntimeError, NotImplementedError, ImportError):
                with quiet_itk():
                    return sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat32))
        except Exception as error:  # pydicom raises nearly anything on damaged files
            raise ValueError(str(error)) from error
    pixels = stored.reshape(-1, *stored.shape[-2:]).astype(np.float32)
    for frame, header in zip(pixels, headers, strict=False):
        slope, intercept = number(header.get("RescaleSlope")), number(header.get("RescaleIntercept"))
        frame *= 1.0 if slope is None else slope
        frame += 0.0 if intercept is None else intercept
    return pixels


def nominal_b(frames: list[Frame]) -> dict[Frame, float | None]:
    """Frame -> b-value with neighbours within 5 s/mm² or 1.5 % put together (scanners note 995 and 1005 for 1000)."""
    counts = Counter(frame.b for frame in frames if frame.b is not None)
    merged: dict[float, float] = {}
    cluster: list[float] = []
    for b in [*sorted(counts), 1e9]:
        if cluster and (b == 1e9 or b - cluster[-1] > max(5.0, 0.015 * b)):
            common = max(cluster, key=lambda value: counts[value])
            merged.update(dict.fromkeys(cluster, common))
            cluster = []
        cluster.append(b)
    return {frame: None if frame.b is None else merged[frame.b] for frame in frames}
