"""Assessment <-> assessment.json and the folder around it (schema: Resources/Schemas/assessment.schema.json)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import SimpleITK as sitk

from MedRationaleLib.assessment import (
    Assessment,
    Candidate,
    Finding,
    RationaleStep,
    SliceRationale,
    UnshownCandidate,
)
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import MANIFEST
from MedRationaleLib.resources import resource_path
from MedRationaleLib.segmentation_io import like, read_nrrd, read_segmentation

SCHEMA_VERSION = 1
ASSESSMENT_FILE = "assessment.json"
SEGMENTATION_FILE = "segmentation.seg.nrrd"
EVIDENCE_FOLDER = "evidence"


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What an output folder remembers of a Study: everything but the voxels."""

    patient: dict[str, Any] = field(default_factory=dict)
    """Identifiers, as far as the Study had them."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """"t2w"/"adc"/"dwi" -> namespace with the fields of SeriesProvenance."""
    warnings: tuple[str, ...] = ()
    """The Study's own warnings."""
    missing: tuple[str, ...] = ()
    """"adc"/"dwi" where the Study lacked them."""
    t2w: None = None
    adc: None = None
    dwi: None = None


def evidence_path(key: str) -> str:
    """Path in the output folder of a concept's heatmap."""
    return f"{EVIDENCE_FOLDER}/{re.sub(r'[^A-Za-z0-9_-]+', '_', key)}.nrrd"


def assessment_to_dict(assessment: Assessment) -> dict[str, Any]:
    """The Assessment as plain JSON values; images become paths relative to the output folder."""
    study = assessment.study
    return {
        "schema_version": SCHEMA_VERSION,
        "study": {
            "patient": plain(study.patient),
            "sequences": plain(study.provenance),
            "missing": plain(study.missing),
            "warnings": plain(study.warnings),
        },
        "decision_tree": assessment.decision_tree,
        "findings": findings_to_list(assessment.findings, assessment.evidence),
        "not_shown": plain(assessment.not_shown),
        "volumes_ml": plain(assessment.volumes_ml),
        "evidence_resolution_mm": plain(assessment.evidence_resolution_mm),
        "evidence": {key: evidence_path(key) for key in assessment.evidence},
        "slices": plain(assessment.slices),
        "segmentation": SEGMENTATION_FILE,
        "manifest": MANIFEST,
        "warnings": plain(assessment.warnings),
    }


def findings_to_list(findings: Iterable[Finding], evidence: Container[str]) -> list[dict[str, Any]]:
    """As in assessment.json, where a step names its heatmap's file; `evidence` holds the concepts that have one."""
    rows = []
    for finding in findings:
        shown = [step.evidence if step.evidence in evidence else None for step in finding.rationale]
        paths = [evidence_path(concept) if concept else None for concept in shown]
        steps = (replace(step, evidence=path) for step, path in zip(finding.rationale, paths, strict=True))
        rows.append(plain(replace(finding, rationale=tuple(steps))))
    return rows


def load_assessment(folder: str | Path, study: Any = None) -> Assessment:
    """Read back an output folder. Without `study`, Assessment.study is a StudyRecord, which has no voxels.

    Raises InputError where a file is missing or is not what `medrationale predict` writes.
    """
    folder = Path(folder)
    data = read_json(folder / ASSESSMENT_FILE)
    validate(data, ASSESSMENT_FILE)
    masks = read_segmentation(folder / data["segmentation"])
    absent = [name for name in ("gland", "pz", "tz", *(row["id"] for row in data["findings"])) if name not in masks]
    if absent:
        raise InputError(
            f"Expected the segments {', '.join(absent)} in {folder / data['segmentation']}, which are missing: "
            "take the file that belongs to this assessment.json."
        )
    findings = findings_of(data)
    lesions = np.zeros(sitk.GetArrayViewFromImage(masks["gland"]).shape, np.uint8)
    for finding in findings:
        lesions[sitk.GetArrayViewFromImage(masks[finding.id]) > 0] = finding.label
    record = data["study"]
    return Assessment(
        study=study or study_of(record),
        gland=masks["gland"],
        pz=masks["pz"],
        tz=masks["tz"],
        lesions=like(masks["gland"], lesions),
        findings=findings,
        evidence={key: read_nrrd(folder / path) for key, path in data["evidence"].items()},
        evidence_resolution_mm=data["evidence_resolution_mm"],
        slices=slices_of(data),
        volumes_ml=data["volumes_ml"],
        decision_tree=data["decision_tree"],
        not_shown=not_shown_of(data),
        warnings=tuple(data["warnings"]),
        manifest={k: v for k, v in read_json(folder / data["manifest"]).items() if k not in ("generator", "files")},
    )


def study_of(record: Mapping[str, Any]) -> StudyRecord:
    """What "study" of an assessment.json tells of the examination, without its images."""
    return StudyRecord(
        patient=record["patient"],
        provenance={name: SimpleNamespace(**row) for name, row in record["sequences"].items()},
        warnings=tuple(record["warnings"]),
        missing=tuple(record["missing"]),
    )


def findings_of(data: Mapping[str, Any]) -> tuple[Finding, ...]:
    """The findings in the content of an assessment.json."""
    key_of = {path: key for key, path in data["evidence"].items()}
    return tuple(_finding(row, key_of) for row in data["findings"])


def not_shown_of(data: Mapping[str, Any]) -> tuple[UnshownCandidate, ...]:
    """The candidates below the threshold, in the content of an assessment.json; earlier versions kept none."""
    rows = data.get("not_shown", [])
    return tuple(UnshownCandidate(**(row | {"center_mm": tuple(row["center_mm"])})) for row in rows)


def slices_of(data: Mapping[str, Any]) -> tuple[SliceRationale, ...]:
    """What the model says of each slice, in the content of an assessment.json."""
    return tuple(_slice(row) for row in data["slices"])


def validate(data: Any, name: str) -> None:
    """Check the content of an assessment.json against its schema."""
    schema = json.loads(resource_path("Schemas/assessment.schema.json").read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(data))
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "the top level"
        raise InputError(f"{name}: expected a file that follows its schema, got at {where}: {error.message[:200]}.")


def read_json(path: Path) -> Any:
    """Read a JSON file of an output folder."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"Expected the file {path}, which is missing: run `medrationale predict` first.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"Expected {path} to be JSON, but it cannot be read ({error}): write it again.") from error


def to_json(value: Any) -> str:
    """Readable JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses, tuples, paths, NumPy numbers and the like as the values that JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, SimpleNamespace):
        return plain(vars(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return value.as_posix() if isinstance(value, PurePath) else str(value)


def _finding(row: dict[str, Any], key_of: dict[str, str]) -> Finding:
    steps = []
    for step in row["rationale"]:
        changes = {
            "runners_up": tuple(Candidate(**item) for item in step["runners_up"]),
            "weakened_by": tuple(step["weakened_by"]),
            "evidence": key_of.get(step["evidence"]),
        }
        steps.append(RationaleStep(**(step | changes)))
    changes = {
        "center_mm": tuple(row["center_mm"]),
        "rationale": tuple(steps),
        "contradictions": tuple(row["contradictions"]),
    }
    return Finding(**(row | changes))


def _slice(row: dict[str, Any]) -> SliceRationale:
    answers = {node: Candidate(**item) for node, item in row["answers"].items()}
    return SliceRationale(slice_index=row["slice_index"], position_mm=tuple(row["position_mm"]), answers=answers)
