"""PI-CAI: picai_public_images_fold0..4 (Zenodo 6624726) and a clone of DIAGNijmegen/picai_labels.

    IMAGES/10005/10005_1000005_{t2w,adc,hbv}.mha      also in the folder that each of the five archives unpacks to
    LABELS/clinical_information/marksheet.csv         one row an examination
    LABELS/csPCa_lesion_delineations/human_expert/    resampled (on the T2W grid), Pooch25, original
    LABELS/anatomical_delineations/                   zonal_pz_tz/AI/Yuan23 (1 PZ, 2 TZ), whole_gland/AI/Guerbet23

The five folds are published as a list only (`src/picai_baseline/splits/picai/splits.json` of
DIAGNijmegen/picai_baseline), by no rule that could be computed from the ids, so they are read from that file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from MedRationaleLib.errors import InputError
from MedRationaleTraining.data.cases import Case, Labels, check_complete
from MedRationaleTraining.data.label_maps import EXCLUDED, PicaiLabels, Split, split_of

MARKSHEET = Path("clinical_information/marksheet.csv")
HUMAN = Path("csPCa_lesion_delineations/human_expert")
LESIONS = (("resampled", True), ("Pooch25", False), ("original", False))
"""Folders of human lesion masks, the best first, and whether they promise the T2W's grid. `resampled` has 1295
examinations, Pooch25 the 205 others; its README promises no grid, nor does `original`."""
ANATOMY: tuple[tuple[Path, dict[str, tuple[int, ...]]], ...] = (
    (PicaiLabels.ZONES, {"pz": (1,), "tz": (2,)}),
    (Path("anatomical_delineations/zonal_pz_tz/AI/HeviAI23"), {"pz": (1,), "tz": (2,)}),
    (Path("anatomical_delineations/whole_gland/AI/Guerbet23"), {"gland": ()}),
    (Path("anatomical_delineations/whole_gland/AI/Bosma22b"), {"gland": ()}),
)
"""The first folder that the clone has is taken: zones, whose union is the gland, before whole glands."""
REMEDY = (
    "unpack all of picai_public_images_fold0.zip to fold4.zip there and bring the clone of DIAGNijmegen/picai_labels "
    "up to date, or choose the folds that are there"
)


class PicaiReader:
    """Examinations of some of the official folds, or else of the project's split by patient (label_maps.split_of).

    Those in label_maps.EXCLUDED are left out: the project's real test cases and what is known to be wrong.
    """

    name = "picai"

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        *,
        split: Split = "train",
        folds: Sequence[int] | None = None,
        splits: str | Path | None = None,
    ) -> None:
        """`folds` (0 to 4) instead of `split`; they need `splits`, the splits.json of picai_baseline."""
        self._images, self._labels, self._split = Path(images), Path(labels), split
        if folds is not None and splits is None:
            raise InputError(
                "Expected the list of PI-CAI's folds, got none; give src/picai_baseline/splits/picai/splits.json of "
                "DIAGNijmegen/picai_baseline."
            )
        self._folds = read_folds(splits) if splits is not None else {}
        self._chosen = None if folds is None else tuple(folds)
        unknown = sorted(set(self._chosen or ()) - set(self._folds.values()))
        if unknown or self._chosen == ():
            raise InputError(f"Expected folds of {sorted(set(self._folds.values()))}, got {folds}; choose of these.")
        part = split if folds is None else "folds " + ", ".join(str(fold) for fold in sorted(set(folds)))
        self.settings: Mapping[str, Any] = {"split": part, "picai_labels": True}

    def cases(self) -> list[Case]:
        """See Reader."""
        rows = self._rows()
        if absent := sorted(id for id, fold in self._folds.items() if fold in (self._chosen or ()) and id not in rows):
            raise InputError(
                f"Expected the examinations of the chosen folds in {self._labels / MARKSHEET}, got {len(absent)} too "
                f"few, the first is {absent[0]}; bring the clone of DIAGNijmegen/picai_labels up to date."
            )
        anatomy = next(((self._labels / f, v) for f, v in ANATOMY if (self._labels / f).is_dir()), None)
        if anatomy is None:
            raise InputError(
                f"Expected masks of zones or glands in {self._labels / ANATOMY[0][0]}, got no such folder; bring the "
                "clone of DIAGNijmegen/picai_labels up to date."
            )
        chosen = [id for id in rows if self._is_chosen(id) and id not in EXCLUDED]
        folders = {path.name: path for pattern in ("*", "*/*") for path in self._images.glob(pattern) if path.is_dir()}
        return check_complete([self._case(id, rows[id], anatomy, folders) for id in chosen], self._images, REMEDY)

    def ids(self) -> frozenset[str]:
        """See Reader."""
        return frozenset(self._rows())

    def _is_chosen(self, id: str) -> bool:
        return split_of(id) == self._split if self._chosen is None else self._folds.get(id) in self._chosen

    def _rows(self) -> dict[str, dict[str, str]]:
        path = self._labels / MARKSHEET
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            return {f"{row['patient_id']}_{row['study_id']}": row for row in rows}
        except (OSError, KeyError, UnicodeDecodeError) as error:
            raise InputError(
                f"Expected a table with patient_id and study_id in {path}, got {_reason(error)}; give a complete clone "
                "of DIAGNijmegen/picai_labels."
            ) from error

    def _case(
        self,
        id: str,
        row: Mapping[str, str],
        anatomy: tuple[Path, dict[str, tuple[int, ...]]],
        folders: Mapping[str, Path],
    ) -> Case:
        patient = id.split("_")[0]
        folder = folders.get(patient, self._images / patient)
        masks = [(self._labels / HUMAN / name / f"{id}.nii.gz", on_t2w) for name, on_t2w in LESIONS]
        lesion, on_t2w = next((m for m in masks if m[0].is_file()), masks[0])
        return Case(
            id=id,
            patient=patient,
            t2w=folder / f"{id}_t2w.mha",
            adc=folder / f"{id}_adc.mha",
            dwi=folder / f"{id}_hbv.mha",
            labels=(
                Labels(path=anatomy[0] / f"{id}.nii.gz", values=anatomy[1]),
                Labels(path=lesion, values={"lesion": ()}, on_t2w=on_t2w),
            ),
            split=self._split if self._chosen is None else None,
            fold=self._folds.get(id),
            facts={key: value for key, value in row.items() if key and value},
        )


def read_folds(path: str | Path) -> dict[str, int]:
    """Examination -> the fold in which it is for validation, from the splits.json of picai_baseline.

    Raises InputError where a patient is in two folds.
    """
    try:
        splits = json.loads(Path(path).read_text(encoding="utf-8"))
        folds = {str(case): fold for fold, split in enumerate(splits) for case in split["val"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"Expected a list of folds with train and val in {path}, got {_reason(error)}; take "
            "src/picai_baseline/splits/picai/splits.json of DIAGNijmegen/picai_baseline."
        ) from error
    patients: dict[str, int] = {}
    for case, fold in folds.items():
        patient = case.split("_")[0]
        if patients.setdefault(patient, fold) != fold:
            raise InputError(
                f"Expected every patient in one fold of {path}, got patient {patient} in folds {patients[patient]} and "
                f"{fold}; take the file as DIAGNijmegen/picai_baseline has it."
            )
    return folds


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    return str(getattr(error, "strerror", None) or "something else")
