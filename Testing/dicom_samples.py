"""DICOM examinations made for tests: series of given geometry and tags, and how to write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

STUDY, FRAME = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=["frame"])
AXIAL = (1.0, 0, 0, 0, 1.0, 0)
SAGITTAL = (0, 1.0, 0, 0, 0, -1.0)
CORONAL = (1.0, 0, 0, 0, 0, -1.0)
OBLIQUE = (1.0, 0, 0, 0, math.cos(0.3), math.sin(0.3))
SHAPE = (12, 32, 40)  # slices, rows, columns
STEP, PIXEL = 4.0, (2.0, 2.5)  # mm; row and column spacing
T2W = {"SeriesDescription": "t2_tse_tra", "ScanningSequence": ["SE"], "EchoTime": 104, "RepetitionTime": 5000}
EPI = {"ScanningSequence": ["EP"], "EchoTime": 60, "RepetitionTime": 4000}
TRACEW = {**EPI, "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"], "SeriesDescription": "diff"}
ADC = {**EPI, "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], "SeriesDescription": "diff_ADC"}


def noise(low: float, high: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, SHAPE)


def dataset(pixels: np.ndarray, number: int, **tags: Any) -> Dataset:
    """An MR dataset of pixels (rows, columns) or (frames, rows, columns), uint16, with pixel data."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = tags.pop("SOPClassUID", MRImageStorage)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.Modality, ds.PatientID, ds.PatientAge, ds.PatientSex, ds.Manufacturer = "MR", "P1", "064Y", "M", "ACME"
    ds.StudyInstanceUID, ds.FrameOfReferenceUID, ds.SeriesNumber = STUDY, FRAME, number
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[f"series {number}"])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.Rows, ds.Columns = pixels.shape[-2:]
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.PixelData = np.clip(np.round(pixels), 0, 65535).astype("<u2").tobytes()
    return ds


def write(
    folder: Path,
    volume: np.ndarray,
    number: int,
    orientation: Sequence[float] = AXIAL,
    order: Sequence[int] | None = None,
    private: tuple[int, str, int, str, Any] | None = None,
    prefix: str = "",
    **tags: Any,
) -> None:
    """Write a series of slices, centred on the origin; `order` names the files in another order than the slices.

    `private`: group, creator, element, VR, value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.array(orientation, dtype=float).reshape(2, 3)
    normal = np.cross(row, column)
    count, rows, columns = volume.shape
    corner = -row * PIXEL[1] * (columns - 1) / 2 - column * PIXEL[0] * (rows - 1) / 2 - normal * STEP * (count - 1) / 2
    for i, plane in enumerate(volume):
        ds = dataset(plane, number, **tags)
        ds.ImagePositionPatient = [f"{v:.6f}" for v in corner + normal * STEP * i]
        ds.ImageOrientationPatient = [f"{v:.6f}" for v in orientation]
        ds.PixelSpacing, ds.SliceThickness, ds.InstanceNumber = list(PIXEL), STEP, i + 1
        if private:
            group, creator, element, vr, value = private
            ds.private_block(group, creator, create=True).add_new(element, vr, value)
        name = f"{prefix}{(order[i] if order is not None else i):03d}.dcm"
        ds.save_as(folder / name, enforce_file_format=True)


def write_examination(root: Path, b_values: Sequence[int] = (50, 400, 800), adc: bool = True, dwi: bool = True) -> None:
    """Axial T2W (series 2), multi-b DWI (4) of a known ADC, its ADC map (5)."""
    write(root / "t2", noise(1, 900), 2, **T2W)
    truth = np.random.default_rng(1).uniform(500, 2500, SHAPE)
    for b in b_values if dwi else ():
        write(root / "dwi", 4000 * np.exp(-b * truth * 1e-6), 4, prefix=f"b{b}-", SequenceName=f"*ep_b{b}t", **TRACEW)
    if adc:
        write(root / "adc", truth, 5, **ADC)


def array(image: sitk.Image | None) -> np.ndarray:
    assert image is not None
    return sitk.GetArrayFromImage(image)


def enhanced(
    volume: np.ndarray, number: int, frame_type: list[str], b_values: Sequence[float], shared: dict[str, Any]
) -> Dataset:
    """An enhanced multi-frame dataset of one volume (n, rows, columns) per b-value, slices in falling order.

    Each b-value has a 20th of the signal before it: of equal ones the ADC would be 0 but for the processor's rounding.
    """
    weighted = np.concatenate([volume // 20**i for i in range(len(b_values))])
    ds = dataset(weighted, number, SOPClassUID=EnhancedMRImageStorage, **shared)
    ds.NumberOfFrames = len(volume) * len(b_values)
    common, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(AXIAL)
    measures.PixelSpacing, measures.SliceThickness = list(PIXEL), STEP
    common.PlaneOrientationSequence, common.PixelMeasuresSequence = [orientation], [measures]
    ds.SharedFunctionalGroupsSequence = [common]
    frames = []
    for b in b_values:
        for i in range(len(volume)):
            groups, place, kind, diffusion, echo, scale = (Dataset() for _ in range(6))
            place.ImagePositionPatient = [0, 0, -STEP * i]
            kind.FrameType, diffusion.DiffusionBValue, echo.EffectiveEchoTime = frame_type, float(b), 100.0
            scale.RescaleSlope, scale.RescaleIntercept = 2, i
            groups.PlanePositionSequence, groups.MRImageFrameTypeSequence = [place], [kind]
            groups.MREchoSequence, groups.PixelValueTransformationSequence = [echo], [scale]
            if "DIFFUSION" in frame_type:
                groups.MRDiffusionSequence = [diffusion]
            frames.append(groups)
    ds.PerFrameFunctionalGroupsSequence = frames
    return ds
