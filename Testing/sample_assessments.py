"""Assessments made by hand for the tests of the views: expert or drawn masks stand in for a model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.study import SeriesProvenance, Study

PATCH_MM = 8.0
PZ_ANSWERS = {
    "lesion_presence": "lesion_present",
    "zone": "zone_pz",
    "adc_signal": "adc_marked_hypointense",
    "dwi_signal": "dwi_mild_hyperintense",
    "diffusion_pattern": "diffusion_focal",
    "t2w_signal": "t2w_moderate_hypointense",
    "shape": "round_oval",
    "margin": "non_circumscribed",
    "homogeneity": "homogeneous",
    "size": "size_below_15mm",
    "epe": "epe_absent",
    "dce": "dce_positive",
}
TZ_ANSWERS = PZ_ANSWERS | {
    "zone": "zone_tz",
    "shape": "lenticular",
    "margin": "obscured",
    "size": "size_15mm_or_more",
    "t2w_signal": "t2w_marked_hypointense",
}


def on_grid(array: np.ndarray, reference: sitk.Image) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(reference)
    return image


def drawn_study(
    size: tuple[int, int, int] = (96, 90, 10), spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)
) -> Study:
    """An oblique study with an elliptic gland; no anatomy, only something to crop, outline and colour."""
    reference = sitk.Image(size, sitk.sitkFloat32)
    reference.SetSpacing(spacing)
    reference.SetOrigin((-48.0, -40.0, 12.0))
    reference.SetDirection((1, 0, 0, 0, 0.96, 0.28, 0, -0.28, 0.96))
    noise = np.random.default_rng(5).normal(0, 12, size[::-1]).astype(np.float32)
    masks = {name: mask.astype(np.float32) for name, mask in drawn_masks(reference).items()}
    t2w = 200 + noise + 180 * masks["pz"] + 60 * masks["tz"]
    adc = 900 + 4 * noise + 700 * masks["pz"] + 300 * masks["tz"]
    dwi = 60 + noise / 3
    images = {
        name: on_grid(array.astype(np.float32), reference) for name, array in (("t2w", t2w), ("adc", adc), ("dwi", dwi))
    }
    provenance = {
        name: SeriesProvenance(
            sequence=name, path=f"{name}.nii.gz", reason=f"given as the {name.upper()} file", sha256="0" * 64
        )
        for name in images
    }
    return Study(**images, provenance=provenance, patient={"id": "DRAWN-1", "synthetic": True})


def drawn_masks(reference: sitk.Image) -> dict[str, np.ndarray]:
    """Gland, zones and two lesions, each (z, y, x) uint8, scaled to the grid's size."""
    nx, ny, nz = reference.GetSize()
    z, y, x = np.mgrid[-1 : 1 : nz * 1j, -1 : 1 : ny * 1j, -1 : 1 : nx * 1j]
    gland = (x / 0.55) ** 2 + (y / 0.45) ** 2 + (z / 0.85) ** 2 < 1
    tz = ((x / 0.38) ** 2 + ((y + 0.12) / 0.27) ** 2 + (z / 0.6) ** 2 < 1) & gland
    first = ((x + 0.25) ** 2 + (y - 0.26) ** 2 < 0.01) & (np.abs(z) < 0.4) & gland
    second = ((x - 0.15) ** 2 + (y + 0.1) ** 2 < 0.012) & (np.abs(z - 0.2) < 0.3) & gland
    lesions = np.where(first, 1, np.where(second, 2, 0))
    masks = {"gland": gland, "pz": gland & ~tz, "tz": tz, "lesions": lesions}
    return {name: mask.astype(np.uint8) for name, mask in masks.items()}


def heatmap(lesion: np.ndarray, reference: sitk.Image, rng: np.random.Generator) -> sitk.Image:
    """A blob near the lesion on patches of PATCH_MM, interpolated, as a model's similarity map would look."""
    image = on_grid(lesion.astype(np.float32), reference)
    coarse_spacing = (PATCH_MM, PATCH_MM, reference.GetSpacing()[2])
    sides = zip(reference.GetSize(), reference.GetSpacing(), coarse_spacing, strict=True)
    coarse_size = [max(1, round(count * fine / coarse)) for count, fine, coarse in sides]
    blurred = sitk.SmoothingRecursiveGaussian(image, (5.0, 5.0, 3.0))
    coarse = sitk.Resample(
        blurred, coarse_size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), coarse_spacing, image.GetDirection()
    )
    values = sitk.GetArrayFromImage(coarse)
    values = values / max(values.max(), 1e-6) * rng.uniform(0.6, 1.0) + rng.uniform(0, 0.18, values.shape)
    fine = sitk.Resample(
        on_grid(np.clip(values, 0, 1).astype(np.float32), coarse), reference, sitk.Transform(), sitk.sitkLinear
    )
    return sitk.Cast(fine, sitk.sitkFloat32)


def assess_by_hand(
    study: Study, masks: Mapping[str, np.ndarray], answers: tuple[dict[str, str], ...], **changes: object
) -> Assessment:
    """An Assessment with one finding for each entry of `answers`; masks["lesions"] holds 1, 2, ..."""
    tree = DecisionTree.load()
    rng = np.random.default_rng(7)
    evidence: dict[str, sitk.Image] = {}
    findings = []
    for label, given in enumerate(answers, start=1):
        lesion = masks["lesions"] == label
        walk = tree.walk_answers(given)
        steps = []
        for node_id, concept in (*walk.steps, ("pirads", walk.category)):
            node = tree.nodes.get(node_id)
            source = {"retrieval": "model", "measurement": "measured", "reader": "reader"}[
                node.answered_by if node else "measurement"
            ]
            others = (
                [c for c in node.candidates(tree.zone(given)) if c != concept] if node and source == "model" else []
            )
            scores = sorted(rng.uniform(-0.1, 0.6, len(others) + 1).tolist(), reverse=True)
            key = f"lesion-{label}/{concept}"
            if source == "model":
                evidence[key] = heatmap(lesion, study.t2w, rng)
            steps.append(
                RationaleStep(
                    node=node_id,
                    concept=concept,
                    text=tree.bank[concept].text,
                    source=source,
                    similarity=scores[0] if source == "model" else None,
                    runners_up=tuple(
                        Candidate(concept=c, similarity=s) for c, s in zip(others, scores[1:], strict=True)
                    ),
                    measurement={"size": "12.4 mm", "zone": "83 % of the lesion in the zone"}.get(node_id),
                    evidence=key if source == "model" else None,
                    weakened_by=tuple(s for s in study.missing if node and s in node.sequences),
                    overridden="dce_not_available" if node_id == "dce" else None,
                )
            )
        indices = np.argwhere(lesion)[:, ::-1].mean(axis=0) if lesion.any() else np.zeros(3)
        voxel_ml = float(np.prod(study.t2w.GetSpacing())) / 1000
        findings.append(
            Finding(
                id=f"lesion-{label}",
                label=label,
                zone=tree.zone(given),
                sector="right peripheral zone posteromedial mid gland"
                if label == 1
                else "left transition zone anterior mid gland",
                size_mm=12.4 if label == 1 else 19.8,
                volume_ml=float(lesion.sum() * voxel_ml),
                center_mm=study.t2w.TransformContinuousIndexToPhysicalPoint(indices.tolist()),
                likelihood=0.83 if label == 1 else 0.41,
                t2w_score=walk.t2w_score,
                dwi_score=walk.dwi_score,
                dce=walk.dce,
                pirads=walk.pirads,
                rationale=tuple(steps),
                contradictions=("The rationale says 'smaller than 15 mm', but the mask measures 19.8 mm.",)
                if label == 2
                else (),
            )
        )
    size = study.t2w.GetSize()
    slices = tuple(
        SliceRationale(
            slice_index=k,
            position_mm=study.t2w.TransformContinuousIndexToPhysicalPoint((size[0] / 2, size[1] / 2, k)),
            answers={"lesion_presence": Candidate(concept="lesion_present", similarity=0.31)},
        )
        for k in range(size[2])
    )
    fields: dict[str, object] = dict(
        study=study,
        **{name: on_grid(masks[name].astype(np.uint8), study.t2w) for name in ("gland", "pz", "tz", "lesions")},
        findings=tuple(findings),
        evidence=evidence,
        evidence_resolution_mm=PATCH_MM,
        slices=slices,
        volumes_ml={"gland": 51.9, "pz": 17.3, "tz": 33.8, "ellipsoid": 49.2},
        decision_tree="pirads_v2_1",
        not_shown=(UnshownCandidate(zone="PZ", volume_ml=0.21, center_mm=(-12.4, 30.0, 5.6), likelihood=0.13),),
        manifest={
            "version": "test",
            "model": {"name": "made by hand, no model", "sha256": "0" * 64},
            "timings_s": {"total": 0.0},
        },
    )
    return Assessment(**(fields | changes))


def drawn_assessment(**changes: object) -> Assessment:
    """The small artificial case with a PZ and a TZ finding."""
    study = drawn_study()
    return assess_by_hand(study, drawn_masks(study.t2w), (PZ_ANSWERS, TZ_ANSWERS), **changes)


def prostatex_assessment(folder: Path) -> Assessment:
    """The real examination with the experts' masks as if they had been predicted. For tests only."""
    study = Study.from_files(t2w=folder / "t2w.nii.gz", adc=folder / "adc.nii.gz", dwi=folder / "dwi.nii.gz")
    arrays = {
        name: sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}.nii.gz")))
        for name in ("gland", "zones", "lesion")
    }
    masks = {
        "gland": arrays["gland"] > 0,
        "pz": arrays["zones"] == 1,
        "tz": arrays["zones"] == 2,
        "lesions": (arrays["lesion"] > 0) * 1,
    }
    return assess_by_hand(
        study, masks, (PZ_ANSWERS,), warnings=("Masks are the experts', the rationale was made by hand.",)
    )
