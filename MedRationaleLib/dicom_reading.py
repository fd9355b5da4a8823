"""Reading an examination from a DICOM folder: which series is T2W, ADC and DWI, why, and the volumes themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError

from .dicom_frames import Frame, b_from_sequence_name, read_frames
from .dicom_stacks import MIN_SLICES, Stack, fit_adc, load, measured_b, multi_b, scan, usable
from .errors import InputError
from .image_files import SUFFIXES, read_image
from .study import NAMES, SeriesProvenance

B_TOLERANCE = 0.25
"""Relative difference between a calculated series' stated b-value and its signal's that is worth a warning."""

Rank = Sequence[tuple[str, Any]]
"""(why a candidate is behind where its value is smaller, the value), most important first."""


@dataclass(kw_only=True)
class Examination:
    """What read_examination returns: the volumes found, why, and what is worth a remark."""

    images: dict[str, sitk.Image] = field(default_factory=dict)
    """Sequence id -> float32 image on its own grid."""
    provenance: dict[str, SeriesProvenance] = field(default_factory=dict)
    patient: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The stack or stacks (several: source b-values of a fitted ADC map) of one sequence, and why."""

    stacks: tuple[Stack, ...]
    reason: str
    remark: str | None = None
    """A sentence for the user, where there is one."""

    @property
    def first(self) -> Stack:
        return self.stacks[-1]


def read_examination(folder: str | Path, overrides: Mapping[str, str | int | Path] | None = None) -> Examination:
    """Recognise, choose and load T2W, ADC and DWI of one examination.

    `overrides`: sequence id -> series number, Series Instance UID, DICOM folder, DICOM file or image file.
    """
    stacks, notes = scan(folder)
    result = Examination()
    given: dict[str, list[Stack]] = {}
    for name, value in (overrides or {}).items():
        found = _override(name, value, stacks, Path(folder))
        if isinstance(found, list):
            given[name] = found
        else:
            result.images[name], sha256 = read_image(found, NAMES[name])
            result.provenance[name] = SeriesProvenance(
                sequence=name, path=str(found), reason="given by the user instead of a series", sha256=sha256
            )
    stacks = _one_study(stacks, given.get("t2w"), "t2w" in result.images, notes)
    stacks = _with_measured_b(stacks)
    reference: Stack | None = None
    for name, choose in (("t2w", _choose_t2w), ("adc", _choose_adc), ("dwi", _choose_dwi)):
        if name in result.images:
            continue
        left = stacks
        while choice := _choose_given(name, given[name]) if name in given else choose(left, reference):
            _same_patient(choice.first, stacks, name)
            try:
                result.images[name], result.provenance[name], remarks = _read(name, choice, left)
            except InputError as error:
                if name == "t2w" or name in given:
                    raise
                notes.append(f"{choice.first.label} was left out ({str(error).rstrip('.')}).")
                left = [stack for stack in left if stack not in choice.stacks]
                continue
            reference = choice.first if name == "t2w" else reference
            notes += [choice.remark, *remarks] if choice.remark else remarks
            break
    result.patient = _patient((reference or stacks[0]).header)
    result.warnings = tuple(dict.fromkeys(notes))
    return result


def _override(name: str, value: str | int | Path, stacks: Sequence[Stack], folder: Path) -> list[Stack] | Path:
    """The stacks, or the image file, that the user named for a sequence."""
    text = str(value)
    named = [stack for stack in stacks if text in (str(stack.number), stack.uid)]
    if named:
        return named
    path = next((path for path in (Path(text), folder / text) if path.exists()), None)
    if path is None:
        known = ", ".join(dict.fromkeys(f'{s.number} "{s.header.get("SeriesDescription", "")}"' for s in stacks))
        raise InputError(
            f"{NAMES[name]}: expected a series number, a series UID or a path, got {text}, which is none; the series "
            f"are {known}."
        )
    if path.is_dir():
        return scan(path)[0]
    if path.name.lower().endswith(SUFFIXES):
        return path
    uids = {frame.header.get("SeriesInstanceUID") for frame in _frames_of(path, name)}
    return [stack for stack in scan(path.parent)[0] if stack.header.get("SeriesInstanceUID") in uids]


def _frames_of(path: Path, name: str) -> list[Frame]:
    try:
        frames = read_frames(path)
    except (InvalidDicomError, ValueError):
        frames = []
    if not frames:
        raise InputError(
            f"{NAMES[name]}: expected a DICOM image or one of {', '.join(SUFFIXES)}, got {path}, which is neither; "
            "check it."
        )
    return frames


def _one_study(stacks: list[Stack], t2w: list[Stack] | None, t2w_is_file: bool, notes: list[str]) -> list[Stack]:
    """Keep the stacks of the one study (StudyInstanceUID) that has the T2W."""

    def study(stack: Stack) -> str:
        return str(stack.header.get("StudyInstanceUID", ""))

    studies = {study(stack) for stack in stacks}
    if len(studies) == 1:
        return stacks
    candidates = {study(s) for s in (t2w or [s for s in stacks if s.kind == "t2w" and usable(s)])} & studies
    if len(candidates) > 1 or (t2w_is_file and not t2w):
        dates = sorted({str(stack.header.get("StudyDate", "?")) for stack in stacks})
        raise InputError(
            f"DICOM: expected one examination, got {len(studies)} of the same patient (dates {', '.join(dates)}); "
            "give the folder of one, or choose the T2W with --t2w."
        )
    kept = [stack for stack in stacks if study(stack) in candidates] or stacks
    if len(kept) < len(stacks):
        notes.append(
            f"The folder holds {len(studies)} examinations of this patient; only the one with the axial T2W was read."
        )
    return kept


def _same_patient(stack: Stack, others: Sequence[Stack], name: str) -> None:
    ids = {str(s.header.get("PatientID") or s.header.get("PatientName") or "") for s in (stack, *others)}
    if len(ids) > 1:
        raise InputError(
            f"{NAMES[name]}: expected a series of the same patient, got patients {', '.join(sorted(ids))}; "
            "check the path."
        )


def _with_measured_b(stacks: list[Stack]) -> list[Stack]:
    """Give calculated DWI stacks without any b-value tag the b-value that their signal corresponds to."""
    sources = multi_b(stacks)
    result = []
    for stack in stacks:
        if stack.kind == "dwi" and stack.b is None and stack.calculated and usable(stack):
            b = measured_b(stack, sources)
            stack = stack if b is None else replace(stack, b=50.0 * round(b / 50))
        result.append(stack)
    return result


def _choose(
    name: str, candidates: Sequence[Stack], rank: Callable[[Stack], Rank], others: Sequence[tuple[Stack, str]] = ()
) -> Choice | None:
    """The usable candidate of highest rank; the reason says why each of the rest is not it."""
    good = [stack for stack in candidates if usable(stack)]
    if not good:
        return None
    best = max(good, key=lambda stack: [value for _, value in rank(stack)])
    rejected = []
    for stack in candidates:
        if stack is best:
            continue
        if stack.plane not in ("axial", "isotropic"):
            why = stack.plane
        elif len(stack.levels) < MIN_SLICES:
            why = f"only {len(stack.levels)} slices"
        else:
            pairs = zip(rank(best), rank(stack), strict=True)
            why = next((words for (_, mine), (words, its) in pairs if its < mine), "equal, read later")
        rejected.append((stack, why))
    rejected += others
    behind = "; ".join(f"{stack.label} ({why})" for stack, why in rejected) or "none, it is the only candidate"
    reason = f"{best.label}: {best.frames[0].kind[1]}; {best.described}; {_why_b(best)}rejected: {behind}"
    return Choice(stacks=(best,), reason=reason)


def _why_b(stack: Stack) -> str:
    """How the b-value of a DWI stack is known, and that it is a calculated one."""
    if stack.kind != "dwi":
        return ""
    frame = stack.frames[0]
    where = "of its signal, by the fit of the acquired b-values" if frame.b is None else f"by {frame.b_source}"
    known = "b-value unknown; " if stack.b is None else f"highest b = {stack.b:g} s/mm² {where}; "
    if not stack.calculated:
        return known
    name = str(stack.header.get("SequenceName") or "")
    sign = (
        f"SequenceName {name} names two source b-values"
        if b_from_sequence_name(name)[1]
        else "ImageType or description"
    )
    return f"{known}calculated, not acquired ({sign}); "


def _in_frame(stack: Stack, reference: Stack | None) -> bool:
    """Whether two stacks share the scanner's coordinate system, as far as they say."""
    mine, other = (s.header.get("FrameOfReferenceUID") if s else None for s in (stack, reference))
    return not (mine and other) or mine == other


def _choose_t2w(stacks: Sequence[Stack], _: Stack | None) -> Choice | None:
    def rank(stack: Stack) -> Rank:
        h, frame = stack.header, stack.frames[0]
        words = str(h.get("SeriesDescription", "")).lower().replace("_", " ").split()
        options = {str(option) for option in np.atleast_1d(h.get("ScanOptions") or "")}
        scanning = {str(value) for value in np.atleast_1d(h.get("ScanningSequence") or "")}
        fat = bool({"fs", "fatsat", "stir", "spair", "dixon"} & set(words)) or "FS" in options or "IR" in scanning
        return (
            ("fat-suppressed", not fat),
            ("slices thicker than 5 mm", stack.step <= 5.05),
            ("coarser in plane", -round(float(max(h.PixelSpacing)), 2)),
            ("thicker slices", -round(stack.step, 1)),
            ("without distortion correction", bool({"DIS2D", "DIS3D"} & frame.image_type)),
            ("fewer slices", len(stack.levels)),
            ("earlier, so presumably repeated", stack.number or 0),
        )

    candidates = [stack for stack in stacks if stack.kind == "t2w"]
    localisers = [(stack, "localiser") for stack in stacks if stack.kind == "localiser"]
    choice = _choose("t2w", candidates, rank, localisers)
    if choice is None:
        planes = sorted({stack.plane for stack in candidates if stack.plane not in ("axial", "isotropic")})
        if planes:
            got = f"only {' and '.join(planes)} T2W ({', '.join(s.label for s in candidates)})"
        elif all(stack.kind == "localiser" for stack in stacks):
            got = f"only localisers ({', '.join(dict.fromkeys(s.label for s in stacks))})"
        else:
            got = f"{len(stacks)} others ({', '.join(s.label for s in stacks[:6])}{' ...' if len(stacks) > 6 else ''})"
        raise InputError(
            f"T2W: expected an axial T2-weighted series of at least {MIN_SLICES} slices, got {got}; give the folder of "
            "the whole examination, or name the series with --t2w."
        )
    return choice


def _choose_adc(stacks: Sequence[Stack], reference: Stack | None) -> Choice | None:
    def rank(stack: Stack) -> Rank:
        return (
            ("other frame of reference than the T2W", _in_frame(stack, reference)),
            ("without distortion correction", bool({"DIS2D", "DIS3D"} & stack.frames[0].image_type)),
            ("fewer slices", len(stack.levels)),
            ("earlier, so presumably repeated", stack.number or 0),
        )

    maps = [stack for stack in stacks if stack.kind == "adc"]
    return _choose("adc", maps, rank) or _fitted(multi_b(stacks), maps)


def _fitted(sources: Sequence[Stack], maps: Sequence[Stack]) -> Choice | None:
    """An ADC map by the mono-exponential fit of several b-values."""
    if not sources:
        return None
    listed = ", ".join(f"{stack.b:g}" for stack in sources)
    rejected = "; ".join(f"{stack.label} ({stack.plane}, {len(stack.levels)} slices)" for stack in maps) or "none"
    reason = (
        f"no axial ADC map found, so it was computed from {sources[-1].label} and its series by a mono-exponential fit "
        f"over b = {listed} s/mm²; rejected maps: {rejected}"
    )
    return Choice(stacks=tuple(sources), reason=reason)


def _choose_dwi(stacks: Sequence[Stack], reference: Stack | None) -> Choice | None:
    def rank(stack: Stack) -> Rank:
        return (
            ("other frame of reference than the T2W", _in_frame(stack, reference)),
            ("b-value unknown", stack.b is not None),
            ("lower b-value", stack.b or 0.0),
            ("calculated, not acquired", not stack.calculated),
            ("fewer slices", len(stack.levels)),
            ("without distortion correction", bool({"DIS2D", "DIS3D"} & stack.frames[0].image_type)),
            ("earlier, so presumably repeated", stack.number or 0),
        )

    return _choose("dwi", [stack for stack in stacks if stack.kind == "dwi"], rank)


def _choose_given(name: str, stacks: Sequence[Stack]) -> Choice:
    """The best stack of a series that the user named, whatever it was recognised as."""
    fitted = _fitted(multi_b(stacks), []) if name == "adc" and all(s.kind != "adc" for s in stacks) else None
    if fitted:
        return replace(fitted, reason=f"given by the user; {fitted.reason}")
    alike = [stack for stack in stacks if stack.kind == name] or list(stacks)
    best = max(alike, key=lambda stack: (stack.b or 0.0, len(stack.levels)))
    if len(best.levels) < MIN_SLICES:
        raise InputError(
            f"{NAMES[name]}: expected at least {MIN_SLICES} slices, got {len(best.levels)} in {best.label}; name "
            "another series."
        )
    reason, remark = f"given by the user: {best.label}; {best.described}", None
    if best.kind != name:
        told = f"{NAMES.get(best.kind, best.kind)} ({best.frames[0].kind[1]})"
        remark = f"{best.label} was given as the {NAMES[name]}, but its tags say {told}; it was used as given: check."
        reason += f"; its tags say {told}"
    return Choice(stacks=(replace(best, kind=name),), reason=reason, remark=remark)


def _read(name: str, choice: Choice, stacks: Sequence[Stack]) -> tuple[sitk.Image, SeriesProvenance, list[str]]:
    """Load a choice: (image, provenance, remarks)."""
    stack, reason = choice.first, choice.reason
    loaded = [load(source) for source in choice.stacks]
    image, _, _ = loaded[-1]
    frames = [frame for _, used, _ in loaded for frame in used]
    notes = [note for _, _, remarks in loaded for note in remarks]
    if len(loaded) > 1:
        if len({item[0].GetSize() for item in loaded}) > 1:
            raise InputError(
                f"ADC: expected all b-values of {stack.label} on one grid, got unreadable slices in some; "
                "export it again."
            )
        adc, _ = fit_adc([sitk.GetArrayFromImage(item[0]) for item in loaded], [float(s.b or 0) for s in choice.stacks])
        fitted = sitk.GetImageFromArray(adc)
        fitted.CopyInformation(image)
        image = fitted
        notes.append("There is no ADC map in this examination; it was computed from the multi-b series.")
    if name == "dwi" and stack.calculated and stack.b is not None and stack.frames[0].b is not None:
        measured = measured_b(stack, multi_b(stacks))
        if measured is not None:
            reason += f"; its signal corresponds to b = {measured:.0f} s/mm² in a fit of the acquired b-values"
            if abs(measured / stack.b - 1) > B_TOLERANCE:
                notes.append(
                    f"The calculated DWI states b = {stack.b:g} s/mm², but its signal corresponds to {measured:.0f}: "
                    "check it."
                )
    paths = list(dict.fromkeys(frame.path for frame in frames))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    source = SeriesProvenance(
        sequence=name,
        path=str(paths[0] if len(paths) == 1 else paths[0].parent),
        reason=reason,
        sha256=digest.hexdigest(),
        series_uid=stack.uid,
        series_number=stack.number,
        series_description=str(stack.header.get("SeriesDescription", "")),
        b_value=stack.b if name == "dwi" else None,
        calculated=len(loaded) > 1 or (name == "dwi" and stack.calculated),
        instance_uids=tuple(dict.fromkeys(str(frame.header.get("SOPInstanceUID")) for frame in frames)),
    )
    return image, source, notes


def _patient(header: Any) -> dict[str, Any]:
    """Identifiers and context of the examination, as far as the tags have them."""
    tags = {
        "id": "PatientID",
        "sex": "PatientSex",
        "birth_date": "PatientBirthDate",
        "study_date": "StudyDate",
        "study_uid": "StudyInstanceUID",
        "study_description": "StudyDescription",
        "accession_number": "AccessionNumber",
        "frame_of_reference_uid": "FrameOfReferenceUID",
        "manufacturer": "Manufacturer",
        "model": "ManufacturerModelName",
        "field_strength_t": "MagneticFieldStrength",
    }
    patient: dict[str, Any] = {
        key: str(header.get(tag)) for key, tag in tags.items() if header.get(tag) not in (None, "")
    }
    age = str(header.get("PatientAge") or "")
    if age[:3].isdigit() and age.endswith("Y"):
        patient["age"] = int(age[:3])
    return patient
