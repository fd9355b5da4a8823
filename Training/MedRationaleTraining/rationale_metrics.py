"""Are the reasons right? Against other ways of answering (paper, Table 3), and against the masks.

Four methods answer the questions that the true rationale answers by retrieval, with the candidates of the true zone:

retrieval  the nearest concept to the slice's embedding where it looks most like a lesion, and a lesion where that is
           nearer by the model's margin, as inference has it (evidence.asked_of_slices). An examination: is there a
           lesion on any slice; the other questions by the mean over the slices where retrieval sees a lesion, over all
           slices where it sees none.
whole      the same with the mean embedding of the whole slice, the paper's unit, and no margin.
mask       the clean lesion mask and what lies under it: a lesion where the mask has one, the zone measured on it, the
           rest by the mean embedding under it. A slice is answered by the finding that is largest on it, an examination
           by the one of the highest PI-RADS category, then the likeliest. Without a finding only absence is answered.
logits     a linear discriminant on the mean and the maximum of each class's mask logits, fitted on the other
           examinations of the set (FOLDS folds): what the segmentation alone knows, without any words.

The truth of a slice is the rationale of its largest lesion, of an examination that of the lesion of the highest
category, then the largest; without a lesion it is that there is none. The paper names the baselines "mask" and "logits"
(Table 3); their details here are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.evidence import asked_of_slices, region_similarity
from MedRationaleLib.findings import LesionMeasurement, measure_lesions
from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.postprocessing import PostprocessingConfig
from MedRationaleLib.rationale import LesionAnswers
from MedRationaleLib.synthesis.fields import PIXEL_MM, SLICE_MM
from MedRationaleTraining.data.stacks import Stack, slice_answers
from MedRationaleTraining.losses import NodeTargets
from MedRationaleTraining.metrics import ratio

if TYPE_CHECKING:
    from MedRationaleTraining.evaluation import Prediction

METHODS = ("retrieval", "whole", "mask", "logits")
LEVELS = ("slices", "examinations")
FOLDS = 5
RIDGE = 0.01
"""Added to the variance of the standardised logits, so that few examples give a discriminant, too."""
HIT = 0.1
"""A finding is held against the lesion with which it has this intersection over union or more, as in picai_eval."""

Asked = list[tuple[str, list[int], int]]
"""(node, indices of the candidate concepts, index of the true one)."""
Said = dict[str, int | None]
"""Node -> index of the concept; None where the method has no answer."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A slice or an examination."""

    asked: Asked
    said: dict[str, Said]
    """"retrieval", "whole" and "mask" -> their answers."""
    logits: np.ndarray
    """(8,) mean, then maximum of the mask logits of each class."""


@dataclass(frozen=True, kw_only=True)
class PredictedFinding:
    """A finding as inference gives it."""

    lesion: LesionMeasurement
    similarity: np.ndarray
    """(K,) of the region under it."""
    pirads: int
    contradictions: int
    """Answers of the rationale that the mask contradicts: presence, zone (paper, Appendix E)."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """A finding on a true lesion."""

    zone: bool
    """Whether its zone is the true one."""
    pirads: int
    true_pirads: int


@dataclass(frozen=True, kw_only=True)
class RationaleResult:
    """One examination."""

    units: dict[str, list[Unit]]
    """Of each level, those of which something is known."""
    matches: list[Match]
    contradicted: list[bool]
    """Of each finding: whether mask and rationale contradict each other."""
    slices: int
    """Slices in which T2W has data."""
    disagreements: dict[str, int]
    """"mask_only", "rationale_only" and "zone" -> slices."""
    of_whole: int
    """Slices that disagree in any of these ways when they are asked as a whole, the paper's unit."""


def predicted_findings(
    prediction: Prediction,
    masks: Mapping[str, np.ndarray],
    likelihood: Sequence[float],
    tree: DecisionTree,
    concepts: Sequence[str],
    config: PostprocessingConfig,
) -> list[PredictedFinding]:
    """Measure every lesion and walk the tree with it, as inference does.

    Args:
        prediction: of the examination.
        masks: (S, 256, 256) "gland", "pz", "tz" bool and "lesions", labels.
        likelihood: of the labels 1, 2, ...
        tree: that is walked.
        concepts: ids in the order of the similarities.
        config: what belongs to the model.
    """
    labels = masks["lesions"]
    if not labels.any():
        return []
    gland, pz, tz = (_image(masks[name].astype(np.uint8)) for name in ("gland", "pz", "tz"))
    findings = []
    for lesion in measure_lesions(_image(labels), likelihood, gland, pz, tz, config):
        similarity = region_similarity(
            prediction.similarity, _shares(labels == lesion.label, prediction.similarity.shape[-1])
        )
        answers = LesionAnswers(lesion, dict(zip(concepts, similarity.tolist(), strict=True)), tree)
        walk = tree.walk(answers)
        findings.append(
            PredictedFinding(
                lesion=lesion, similarity=similarity, pirads=walk.pirads, contradictions=len(answers.contradictions)
            )
        )
    return findings


def assess_rationale(
    prediction: Prediction,
    masks: Mapping[str, np.ndarray],
    likelihood: Sequence[float],
    tree: DecisionTree,
    targets: NodeTargets,
    config: PostprocessingConfig,
) -> RationaleResult:
    """Compare what is said of slices, examination and findings with what is true, and with each other."""
    concepts = list(targets.index)
    labels, seen = masks["lesions"], np.flatnonzero(prediction.seen)
    findings = predicted_findings(prediction, masks, likelihood, tree, concepts, config)
    by_label = {f.lesion.label: f for f in findings}
    largest = [_largest_label(labels[s]) for s in seen]
    rows = {"retrieval": asked(prediction, tree, concepts)[seen], "whole": prediction.slices[seen]}
    present, absent = targets.index[tree.present], targets.index[tree.absent]
    margin = {"retrieval": config.presence_margin, "whole": 0.0}
    sees = {method: row[:, present] - row[:, absent] > margin[method] for method, row in rows.items()}
    truths = slice_answers(prediction.stack)
    slices = [
        _unit(
            targets,
            tree,
            truths[s],
            {method: (row[i], bool(sees[method][i])) for method, row in rows.items()},
            by_label.get(largest[i]),
            prediction.logits[s],
        )
        for i, s in enumerate(seen)
    ]
    units: dict[str, list[Unit]] = {"slices": slices, "examinations": []}
    if len(seen):
        logits = prediction.logits[seen]
        half = logits.shape[1] // 2
        units["examinations"] = [
            _unit(
                targets,
                tree,
                examination_answers(prediction.stack, tree),
                {m: ((r[sees[m]] if sees[m].any() else r).mean(0), bool(sees[m].any())) for m, r in rows.items()},
                max(findings, key=lambda f: (f.pirads, f.lesion.likelihood), default=None),
                np.concatenate([logits[:, :half].mean(0), logits[:, half:].max(0)]),
            )
        ]
    zone_of = {label: finding.lesion.zone for label, finding in by_label.items()}
    zones = [targets.index[c] for c in tree.zones]
    disagreements = {
        method: _disagreements(largest, zone_of, sees[method], [list(tree.zones.values())[i] for i in row.argmax(1)])
        for method, row in ((m, r[:, zones]) for m, r in rows.items())
    }
    return RationaleResult(
        units={level: [u for u in of_level if u.asked] for level, of_level in units.items()},
        matches=_matches(prediction, labels, findings, tree),
        contradicted=[f.contradictions > 0 for f in findings],
        slices=len(seen),
        disagreements=disagreements["retrieval"],
        of_whole=sum(disagreements["whole"].values()),
    )


def _disagreements(
    largest: Sequence[int], zone_of: Mapping[int, str], sees: np.ndarray, said: Sequence[str]
) -> dict[str, int]:
    """`largest`: of each slice the largest finding's label; `sees`, `said`: lesion and zone by retrieval."""
    both = [(zone, zone_of[m]) for m, s, zone in zip(largest, sees, said, strict=True) if m and s]
    return {
        "mask_only": sum(bool(m) and not s for m, s in zip(largest, sees, strict=True)),
        "rationale_only": sum(not m and bool(s) for m, s in zip(largest, sees, strict=True)),
        "zone": sum(a != b for a, b in both),
    }


def asked(prediction: Prediction, tree: DecisionTree, concepts: Sequence[str]) -> np.ndarray:
    """(S, K) similarity of every slice where it looks most like a lesion, as in inference."""
    return asked_of_slices(
        prediction.similarity,
        prediction.probabilities[0],
        present=concepts.index(tree.present),
        absent=concepts.index(tree.absent),
        patch_mm=prediction.probabilities.shape[-1] * PIXEL_MM / prediction.similarity.shape[-1],
    )


def examination_answers(stack: Stack, tree: DecisionTree) -> dict[str, str]:
    """The rationale of the lesion of the highest category, then the largest; absence where there is none.

    A rationale that is not complete counts below all categories. Where nobody looked for lesions, nothing is known.
    """
    volumes = stack.regions.sum((1, 2, 3))

    def rank(index: int) -> tuple[int, float]:
        try:
            category = tree.walk_answers(stack.answers[index]).pirads
        except InputError:
            category = 0
        return category, float(volumes[index])

    lesions = [r for r, lesion in enumerate(stack.is_lesion) if lesion]
    if lesions:
        return stack.answers[max(lesions, key=rank)]
    return {tree.start: tree.absent} if stack.known[CLASSES.index("lesion")] else {}


def _unit(
    targets: NodeTargets,
    tree: DecisionTree,
    truth: Mapping[str, str],
    retrieved: Mapping[str, tuple[np.ndarray, bool]],
    finding: PredictedFinding | None,
    logits: np.ndarray,
) -> Unit:
    """`retrieved`: by either way, similarity and whether there is a lesion; `finding`: who answers for the masks."""
    asked = targets.rows(truth)
    said: dict[str, Said] = {m: {node: _nearest(row, c) for node, c, _ in asked} for m, (row, _) in retrieved.items()}
    said["mask"] = {node: _nearest(finding.similarity, c) if finding else None for node, c, _ in asked}
    there = {m: sees for m, (_, sees) in retrieved.items()} | {"mask": finding is not None}
    for method, answers in said.items():
        answers[tree.start] = targets.index[tree.present if there[method] else tree.absent]
    if finding is not None and "zone" in said["mask"]:
        said["mask"]["zone"] = next(targets.index[c] for c, zone in tree.zones.items() if zone == finding.lesion.zone)
    return Unit(asked=asked, said=said, logits=logits)


def _nearest(similarity: np.ndarray, candidates: list[int]) -> int:
    return candidates[int(similarity[candidates].argmax())]


def _matches(
    prediction: Prediction, labels: np.ndarray, findings: Sequence[PredictedFinding], tree: DecisionTree
) -> list[Match]:
    """Findings, the likeliest first, each with the lesion it overlaps most of those that are not taken."""
    open_lesions = [r for r in prediction.rationales if r.is_lesion and "zone" in r.answers]
    found = []
    for finding in sorted(findings, key=lambda f: f.lesion.label):
        mask = labels == finding.lesion.label
        overlaps = []
        for region in open_lesions:
            true = prediction.regions == region.label
            overlaps.append(float((mask & true).sum() / max(1, (mask | true).sum())))
        if overlaps and max(overlaps) >= HIT:
            region = open_lesions.pop(int(np.argmax(overlaps)))
            zone = tree.zones[region.answers["zone"]] == finding.lesion.zone
            found.append(Match(zone=zone, pirads=finding.pirads, true_pirads=region.pirads))
    return found


def _image(array: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((PIXEL_MM, PIXEL_MM, SLICE_MM))
    return image


def _shares(mask: np.ndarray, pixels: int) -> np.ndarray:
    """(S, H, W) bool -> (S, pixels, pixels) share of each patch."""
    factor = mask.shape[-1] // pixels
    return mask.reshape(len(mask), pixels, factor, pixels, factor).mean((2, 4), dtype=np.float32)


def _largest_label(plane: np.ndarray) -> int:
    """The label with most pixels; 0 where there is none."""
    counts = np.bincount(plane.ravel(), minlength=2)
    return int(counts[1:].argmax()) + 1 if counts[1:].any() else 0


# ------------------------------------------------------------------ what the logits alone know


class Discriminant:
    """Linear discriminant: the class with the largest x'W m_c - m_c'W m_c / 2 + log(share_c), W = (S + RIDGE)^-1.

    S is the covariance within classes of the standardised features, m_c the mean of class c.
    """

    def __init__(self, features: np.ndarray, classes: Sequence[int]) -> None:
        """`features` (N, d) of N >= 1 examples of known class."""
        self.classes, index = np.unique(classes, return_inverse=True)
        self._centre, self._scale = features.mean(0), features.std(0) + 1e-6
        x = (features - self._centre) / self._scale
        means = np.stack([x[index == c].mean(0) for c in range(len(self.classes))])
        within = x - means[index]
        weights = np.linalg.inv(within.T @ within / len(x) + RIDGE * np.eye(x.shape[1]))
        self._directions = means @ weights
        share = np.bincount(index) / len(x)
        self._offsets = np.log(share) - (self._directions * means).sum(1) / 2

    def best(self, features: np.ndarray, candidates: Sequence[int]) -> int | None:
        """The likeliest of the candidates for one example (d,); None where none of them was in the examples."""
        scores = self._directions @ ((features - self._centre) / self._scale) + self._offsets
        known = [(float(score), int(c)) for score, c in zip(scores, self.classes, strict=True) if c in candidates]
        return max(known)[1] if known else None


def logit_answers(cases: Sequence[Sequence[Unit]]) -> list[list[Said]]:
    """Of every unit of every examination, by discriminants fitted on the examinations of the other folds."""
    folds = np.arange(len(cases)) % FOLDS
    result: list[list[Said]] = [[] for _ in cases]
    for fold in np.unique(folds):
        examples: dict[str, list[tuple[np.ndarray, int]]] = {}
        for case in (c for c, f in zip(cases, folds, strict=True) if f != fold):
            for unit in case:
                for node, _, truth in unit.asked:
                    examples.setdefault(node, []).append((unit.logits, truth))
        fitted = {n: Discriminant(np.stack([x for x, _ in e]), [c for _, c in e]) for n, e in examples.items()}
        for i in np.flatnonzero(folds == fold).tolist():
            result[i] = [
                {n: fitted[n].best(unit.logits, c) if n in fitted else None for n, c, _ in unit.asked}
                for unit in cases[i]
            ]
    return result


# ------------------------------------------------------------------ a set of examinations


def summarise_rationale(results: Sequence[RationaleResult]) -> dict[str, Any]:
    """The figures of a set, with intervals over examinations.

    {"rationale": {level: {method: {"overall": Estimate over all questions, "complete": Estimate of the units of which
     every answer is right, "nodes": {node: Estimate}}}},
     "findings": {"zone", "pirads", "pirads_within_one": Estimates over findings that hit a lesion,
                  "confusion": {true category: {category: findings}}},
     "inconsistency": {"slices": Estimate of any of the next three, "slices_mask_only": the mask has a lesion and the
                       rationale none, "slices_rationale_only": the reverse, "slices_zone": both see one, in different
                       zones; "slices_whole": any of the three where slices are asked as a whole;
                       "findings": Estimate of those whose own embedding denies the lesion or its zone}}
    Accuracy of zone and category is the paper's Figure 6, inconsistency its Appendix E.
    """
    tables: dict[str, dict[str, Any]] = {}
    for level in LEVELS:
        cases = [r.units[level] for r in results]
        said = {m: [[u.said[m] for u in case] for case in cases] for m in METHODS if m != "logits"}
        said["logits"] = logit_answers(cases)
        defined = {m: m != "logits" or len(cases) > 1 for m in METHODS}  # nothing to fit on in a single examination
        tables[level] = {m: _accuracy(cases if defined[m] else [[]], said[m] if defined[m] else [[]]) for m in METHODS}
    matches = [r.matches for r in results]
    there = [len(m) for m in matches]
    confusion: dict[str, dict[str, int]] = {}
    for m in sorted((m for case in matches for m in case), key=lambda m: (m.true_pirads, m.pirads)):
        row = confusion.setdefault(str(m.true_pirads), {})
        row[str(m.pirads)] = row.get(str(m.pirads), 0) + 1
    slices = [r.slices for r in results]
    kinds = ("mask_only", "rationale_only", "zone")
    return {
        "rationale": tables,
        "findings": {
            "zone": asdict(ratio([sum(m.zone for m in c) for c in matches], there)),
            "pirads": asdict(ratio([sum(m.pirads == m.true_pirads for m in c) for c in matches], there)),
            "pirads_within_one": asdict(
                ratio([sum(abs(m.pirads - m.true_pirads) <= 1 for m in c) for c in matches], there)
            ),
            "confusion": confusion,
        },
        "inconsistency": {
            "slices": asdict(ratio([sum(r.disagreements.values()) for r in results], slices)),
            **{f"slices_{k}": asdict(ratio([r.disagreements[k] for r in results], slices)) for k in kinds},
            "slices_whole": asdict(ratio([r.of_whole for r in results], slices)),
            "findings": asdict(ratio([sum(r.contradicted) for r in results], [len(r.contradicted) for r in results])),
        },
    }


def _accuracy(cases: Sequence[Sequence[Unit]], said: Sequence[Sequence[Said]]) -> dict[str, Any]:
    right = [
        [
            {node: answers.get(node) == truth for node, _, truth in unit.asked}
            for unit, answers in zip(u, s, strict=True)
        ]
        for u, s in zip(cases, said, strict=True)
    ]
    nodes = dict.fromkeys(node for case in right for unit in case for node in unit)
    return {
        "overall": asdict(
            ratio([sum(sum(u.values()) for u in case) for case in right], [sum(map(len, case)) for case in right])
        ),
        "complete": asdict(ratio([sum(all(u.values()) for u in case) for case in right], [len(c) for c in right])),
        "nodes": {
            n: asdict(ratio([sum(u.get(n, False) for u in c) for c in right], [sum(n in u for u in c) for c in right]))
            for n in nodes
        },
    }
