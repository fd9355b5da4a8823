"""Medical Segmentation Decathlon, Task05_Prostate, unpacked as it is downloaded.

    FOLDER/dataset.json, FOLDER/imagesTr/prostate_16.nii.gz (4-D: T2 and ADC), FOLDER/labelsTr/prostate_16.nii.gz

No DWI and no lesions. The 16 official test cases have no masks, so the 32 others are split here, by the last digit of
their number as PI-CAI's patients are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from MedRationaleLib.errors import InputError
from MedRationaleTraining.data.cases import Case, Labels, check_complete
from MedRationaleTraining.data.label_maps import Split, split_of


class MsdReader:
    """The labelled examinations of one split."""

    name = "msd"

    def __init__(self, folder: str | Path, *, split: Split = "train") -> None:
        """`folder` is Task05_Prostate."""
        self._folder, self._split = Path(folder), split
        self.settings: Mapping[str, Any] = {"split": split}

    def cases(self) -> list[Case]:
        """See Reader."""
        cases = [case for case in self._all() if case.split == self._split]
        return check_complete(cases, self._folder, "unpack Task05_Prostate.tar there again")

    def ids(self) -> frozenset[str]:
        """See Reader."""
        return frozenset(case.id for case in self._all())

    def _all(self) -> list[Case]:
        path = self._folder / "dataset.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            volumes = {name: int(index) for index, name in about["modality"].items()}
            values = {name: int(value) for value, name in about["labels"].items()}
            zones = {"pz": (values["PZ"],), "tz": (values["TZ"],)}
            channels = {"t2w": volumes["T2"], "adc": volumes["ADC"]}
            pairs = sorted((str(row["image"]), str(row["label"])) for row in about["training"])
            splits = [split_of(_id(image).rsplit("_", 1)[-1]) for image, _ in pairs]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"Expected the modalities T2 and ADC, the labels PZ and TZ and the list of training cases in {path}, "
                "got another file or none; give the folder Task05_Prostate as it was unpacked."
            ) from error
        return [
            Case(
                id=_id(image),
                patient=_id(image),
                t2w=self._folder / image,
                adc=self._folder / image,
                volumes=channels,
                labels=(Labels(path=self._folder / label, values=zones),),
                split=split,
            )
            for (image, label), split in zip(pairs, splits, strict=True)
        ]


def _id(image: str) -> str:
    return Path(image).name.removesuffix(".nii.gz")
