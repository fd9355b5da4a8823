"""The synthetic rationale set on disk: made once, seeded, resumable; and the examples that training draws from it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from MedRationaleLib.errors import InputError
from MedRationaleLib.files import check_writable, write_text
from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.synthesis import synthesize
from MedRationaleLib.synthesis.anatomy import phantom_anatomy, random_placement
from MedRationaleLib.synthesis.regions import Region
from MedRationaleTraining.data.label_maps import Split, open_label_maps
from MedRationaleTraining.data.real_backgrounds import RealBackgrounds

_logger = logging.getLogger(__name__)
LESION_BIT, VALID_SHIFT = 4, 3
STAMP = "config.json"
"""What a set was made of."""


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """What the synthetic set is made of."""

    picai_labels: str | None = None
    """Clone of DIAGNijmegen/picai_labels or the packed anatomy archive; None makes procedural phantoms only."""
    real_backgrounds: str | None = None
    """Folder of real examinations (zones.nii.gz with t2w, or adc and dwi) to take surroundings from."""
    real_share: float = 0.75
    """How often the surroundings are real."""
    keep_gland: float = 0.6
    """How often, then, the real gland's interior stays, in one of the sequences."""
    split: Split = "train"
    """Which patients' label maps; the test split is for evaluation only."""
    cases: int = 600
    """Examinations to make; more than there are label maps gives each several appearances."""
    phantoms: float = 0.05
    """Share of procedural glands."""
    seed: int = 0
    """Examination i of a set is made from (seed, i) alone."""
    workers: int = 1
    """Processes."""


def make_set(out: Path, config: SynthesisConfig) -> int:
    """Write the set to `out`, keeping what is there, so an interrupted run goes on; returns how many were made."""
    _check(config)
    _open_sources(config)
    claim_folder(out, {k: v for k, v in asdict(config).items() if k not in ("workers", "cases")})
    missing = [i for i in range(config.cases) if not (out / f"{i:05d}" / "rationales.json").exists()]
    make = partial(_make_one, out=out, config=config)
    if config.workers > 1:
        with ProcessPoolExecutor(config.workers) as pool:
            for _ in track(pool.map(make, missing, chunksize=2), "Synthesising", total=len(missing)):
                pass
    else:
        for index in track(missing, "Synthesising"):
            make(index)
    return len(missing)


def claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a set, or go on with one of the same settings: write them, remove what a kill left behind."""
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / STAMP
    wanted = json.dumps(settings)
    if stamp.exists() and (known := stamp.read_text(encoding="utf-8")) != wanted:
        raise InputError(
            f"Expected a set made with the same settings in {out}, got one with {_other(known, json.loads(wanted))}; "
            "choose another folder or remove this one."
        )
    write_text(stamp, wanted)
    for leftover in out.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", leftover.name):  # of a run that was killed
            shutil.rmtree(leftover)


def _other(stamp: str, settings: dict[str, Any]) -> str:
    """The settings of a set that was made before, as far as they are others."""
    try:
        known: dict[str, Any] = json.loads(stamp)
        others = [f"{name} {value}" for name, value in known.items() if settings.get(name) != value]
        return ", ".join(others) or "fewer settings"
    except (ValueError, AttributeError):
        return f"settings that cannot be read in {STAMP}"


def store_exam(folder: Path, *, images: np.ndarray, labels: np.ndarray, record: dict[str, Any]) -> None:
    """Write the three files of StoredExam; the folder is there completely or not at all.

    Args:
        folder: of the examination, in a set's folder.
        images: (3, S, H, W) float16.
        labels: (2, S, H, W) uint8, packed labels and regions.
        record: what rationales.json says: source, regions and, unless all are, which classes are labelled.
    """
    # A folder is complete once its last file is in place; the temporary folder is on the same file system.
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        temporary.mkdir(exist_ok=True)
        np.save(temporary / "images.npy", images)
        np.save(temporary / "labels.npy", labels)
        (temporary / "rationales.json").write_text(json.dumps(record))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"Expected room for an examination in {folder.parent}, got '{error.strerror or error}'; free some space "
            "and run the same command again."
        ) from error


def _check(config: SynthesisConfig) -> None:
    rules = (
        (config.cases >= 1, "cases of at least 1", config.cases),
        (config.workers >= 1, "workers of at least 1", config.workers),
        (0 <= config.phantoms <= 1, "phantoms from 0 to 1", config.phantoms),
        (0 <= config.real_share <= 1, "real_share from 0 to 1", config.real_share),
        (0 <= config.keep_gland <= 1, "keep_gland from 0 to 1", config.keep_gland),
        (config.seed >= 0, "seed of 0 or more", config.seed),
    )
    for holds, expected, got in rules:
        if not holds:
            raise InputError(f"Expected {expected}, got {got}; correct the configuration.")


_sources: dict[SynthesisConfig, tuple] = {}


def _open_sources(config: SynthesisConfig) -> tuple:
    """Label maps and backgrounds, opened once a process."""
    if config not in _sources:
        maps = open_label_maps(config.picai_labels) if config.picai_labels else None
        backgrounds = None
        if config.real_backgrounds:
            backgrounds = RealBackgrounds(
                config.real_backgrounds, share=config.real_share, keep_gland=config.keep_gland
            )
        cases = maps.cases(config.split) if maps else []
        if maps and not cases:
            raise InputError(
                f"Expected label maps of the {config.split} split in {config.picai_labels}, got none; "
                "choose another split or a complete copy."
            )
        _sources[config] = (maps, cases, backgrounds)
    return _sources[config]


def _make_one(index: int, *, out: Path, config: SynthesisConfig) -> None:
    rng = np.random.default_rng((config.seed, index))
    maps, cases, backgrounds = _open_sources(config)
    if maps is None or rng.random() < config.phantoms:
        anatomy = phantom_anatomy(rng)
    else:
        # Walk through all label maps in a fixed shuffled order, so that a set covers as many patients as it can.
        order = np.random.default_rng(config.seed).permutation(len(cases))
        label_map = maps.load(cases[order[index % len(cases)]])
        anatomy = random_placement(label_map.zones, label_map.lesions, rng, source=label_map.case_id)
    exam = synthesize(anatomy, rng, background=backgrounds)
    labels = exam.anatomy.zones | (exam.lesions.astype(np.uint8) * LESION_BIT)
    for channel in range(3):
        labels |= exam.valid[channel].astype(np.uint8) << (VALID_SHIFT + channel)
    store_exam(
        out / f"{index:05d}",
        images=exam.images.astype(np.float16),
        labels=np.stack([labels, exam.regions]),
        record={
            "source": exam.anatomy.source,
            "b_value": exam.b_value,
            "regions": [asdict(region) for region in exam.rationales],
        },
    )


def describe_set(folder: str | Path) -> dict[str, Any]:
    """What a set is made of, without the paths of the machine that made it."""
    folder = Path(folder)
    stamp = json.loads((folder / STAMP).read_text(encoding="utf-8")) if (folder / STAMP).exists() else {}
    return {
        "name": folder.name,
        "examinations": len(stored_exams(folder)),
        "reader": stamp.get("reader"),
        "split": stamp.get("split"),
        "seed": stamp.get("seed"),
        "picai_labels": bool(stamp.get("picai_labels")),
        "real_backgrounds": bool(stamp.get("real_backgrounds")),
    }


@dataclass(frozen=True, kw_only=True)
class StoredExam:
    """One examination of a set, synthetic or real, memory-mapped."""

    images: np.ndarray
    """(3, S, H, W) float16; any scale, for they are z-scored when drawn."""
    labels: np.ndarray
    """(S, H, W) uint8: bits 0-1 zone (3: gland whose zone is not known), 2 lesion, 3-5 validity of T2W, ADC, DWI."""
    regions: np.ndarray
    """(S, H, W) uint8."""
    rationales: tuple[Region, ...]
    source: str
    classes: tuple[str, ...] = CLASSES
    """Those of CLASSES that somebody labelled; of the others nothing is known, not that they are absent."""

    @classmethod
    def open(cls, folder: Path) -> StoredExam:
        """Map the arrays; nothing is read yet."""
        try:
            data = json.loads((folder / "rationales.json").read_text(encoding="utf-8"))
            labels = np.load(folder / "labels.npy", mmap_mode="r")
            return cls(
                images=np.load(folder / "images.npy", mmap_mode="r"),
                labels=labels[0],
                regions=labels[1],
                rationales=tuple(Region(**region) for region in data["regions"]),
                source=data["source"],
                classes=_classes(data.get("classes", CLASSES)),
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise InputError(
                f"Expected images.npy, labels.npy and rationales.json of one examination in {folder}, "
                f"got files that cannot be read ({error}); remove that folder and run `synthesize` or `prepare` again."
            ) from error


def _classes(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    if unknown := set(names) - set(CLASSES):
        raise ValueError(f"classes {', '.join(sorted(unknown))}")
    return tuple(names)


def stored_exams(folder: str | Path, cases: int | None = None) -> list[Path]:
    """Folders of a set's examinations, or of the first `cases` of them."""
    if cases is not None and cases < 1:
        raise InputError(f"Expected at least 1 examination of {folder}, got cases {cases}; correct it or leave it out.")
    found = sorted(p.parent for p in Path(folder).glob("[!.]*/rationales.json"))
    if not found:
        raise InputError(
            f"Expected a synthetic set in {folder}, or a prepared one, found none; make one with "
            "`medrationale-train synthesize` or `medrationale-train prepare`."
        )
    return found[:cases]
