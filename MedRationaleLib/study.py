"""The Study: T2W, ADC and DWI of one examination on one physical grid, checked, with where each came from."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from .arguments import MOST_PSA
from .errors import InputError
from .image_files import SUFFIXES, acquisition_plane, check_volume, quiet_itk, read_image

log = logging.getLogger(__name__)

NAMES = {"t2w": "T2W", "adc": "ADC", "dwi": "DWI"}
"""Sequence ids and their names in sentences."""

CASE_SUFFIXES = {"t2w": ("t2w", "t2"), "adc": ("adc",), "dwi": ("hbv", "dwi")}
"""How the files of a case folder end, before the extension: PI-CAI's names first, then those of plain folders."""

SYNTHETIC_FIELD, B_VALUE_FIELD = "MedRationaleSynthetic", "MedRationaleBValue"
"""Header fields of a phantom's files: that no patient was imaged, and the DWI's b-value in s/mm²."""

ADC_UNITS = ((1.0, "1e-6 mm²/s"), (1e3, "1e-3 mm²/s"), (1e6, "mm²/s"))
"""Factor to 1e-6 mm²/s and the name of each unit that is recognised."""

ADC_P99 = (1000.0, 8000.0)
"""Plausible 99th percentile of the positive values of an ADC map in 1e-6 mm²/s: fluid has 3000 at 37 degrees, the four
maps measured here 2700 to 2950; noise maps reach twice that."""

GLAND_BOX_MM = (60.0, 60.0, 45.0)
"""Central block (right-left, front-back, foot-head) in which the gland is expected, to judge coverage."""

APART_MM = 10.0
"""Distance of the centres of ADC and DWI from which it is remarked on; most ADC maps are on their DWI's own grid."""

MIN_B = 800.0
"""s/mm²; lesions do not stand out from normal tissue below it (PI-RADS v2.1 asks for 1400 and more)."""

WEAKENED = {
    ("adc",): "the answers on ADC signal and diffusion pattern, and the DWI score with them, are inferred from the DWI "
    "and the T2W",
    ("dwi",): "the answers on DWI signal and diffusion pattern, and the DWI score with them, are inferred from the ADC "
    "and the T2W",
    ("adc", "dwi"): "ADC signal, DWI signal and diffusion pattern, and with them the DWI score, which decides the "
    "category in the peripheral zone, are inferred from the T2W alone; PI-RADS v2.1 gives no DWI score then",
}
"""Missing sequences -> what that means for the answers."""


@dataclass(frozen=True, kw_only=True)
class SeriesProvenance:
    """Which series or file one sequence of a Study is, and why it was taken."""

    sequence: str
    """"t2w", "adc" or "dwi"."""
    path: str
    """The file, or the folder that holds the series."""
    reason: str
    """In plain words: why this one, and which candidates were rejected and why."""
    sha256: str
    """Of the file; of a DICOM series, over its files ordered by slice, so that file names do not matter."""
    series_uid: str | None = None
    series_number: int | None = None
    series_description: str | None = None
    b_value: float | None = None
    """s/mm² of a DWI where known."""
    calculated: bool = False
    """True where the volume was not acquired: a calculated b-value, or an ADC map fitted here."""
    factor: float = 1.0
    """What the stored values were multiplied by (ADC to 1e-6 mm²/s)."""
    spacing_mm: tuple[float, float, float] | None = None
    """Voxel sides as stored, before resampling."""
    size: tuple[int, int, int] | None = None
    """Voxels as stored, before resampling."""
    instance_uids: tuple[str, ...] = ()
    """SOP Instance UIDs of the DICOM files used."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """T2W as it was stored, ADC and DWI resampled onto its grid (linear, in physical space, LPS mm).

    The verbs `from_files`, `from_case`, `from_dicom` and `from_images` read and check; the constructor does not.
    """

    t2w: sitk.Image
    """float32, grid as stored (any orientation, oblique or not)."""
    adc: sitk.Image | None = None
    """float32 in 1e-6 mm²/s on the T2W grid; 0 outside its field of view."""
    dwi: sitk.Image | None = None
    """float32, highest b-value, arbitrary unit, on the T2W grid; 0 outside its field of view."""
    valid: Mapping[str, sitk.Image] = field(default_factory=dict)
    """"adc"/"dwi" -> uint8 on the T2W grid, 1 where the sequence has data."""
    provenance: Mapping[str, SeriesProvenance] = field(default_factory=dict)
    """Sequence id -> where it came from."""
    patient: Mapping[str, Any] = field(default_factory=dict)
    """id, sex, age (years), study_date, study_uid, ... as far as the input had them."""
    warnings: tuple[str, ...] = ()
    """Sentences that belong beside every answer given on this Study."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Which of "adc" and "dwi" this examination lacks."""
        return tuple(name for name in ("adc", "dwi") if getattr(self, name) is None)

    def with_psa(self, ng_ml: float) -> Study:
        """The same with the patient's PSA in ng/ml, above 0 and up to MOST_PSA, whose density an assessment adds."""
        if not 0 < ng_ml <= MOST_PSA:
            raise InputError(
                f"PSA: expected a number above 0 and up to {MOST_PSA:,} in ng/ml, got {ng_ml}; leave it out or correct "
                "it."
            )
        return replace(self, patient={**self.patient, "psa_ng_ml": ng_ml})

    @classmethod
    def from_files(
        cls,
        *,
        t2w: str | Path | None,
        adc: str | Path | None = None,
        dwi: str | Path | None = None,
        b_value: float | None = None,
        patient: Mapping[str, Any] | None = None,
    ) -> Study:
        """Read up to three image files (NIfTI, MHA/MHD, NRRD). `b_value` in s/mm² of the DWI, where it is known."""
        given = {name: path for name, path in (("t2w", t2w), ("adc", adc), ("dwi", dwi)) if path is not None}
        _require_t2w(given, "give it with --t2w")
        images, provenance, patient = {}, {}, dict(patient or {})
        for name, path in given.items():
            images[name], sha256 = read_image(path, NAMES[name])
            fields = _phantom_fields(path)
            patient |= {"synthetic": True} if SYNTHETIC_FIELD in fields else {}
            if name == "dwi" and b_value is None and B_VALUE_FIELD in fields:
                b_value = float(fields[B_VALUE_FIELD])
            provenance[name] = SeriesProvenance(
                sequence=name,
                path=str(path),
                reason=f"given as the {NAMES[name]} file",
                sha256=sha256,
                b_value=b_value if name == "dwi" else None,
            )
        return cls.from_images(
            t2w=images["t2w"],
            adc=images.get("adc"),
            dwi=images.get("dwi"),
            provenance=provenance,
            patient=patient,
        )

    @classmethod
    def from_case(
        cls,
        folder: str | Path,
        *,
        t2w: str | Path | None = None,
        adc: str | Path | None = None,
        dwi: str | Path | None = None,
        b_value: float | None = None,
    ) -> Study:
        """Read a folder in PI-CAI naming (`*_t2w.mha`, `*_adc.mha`, `*_hbv.mha`) or with t2w / adc / dwi files; t2w /
        adc / dwi name a file instead. `b_value` in s/mm² of the DWI, where it is known."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"Case: expected a folder, got {folder}, which is no folder; check the path.")
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not files:
            inside = sorted(path.name for path in folder.iterdir())
            raise InputError(
                f"Case: expected a folder with image files, got {folder} with only the folders "
                f"{', '.join(inside[:4])} in it; name one of them, or read a DICOM folder with --dicom."
                if inside
                else f"Case: expected a folder with image files, got the empty folder {folder}; check the path."
            )
        stems = [
            (path, match[1].lower())
            for path in files
            if (match := re.match(r"(.+?)(\.nii(\.gz)?|\.mha|\.mhd|\.nrrd|\.nhdr)$", path.name, re.IGNORECASE))
        ]
        named = {name: Path(path) for name, path in (("t2w", t2w), ("adc", adc), ("dwi", dwi)) if path is not None}
        given = dict(named)
        for name, endings in CASE_SUFFIXES.items():
            for ending in endings if name not in named else ():
                matches = [path for path, stem in stems if stem == ending or stem.endswith(f"_{ending}")]
                if len(matches) > 1:
                    found = ", ".join(path.name for path in matches)
                    raise InputError(
                        f"{NAMES[name]}: expected one file in {folder}, got {found}; give one with --{name}."
                    )
                if matches and name not in given:
                    given[name] = matches[0]
        if "t2w" not in given:
            shown = ", ".join(path.name for path in files[:8]) + (" ..." if len(files) > 8 else "")
            planes = [stem for _, stem in stems if stem.endswith(("_sag", "_cor"))]
            other = " (a sagittal or coronal T2W cannot stand in for it)" if planes else ""
            raise InputError(
                f"T2W: expected a file *_t2w with one of {', '.join(SUFFIXES)} in {folder}, got {shown}{other}; add "
                "the axial T2W, or read a DICOM folder with --dicom."
            )
        identity = re.match(r"(\d+)_(\d+)_t2w\.", given["t2w"].name, re.IGNORECASE)
        patient = {"id": identity[1], "study_id": identity[2]} if identity else {"id": folder.name}
        study = cls.from_files(**given, b_value=b_value, patient=patient)
        reasons = {
            name: replace(source, reason=f"found in the case folder by its name {Path(source.path).name}")
            for name, source in study.provenance.items()
            if name not in named
        }
        return replace(study, provenance={**study.provenance, **reasons})

    @classmethod
    def from_dicom(
        cls,
        folder: str | Path,
        *,
        t2w: str | int | Path | None = None,
        adc: str | int | Path | None = None,
        dwi: str | int | Path | None = None,
    ) -> Study:
        """Read an examination from a DICOM folder; t2w / adc / dwi override the choice by a series number, a Series
        Instance UID, or a DICOM folder or image file."""
        from .dicom_reading import read_examination  # pydicom is needed for DICOM only

        overrides = {"t2w": t2w, "adc": adc, "dwi": dwi}
        examination = read_examination(folder, {name: value for name, value in overrides.items() if value is not None})
        _require_t2w(examination.images, f"check that the whole examination is in {folder}, or give it with --t2w")
        return cls.from_images(
            t2w=examination.images["t2w"],
            adc=examination.images.get("adc"),
            dwi=examination.images.get("dwi"),
            provenance=examination.provenance,
            patient=examination.patient,
            warnings=examination.warnings,
        )

    @classmethod
    def from_images(
        cls,
        *,
        t2w: sitk.Image,
        adc: sitk.Image | None = None,
        dwi: sitk.Image | None = None,
        provenance: Mapping[str, SeriesProvenance] | None = None,
        patient: Mapping[str, Any] | None = None,
        warnings: tuple[str, ...] = (),
    ) -> Study:
        """Check 3-D images that are already in memory, against each other too, and bring them to the T2W grid."""
        given = {"t2w": t2w, "adc": adc, "dwi": dwi}
        images = {name: sitk.Cast(image, sitk.sitkFloat32) for name, image in given.items() if image is not None}
        for name, image in images.items():
            check_volume(image, NAMES[name])
        plane = acquisition_plane(images["t2w"])
        if plane not in ("axial", "isotropic"):
            raise InputError(
                f"T2W: expected an axial series, got a {plane} one; give the axial T2W of this examination."
            )
        sources = dict(provenance or {})
        for name, image in images.items():
            source = sources.get(name) or SeriesProvenance(
                sequence=name, path="", reason="given as an image in memory", sha256=""
            )
            sources[name] = replace(source, spacing_mm=image.GetSpacing(), size=image.GetSize())
        for first, second in combinations(images, 2):
            fitted = "adc" in (first, second) and sources["adc"].calculated  # from the DWI's own files, rightly
            if not fitted and sources[first].sha256 and sources[first].sha256 == sources[second].sha256:
                raise InputError(
                    f"{NAMES[second]}: expected another image than the {NAMES[first]}, got the same one "
                    f"({sources[second].path}) for both; give the {NAMES[second]} of this examination."
                )
        notes = list(warnings) + _small_block(images["t2w"])
        if {"adc", "dwi"} <= images.keys():
            apart = _centres_apart(images["adc"], images["dwi"])
            if apart > APART_MM:
                notes.append(
                    f"ADC and DWI lie {apart:.0f} mm apart (their centres), but an ADC map usually lies where its DWI "
                    "does: answers may be of other places than they seem to be; check that both are of the same "
                    "examination and that neither was moved."
                )
        valid: dict[str, sitk.Image] = {}
        for name in ("adc", "dwi"):
            if name in images:
                images[name], valid[name], remarks = _onto(images[name], images["t2w"], NAMES[name])
                notes += remarks
        missing = tuple(name for name in ("adc", "dwi") if name not in images)
        if missing:
            what = " and ".join(NAMES[name] for name in missing)
            notes.append(f"{what} missing: {WEAKENED[missing]}. Which lesions are found changes with it, too.")
        swapped = len(missing) == 0 and looks_swapped(images["adc"], images["dwi"])
        if swapped:
            notes.append(
                "ADC and DWI look swapped (the image given as ADC has the contrast of a high-b DWI and the other way "
                "round); they were used as given: check, and exchange them if so."
            )
        elif "adc" in images:
            factor, unit = adc_unit(images["adc"])
            if factor != 1.0:
                images["adc"] = images["adc"] * factor
                sources["adc"] = replace(sources["adc"], factor=factor)
                notes.append(f"ADC values are in {unit} and were multiplied by {factor:g} to 1e-6 mm²/s.")
        if "dwi" in images:
            b_value = sources["dwi"].b_value
            if b_value is None:
                notes.append(
                    f"The b-value of the DWI is not known, so nothing says whether it reaches the {MIN_B:g} s/mm² that "
                    "are expected; give the b-value if you know it (on the command line with --b-value)."
                )
            elif b_value < MIN_B:
                notes.append(
                    f"The highest DWI has b = {b_value:g} s/mm², below {MIN_B:g}: lesions stand out less, so the "
                    "answers on DWI signal and the DWI score are weaker."
                )
        for note in notes:
            log.info(note)
        return cls(
            **images, valid=valid, provenance=sources, patient=dict(patient or {}), warnings=tuple(dict.fromkeys(notes))
        )


def _phantom_fields(path: str | Path) -> dict[str, str]:
    """SYNTHETIC_FIELD and B_VALUE_FIELD as far as an image file's header has them."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with quiet_itk():
        reader.ReadImageInformation()
    return {key: reader.GetMetaData(key) for key in (SYNTHETIC_FIELD, B_VALUE_FIELD) if reader.HasMetaDataKey(key)}


def _require_t2w(given: Mapping[str, object], remedy: str) -> None:
    if "t2w" not in given:
        got = " and ".join(NAMES[name] for name in given) or "nothing"
        raise InputError(f"T2W: expected an axial T2W, without which nothing can be said, got {got} only; {remedy}.")


def _box_slices(reference: sitk.Image) -> tuple[slice, ...]:
    """Slices (z, y, x) of the central GLAND_BOX_MM of an image of any orientation, clipped to it."""
    axes = np.abs(np.asarray(reference.GetDirection()).reshape(3, 3)).argmax(axis=0)
    slices = []
    for axis, size, spacing in zip(axes, reference.GetSize(), reference.GetSpacing(), strict=True):
        half = GLAND_BOX_MM[axis] / 2 / spacing
        slices.append(slice(max(0, round(size / 2 - half)), min(size, max(round(size / 2 + half), 1))))
    return tuple(reversed(slices))


def _small_block(t2w: sitk.Image) -> list[str]:
    """The remark that a T2W is smaller than the region in which a gland lies, if it is."""
    axes = np.abs(np.asarray(t2w.GetDirection()).reshape(3, 3)).argmax(axis=0)
    extent = np.zeros(3)
    extent[axes] = np.asarray(t2w.GetSize()) * np.asarray(t2w.GetSpacing())
    if np.all(extent >= GLAND_BOX_MM):
        return []
    sides, box = (" x ".join(f"{value:.0f}" for value in values) for values in (extent, GLAND_BOX_MM))
    return [f"The T2W covers {sides} mm, less than the {box} mm in which a gland lies: parts of it may be cut off."]


def _onto(image: sitk.Image, t2w: sitk.Image, name: str) -> tuple[sitk.Image, sitk.Image, list[str]]:
    """Resample onto the T2W grid: (float32 image, uint8 mask of where it has data, remarks on coverage)."""
    ones = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(image)
    identity = sitk.Transform()
    valid = sitk.Resample(ones, t2w, identity, sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    covered = sitk.GetArrayViewFromImage(valid)
    smaller = min(np.prod(i.GetSize(), dtype=float) * np.prod(i.GetSpacing()) for i in (image, t2w))
    if covered.sum() * np.prod(t2w.GetSpacing()) < 0.01 * smaller:
        raise InputError(
            f"{name}: expected a volume that overlaps the T2W, got one that does not (their centres are "
            f"{_centres_apart(image, t2w):.0f} mm apart); check that both are of the same examination."
        )
    box = covered[_box_slices(t2w)].mean()
    words = " x ".join(f"{side:g}" for side in GLAND_BOX_MM)
    remark = (
        f"The {name} covers only {100 * box:.0f} % of the central {words} mm of the T2W, where the gland is expected: "
        "answers beyond it rest on the other sequences; check that both are of the same examination."
    )
    linear = sitk.Resample(image, t2w, identity, sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    return linear, valid, [remark] if box < 0.9 else []


def _centres_apart(first: sitk.Image, second: sitk.Image) -> float:
    """Distance in mm of the two volumes' centres."""
    centres = [i.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in i.GetSize()]) for i in (first, second)]
    return float(np.linalg.norm(np.subtract(*centres)))


def _unit(values: np.ndarray) -> tuple[float, str] | None:
    """The entry of ADC_UNITS that makes positive values an ADC map's, or None."""
    p99 = float(np.percentile(values, 99)) if values.size else 0.0
    return next((unit for unit in ADC_UNITS if ADC_P99[0] <= p99 * unit[0] <= ADC_P99[1]), None)


def adc_unit(adc: sitk.Image) -> tuple[float, str]:
    """(factor to 1e-6 mm²/s, name) of the unit that an ADC map is in, by the 99th percentile of its positive values."""
    array = sitk.GetArrayViewFromImage(adc)
    unit = _unit(array[array > 0])
    if unit is None:
        p99 = float(np.percentile(array[array > 0], 99)) if (array > 0).any() else 0.0
        raise InputError(
            f"ADC: expected values in 1e-6 mm²/s, 1e-3 mm²/s or mm²/s (fluid near 3000, 3 or 0.003), got a 99th "
            f"percentile of {p99:.3g}; check that this is an ADC map and rescale it."
        )
    return unit


def looks_swapped(adc: sitk.Image, dwi: sitk.Image) -> bool:
    """Whether the image given as ADC is the DWI and the other way round. Both on one grid, any scale.

    Inside the body ADC and high-b DWI are anticorrelated; that is symmetric, so it is their histograms that tell which
    is which: diffusivity is bounded by that of free water, so ADC has a short right tail and its logarithm a long left
    one, whereas a high-b DWI is dark but for few bright spots. One vote is the skewness of the values and of their
    logarithm (both must agree), one vote is which of the two has the values of an ADC map in a known unit; swapped if
    the sum is positive. Right in both orders on the four real pairs at hand (skewness 0.7-0.9 against 2.1-4.2), on one
    of them with b = 50, 400 and 800 too. Limits: the first vote needs muscle, fat and fluid in view; on central crops
    of 90 mm and less a swap goes unnoticed where the DWI's values happen to be those of an ADC map.
    """
    first, second = (sitk.GetArrayViewFromImage(image).ravel().astype(np.float64) for image in (adc, dwi))
    body = (first > 0) & (second > 0)
    if body.sum() < 100:
        return False

    def lean(values: np.ndarray) -> np.ndarray:
        """Skewness of the values and of their logarithm."""
        both = np.stack([values, np.log(values + 1e-3 * values.max())])
        both -= both.mean(axis=1, keepdims=True)
        square = both * both
        return (square * both).mean(axis=1) / np.maximum(square.mean(axis=1), 1e-30) ** 1.5

    more = lean(first[body]) - lean(second[body])
    shape = int(np.all(more > 0.3)) - int(np.all(more < -0.3))
    units = int(_unit(second[body]) is not None) - int(_unit(first[body]) is not None)
    return shape + units > 0
