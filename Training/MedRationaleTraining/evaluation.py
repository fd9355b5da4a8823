"""Metrics on whole synthetic examinations of patients that were not trained on."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleTraining.data.stacks import StoredExam, stored_exams, whole_exam
from MedRationaleTraining.losses import NodeTargets


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|); nan when both are empty."""
    total = a.sum() + b.sum()
    return float(2 * (a & b).sum() / total) if total else float("nan")


@torch.no_grad()
def quick_validation(
    model: RationaleModel, folder: str, cases: int, tree: DecisionTree, fabric: Any
) -> dict[str, float]:
    """Volume Dice of the raw masks at 0.5 and node accuracy of the true regions, for the training curves."""
    targets = NodeTargets(tree, model.concepts)
    scores: dict[str, list[float]] = defaultdict(list)
    for path in stored_exams(folder)[:cases]:
        stack = whole_exam(StoredExam.open(path))
        with fabric.autocast():
            output = model(stack.images[None].to(fabric.device))
        predicted = output.mask_logits[0].cpu().numpy() > 0
        for c, name in enumerate(CLASSES):
            scores[f"dice_{name}"].append(dice(predicted[:, c], stack.masks[:, c].numpy() > 0.5))
        similarity = (output.pool(stack.regions[None].to(fabric.device))[0] @ model.concept_embeddings.T).cpu()
        for row, answers in zip(similarity, stack.answers, strict=True):
            for node, candidates, truth in targets.rows(answers):
                best = candidates[int(row[candidates].argmax())]
                scores[f"acc_{node}"].append(float(best == truth))
    names = [f"dice_{n}" for n in CLASSES] + [f"acc_{n}" for n in targets.nodes]
    return {n: float(np.nanmean(scores[n])) if scores[n] else float("nan") for n in names}
