"""Real label maps to synthesise on: the packed PI-CAI anatomy archive or a clone of DIAGNijmegen/picai_labels."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol
from zipfile import BadZipFile

import numpy as np
import SimpleITK as sitk

from MedRationaleLib.errors import InputError
from MedRationaleLib.preprocessing import CropSpec, Grid

Split = Literal["train", "val", "test"]
LABEL_CROP = CropSpec(spacing_mm=(0.5, 0.5, 3.0), size=(256, 256, 24), pixels=256)
"""What a label map covers: 128 x 128 x 72 mm."""
EXCLUDED = frozenset(
    {
        *("11373_1001396", "11063_1001085"),  # their images are the real tests
        *("11050_1001070", "10096_1000096"),  # their gland maps are wrong
        *("10000_1000000", "10270_1000274"),  # test patients whose images serve as backgrounds for training
    }
)


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Zones and lesions of one patient, (24, 256, 256) uint8 at 3.0 x 0.5 x 0.5 mm, canonical LPS orientation."""

    case_id: str
    """Patient and study number as PI-CAI writes them, "10005_1000005"."""
    zones: np.ndarray
    """0 background, 1 PZ, 2 TZ."""
    lesions: np.ndarray
    """0, or ISUP grade 2..5 (1 = graded 2 or more without a number)."""


class LabelMaps(Protocol):
    """A source of label maps."""

    def cases(self, split: Split) -> list[str]:
        """Case ids of a split."""

    def load(self, case_id: str) -> LabelMap:
        """One label map."""


def split_of(case_id: str) -> Split:
    """By the last digit of the patient id: 0 test, 1 validation, else training, so that no patient is in two splits."""
    digit = int(case_id.split("_")[0]) % 10
    return "test" if digit == 0 else "val" if digit == 1 else "train"


class PackedAnatomy:
    """The 15 npz files of picai_anatomy (format in its README.txt)."""

    def __init__(self, folder: Path) -> None:
        with (folder / "picai_anatomy_meta.csv").open(newline="") as file:
            self._rows = {row["case_id"]: row for row in csv.DictReader(file)}
        self._folder = folder

    def cases(self, split: Split) -> list[str]:
        """Case ids of a split, without clipped and known wrong maps."""
        return [
            case
            for case, row in self._rows.items()
            if split_of(case) == split and row["truncated"] != "True" and case not in EXCLUDED
        ]

    def load(self, case_id: str) -> LabelMap:
        """Unpack one case: bits 0-1 zone, 3-5 human lesion."""
        path = self._folder / f"picai_anatomy_{int(self._rows[case_id]['shard']):02d}.npz"
        try:
            packed = _archive(path)[case_id]
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise InputError(
                f"Expected the label map {case_id} in {path}, got '{error}'; copy the archive anew and completely."
            ) from error
        return LabelMap(case_id=case_id, zones=packed & 3, lesions=(packed >> 3) & 7)


@lru_cache(maxsize=4)
def _archive(path: Path) -> np.lib.npyio.NpzFile:
    return np.load(path)


class PicaiLabels:
    """A clone of the picai_labels repository: zones by Yuan23, lesions by the human experts (resampled)."""

    ZONES = Path("anatomical_delineations/zonal_pz_tz/AI/Yuan23")
    LESIONS = Path("csPCa_lesion_delineations/human_expert/resampled")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cases = sorted(p.name.removesuffix(".nii.gz") for p in (folder / self.ZONES).glob("*.nii.gz"))
        if not self._cases:
            raise InputError(
                f"Expected zone maps in {folder / self.ZONES}, found none; clone DIAGNijmegen/picai_labels completely."
            )

    def cases(self, split: Split) -> list[str]:
        """Case ids of a split."""
        return [case for case in self._cases if split_of(case) == split and case not in EXCLUDED]

    def load(self, case_id: str) -> LabelMap:
        """Zones and lesions, brought to 3.0 x 0.5 x 0.5 mm around the gland."""
        zones = sitk.ReadImage(str(self._folder / self.ZONES / f"{case_id}.nii.gz"), sitk.sitkUInt8)
        lesion_path = self._folder / self.LESIONS / f"{case_id}.nii.gz"
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.Execute(zones > 0)
        centre = shape.GetCentroid(1) if shape.HasLabel(1) else None
        grid = Grid.for_image(zones, LABEL_CROP, centre)
        lesions = sitk.ReadImage(str(lesion_path), sitk.sitkUInt8) if lesion_path.exists() else zones * 0
        return LabelMap(
            case_id=case_id,
            zones=grid.from_reference(zones, nearest=True),
            lesions=grid.from_reference(lesions, nearest=True),
        )


def open_label_maps(folder: str | Path) -> LabelMaps:
    """Recognise which of the two layouts a folder has."""
    folder = Path(folder)
    if (folder / "picai_anatomy_meta.csv").exists():
        return PackedAnatomy(folder)
    if (folder / PicaiLabels.ZONES).is_dir():
        return PicaiLabels(folder)
    raise InputError(
        f"Expected picai_anatomy_meta.csv or {PicaiLabels.ZONES} in {folder}, found neither; "
        "give a clone of DIAGNijmegen/picai_labels or the packed anatomy archive."
    )


def iterate(maps: LabelMaps, split: Split) -> Iterator[LabelMap]:
    """Every label map of a split."""
    for case in maps.cases(split):
        yield maps.load(case)
