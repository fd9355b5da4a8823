"""Thresholds chosen on the synthetic validation split; they are stored with the model and used by inference."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.findings import PostprocessingConfig, clean_gland, label_lesions
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleTraining.evaluation import SPACING, predictions
from MedRationaleTraining.evidence_metrics import THRESHOLDS, heat_maps, intersection_over_union, true_regions
from MedRationaleTraining.metrics import Detection, LesionResults, dice, match_lesions

_logger = logging.getLogger(__name__)
GLAND = tuple(round(0.30 + 0.05 * i, 2) for i in range(12))
FLOORS = (0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50)
PEAKS = tuple(round(0.10 + 0.05 * i, 2) for i in range(17))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was chosen, and how every choice scored."""

    gland_threshold: float
    lesion_floor: float
    lesion_peak: float
    gland_dice: dict[float, float]
    """Threshold -> mean volume Dice."""
    lesion_score: dict[float, float]
    """Floor -> picai_eval's (AP + AUROC) / 2."""
    lesion_f2: dict[float, float]
    """Peak, at the chosen floor -> F2 over lesions."""
    heat_thresholds: dict[str, float] = field(default_factory=dict)
    """Concept -> the heat from which its heatmap overlaps best with where the concept is; of those that occurred."""

    @property
    def postprocessing(self) -> dict[str, float]:
        """Fields of PostprocessingConfig."""
        return {n: getattr(self, n) for n in ("gland_threshold", "lesion_peak", "lesion_floor")}


def calibrate(
    model: RationaleModel, folder: str | Path, *, cases: int | None = None, device: str = "cpu"
) -> Calibration:
    """Search the three thresholds of the masks, and of each concept's heatmap the one of the best overlap."""
    tree = DecisionTree.load()
    concepts = list(tree.bank)
    overlaps: dict[str, list[np.ndarray]] = defaultdict(list)

    def masks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for found in predictions(model, folder, cases, device):
            heat = heat_maps(model, torch.from_numpy(found.similarity), torch.from_numpy(found.field)).numpy()
            for concept, true in true_regions(found.stack, tree, found.field).items():
                on = true.region.sum((1, 2)) > 1
                if on.any():
                    overlap = intersection_over_union(heat[concepts.index(concept), on], true.region[on])
                    overlaps[concept].append(overlap)
            yield found.probabilities, found.truth

    chosen = calibrate_masks(masks(), folder)
    best = {concept: np.concatenate(found).mean(0).argmax() for concept, found in overlaps.items()}
    return replace(chosen, heat_thresholds={concept: THRESHOLDS[int(i)] for concept, i in best.items()})


def calibrate_masks(masks: Iterable[tuple[np.ndarray, np.ndarray]], folder: str | Path) -> Calibration:
    """Search the three thresholds one after the other, on (4, S, 256, 256) probabilities and truth.

    The gland's threshold has the best mean Dice. The lesions' floor, which sets how far a candidate reaches, has the
    best picai_eval score. That score never falls when less likely candidates are added, so it would always choose the
    lowest peak; the peak, from which a candidate is shown, has the best F2 over picai_eval's matches instead, for a
    false candidate is dismissed more easily than a lesion that was not shown is found.
    """
    base = PostprocessingConfig()
    gland_dice: dict[float, list[float]] = {t: [] for t in GLAND}
    results: dict[float, list[LesionResults]] = {f: [] for f in FLOORS}
    for p, truth in masks:
        gland = np.zeros(truth[0].shape, bool)
        for threshold in GLAND:
            mask = clean_gland(p[0], SPACING, replace(base, gland_threshold=threshold))
            gland_dice[threshold].append(dice(mask, truth[0]))
            gland = mask if threshold == base.gland_threshold else gland
        for floor in FLOORS:
            labels = label_lesions(p[3], gland, SPACING, replace(base, lesion_floor=floor, lesion_peak=floor))
            results[floor].append(match_lesions(labels, p[3], truth[3]))
    detections = {floor: Detection(found) for floor, found in results.items()}
    mean_dice = {t: float(np.nanmean(v)) for t, v in gland_dice.items() if np.isfinite(v).any()}
    if not mean_dice or not detections[FLOORS[0]].lesions:
        raise InputError(
            f"Expected glands and lesions in {folder} to choose thresholds on, got none; give another validation set."
        )
    scores = {floor: detection.score() for floor, detection in detections.items()}
    floor = _best(scores, base.lesion_floor)
    f2 = {peak: detections[floor].f2(peak) for peak in PEAKS if peak >= floor}
    chosen = Calibration(
        gland_threshold=_best(mean_dice, base.gland_threshold),
        lesion_floor=floor,
        lesion_peak=_best(f2, base.lesion_peak),
        gland_dice=mean_dice,
        lesion_score=scores,
        lesion_f2=f2,
    )
    _logger.info("thresholds chosen on %s: %s", Path(folder).name, chosen.postprocessing)
    return chosen


def _best(scores: dict[float, float], default: float) -> float:
    """The threshold of the highest score; of equal ones the nearest to the default."""
    highest = max(scores.values())
    return min((t for t, s in scores.items() if s >= highest - 1e-9), key=lambda t: abs(t - default))
