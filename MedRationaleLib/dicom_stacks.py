"""DICOM frames put together: scanning a folder, grouping into stacks of one volume each, loading and fitting them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError

from .dicom_frames import Frame, nominal_b, number, read_frames, read_pixels
from .errors import InputError
from .image_files import check_volume
from .study import NAMES

MIN_SLICES = 5
"""A stack of fewer slices is no examination of a prostate (localisers have 1 to 5 a plane)."""

MAX_FILLED = 0.2
"""Largest fraction of unreadable slices that is filled by interpolation."""

DICOM_SUFFIXES = ("", ".dcm", ".dicom", ".ima", ".img")
"""Endings of files that are expected to be DICOM, so that one that is not is worth a warning."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """The frames of one series that make one volume: one kind, one b-value, one orientation."""

    frames: tuple[Frame, ...]
    kind: str
    b: float | None = None
    """s/mm², nominal, of a DWI."""

    @property
    def header(self) -> Any:
        return self.frames[0].header

    @property
    def number(self) -> int | None:
        value = number(self.header.get("SeriesNumber"))
        return None if value is None else int(value)

    @property
    def uid(self) -> str:
        return str(self.header.get("SeriesInstanceUID"))

    @property
    def calculated(self) -> bool:
        return self.kind == "dwi" and self.frames[0].calculated

    @cached_property
    def levels(self) -> list[list[Frame]]:
        """Frames by slice position along the normal, lowest first; frames of one level are repeats or directions."""
        normal = self.frames[0].axes[:, 2]
        ordered = sorted(self.frames, key=lambda f: (float(f.position @ normal), f.instance))
        levels: list[list[Frame]] = []
        for frame in ordered:
            if levels and abs((frame.position - levels[-1][0].position) @ normal) < 0.1:
                levels[-1].append(frame)
            else:
                levels.append([frame])
        return levels

    @cached_property
    def heights(self) -> np.ndarray:
        """Positions of the levels along the normal, mm, ascending; (n,)."""
        return np.array([level[0].position @ self.frames[0].axes[:, 2] for level in self.levels])

    @property
    def step(self) -> float:
        """Distance of neighbouring slices, mm."""
        if len(self.levels) < 2:
            return number(self.header.get("SliceThickness")) or 1.0
        return float(np.median(np.diff(self.heights)))

    @property
    def plane(self) -> str:
        """Plane of the slices, or "isotropic"."""
        return "isotropic" if self.step < 1.5 * float(max(self.header.PixelSpacing)) else self.frames[0].plane

    @property
    def label(self) -> str:
        b = f" b {self.b:g}" if self.kind == "dwi" and self.b is not None else ""
        return f'series {"?" if self.number is None else self.number} "{self.header.get("SeriesDescription", "")}"{b}'

    @property
    def described(self) -> str:
        rows, columns = (float(value) for value in self.header.PixelSpacing)
        return f"{self.plane}, {len(self.levels)} slices, {columns:.2f} x {rows:.2f} x {self.step:.1f} mm"

    @property
    def lattice(self) -> tuple[float, ...]:
        """Equal for stacks on one grid."""
        return (*self.frames[0].grid, len(self.levels), *np.round(self.levels[0][0].position, 1).tolist())


def _files(folder: Path) -> list[Path]:
    """All files under a folder, sorted; linked folders are followed, each place once."""
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()  # so that it is always the same way that leads to a place with several
        found += [path for path in (Path(parent) / name for name in names) if path.is_file()]
    return sorted(found)


def scan(folder: str | Path) -> tuple[list[Stack], list[str]]:
    """All MR stacks under a folder, and remarks on files that could not be read. Refuses two patients."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"DICOM: expected a folder, got {folder}, which is no folder; check the path.")
    paths = [path for path in _files(folder) if path.name.upper() != "DICOMDIR"]
    if not paths:
        raise InputError(f"DICOM: expected a folder with DICOM files, got the empty folder {folder}; check the path.")
    frames: list[Frame] = []
    skipped: list[Path] = []
    for path in paths:
        try:
            frames += read_frames(path)
        except InvalidDicomError:
            if path.suffix.lower() in DICOM_SUFFIXES and not path.name.startswith("."):
                skipped.append(path)
        except (ValueError, OSError):
            skipped.append(path)
    patients = sorted({str(f.header.get("PatientID") or f.header.get("PatientName") or "") for f in frames})
    if len(patients) > 1:
        raise InputError(
            f"DICOM: expected the images of one patient in {folder}, got {len(patients)} ({', '.join(patients[:4])}); "
            "give the folder of one patient."
        )
    if not frames:
        bad = f", {len(skipped)} of them unreadable" if skipped else ""
        raise InputError(
            f"DICOM: expected MR images in {folder}, got {len(paths)} files and none among them{bad}; check the folder."
        )
    unique = {(str(f.header.get("SOPInstanceUID")), f.index): f for f in reversed(frames)}  # a file may lie there twice
    return _stacks(list(unique.values())[::-1]), [skipped_note(skipped)] if skipped else []


def skipped_note(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths[:3]) + (" ..." if len(paths) > 3 else "")
    return f"{len(paths)} unreadable DICOM file{'s were' if len(paths) > 1 else ' was'} skipped ({names})."


def _stacks(frames: Iterable[Frame]) -> list[Stack]:
    """Group frames by series, kind, b-value, echo and orientation, in the order of series numbers."""
    by_series: dict[str, list[Frame]] = defaultdict(list)
    for frame in frames:
        by_series[str(frame.header.get("SeriesInstanceUID"))].append(frame)
    stacks = []
    for members in by_series.values():
        kinds = {frame.kind[0] for frame in members}
        b_of = nominal_b(members)
        groups: dict[tuple[object, ...], list[Frame]] = defaultdict(list)
        for frame in members:
            kind = frame.kind[0]
            if kind == "t2w" and "dwi" in kinds:
                kind = "dwi"  # the b = 0 images of a diffusion series
            b = (0.0 if frame.kind[0] == "t2w" else b_of[frame]) if kind == "dwi" else None
            variant = frame.calculated if kind == "dwi" else frame.header.get("EchoTime") if kind == "t2w" else None
            groups[kind, b, frame.grid, variant].append(frame)
        tilts = {key[2][:6] for key in groups if key[0] == "t2w"}  # type: ignore[index]
        for key, group in groups.items():
            kind = "localiser" if key[0] == "t2w" and len(tilts) > 1 else str(key[0])
            b = key[1] if isinstance(key[1], float) else None
            group.sort(key=lambda f: (f.instance, f.index))
            stacks.append(Stack(frames=tuple(group), kind=kind, b=b))
    return sorted(stacks, key=lambda s: (s.number is None, s.number or 0, s.b or 0.0))


def trace(stack: Stack, level: Sequence[Frame]) -> tuple[Frame, ...]:
    """The frames of one slice position that make its value: T2W and ADC the first; of a DWI the frames that already are
    the mean over directions, else all directions."""
    if stack.kind != "dwi":
        return tuple(level[:1])
    return tuple(f for f in level if f.trace) or tuple(level)


def load(stack: Stack) -> tuple[sitk.Image, tuple[Frame, ...], list[str]]:
    """The stack as a float32 image (slices sorted along the normal), the frames used, and remarks.

    Directions of a DWI become the trace-weighted image, their geometric mean exp(mean(log S)). Slices that cannot be
    read or are absent are filled by linear interpolation between their neighbours.
    """
    name = NAMES.get(stack.kind, "Series")
    pixels: dict[Path, np.ndarray | None] = {}
    slices: list[np.ndarray | None] = []
    used: list[Frame] = []
    bad: list[Path] = []
    for level in stack.levels:
        values = []
        for frame in trace(stack, level):
            if frame.path not in pixels:
                try:
                    pixels[frame.path] = read_pixels(frame.path)
                except ValueError:
                    pixels[frame.path] = None
                    bad.append(frame.path)
            volume = pixels[frame.path]
            if volume is not None and frame.index < len(volume):
                values.append(volume[frame.index])
                used.append(frame)
        if len(values) > 1:
            values = [np.exp(np.mean(np.log(np.maximum(values, 1e-3)), axis=0))]
        slices.append(values[0] if values else None)
    notes = [skipped_note(bad)] if bad else []
    if not used:
        raise InputError(f"{name}: expected readable images in {stack.label}, got none; export the series again.")
    read = [i for i, plane in enumerate(slices) if plane is not None]
    places = np.round((stack.heights[read] - stack.heights[read[0]]) / stack.step).astype(int)
    stray = np.abs((stack.heights[read] - stack.heights[read[0]]) / stack.step - places).max()
    count = int(places[-1]) + 1
    if stray > 0.1 or count - len(read) > MAX_FILLED * count:
        raise InputError(
            f"{name}: expected evenly spaced slices {stack.step:.1f} mm apart in {stack.label}, got {len(read)} slices "
            f"over {stack.heights[read[-1]] - stack.heights[read[0]]:.0f} mm with gaps; export the whole series again."
        )
    first, last = stack.levels[read[0]][0], stack.levels[read[-1]][0]
    axes = first.axes
    sideways = (last.position - first.position) @ axes[:, :2]
    if np.abs(sideways).max() > 0.02 * max(stack.step * (count - 1), 50.0):
        raise InputError(
            f"{name}: expected slices stacked along their normal in {stack.label}, got slices that shift sideways by "
            f"{np.abs(sideways).max():.1f} mm; export the original series."
        )
    array = np.empty((count, int(first.header.Rows), int(first.header.Columns)), np.float32)
    for place, i in zip(places, read, strict=True):
        array[place] = slices[i]
    for place in sorted(set(range(count)) - set(places.tolist())):
        below, above = places[places < place].max(), places[places > place].min()
        part = np.float32((place - below) / (above - below))
        array[place] = (1 - part) * array[below] + part * array[above]
    if count > len(read):
        missing = count - len(read)
        notes.append(
            f"{name}: {missing} slice{'s' if missing > 1 else ''} of {stack.label} {'are' if missing > 1 else 'is'} "
            "missing and interpolated."
        )
    image = sitk.GetImageFromArray(array)
    rows, columns = (float(value) for value in first.header.PixelSpacing)
    image.SetSpacing((columns, rows, stack.step))
    image.SetOrigin(first.position.tolist())
    image.SetDirection(axes.ravel().tolist())
    check_volume(image, f"{name} ({stack.label})")
    return image, tuple(used), notes


def fit_adc(signals: Sequence[np.ndarray], b_values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Mono-exponential fit S(b) = S0 exp(-b ADC) by linear least squares on log S over all b (s/mm²).

    ADC = -sum_i (b_i - mean b) log S_i / sum_i (b_i - mean b)². Returns (ADC in 1e-6 mm²/s, log S0), both in the
    signals' shape; ADC is 0 where a signal is not positive, and not below 0.
    """
    stack = np.stack([np.asarray(signal, np.float32) for signal in signals])
    logs = np.log(np.maximum(stack, 1e-3))
    centred = np.asarray(b_values, np.float32) - np.float32(np.mean(b_values))
    adc = -np.tensordot(centred / np.sum(centred**2), logs, axes=1)
    log_s0 = logs.mean(axis=0) + adc * np.float32(np.mean(b_values))
    return np.where((stack > 0).all(axis=0), np.maximum(adc, 0) * np.float32(1e6), 0).astype(np.float32), log_s0


def multi_b(stacks: Iterable[Stack]) -> list[Stack]:
    """The acquired DWI stacks on one grid with the most b-values (two at least, 300 s/mm² apart or more), by b."""
    grids: dict[tuple[float, ...], dict[float, Stack]] = defaultdict(dict)
    for stack in stacks:
        if usable(stack) and stack.kind == "dwi" and stack.b is not None and not stack.calculated:
            grids[stack.lattice].setdefault(stack.b, stack)
    best = max(grids.values(), key=len, default={})
    return [best[b] for b in sorted(best)] if len(best) > 1 and max(best) - min(best) >= 300 else []


def usable(stack: Stack) -> bool:
    return stack.plane in ("axial", "isotropic") and len(stack.levels) >= MIN_SLICES


def measured_b(calculated: Stack, sources: Sequence[Stack]) -> float | None:
    """b at which the mono-exponential model of the acquired b-values gives a calculated image's signal: the median of
    (log S0 - log S) / ADC over voxels with ADC 0.5-2.5e-3 mm²/s; None where it cannot be told."""
    if not sources or calculated.lattice != sources[0].lattice:
        return None
    try:
        signal = sitk.GetArrayFromImage(load(calculated)[0])
        signals = [sitk.GetArrayFromImage(load(stack)[0]) for stack in sources]
    except InputError:
        return None
    if len({values.shape for values in (signal, *signals)}) > 1:
        return None
    adc, log_s0 = fit_adc(signals, [float(stack.b or 0) for stack in sources])
    body = (adc > 500) & (adc < 2500) & (signal > 0.02 * signal.max())
    if body.sum() < 100:
        return None
    return float(np.median((log_s0[body] - np.log(signal[body])) / (adc[body] * 1e-6)))
