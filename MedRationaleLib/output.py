"""The folder that a run leaves: assessment.json, segmentation.seg.nrrd, evidence/, report.html and manifest.json."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from MedRationaleLib.assessment import Assessment
from MedRationaleLib.files import GENERATOR, MANIFEST, staged_folder
from MedRationaleLib.report import build_report
from MedRationaleLib.segmentation_io import like, segments_of, write_nrrd, write_segmentation
from MedRationaleLib.serialization import (
    ASSESSMENT_FILE,
    EVIDENCE_FOLDER,
    SEGMENTATION_FILE,
    assessment_to_dict,
    to_json,
    validate,
)

REPORT_FILE = "report.html"
RESULT_FILES = (ASSESSMENT_FILE, SEGMENTATION_FILE, REPORT_FILE, MANIFEST)
"""Those of every result; heatmaps come on top."""
EVIDENCE_STEP = 1 / 256
"""Heatmaps are written in steps of this: exact in float32, a third of the size, and finer than anything they mean."""


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """What `write_results` wrote."""

    folder: Path
    assessment: Path
    segmentation: Path
    report: Path
    manifest: Path
    evidence: tuple[Path, ...]


def write_results(assessment: Assessment, folder: str | Path) -> OutputPaths:
    """Write all files, or none: they are made in a temporary folder that moves into place at the end.

    Raises InputError where `folder` cannot be written, or holds foreign files of these names (see files.staged_folder).
    """
    folder = Path(folder)
    started = time.perf_counter()
    record = assessment_to_dict(assessment)
    text = to_json(record)
    validate(record, ASSESSMENT_FILE)
    report = build_report(assessment)
    evidence = record["evidence"]
    files = [*RESULT_FILES, *evidence.values()]
    with staged_folder(folder) as stage:
        (stage / ASSESSMENT_FILE).write_text(text, encoding="utf-8")
        (stage / REPORT_FILE).write_text(report, encoding="utf-8")
        write_segmentation(stage / SEGMENTATION_FILE, segments_of(assessment), assessment.gland)
        if evidence:
            (stage / EVIDENCE_FOLDER).mkdir()
        for key, path in evidence.items():
            write_nrrd(stage / path, _in_steps(assessment.evidence[key]))
        timings = {**assessment.manifest.get("timings_s", {}), "write": round(time.perf_counter() - started, 3)}
        manifest = {"generator": GENERATOR, **assessment.manifest, "timings_s": timings, "files": files}
        (stage / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    return OutputPaths(
        folder=folder,
        assessment=folder / ASSESSMENT_FILE,
        segmentation=folder / SEGMENTATION_FILE,
        report=folder / REPORT_FILE,
        manifest=folder / MANIFEST,
        evidence=tuple(folder / path for path in evidence.values()),
    )


def _in_steps(heatmap: sitk.Image) -> sitk.Image:
    """float32, rounded to multiples of EVIDENCE_STEP."""
    values = sitk.GetArrayFromImage(heatmap).astype(np.float32, copy=False)
    return like(heatmap, np.round(values / EVIDENCE_STEP) * np.float32(EVIDENCE_STEP))
