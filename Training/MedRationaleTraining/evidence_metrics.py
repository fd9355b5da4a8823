"""How well heatmaps show what they stand for, where a concept's true place is known.

The unit is a slice: all heatmaps of an examination (S, 64, 64) lie on the grid of `Stack.regions` (3 mm), and each
slice on which a concept has a place is measured on its own, then averaged. Three sources are measured alike:

heatmap     h_k = model.heat(cosine), cosine averaged over the image and its mirror image, as inference shows it
similarity  max(cosine, 0), the plain similarity map of the same model
gradcam     Grad-CAM of the lesion's logit: one map a slice, held against each concept of a lesion
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleTraining.constraints import NOT_DESCRIBED, PRESENT, ZONES
from MedRationaleTraining.data.stacks import REGION_PIXELS, Stack
from MedRationaleTraining.metrics import Estimate, ratio

SOURCES = ("heatmap", "similarity", "gradcam")
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Of the intersection over union: 0.05 to 0.95."""
NO_MASS = 1e-6
"""A map whose positive part sums to less than this (in patches of heat 1) is empty."""
CAM_SLICES = 8
"""Slices that go through the decoder at once when gradients are kept."""
FIGURES = ("rma", "pointing", "iou_50", "iou_best", "iou_stored")


# ------------------------------------------------------------------ one map against one region


def relevance_mass(heat: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Relevance mass accuracy, RMA = sum(H M) / sum(H) with H = max(heat, 0) (paper, Eq. 5; Arras et al., 2022).

    Args:
        heat: (S, h, w).
        region: (S, h, w) share of each patch that lies in the true region, [0, 1].

    Returns:
        (S,); nan where the map is empty, for there is no mass to be right or wrong.
    """
    positive = np.maximum(heat, 0).astype(np.float64)
    mass = positive.sum((1, 2))
    inside = (positive * region).sum((1, 2))
    return np.where(mass >= NO_MASS, inside / np.maximum(mass, NO_MASS), np.nan)


def pointing(heat: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Pointing game (Zhang et al., 2018): whether the map's maximum lies in the region.

    Patches that tie for the maximum count by their share inside, and so does a patch that lies partly inside: the
    chance that a point drawn in the brightest patches is a hit. There is no tolerance around the region.

    Args:
        heat: (S, h, w).
        region: (S, h, w) share of each patch that lies in the true region, [0, 1].

    Returns:
        (S,) in [0, 1]; nan where the map is empty.
    """
    brightest = heat == heat.max((1, 2), keepdims=True)
    hit = (region * brightest).sum((1, 2)) / brightest.sum((1, 2))
    return np.where(np.maximum(heat, 0).sum((1, 2), dtype=np.float64) >= NO_MASS, hit, np.nan)


def intersection_over_union(heat: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Of {heat >= t} and the region, for every t of THRESHOLDS; patches partly inside count by their share.

    Args:
        heat: (S, h, w).
        region: (S, h, w) share of each patch that lies in the true region, [0, 1], nowhere empty.

    Returns:
        (S, T).
    """
    area = region.sum((1, 2))
    found = []
    for threshold in THRESHOLDS:
        above = heat >= np.float32(threshold)
        common = (region * above).sum((1, 2))
        found.append(common / (above.sum((1, 2)) + area - common))
    return np.stack(found, 1)


# ------------------------------------------------------------------ maps and regions of an examination


def on_region_grid(maps: Tensor) -> Tensor:
    """(A, S, h, w) -> (A, S, 64, 64): bilinear where the embedding is coarser, area means where it is finer."""
    if maps.shape[-1] == REGION_PIXELS:
        return maps
    if maps.shape[-1] > REGION_PIXELS:
        return torch.nn.functional.interpolate(maps, (REGION_PIXELS,) * 2, mode="area")
    return torch.nn.functional.interpolate(maps, (REGION_PIXELS,) * 2, mode="bilinear", align_corners=False)


def lesion_gradcam(model: RationaleModel, encoded: Tensor, detail: Sequence[Tensor]) -> Tensor:
    """Grad-CAM of the lesion's logits on the encoder's last feature map A.

    max(sum_d a_d A_d, 0), a_d the mean of dy/dA_d over the slice (Selvaraju et al., 2017). y is the sum of the
    lesion's logits over the pixels in which they are positive, all pixels where none is (Seg-Grad-CAM, Vinogradova et
    al., 2020).

    Args:
        model: in evaluation mode.
        encoded: (N, neck_dim, h, w) f_img's output, made without inference mode.
        detail: the pyramid's levels, N slices each, or nothing.

    Returns:
        (N, h, w) float32, 0 up, in units that differ from slice to slice.
    """
    maps = []
    for start in range(0, len(encoded), CAM_SLICES):
        part = slice(start, start + CAM_SLICES)
        with torch.enable_grad():
            features = encoded[part].detach().float().requires_grad_()
            logits = model.f_mask(features, [level[part].detach().float() for level in detail])
            lesion = logits[:, CLASSES.index("lesion")]
            chosen = lesion.detach() > 0
            chosen = chosen | ~chosen.any(2).any(1)[:, None, None]
            (gradient,) = torch.autograd.grad((lesion * chosen).sum(), features)
        weight = gradient.mean((2, 3), keepdim=True)
        maps.append((weight * features.detach()).sum(1).clamp(min=0))
    return torch.cat(maps)


@torch.no_grad()
def heat_maps(model: RationaleModel, similarity: Tensor, field: Tensor) -> Tensor:
    """(K, S, h, w) cosine -> (K, S, 64, 64) heat, dark where T2W has no data: `field` (S, 64, 64) is its share."""
    device = model.concept_embeddings.device
    return on_region_grid(model.heat(similarity.to(device))).cpu() * field.cpu()


def evidence_maps(
    model: RationaleModel, similarity: Tensor, cam: Tensor | None, field: Tensor
) -> dict[str, np.ndarray]:
    """Every source's maps, dark where T2W has no data, for there is no image there to light up on.

    Args:
        model: whose `heat` turns similarities into heatmaps.
        similarity: (K, S, h, w) cosine, averaged over mirror images.
        cam: (S, h', w') of `lesion_gradcam`, averaged over mirror images; None leaves Grad-CAM out.
        field: (S, 64, 64) share of each patch in which T2W has data.

    Returns:
        source -> (K, S, 64, 64) float32; "gradcam" (1, S, 64, 64), brightest patch of every slice 1.
    """
    maps = {
        "heatmap": heat_maps(model, similarity, field),
        "similarity": on_region_grid(similarity.clamp(min=0)) * field,
    }
    if cam is not None:
        cam = on_region_grid(cam[None]) * field
        maps["gradcam"] = cam / cam.amax((2, 3), keepdim=True).clamp(min=1e-12)
    return {source: m.float().cpu().numpy() for source, m in maps.items()}


@dataclass(frozen=True, kw_only=True)
class TrueRegion:
    """Where a concept truly is."""

    node: str
    region: np.ndarray
    """(S, 64, 64) share of each patch, [0, 1]."""
    lesion: np.ndarray
    """(S,) bool: on the slice it is true of a lesion (PI-RADS 3 up), not of a mimic alone. Never for zones."""


def true_regions(stack: Stack, tree: DecisionTree, field: np.ndarray) -> dict[str, TrueRegion]:
    """Concept -> its place.

    A concept that describes findings (signal, pattern, shape, margin, homogeneity) is in all findings, lesions and
    mimics, whose rationale names it; `lesion_present` in the lesions; a zone in its mask. Absence, size and extension
    have no place. `field` (S, 64, 64) is the share of each patch in which T2W has data.
    """
    described = [n.id for n in tree.nodes.values() if n.answered_by == "retrieval" and n.id not in NOT_DESCRIBED]
    masks = stack.regions.numpy()
    found: dict[str, TrueRegion] = {}

    def add(concept: str, node: str, region: np.ndarray, lesion: np.ndarray) -> None:
        if concept in found:
            before = found[concept]
            region, lesion = np.minimum(before.region + region, field), before.lesion | lesion
        found[concept] = TrueRegion(node=node, region=np.minimum(region, field), lesion=lesion)

    for mask, answers, is_lesion in zip(masks, stack.answers, stack.is_lesion, strict=True):
        on = np.minimum(mask, field).sum((1, 2)) > 1
        for node in described:
            if node in answers:
                add(answers[node], node, mask, on & is_lesion)
        if is_lesion:
            add(PRESENT, tree.bank[PRESENT].node, mask, on)
    zones = on_region_grid(stack.masks).numpy()
    for concept, name in ZONES.items():
        zone = zones[:, CLASSES.index(name)]
        add(concept, tree.bank[concept].node, zone, np.zeros(len(zone), bool))
    return found


@dataclass(frozen=True, kw_only=True)
class MapScores:
    """One source against one concept's region on the n slices of an examination on which that has a patch or more."""

    rma: np.ndarray
    """(n,) nan where the map is empty."""
    pointing: np.ndarray
    """(n,) nan where the map is empty."""
    iou: np.ndarray
    """(n, T)."""
    lesion: np.ndarray
    """(n,) bool, see TrueRegion."""
    uniform: np.ndarray
    """(n,) RMA of a map that is equally bright wherever T2W has data: the region's share of the image."""


EvidenceScores = dict[str, dict[str, MapScores]]
"""Source -> concept -> scores, of one examination."""


def evidence_scores(
    maps: Mapping[str, np.ndarray], regions: Mapping[str, TrueRegion], concepts: Sequence[str], field: np.ndarray
) -> EvidenceScores:
    """Every source against every concept's place; Grad-CAM of the lesion says nothing of zones and is spared them."""
    scores: EvidenceScores = {source: {} for source in maps}
    for concept, true in regions.items():
        on = true.region.sum((1, 2)) > 1
        if not on.any():
            continue
        region = true.region[on]
        for source, of_source in maps.items():
            if source == "gradcam" and true.node == "zone":
                continue
            heat = of_source[0 if source == "gradcam" else concepts.index(concept)][on]
            scores[source][concept] = MapScores(
                rma=relevance_mass(heat, region),
                pointing=pointing(heat, region),
                iou=intersection_over_union(heat, region),
                lesion=true.lesion[on],
                uniform=region.sum((1, 2)) / field[on].sum((1, 2)),
            )
    return scores


# ------------------------------------------------------------------ a set of examinations


def summarise_evidence(
    cases: Sequence[EvidenceScores], tree: DecisionTree, stored: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The figures of a set, with intervals over examinations.

    {"rma_lesion": Estimate of the heatmaps, "thresholds": [...],
     source: {"lesion": row, "findings": row, "nodes": {node: row}, "concepts": {concept: row}}}
    "lesion" is over all concepts that describe lesions (not presence, not zone) on the lesions' slices, "findings" the
    same with mimics. A row: the Estimates rma, pointing, iou_50, iou_best and iou_stored, "empty" (slices whose map is
    empty; they are in none of rma and pointing), "uniform" (RMA of an even map) and, of a concept, "best_threshold".

    iou_50 is at a heat of 0.5. iou_best is at the threshold, one a concept, that is best on these very examinations,
    hence too good; iou_stored at that of `stored` (concept -> one of THRESHOLDS, chosen on validation examinations),
    not defined where there is none.
    """
    summary: dict[str, Any] = {"thresholds": list(THRESHOLDS)}
    for source in SOURCES:
        of_source = [case.get(source, {}) for case in cases]
        present = {c for case in of_source for c in case}
        nodes = {c: tree.bank[c].node for c in tree.bank if c in present}
        best = {c: int(np.concatenate([s[c].iou for s in of_source if c in s]).mean(0).argmax()) for c in nodes}
        kept = {c: int(np.abs(np.subtract(THRESHOLDS, t)).argmin()) for c, t in (stored or {}).items()}
        units = [_units(case, best, kept if source == "heatmap" else {}) for case in of_source]
        describing = [c for c, node in nodes.items() if node not in NOT_DESCRIBED]
        summary[source] = {
            "lesion": _row(units, describing, lesions=True),
            "findings": _row(units, describing),
            "nodes": {n: _row(units, [c for c in nodes if nodes[c] == n]) for n in dict.fromkeys(nodes.values())},
            "concepts": {c: _row(units, [c]) | {"best_threshold": THRESHOLDS[best[c]]} for c in nodes},
        }
    return {"rma_lesion": summary["heatmap"]["lesion"]["rma"]} | summary


def _units(case: Mapping[str, MapScores], best: Mapping[str, int], stored: Mapping[str, int]) -> dict[str, np.ndarray]:
    """An examination's slices of all concepts in one table of columns."""
    half = THRESHOLDS.index(0.5)
    columns: dict[str, list[np.ndarray]] = {n: [np.zeros(0)] for n in ("concept", "lesion", "uniform", *FIGURES)}
    for concept, s in case.items():
        nothing = np.full(len(s.rma), np.nan)
        columns["concept"].append(np.full(len(s.rma), concept))
        columns["lesion"].append(s.lesion)
        columns["uniform"].append(s.uniform)
        columns["rma"].append(s.rma)
        columns["pointing"].append(s.pointing)
        columns["iou_50"].append(s.iou[:, half])
        columns["iou_best"].append(s.iou[:, best[concept]])
        columns["iou_stored"].append(s.iou[:, stored[concept]] if concept in stored else nothing)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _row(
    units: Sequence[Mapping[str, np.ndarray]], concepts: Sequence[str], *, lesions: bool = False
) -> dict[str, Any]:
    chosen = [np.isin(u["concept"], concepts) & ((u["lesion"] > 0) | (not lesions)) for u in units]

    def figure(name: str) -> Estimate:
        values = [u[name][c] for u, c in zip(units, chosen, strict=True)]
        return ratio([float(np.nansum(v)) for v in values], [int(np.isfinite(v).sum()) for v in values])

    row: dict[str, Any] = {name: asdict(figure(name)) for name in FIGURES}
    row["empty"] = int(sum(np.isnan(u["rma"][c]).sum() for u, c in zip(units, chosen, strict=True)))
    row["uniform"] = figure("uniform").value
    return row
