"""Metrics on whole synthetic examinations of patients that were not trained on.

evaluation.json has format, model, weights_sha256, data, postprocessing; metrics (masks and detection) and retrieval
(nodes of true regions and slices); evidence (see `summarise_evidence`); constraints (the share at which each would be
just held, see `constraints.held_at`); rationale, findings and inconsistency (see `summarise_rationale`). Every Estimate
is {"value", "ci95", "n"}, value null where it is not defined.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.files import check_writable, write_text
from MedRationaleLib.model.checkpoint import load_checkpoint
from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.model.precision import autocast, check_device
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.postprocessing import (
    DIFFUSION,
    PostprocessingConfig,
    Sequences,
    clean_gland,
    label_lesions,
    lesion_candidates,
    split_zones,
)
from MedRationaleLib.synthesis.fields import PIXEL_MM, SLICE_MM
from MedRationaleLib.synthesis.regions import Region
from MedRationaleTraining.config import Distance
from MedRationaleTraining.constraints import RationaleConstraints, at_full_shares, held_at
from MedRationaleTraining.data.stacks import REGION_PIXELS, Stack, make_stack, slice_answers, whole_exam
from MedRationaleTraining.data.synthetic import LESION_BIT, StoredExam, describe_set, stored_exams
from MedRationaleTraining.evaluation_figures import Example, evidence_chart, example_of, example_panel
from MedRationaleTraining.evaluation_tables import UNITS, markdown
from MedRationaleTraining.evidence_metrics import (
    EvidenceScores,
    evidence_maps,
    evidence_scores,
    lesion_gradcam,
    summarise_evidence,
    true_regions,
)
from MedRationaleTraining.losses import NodeTargets
from MedRationaleTraining.metrics import Detection, Estimate, LesionResults, dice, match_lesions, mean, ratio
from MedRationaleTraining.metrics import smoothed_dice as smoothed
from MedRationaleTraining.rationale_metrics import RationaleResult, assess_rationale, summarise_rationale

SPACING = (SLICE_MM, PIXEL_MM, PIXEL_MM)
"""Of the synthetic sets and of the masks that are compared, (z, y, x) in mm."""
EXAMPLES = 3
"""Lesions in the example figure: of the first examinations that have one, not the best."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one examination, and what is true of it."""

    probabilities: np.ndarray
    """(4, S, 256, 256) float32: gland, PZ, TZ, lesion; 0 where T2W has no data."""
    truth: np.ndarray
    """(4, S, 256, 256) bool."""
    sequences: Sequences
    """ADC and DWI as they were imaged, (S, 256, 256)."""
    pooled: np.ndarray
    """(R, K) similarity of every true region to every concept."""
    slices: np.ndarray
    """(S, K) of every slice's mean embedding."""
    similarity: np.ndarray
    """(K, S, h', w') float32 cosine similarity of every patch to every concept."""
    logits: np.ndarray
    """(S, 8) mean, then maximum over the slice of the mask logits of each class."""
    stack: Stack
    seen: np.ndarray
    """(S,) bool: T2W has data in the slice."""
    field: np.ndarray
    """(S, 64, 64) share of each patch of the region grid in which T2W has data."""
    regions: np.ndarray
    """(S, 256, 256) uint8 labels of the true regions in which T2W has data."""
    rationales: tuple[Region, ...]
    """What is true of them."""
    maps: dict[str, np.ndarray]
    """Evidence maps of every source, see `evidence_maps`; none unless asked for."""
    constraints: dict[str, float]
    """The share at which each constraint that occurs would just be held; none unless asked for."""


@torch.no_grad()  # not inference mode, whose tensors Grad-CAM could not go back through
def predict(
    model: RationaleModel,
    exam: StoredExam,
    device: str = "cpu",
    *,
    evidence: bool = False,
    gradcam: bool = True,
    constraints: RationaleConstraints | None = None,
    rng: np.random.Generator | None = None,
) -> Prediction:
    """One forward pass over all slices and their mirror image, averaged, as inference does it.

    `evidence` adds the maps; Grad-CAM among them costs the decoder a second pass, there and back. `constraints` are
    measured on the slices as they are, as in training; `rng` draws for them.
    """
    stack = whole_exam(exam)
    encoder: dict[str, Any] = {}
    hook = model.f_img.register_forward_hook(lambda _, given, out: encoder.update(features=out, detail=given[1]))
    try:
        with autocast(device):
            output = model(torch.stack([stack.images, stack.images.flip(-1)]).to(device))
    finally:
        hook.remove()
    probabilities = mean_of_mirrored(output.mask_logits.float().sigmoid()).permute(1, 0, 2, 3)
    logits = mean_of_mirrored(output.mask_logits)
    size = stack.images.shape[-2:]
    full = torch.nn.functional.interpolate(probabilities, size, mode="bilinear", align_corners=False)
    concepts = model.concept_embeddings
    weights = torch.stack([stack.regions, stack.regions.flip(-1)]).to(device)
    if weights.shape[-2:] != output.embedding.shape[-2:]:
        target = output.embedding.shape[-2:]
        weights = torch.nn.functional.interpolate(weights.flatten(0, 1), target, mode="area").unflatten(0, (2, -1))
    images, valid, labels, regions = make_stack(exam, 0, len(exam.labels))
    similarity = mean_of_mirrored(torch.stack([output.similarity(i, concepts) for i in (0, 1)]))
    field = torch.nn.functional.interpolate(torch.from_numpy(valid[:1]).float(), (REGION_PIXELS,) * 2, mode="area")[0]
    maps = {}
    if evidence:
        cam = None
        if gradcam:
            pair = lesion_gradcam(model, encoder["features"], encoder["detail"]).unflatten(0, (2, -1))
            cam = mean_of_mirrored(pair)
        maps = evidence_maps(model, similarity, cam, field.to(device))
    found = {}
    if constraints is not None:
        found = constraints(model, output, [stack], concepts, rng or np.random.default_rng(0))
    return Prediction(
        probabilities=full.float().cpu().numpy() * valid[0],
        truth=true_masks(labels, valid[0]),
        sequences=diffusion(images, valid),
        pooled=(output.pool(weights).mean(0) @ concepts.T).cpu().numpy(),
        slices=(output.slice_means().mean(0) @ concepts.T).cpu().numpy(),
        similarity=similarity.cpu().numpy(),
        logits=torch.cat([logits.mean((2, 3)), logits.amax((2, 3))], 1).cpu().numpy(),
        stack=stack,
        seen=valid[0].any((1, 2)),
        field=field.numpy(),
        regions=regions * valid[0],
        rationales=exam.rationales,
        maps=maps,
        constraints={name: held_at(name, float(g)) for name, g in found.items()},
    )


def true_masks(labels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Packed labels and where T2W has data, (S, 256, 256) -> (4, S, 256, 256) bool: gland, PZ, TZ, lesion."""
    zone = np.where(valid, labels & 3, 0)
    return np.stack([zone > 0, zone == 1, zone == 2, valid & ((labels & LESION_BIT) > 0)])


def diffusion(images: np.ndarray, valid: np.ndarray) -> Sequences:
    """(3, S, 256, 256) images and where they have data -> "adc" and "dwi", as far as the examination has them."""
    return {name: (images[c], valid[c]) for c, name in enumerate(DIFFUSION, start=1) if valid[c].any()}


def mean_of_mirrored(pair: torch.Tensor) -> torch.Tensor:
    """(2, ..., w), of the image and of its mirror image -> (..., w)."""
    return (pair[0] + pair[1].flip(-1)) / 2


def predictions(
    model: RationaleModel, folder: str | Path, cases: int | None, device: str, **asked: Any
) -> Iterator[Prediction]:
    """One after the other, with a progress bar; `asked` is what `predict` is asked for."""
    for path in track(stored_exams(folder, cases), "Assessing"):
        yield predict(model, StoredExam.open(path), device, **asked)


@dataclass(frozen=True, kw_only=True)
class MaskResult:
    """The masks of one examination."""

    dice: dict[str, float]
    """Volume Dice of gland, PZ, TZ and lesion; nan where there is none."""
    smoothed: tuple[float, ...]
    """The paper's Dice of every slice with a lesion."""
    lesions: LesionResults
    candidates: tuple[tuple[float, int, int], ...]
    """Likelihood, voxels, and how many of these are in a true lesion."""
    lesion_voxels: int
    """Of all true lesions."""

    def dice_from(self, likelihood: float) -> float:
        """Volume Dice of the candidates from this likelihood up; nan where there is no lesion."""
        shown = [(voxels, inside) for value, voxels, inside in self.candidates if value >= likelihood]
        total = self.lesion_voxels + sum(voxels for voxels, _ in shown)
        return 2 * sum(inside for _, inside in shown) / total if self.lesion_voxels else float("nan")


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One examination."""

    masks: MaskResult
    answers: dict[str, list[tuple[str, str, str, bool]]]
    """"regions" and "slices" -> (node, zone, true concept, retrieved or not)."""
    evidence: EvidenceScores
    constraints: dict[str, float]
    """See Prediction."""
    rationale: RationaleResult


def assess_masks(
    probabilities: np.ndarray, truth: np.ndarray, sequences: Sequences, config: PostprocessingConfig
) -> tuple[MaskResult, dict[str, np.ndarray], tuple[float, ...]]:
    """Post-process as inference does, and compare; probabilities and truth are (4, S, 256, 256).

    Returns the result, the masks and the likelihoods of the lesions 1, 2, ... that are shown.
    """
    gland = clean_gland(probabilities[0], SPACING, config)
    pz, tz = split_zones(probabilities[1], probabilities[2], gland, SPACING, config)
    # Candidates of every likelihood make the curves of AP and AUROC; a user sees those from lesion_likelihood up.
    candidates = lesion_candidates(probabilities[3], pz, tz, sequences, SPACING, config)
    every, likelihood = label_lesions(candidates, gland.shape, replace(config, lesion_likelihood=0.0))
    shown = sum(value >= config.lesion_likelihood for value in likelihood)
    lesion = (every > 0) & (every <= shown)
    volume = {n: dice(a, t) for n, a, t in zip(CLASSES, (gland, pz, tz, lesion), truth, strict=True)}
    positive = np.flatnonzero(truth[3].any((1, 2)))
    if not positive.size:
        volume["lesion"] = float("nan")
    sizes, inside = (np.bincount(part, minlength=len(likelihood) + 1)[1:] for part in (every.ravel(), every[truth[3]]))
    result = MaskResult(
        candidates=tuple(zip(np.float32(likelihood).tolist(), sizes.tolist(), inside.tolist(), strict=True)),
        lesion_voxels=int(truth[3].sum()),
        dice=volume,
        smoothed=tuple(smoothed(lesion[s], truth[3][s]) for s in positive),
        lesions=match_lesions(every, likelihood, truth[3]),
    )
    return result, {"gland": gland, "pz": pz, "tz": tz, "lesions": every * lesion}, likelihood[:shown]


def assess(
    prediction: Prediction, config: PostprocessingConfig, tree: DecisionTree, targets: NodeTargets, concepts: list[str]
) -> CaseResult:
    """Masks, answers, evidence and rationales against what is true."""
    result, masks, likelihood = assess_masks(prediction.probabilities, prediction.truth, prediction.sequences, config)
    kept = np.flatnonzero(prediction.seen)
    of_slices = slice_answers(prediction.stack)
    places = true_regions(prediction.stack, tree, prediction.field)
    return CaseResult(
        masks=result,
        answers={
            "regions": _retrieved(prediction.pooled, prediction.stack.answers, targets, concepts),
            "slices": _retrieved(prediction.slices[kept], [of_slices[s] for s in kept], targets, concepts),
        },
        evidence=evidence_scores(prediction.maps, places, concepts, prediction.field),
        constraints=prediction.constraints,
        rationale=assess_rationale(prediction, masks, likelihood, tree, targets, config),
    )


def _retrieved(
    similarity: np.ndarray, answers: Sequence[Mapping[str, str]], targets: NodeTargets, concepts: list[str]
) -> list[tuple[str, str, str, bool]]:
    found = []
    for row, rationale in zip(similarity, answers, strict=True):
        for node, candidates, truth in targets.rows(rationale):
            best = candidates[int(row[candidates].argmax())]
            zone = (
                "" if node in ("zone", "lesion_presence") else rationale.get("zone", "")
            )  # what is known when it is asked
            found.append((node, zone, concepts[truth], best == truth))
    return found


def summarise_masks(results: Sequence[MaskResult], config: PostprocessingConfig) -> dict[str, dict[str, Any]]:
    """Dice and detection, each an Estimate as a mapping."""
    metrics: dict[str, Estimate] = {f"dice_{n}": mean([r.dice[n] for r in results]) for n in CLASSES}
    metrics["dice_lesion_smoothed"] = ratio([sum(r.smoothed) for r in results], [len(r.smoothed) for r in results])
    detection = Detection([r.lesions for r in results])
    metrics |= detection.estimates(config.lesion_likelihood)
    alike = detection.threshold_for(1.0)
    metrics["dice_lesion_at_1_fp"] = mean([r.dice_from(alike) for r in results])
    return {k: asdict(v) for k, v in metrics.items()}


def summarise(
    results: Sequence[CaseResult],
    config: PostprocessingConfig,
    tree: DecisionTree,
    heat_thresholds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Every figure with its interval over examinations; `heat_thresholds` are those of `summarise_evidence`."""
    retrieval = {unit: _accuracies([r.answers[unit] for r in results]) for unit in UNITS}
    return {
        "metrics": summarise_masks([r.masks for r in results], config),
        "retrieval": retrieval,
        "evidence": summarise_evidence([r.evidence for r in results], tree, heat_thresholds),
        "constraints": _held([r.constraints for r in results]),
        **summarise_rationale([r.rationale for r in results]),
    }


def _held(cases: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Constraint -> the share at which it would just be held, a mean over the examinations in which it occurs."""
    names = dict.fromkeys(name for case in cases for name in case)
    return {name: asdict(mean([case.get(name, float("nan")) for case in cases])) for name in names}


def _accuracies(cases: Sequence[list[tuple[str, str, str, bool]]]) -> dict[str, dict[str, Any]]:
    """Node -> accuracy, interval, number of examples, and what always giving the commonest answer would score."""
    rows = [row for case in cases for row in case]
    table = {}
    for node in dict.fromkeys(node for node, *_ in rows):
        right = [sum(hit for n, _, _, hit in case if n == node) for case in cases]
        there = [sum(n == node for n, *_ in case) for case in cases]
        by_zone: dict[str, Counter[str]] = defaultdict(Counter)
        for n, zone, truth, _ in rows:
            if n == node:
                by_zone[zone][truth] += 1
        commonest = sum(counts.most_common(1)[0][1] for counts in by_zone.values())
        table[node] = asdict(ratio(right, there)) | {"majority": commonest / sum(there)}
    return table


def evaluate(
    model: str | Path,
    data: str | Path,
    out: Path,
    *,
    cases: int | None = None,
    device: str = "cpu",
    gradcam: bool = True,
    distance: Distance | None = None,
) -> dict[str, Any]:
    """Write evaluation.json, evaluation.md and two figures to `out`; returns what the JSON holds.

    The thresholds of the heatmaps' overlap are those under `heat_thresholds` of the calibration that came with the
    model, where there is one; nothing is chosen here but what is called best. Without `gradcam`, that source of
    evidence is not defined, and a third of the time is saved. `distance` is that of the constraints; None: the
    one that the model was trained with.
    """
    stored_exams(data, cases)
    check_device(device)
    check_writable(out)
    checkpoint = load_checkpoint(model, device=device)
    config = PostprocessingConfig(**checkpoint.postprocessing)
    concepts = list(checkpoint.model.concepts)
    tree = DecisionTree.load()
    targets = NodeTargets(tree, concepts)
    results: list[CaseResult] = []
    examples: list[Example] = []
    if distance is None:
        distance = checkpoint.training.get("settings", {}).get("constraints", {}).get("distance", "l2")
    constraints = RationaleConstraints(at_full_shares(distance), tree, concepts)
    asked = {"evidence": True, "gradcam": gradcam, "constraints": constraints, "rng": np.random.default_rng(0)}
    for prediction in predictions(checkpoint.model, data, cases, device, **asked):
        results.append(assess(prediction, config, tree, targets, concepts))
        if len(examples) < EXAMPLES:
            places = true_regions(prediction.stack, tree, prediction.field)
            example = example_of(prediction, places, tree, concepts)
            examples += [example] if example is not None else []
    thresholds = checkpoint.training.get("calibration", {}).get("heat_thresholds")
    about = header(checkpoint.model.config.name, checkpoint.sha256, Path(data), len(results), config)
    report = about | summarise(results, config, tree, thresholds)
    text = json.dumps(report, indent=1, allow_nan=False)
    report = json.loads(text)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "evaluation.json", text + "\n")
    write_text(out / "evaluation.md", markdown(report))
    write_text(out / "evidence_rma.svg", evidence_chart(report["evidence"], tree))
    write_text(out / "evidence_examples.svg", example_panel(examples))
    return report


def header(name: str, sha256: str, data: Path, cases: int, config: PostprocessingConfig) -> dict[str, Any]:
    """What evaluation.json says first: of which weights, on what."""
    made = describe_set(data)
    return {
        "format": 1,
        "model": name,
        "weights_sha256": sha256,
        "data": {**{k: made[k] for k in ("name", "split", "seed")}, "examinations": cases},
        "postprocessing": asdict(config),
    }


@torch.no_grad()
def quick_validation(
    model: RationaleModel, folder: str, cases: int, tree: DecisionTree, fabric: Any
) -> dict[str, float]:
    """Volume Dice of the raw masks at 0.5 and node accuracy of the true regions, for the training curves."""
    targets = NodeTargets(tree, model.concepts)
    scores: dict[str, list[float]] = defaultdict(list)
    for path in stored_exams(folder, cases):
        stack = whole_exam(StoredExam.open(path))
        with fabric.autocast():
            output = model(stack.images[None].to(fabric.device))
        for name, value in raw_dice(output.mask_logits[0], stack).items():
            scores[f"dice_{name}"].append(value)
        regions = stack.regions
        if regions.shape[-2:] != output.embedding.shape[-2:]:
            regions = torch.nn.functional.interpolate(regions, output.embedding.shape[-2:], mode="area")
        similarity = (output.pool(regions[None].to(fabric.device))[0] @ model.concept_embeddings.T).cpu()
        for row, answers in zip(similarity, stack.answers, strict=True):
            for node, candidates, truth in targets.rows(answers):
                best = candidates[int(row[candidates].argmax())]
                scores[f"acc_{node}"].append(float(best == truth))
    names = [f"dice_{n}" for n in CLASSES] + [f"acc_{n}" for n in targets.nodes]
    return {n: float(np.nanmean(scores[n])) if scores[n] else float("nan") for n in names}


def raw_dice(logits: torch.Tensor, stack: Stack) -> dict[str, float]:
    """(S, 4, h, w) logits at 0.5, before any post-processing -> volume Dice of each class."""
    predicted, masks = (logits > 0).cpu().numpy(), stack.masks
    if masks.shape[-2:] != predicted.shape[-2:]:
        masks = torch.nn.functional.interpolate(masks, predicted.shape[-2:], mode="area")
    return {name: dice(predicted[:, c], masks[:, c].numpy() > 0.5) for c, name in enumerate(CLASSES)}
