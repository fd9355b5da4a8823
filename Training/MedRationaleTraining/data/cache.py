"""Real examinations prepared once, stored as synthetic ones are, so that training reads both in the same way."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from rich.progress import Progress
from scipy.ndimage import center_of_mass, label

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import write_text
from MedRationaleLib.image_files import quiet_itk
from MedRationaleLib.preprocessing import CropSpec, prepare
from MedRationaleLib.study import Study
from MedRationaleLib.synthesis.regions import Region, measured_answers, region_of
from MedRationaleTraining.data.cases import Case, Labels, Reader
from MedRationaleTraining.data.label_maps import Split
from MedRationaleTraining.data.msd import MsdReader
from MedRationaleTraining.data.picai import PicaiReader
from MedRationaleTraining.data.prostate158 import Prostate158Reader
from MedRationaleTraining.data.rationale_set import PRESENCE, PRESENT, ZONE, Rationale, read_rationales, walk
from MedRationaleTraining.data.synthetic import LESION_BIT, VALID_SHIFT, claim_folder, store_exam

_logger = logging.getLogger(__name__)
CROP = CropSpec()
"""What is stored: 192 x 192 x 72 mm, as the model sees it."""
GRID_TOLERANCE_MM = 0.1
"""How far corners of volumes on one grid may be apart: NIfTI rounds a geometry to float32, MetaImage to 6 digits."""
PZ, TZ, GLAND = 1, 2, 3
"""Bits 0-1 of stored labels; GLAND is gland whose zone nobody labelled."""
REFUSED = "refused.json"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which real examinations to prepare."""

    reader: Literal["picai", "prostate158", "msd"]
    """The data set."""
    data: str
    """Its folder: PI-CAI's images, the unpacked Prostate158 or Task05_Prostate."""
    labels: str | None = None
    """PI-CAI: a clone of DIAGNijmegen/picai_labels."""
    split: Split = "train"
    """By patient. Prostate158: the official tables. PI-CAI and MSD: ids ending in 0 test, in 1 val, others train."""
    folds: list[int] | None = None
    """PI-CAI: official folds (0 to 4) instead of split, e.g. [1,2,3,4] for training and [0] for validation."""
    splits: str | None = None
    """PI-CAI: the list of its folds, src/picai_baseline/splits/picai/splits.json of DIAGNijmegen/picai_baseline."""
    rationales: str | None = None
    """JSONL of {"case": id, "lesion": number or "slice": index, "rationale": {node: concept}}."""
    workers: int = 1
    """Processes."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What prepare_set did."""

    made: int
    """Examinations prepared now; the others were there."""
    total: int
    """Examinations that the set now has."""
    refused: Mapping[str, str]
    """Case id -> why it could not be prepared. A later run tries it again."""


def open_reader(config: PrepareConfig) -> Reader:
    """The reader that the configuration names; reads nothing but PI-CAI's list of folds."""
    picai = config.reader == "picai"
    for option in ("labels", "folds", "splits"):
        if not picai and getattr(config, option) is not None:
            raise InputError(
                f"Expected {option} with the reader picai only, got it with {config.reader}; leave it out."
            )
    if picai and config.labels is None:
        raise InputError("Expected labels with the reader picai, got none; give a clone of DIAGNijmegen/picai_labels.")
    if picai:
        return PicaiReader(
            config.data, str(config.labels), split=config.split, folds=config.folds, splits=config.splits
        )
    if config.reader == "prostate158":
        return Prostate158Reader(config.data, split=config.split)
    return MsdReader(config.data, split=config.split)


def prepare_set(reader: Reader, out: str | Path, *, rationales: str | Path | None = None, workers: int = 1) -> Prepared:
    """Write the reader's examinations to `out`, one folder each, keeping those that are there.

    An examination that cannot be used (a damaged file, a mask on another grid) is left out, logged, and named in
    refused.json; the others are prepared. Raises InputError where the download is incomplete, where the rationale
    set has a mistake, where `out` has a set of other settings, and where no examination could be prepared.
    """
    if workers < 1:
        raise InputError(f"Expected workers of at least 1, got {workers}; correct the configuration.")
    out, cases, tree = Path(out), reader.cases(), _tree()
    told = read_rationales(rationales, reader.ids(), tree) if rationales is not None else {}
    digest = hashlib.sha256(Path(rationales).read_bytes()).hexdigest() if rationales is not None else None
    claim_folder(out, {"reader": reader.name, **reader.settings, "rationales": digest, "crop": asdict(CROP)})
    missing = [case for case in cases if not (out / case.id / "rationales.json").exists()]
    jobs = [(case, told.get(case.id, ())) for case in missing]
    refused = dict(_run(jobs, out, workers))
    for why in refused.values():
        _logger.warning("left out: %s", why)
    if refused:
        write_text(out / REFUSED, json.dumps(refused, indent=1) + "\n")
    else:
        (out / REFUSED).unlink(missing_ok=True)
    if len(refused) == len(cases):
        raise InputError(
            f"None of {len(cases)} examinations could be prepared; the first: {next(iter(refused.values()))}"
        )
    return Prepared(made=len(missing) - len(refused), total=len(cases) - len(refused), refused=refused)


def _run(jobs: list[tuple[Case, tuple[Rationale, ...]]], out: Path, workers: int) -> Iterable[tuple[str, str]]:
    """(case id, why) of those that were refused."""
    make = partial(_prepare_one, out=out)
    results: list[str | None] = []
    # No rich.progress.track: left by an exception, its generator may be collected in another bar's thread, and hang it.
    with Progress() as progress, ExitStack() as stack:
        task = progress.add_task("Preparing", total=len(jobs))
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, initializer=_one_thread))
        for why in pool.map(make, jobs) if workers > 1 else map(make, jobs):
            results.append(why)
            progress.advance(task)
    return ((case.id, why) for (case, _), why in zip(jobs, results, strict=True) if why is not None)


def _one_thread() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _prepare_one(job: tuple[Case, tuple[Rationale, ...]], *, out: Path) -> str | None:
    """Store one case; a sentence where it cannot be used."""
    case, rationales = job
    try:
        images, labels, record = prepare_case(case, rationales)
    except InputError as error:
        return f"{case.id}: {error}"
    store_exam(out / case.id, images=images, labels=labels, record=record)
    return None


# ------------------------------------------------------------------ one examination


def prepare_case(case: Case, rationales: tuple[Rationale, ...] = ()) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """What a stored examination consists of (see StoredExam).

    Returns:
        images (3, S, H, W) float16, z-scored per slice, 0 where a sequence has no data; labels and regions as
        (2, S, H, W) uint8; the record of rationales.json. The crop is centred on the gland where one is labelled.
    """
    study = read_study(case)
    zones, lesions = read_masks(case, study.t2w)
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(zones > 0)
    given = prepare(study, CROP, shape.GetCentroid(1) if shape.HasLabel(1) else None)

    def sample(image: sitk.Image) -> np.ndarray:
        return given.grid.from_reference(image, nearest=True, pixels=CROP.pixels)

    places, described, count = place_regions(case, zones, lesions, rationales)
    zone, regions = sample(zones), sample(places)
    stored = [
        _region(number, regions == number, zone, described.get(number), case.classes)
        for number in range(1, count + 1)
        if (regions == number).any()
    ]
    for number, rationale in described.items():
        if not (regions == number).any():
            _logger.warning("%s: %s lies outside the crop or between its slices; left out", case.id, rationale.line)
    regions[~np.isin(regions, [region.label for region in stored])] = 0
    labels = zone | ((sample(lesions) > 0).astype(np.uint8) * LESION_BIT)
    for channel in range(3):
        labels |= given.valid[:, channel].astype(np.uint8) << (VALID_SHIFT + channel)
    record = {
        "source": case.id,
        "classes": list(case.classes),
        "regions": [asdict(region) for region in stored],
        "patient": case.patient,
        "split": case.split,
        "fold": case.fold,
        "facts": dict(case.facts),
        "warnings": list(study.warnings),
    }
    return given.images.transpose(1, 0, 2, 3).astype(np.float16), np.stack([labels, regions]), record


def read_study(case: Case) -> Study:
    """The case's images, checked and on the T2W's grid."""
    if not case.volumes:
        return Study.from_files(t2w=case.t2w, adc=case.adc, dwi=case.dwi, patient={"id": case.patient})
    images = {}
    for name, index in case.volumes.items():
        image = _read(getattr(case, name))
        if image.GetDimension() != 4 or not 0 <= index < image.GetSize()[3]:
            raise InputError(
                f"Expected a 4-D image with at least {index + 1} volumes in {getattr(case, name)}, got size "
                f"{' x '.join(map(str, image.GetSize()))}; unpack the download again."
            )
        images[name] = image[:, :, :, index]
    return Study.from_images(**images, patient={"id": case.patient})


def read_masks(case: Case, t2w: sitk.Image) -> tuple[sitk.Image, sitk.Image]:
    """Zones (0, PZ, TZ or GLAND) and lesions (0 or 1), both uint8 on the T2W's grid in LPS orientation."""
    size = sitk.GetArrayViewFromImage(t2w).shape
    zones, lesions = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    for labels in case.labels:
        array = _on_t2w(labels, t2w)
        masks = {name: np.isin(array, values) if values else array > 0 for name, values in labels.values.items()}
        if "gland" in masks:
            zones[masks["gland"] & (zones == 0)] = GLAND
        for name, value in (("pz", PZ), ("tz", TZ)):
            if name in masks:
                zones[masks[name]] = value
        if "lesion" in masks:
            lesions[masks["lesion"]] = 1
    images = sitk.GetImageFromArray(zones), sitk.GetImageFromArray(lesions)
    for image in images:
        image.CopyInformation(t2w)
    return sitk.DICOMOrient(images[0], "LPS"), sitk.DICOMOrient(images[1], "LPS")


def _on_t2w(labels: Labels, t2w: sitk.Image) -> np.ndarray:
    """The label file's values on the T2W's grid."""
    image = _read(labels.path)
    if image.GetDimension() != 3:
        raise InputError(
            f"Expected 3-D masks in {labels.path}, got {image.GetDimension()} dimensions; replace the file."
        )
    apart = _apart(image, t2w)
    if apart > GRID_TOLERANCE_MM or image.GetSize() != t2w.GetSize():
        if labels.on_t2w:
            sizes = (" x ".join(map(str, i.GetSize())) for i in (t2w, image))
            raise InputError(
                f"Expected masks on the T2W's grid of {next(sizes)} voxels in {labels.path}, got {next(sizes)} voxels "
                f"with corners up to {apart:.1f} mm apart; take the masks of this very T2W."
            )
        image = sitk.Resample(image, t2w, sitk.Transform(), sitk.sitkNearestNeighbor, 0, image.GetPixelID())
    array = np.rint(sitk.GetArrayFromImage(image)).astype(np.int64)
    known = {value for values in labels.values.values() for value in values}
    if known and (other := sorted(set(np.unique(array).tolist()) - known - {0})):
        raise InputError(
            f"Expected the values 0, {', '.join(map(str, sorted(known)))} in {labels.path}, got {other[0]}, too; take "
            "the masks as they were published."
        )
    return array


def _apart(image: sitk.Image, t2w: sitk.Image) -> float:
    """Largest distance of two volumes' corresponding corners, mm."""
    corners = [
        np.array([i.TransformIndexToPhysicalPoint(c) for c in product(*((0, n - 1) for n in i.GetSize()))])
        for i in (image, t2w)
    ]
    return float(np.linalg.norm(corners[0] - corners[1], axis=1).max())


def _read(path: Path) -> sitk.Image:
    """An image as stored; what is cut off is refused, for ITK would fill it up with zeros."""
    broken = f"Expected a complete image file, got {path}, which is truncated or damaged; download it again."
    try:
        if path.name.endswith(".gz"):
            gzip.decompress(path.read_bytes())
        with quiet_itk():
            return sitk.ReadImage(str(path))
    except (OSError, EOFError, zlib.error, RuntimeError) as error:
        raise InputError(broken) from error


# ------------------------------------------------------------------ regions


def place_regions(
    case: Case, zones: sitk.Image, lesions: sitk.Image, rationales: tuple[Rationale, ...]
) -> tuple[sitk.Image, dict[int, Rationale], int]:
    """Where every rationale holds; zones and lesions as read_masks gives them.

    Returns:
        regions: uint8 on their grid; lesions are 1 .. n from inferior to superior, what
            lines with `slice` describe follows.
        described: number of a region -> its line; lesions without one are regions, too.
        count: of regions.
    """
    lesion, gland = sitk.GetArrayFromImage(lesions), sitk.GetArrayFromImage(zones) > 0
    pieces, count = label(lesion, np.ones((3, 3, 3)))
    order = sorted(range(1, count + 1), key=lambda k: center_of_mass(pieces == k))
    rank = np.zeros(count + 1, int)
    rank[order] = np.arange(1, count + 1)
    regions, described, lesion_count = rank[pieces], {}, count
    for rationale in rationales:
        if rationale.lesion is not None:
            if rationale.lesion > lesion_count:
                raise InputError(
                    f"{rationale.line}: expected one of the {lesion_count} lesions of {case.id}, got number "
                    f"{rationale.lesion}; correct it."
                )
            described[rationale.lesion] = rationale
    for rationale in rationales:
        if rationale.slice is not None:
            if rationale.slice >= len(regions):
                raise InputError(
                    f"{rationale.line}: expected a slice from 0 to {len(regions) - 1} of {case.id}, got "
                    f"{rationale.slice}; correct it."
                )
            where = lesion[rationale.slice] > 0
            where = where if where.any() else gland[rationale.slice]
            if not where.any():
                raise InputError(
                    f"{rationale.line}: expected a slice of {case.id} with gland or lesion, got slice "
                    f"{rationale.slice} without; correct it."
                )
            count += 1
            regions[rationale.slice][where] = count
            described[count] = rationale
    if count > 255:
        raise InputError(f"Expected at most 255 regions in {case.id}, got {count}; leave some lines out.")
    image = sitk.GetImageFromArray(regions.astype(np.uint8))
    image.CopyInformation(lesions)
    return image, described, count


def _region(
    number: int, mask: np.ndarray, zone: np.ndarray, rationale: Rationale | None, classes: tuple[str, ...]
) -> Region:
    """A region with its rationale: as written, as measured on the mask, and walked to its category.

    A lesion without a line has no more than its presence and zone, and 0 for scores that nobody gave.
    """
    measured = {PRESENCE: PRESENT}
    pz, tz = (int((zone[mask] == value).sum()) for value in (PZ, TZ))
    if pz or tz:
        measured[ZONE] = "zone_pz" if pz >= tz else "zone_tz"
    if rationale is None:
        return Region(label=number, answers=measured, t2w_score=0, dwi_score=0, pirads=0, is_lesion=True)
    sized = measured_answers(mask, zone)
    if "gland" not in classes:
        sized.pop("epe")
    return region_of(number, walk(rationale, measured | sized, _tree()), _tree())


@lru_cache(maxsize=1)
def _tree() -> DecisionTree:
    return DecisionTree.load()
