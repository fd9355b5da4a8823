"""Prostate158 (Zenodo 6481141 and, for the test part, 6592345), unpacked as it is downloaded.

    FOLDER/prostate158_train/{train,valid}.csv    paths relative to the table; FOLDER may be this folder itself
    FOLDER/prostate158_train/train/020/{t2,adc,dwi,t2_anatomy_reader1,adc_tumor_reader1}.nii.gz
    FOLDER/prostate158_test/test.csv, test/001/...

Anatomy: 1 central gland, 2 peripheral zone (metadata of MONAI's prostate_mri_anatomy, by the same authors). A tumour
column that names `empty.nii.gz` says that there is none; an empty cell says nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from MedRationaleLib.errors import InputError
from MedRationaleTraining.data.cases import Case, Labels, check_complete
from MedRationaleTraining.data.label_maps import Split

TABLES: dict[Split, tuple[str, str]] = {
    "train": ("prostate158_train", "train.csv"),
    "val": ("prostate158_train", "valid.csv"),
    "test": ("prostate158_test", "test.csv"),
}
"""Split -> the archive's folder and its table."""
ANATOMY = "t2_anatomy_reader1"
COLUMNS = ("t2", "adc", "dwi", ANATOMY)
"""What every study has."""
TUMOUR = ("adc_tumor_reader1", "t2_tumor_reader1")
"""The first that is filled in. All files of a study are on one grid."""


class Prostate158Reader:
    """The examinations of one of the official tables."""

    name = "prostate158"

    def __init__(self, folder: str | Path, *, split: Split = "train") -> None:
        self._folder, self._split = Path(folder), split
        self.settings: Mapping[str, Any] = {"split": split}

    def cases(self) -> list[Case]:
        """See Reader."""
        table = self._table(self._split)
        if table is None:
            archive, name = TABLES[self._split]
            raise InputError(
                f"Expected {name} in {self._folder} or in {self._folder / archive}, got neither; unpack {archive}.zip "
                "there."
            )
        return check_complete(
            [self._case(row, table.parent) for row in _rows(table)],
            table.parent,
            f"unpack {TABLES[self._split][0]}.zip there again",
        )

    def ids(self) -> frozenset[str]:
        """See Reader."""
        tables = (self._table(split) for split in TABLES)
        return frozenset(_id(row) for table in tables if table is not None for row in _rows(table))

    def _table(self, split: Split) -> Path | None:
        archive, name = TABLES[split]
        return next((p for p in (self._folder / name, self._folder / archive / name) if p.is_file()), None)

    def _case(self, row: Mapping[str, str], home: Path) -> Case:
        labels = [Labels(path=home / row[ANATOMY], values={"tz": (1,), "pz": (2,)})]
        if tumour := next((row[column] for column in TUMOUR if row.get(column)), None):
            labels.append(Labels(path=home / tumour, values={"lesion": ()}))
        return Case(
            id=_id(row),
            patient=_id(row),
            t2w=home / row["t2"],
            adc=home / row["adc"],
            dwi=home / row["dwi"],
            labels=tuple(labels),
            split=self._split,
        )


def _id(row: Mapping[str, str]) -> str:
    """The name of the folder that the T2W is in: "020"."""
    return Path(row["t2"]).parent.name


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        if lacking := [column for column in COLUMNS if not row.get(column)]:
            raise InputError(
                f"Expected the columns {', '.join(COLUMNS)} filled in {table}, got no "
                f"{lacking[0]} in line {number}; unpack the download again."
            )
    return rows
