"""Figures of merit and their confidence intervals; the unit that is drawn again is the examination."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

with redirect_stdout(StringIO()):  # picai_eval greets on import
    from picai_eval.eval import evaluate_case
    from picai_eval.metrics import Metrics

RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over examinations; None where it is not defined."""

    value: float | None
    ci95: tuple[float, float] | None
    n: int
    """Examples that it rests on (examinations, lesions, slices or regions)."""


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|); nan when both are empty."""
    total = a.sum() + b.sum()
    return float(2 * (a & b).sum() / total) if total else float("nan")


def smoothed_dice(a: np.ndarray, b: np.ndarray, epsilon: float = 1.0) -> float:
    """The paper's (2 |A and B| + epsilon) / (|A| + |B| + epsilon); a complete miss of nine pixels scores 0.10."""
    return float((2 * (a & b).sum() + epsilon) / (a.sum() + b.sum() + epsilon))


def estimate(statistic: Callable[..., Any], cases: int, n: int, seed: int = 0, *, vectorized: bool = False) -> Estimate:
    """`statistic` of all examinations, given by their indices, and its percentile interval over resampled ones.

    A vectorized one takes many resamples at once, (resamples, cases), and gives as many values.
    """
    value = float(statistic(np.arange(cases)))
    if not np.isfinite(value):
        return Estimate(value=None, ci95=None, n=n)
    if cases < 2:
        return Estimate(value=value, ci95=None, n=n)
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # resamples without a single example are left out below
        drawn = bootstrap(
            (np.arange(cases),),
            statistic,
            n_resamples=RESAMPLES,
            vectorized=vectorized,
            method="percentile",
            random_state=rng,
        ).bootstrap_distribution
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Estimate(value=value, ci95=(float(low), float(high)), n=n)


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Mean over all examples, of which each examination has some: sum of sums / sum of counts."""
    total, number = np.asarray(sums, float), np.asarray(counts, float)

    def statistic(index: np.ndarray, axis: int = -1) -> np.ndarray:
        count = number[index].sum(axis)
        return np.where(count > 0, total[index].sum(axis) / np.maximum(count, 1), np.nan)

    return estimate(statistic, len(total), int(number.sum()), vectorized=True)


def mean(values: Sequence[float]) -> Estimate:
    """Mean over the examinations in which the figure is defined (not nan)."""
    defined = np.isfinite(values)
    return ratio(np.where(defined, values, 0).tolist(), defined.astype(int).tolist())


LesionResults = list[tuple[int, float, float]]
"""picai_eval's: (is a lesion, the candidate's confidence or 0 where missed, overlap) of one examination."""


def match_lesions(labels: np.ndarray, likelihood: Sequence[float], truth: np.ndarray) -> LesionResults:
    """Candidates (0 or a label) against true lesions, by picai_eval: a hit has an intersection over union of 0.1 up.

    `likelihood` is that of the labels 1, 2, ...
    """
    detection = np.append(0, likelihood).astype(np.float32)[labels]
    return evaluate_case(detection, truth.astype(np.int32))[0]


class Detection:
    """Lesion AP and case AUROC by picai_eval, guarded: without a positive examination it gives -0.0 and nan."""

    def __init__(self, results: Sequence[LesionResults]) -> None:
        self._metrics = Metrics(dict(enumerate(results)))
        self._target = np.array([any(hit for hit, _, _ in r) for r in results])
        self.results = list(results)
        self.lesions = sum(hit for r in results for hit, _, _ in r)

    def ap(self, index: np.ndarray) -> float:
        """Average precision; nan where no examination has a lesion."""
        return float(self._metrics.calc_AP(index.tolist())) if self._target[index].any() else float("nan")

    def auroc(self, index: np.ndarray) -> float:
        """Of the highest likelihood in an examination; nan where not both kinds are present."""
        chosen = self._target[index]
        mixed = chosen.any() and not chosen.all()
        return float(self._metrics.calc_auroc(index.tolist())) if mixed else float("nan")

    def score(self) -> float:
        """The PI-CAI challenge's (AP + AUROC) / 2; AP alone where AUROC is not defined."""
        every = np.arange(len(self.results))
        return float(np.nanmean([self.ap(every), self.auroc(every)])) if self._target.any() else float("nan")

    def at(self, threshold: float) -> tuple[list[int], list[int], list[int]]:
        """Per examination at an operating point: lesions found, lesions there, false candidates."""
        found = [sum(bool(hit) and 0 < confidence >= threshold for hit, confidence, _ in r) for r in self.results]
        there = [sum(hit for hit, _, _ in r) for r in self.results]
        false = [sum(not hit and confidence >= threshold for hit, confidence, _ in r) for r in self.results]
        return found, there, false

    def threshold_for(self, false_per_case: float) -> float:
        """The lowest likelihood from which no more than so many false candidates an examination are shown."""
        false = sorted((confidence for r in self.results for hit, confidence, _ in r if not hit), reverse=True)
        allowed = int(false_per_case * len(self.results))
        return float(np.nextafter(false[allowed], 1)) if len(false) > allowed else 0.0

    def f2(self, threshold: float) -> float:
        """F-measure with beta = 2, 5 TP / (5 TP + 4 FN + FP) over lesions: a missed lesion weighs four false ones."""
        found, there, false = (sum(v) for v in self.at(threshold))
        total = found + 4 * there + false
        return 5 * found / total if total else float("nan")

    def estimates(self, threshold: float) -> Mapping[str, Estimate]:
        """AP and AUROC over all thresholds; sensitivity and false candidates an examination at `threshold`.

        And sensitivity where there is one false candidate an examination, which is the same for every model.
        """
        cases = len(self.results)
        found, there, false = self.at(threshold)
        return {
            "lesion_ap": estimate(self.ap, cases, self.lesions),
            "case_auroc": estimate(self.auroc, cases, cases),
            "lesion_sensitivity": ratio(found, there),
            "false_candidates_per_case": ratio(false, [1] * cases),
            "lesion_sensitivity_at_1_fp": ratio(self.at(self.threshold_for(1.0))[0], there),
        }
