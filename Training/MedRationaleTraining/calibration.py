"""Thresholds and the candidates' likelihood, chosen on the synthetic validation split, stored with the model."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.postprocessing import (
    OF_MASK,
    Candidate,
    PostprocessingConfig,
    Sequences,
    clean_gland,
    lesion_candidates,
    split_zones,
)
from MedRationaleTraining.evaluation import SPACING, assess_masks, predictions
from MedRationaleTraining.evidence_metrics import THRESHOLDS, heat_maps, intersection_over_union, true_regions
from MedRationaleTraining.metrics import Detection, LesionResults, dice, match_lesions
from MedRationaleTraining.rationale_metrics import asked

_logger = logging.getLogger(__name__)
Choice = TypeVar("Choice", float, tuple[float, float])
GLAND = tuple(round(0.1 * i, 1) for i in range(3, 10))
OPENINGS = (1.5, 5.0, 8.0)
"""mm; from the slices' distance up, an opening also takes away what is thin from slice to slice."""
FLOORS = (0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50)
ALIKE = 0.01
"""Floors whose scores differ by less score the same: on 150 examinations the 95 % interval of the shipped model's
average precision is 0.17 wide (its card)."""
LIKELIHOODS = tuple(round(0.02 * i, 2) for i in range(1, 50))
SEEN_ON = ("mask", "mask+adc", "mask+dwi", "mask+adc+dwi")
FOLDS = 5
"""Of the cross-validation, by examination, in which every candidate is judged by weights that it had no part in."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was chosen, and how every choice scored."""

    gland_threshold: float
    gland_opening_mm: float
    lesion_floor: float
    lesion_likelihood: float
    likelihood: dict[str, dict[str, float]]
    """As PostprocessingConfig has it; empty where there were too few candidates to fit it."""
    lesion_slices: int
    """Slices of the set on which candidates are then shown, cross-validated, too."""
    gland_dice: dict[float, dict[float, float]] = field(default_factory=dict)
    """Opening in mm -> threshold -> mean volume Dice; like the next two, empty where the choice was an earlier one."""
    lesion_score: dict[float, float] = field(default_factory=dict)
    """Floor -> picai_eval's (AP + AUROC) / 2 by cross-validated likelihood."""
    lesion_f2: dict[float, float] = field(default_factory=dict)
    """Likelihood from which candidates are shown, at the chosen floor -> F2 over lesions, cross-validated."""
    presence_margin: float = 0.0
    """As PostprocessingConfig has it: by retrieval as many slices have a lesion as by the masks."""
    heat_thresholds: dict[str, float] = field(default_factory=dict)
    """Concept -> the heat from which its heatmap overlaps best with where the concept is; of those that occurred."""

    @property
    def postprocessing(self) -> dict[str, Any]:
        """Fields of PostprocessingConfig."""
        named = ("gland_threshold", "gland_opening_mm", "lesion_floor", "lesion_likelihood", "likelihood")
        return {n: getattr(self, n) for n in (*named, "presence_margin")}


def calibrate(
    model: RationaleModel,
    folder: str | Path,
    *,
    cases: int | None = None,
    device: str = "cpu",
    of_masks: PostprocessingConfig | None = None,
) -> Calibration:
    """Choose what belongs to the masks, a slice's margin, and of each heatmap the threshold of the best overlap.

    Where `of_masks` was chosen for these very masks before, the first of these is taken from there.
    """
    tree = DecisionTree.load()
    concepts = list(tree.bank)
    overlaps: dict[str, list[np.ndarray]] = defaultdict(list)
    nearer: list[np.ndarray] = []

    def masks() -> Iterator[tuple[np.ndarray, np.ndarray, Sequences]]:
        for found in predictions(model, folder, cases, device):
            heat = heat_maps(model, torch.from_numpy(found.similarity), torch.from_numpy(found.field)).numpy()
            for concept, true in true_regions(found.stack, tree, found.field).items():
                on = true.region.sum((1, 2)) > 1
                if on.any():
                    overlap = intersection_over_union(heat[concepts.index(concept), on], true.region[on])
                    overlaps[concept].append(overlap)
            rows = asked(found, tree, concepts)[found.seen]
            nearer.append(rows[:, concepts.index(tree.present)] - rows[:, concepts.index(tree.absent)])
            yield found.probabilities, found.truth, found.sequences

    chosen = calibrate_masks(masks(), folder) if of_masks is None else chosen_before(masks(), of_masks)
    best = {concept: np.concatenate(found).mean(0).argmax() for concept, found in overlaps.items()}
    chosen = replace(
        chosen,
        presence_margin=margin_of(np.concatenate(nearer), chosen.lesion_slices),
        heat_thresholds={concept: THRESHOLDS[int(i)] for concept, i in best.items()},
    )
    _logger.info("chosen on %s: %s", Path(folder).name, chosen.postprocessing)
    return chosen


def margin_of(nearer: np.ndarray, count: int) -> float:
    """The margin that `count` of the values are above, halfway to the next one; beyond all values for none or all."""
    ordered = np.concatenate([[nearer.max() + 1], np.sort(nearer)[::-1], [nearer.min() - 1]])
    return round(float(ordered[count] + ordered[count + 1]) / 2, 4)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The candidates of one examination, and picai_eval's matches in which the confidence is a candidate's number."""

    candidates: list[tuple[str, Mapping[str, float]]]
    """What it was seen on, and its features."""
    matches: LesionResults
    slices: list[np.ndarray]
    """Of each candidate, those that it is on."""

    def shown_on(self, likelihood: Sequence[float], threshold: float) -> int:
        """Slices with a candidate that is shown."""
        shown = sorted((i for i, v in enumerate(likelihood) if v >= threshold), key=lambda i: -likelihood[i])
        on = [self.slices[i] for i in shown[: PostprocessingConfig().lesion_maximum]]
        return len(np.unique(np.concatenate(on))) if on else 0

    @property
    def hits(self) -> list[bool]:
        """Of each candidate."""
        numbers = {round(number) for hit, number, _ in self.matches if hit}
        return [i in numbers for i in range(1, len(self.candidates) + 1)]

    def results(self, likelihood: Sequence[float]) -> LesionResults:
        """The matches with the candidates' likelihoods."""
        of = [0.0, *likelihood]
        return [(hit, of[round(number)], overlap) for hit, number, overlap in self.matches]


def calibrate_masks(masks: Iterable[tuple[np.ndarray, np.ndarray, Sequences]], folder: str | Path) -> Calibration:
    """Choose one after the other, on (4, S, 256, 256) probabilities and truth, and what was imaged.

    The gland's opening and threshold have the best mean Dice. A candidate's likelihood is a logistic regression,
    fitted for each of the combinations of sequences that it may have been seen on. The lesions' floor, which sets how
    far a candidate reaches, has the best picai_eval score, or one as good (ALIKE). That score never falls when less
    likely candidates are added, so it would show all of them; the likelihood from which one is shown has the best F2
    over picai_eval's matches instead, for a false candidate is dismissed more easily than a lesion that was not shown
    is found.
    """
    base = PostprocessingConfig()
    gland_dice: dict[tuple[float, float], list[float]] = {(o, t): [] for o in OPENINGS for t in GLAND}
    found: dict[float, list[_Found]] = {f: [] for f in FLOORS}
    for p, truth, sequences in masks:
        for (opening, threshold), values in gland_dice.items():
            config = replace(base, gland_threshold=threshold, gland_opening_mm=opening)
            values.append(dice(clean_gland(p[0], SPACING, config), truth[0]))
        gland = clean_gland(p[0], SPACING, base)
        pz, tz = split_zones(p[1], p[2], gland, SPACING, base)
        for floor in FLOORS:
            config = replace(base, lesion_floor=floor)
            found[floor].append(_match(lesion_candidates(p[3], pz, tz, sequences, SPACING, config), truth[3]))
    mean_dice = {cleaned: float(np.nanmean(v)) for cleaned, v in gland_dice.items() if np.isfinite(v).any()}
    likelihoods = {floor: _judged(of_floor) for floor, of_floor in found.items()}
    detections = {
        floor: Detection([f.results(values) for f, values in zip(found[floor], of_floor, strict=True)])
        for floor, of_floor in likelihoods.items()
    }
    if not mean_dice or not detections[FLOORS[0]].lesions:
        raise InputError(
            f"Expected glands and lesions in {folder} to choose thresholds on, got none; give another validation set."
        )
    opening, threshold = _best(mean_dice, (base.gland_opening_mm, base.gland_threshold))
    scores = {floor: detection.score() for floor, detection in detections.items()}
    floor = _best(scores, base.lesion_floor, ALIKE)
    f2 = {threshold: detections[floor].f2(threshold) for threshold in LIKELIHOODS}
    shown_from = _best(f2, base.lesion_likelihood)
    return Calibration(
        gland_threshold=threshold,
        gland_opening_mm=opening,
        lesion_floor=floor,
        lesion_likelihood=shown_from,
        likelihood=_weights(found[floor]),
        lesion_slices=sum(f.shown_on(v, shown_from) for f, v in zip(found[floor], likelihoods[floor], strict=True)),
        gland_dice={o: {t: v for (of, t), v in mean_dice.items() if of == o} for o in OPENINGS},
        lesion_score=scores,
        lesion_f2=f2,
    )


def chosen_before(
    masks: Iterable[tuple[np.ndarray, np.ndarray, Sequences]], config: PostprocessingConfig
) -> Calibration:
    """The choice that `config` holds, with the slices counted on which candidates are shown by it."""
    shown = (assess_masks(*of_case, config)[1]["lesions"] for of_case in masks)
    return Calibration(
        gland_threshold=config.gland_threshold,
        gland_opening_mm=config.gland_opening_mm,
        lesion_floor=config.lesion_floor,
        lesion_likelihood=config.lesion_likelihood,
        likelihood={seen_on: dict(weights) for seen_on, weights in config.likelihood.items()},
        lesion_slices=sum(int(lesions.any((1, 2)).sum()) for lesions in shown),
    )


def _match(candidates: Sequence[Candidate], truth: np.ndarray) -> _Found:
    labels = np.zeros(truth.shape, np.uint8)
    for number, candidate in enumerate(candidates, start=1):
        labels[candidate.mask] = number
    matches = match_lesions(labels, range(1, len(candidates) + 1), truth)
    return _Found(
        candidates=[(c.seen_on, c.features) for c in candidates],
        matches=matches,
        slices=[np.flatnonzero(c.mask.any((1, 2))) for c in candidates],
    )


def _names(seen_on: str) -> tuple[str, ...]:
    """Features of a candidate that was seen on these."""
    return (*OF_MASK, *seen_on.split("+")[1:])


def _table(found: Sequence[_Found], seen_on: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the candidates that were seen on all of these: features, hit or not, examination, and place in the list."""
    names = _names(seen_on)
    rows = [
        ([features[n] for n in names], hit, case, place)
        for case, f in enumerate(found)
        for place, ((_, features), hit) in enumerate(zip(f.candidates, f.hits, strict=True))
        if all(n in features for n in names)
    ]
    x, hits, cases, places = zip(*rows, strict=True) if rows else ((), (), (), ())
    return np.array(x, float).reshape(-1, len(names)), np.array(hits, bool), np.array(cases, int), np.array(places, int)


def _enough(hits: np.ndarray, cases: np.ndarray) -> bool:
    """Whether each fold can have hits and others, from examinations of its own."""
    return all(len(np.unique(cases[hits == kind])) >= FOLDS for kind in (True, False))


def _judged(found: Sequence[_Found]) -> list[list[float]]:
    """The likelihood of every candidate of every examination, by weights fitted without that examination."""
    values = [[float(1 / (1 + np.exp(-f["peak"]))) for _, f in of_case.candidates] for of_case in found]
    for seen_on in SEEN_ON:
        x, hits, cases, places = _table(found, seen_on)
        if not _enough(hits, cases):
            continue
        folds = StratifiedGroupKFold(FOLDS)
        judged = cross_val_predict(LogisticRegression(), x, hits, groups=cases, cv=folds, method="predict_proba")
        for case, place, value in zip(cases, places, judged[:, 1], strict=True):
            if found[case].candidates[place][0] == seen_on:
                values[case][place] = float(value)
    return values


def _weights(found: Sequence[_Found]) -> dict[str, dict[str, float]]:
    weights = {}
    for seen_on in SEEN_ON:
        x, hits, cases, _ = _table(found, seen_on)
        if _enough(hits, cases):
            fitted = LogisticRegression().fit(x, hits)
            named = zip(_names(seen_on), fitted.coef_[0], strict=True)
            weights[seen_on] = {"intercept": round(float(fitted.intercept_[0]), 4)}
            weights[seen_on] |= {name: round(float(w), 4) for name, w in named}
    return weights


def _best(scores: dict[Choice, float], default: Choice, alike: float = 1e-9) -> Choice:
    """What has the highest score; of those that are alike the nearest to the default."""
    highest = max(scores.values())
    equal = (choice for choice, score in scores.items() if score >= highest - alike)
    return min(equal, key=lambda choice: np.abs(np.subtract(choice, default)).tolist())
