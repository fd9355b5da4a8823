"""A model against expert masks of real examinations: folders as `predict --case` reads them, with masks beside."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from rich.progress import track
from rich.table import Table

from MedRationaleLib.assessment import Assessment, Finding
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import write_text
from MedRationaleLib.inference import Predictor
from MedRationaleLib.model.checkpoint import load_checkpoint
from MedRationaleLib.study import Study
from MedRationaleTraining.constraints import NOT_DESCRIBED
from MedRationaleTraining.evidence_metrics import relevance_mass
from MedRationaleTraining.metrics import dice

SCORES = "real_cases.json"
MASKS = ("gland", "zones", "lesion")
OVERLAP = 0.1
"""A finding hits an expert's lesion from this Dice on, as in picai_eval."""


@dataclass(frozen=True, kw_only=True)
class CaseScore:
    """One examination; None where the expert's mask is missing."""

    case: str
    missing: tuple[str, ...]
    """Sequences that the examination lacks."""
    gland: float | None
    """Volume Dice."""
    pz: float | None
    tz: float | None
    lesions: int | None
    """Connected lesions of the expert."""
    lesions_found: int | None
    findings: int
    best_lesion_dice: float | None
    """Of the finding that overlaps an expert's lesion most."""
    lesion_rma: float | None
    """Relevance mass accuracy of that finding's heatmaps on the slices of the lesion that it hits; see `_rma`."""
    hits: tuple[str, ...]
    """Of each finding that hits a lesion: id, zone, PI-RADS."""


def score_cases(model: str, folders: list[Path]) -> list[CaseScore]:
    """Assess every folder (t2w, adc, dwi; gland, zones 1 PZ 2 TZ, lesion as .nii.gz) and compare."""
    if not folders:
        raise InputError("Expected at least one folder of a real examination, got none; name them as [one,two].")
    for folder in folders:
        if not any((folder / f"{name}.nii.gz").exists() for name in MASKS):
            raise InputError(
                f"Expected gland.nii.gz, zones.nii.gz or lesion.nii.gz in {folder}, found none; add an expert's masks."
            )
    predictor = Predictor.load(model)
    return [score(predictor.assess(Study.from_case(f)), f) for f in track(folders, "Assessing")]


def score(assessment: Assessment, folder: Path) -> CaseScore:
    """An assessment against the expert masks in `folder` (a folder of `score_cases`)."""
    masks = {name: _mask(folder / f"{name}.nii.gz", assessment.gland) for name in MASKS}
    gland, zones, lesion = (masks[name] for name in MASKS)
    found = sitk.GetArrayFromImage(assessment.lesions)
    pieces = []
    if lesion is not None:
        labels = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray((lesion > 0).astype(np.uint8))))
        pieces = [labels == label for label in range(1, int(labels.max()) + 1)]
    overlaps = {f: [dice(found == f.label, piece) for piece in pieces] for f in assessment.findings} if pieces else {}
    best = max(overlaps, key=lambda f: max(overlaps[f]), default=None)
    hit = best is not None and max(overlaps[best]) >= OVERLAP

    def against(image: sitk.Image, truth: np.ndarray | None) -> float | None:
        return None if truth is None else round(dice(sitk.GetArrayFromImage(image) > 0, truth), 4)

    return CaseScore(
        case=folder.name,
        missing=assessment.study.missing,
        gland=against(assessment.gland, None if gland is None else gland > 0),
        pz=against(assessment.pz, None if zones is None else zones == 1),
        tz=against(assessment.tz, None if zones is None else zones == 2),
        lesions=None if lesion is None else len(pieces),
        lesions_found=None
        if lesion is None
        else sum(any(o[i] >= OVERLAP for o in overlaps.values()) for i in range(len(pieces))),
        findings=len(assessment.findings),
        best_lesion_dice=(round(max(overlaps[best]), 4) if best else 0.0) if pieces else None,
        lesion_rma=_rma(assessment, best, pieces[int(np.argmax(overlaps[best]))]) if best and hit else None,
        hits=tuple(f"{f.id} {f.zone} PI-RADS {f.pirads}" for f, o in overlaps.items() if max(o) >= OVERLAP),
    )


def _rma(assessment: Assessment, finding: Finding, lesion: np.ndarray) -> float | None:
    """Mean RMA of the heatmaps of the concepts that describe a finding, over the lesion's slices (paper, Eq. 5)."""
    slices = lesion.any((1, 2))
    keys = [s.evidence for s in finding.rationale if s.evidence and s.node not in NOT_DESCRIBED]
    heat = (sitk.GetArrayViewFromImage(assessment.evidence[key])[slices] for key in keys)
    values = np.concatenate([np.zeros(0), *(relevance_mass(h, lesion[slices].astype(float)) for h in heat)])
    return round(float(np.nanmean(values)), 4) if np.isfinite(values).any() else None


def _mask(path: Path, reference: sitk.Image) -> np.ndarray | None:
    if not path.exists():
        return None
    image = sitk.ReadImage(str(path), sitk.sitkUInt8)
    return sitk.GetArrayFromImage(sitk.Resample(image, reference, sitk.Transform(), sitk.sitkNearestNeighbor))


def write_scores(model: str, scores: list[CaseScore], out: Path) -> None:
    """real_cases.json, with the SHA-256 of the weights that were scored."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"weights_sha256": load_checkpoint(model).sha256, "cases": [asdict(s) for s in scores]}
    write_text(out / SCORES, json.dumps(record, indent=1) + "\n")


def read_scores(path: Path, sha256: str) -> list[CaseScore]:
    """What `write_scores` wrote of these very weights."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        scores = [
            CaseScore(**{**case, "missing": tuple(case["missing"]), "hits": tuple(case["hits"])})
            for case in record["cases"]
        ]
        scored = record["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"Expected {SCORES} by `score` in {path}, got a file that cannot be used ({reason})."
        ) from error
    if scored != sha256:
        raise InputError(f"Expected scores of the exported weights in {path}, got those of others; run `score` again.")
    return scores


COLUMNS = ("case", "missing", "gland", "PZ", "TZ", "lesions found", "findings", "lesion Dice", "lesion RMA", "hits")


def rows(scores: list[CaseScore]) -> list[list[str]]:
    """A row of COLUMNS for each case."""
    table = []
    for s in scores:
        figures = ["-" if v is None else f"{v:.3f}" for v in (s.gland, s.pz, s.tz)]
        found = "-" if s.lesions is None else f"{s.lesions_found} of {s.lesions}"
        best = "-" if s.best_lesion_dice is None else f"{s.best_lesion_dice:.3f}"
        rma = "-" if s.lesion_rma is None else f"{s.lesion_rma:.3f}"
        missing = ", ".join(s.missing) or "-"
        table.append([s.case, missing, *figures, found, str(s.findings), best, rma, "; ".join(s.hits) or "-"])
    return table


def table(scores: list[CaseScore]) -> Table:
    """For the terminal."""
    result = Table()
    for name in COLUMNS:
        result.add_column(name, overflow="fold")
    for row in rows(scores):
        result.add_row(*row)
    return result


def markdown_table(scores: list[CaseScore]) -> str:
    """For the model card."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows(scores)))
