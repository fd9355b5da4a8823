"""Eq. 2 of the paper: Dice and focal loss for the masks, InfoNCE between image and rationale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from monai.losses import DiceLoss, FocalLoss
from torch import Tensor, nn

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.model.config import CLASSES
from MedRationaleTraining.config import LossConfig

CERTAIN_NO = -1e4
"""A logit whose sigmoid is 0 in every precision."""


class SegmentationLoss(nn.Module):
    """L_seg = Dice + FL_{alpha, gamma}; Dice over the whole batch, so that slices without a lesion are defined."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self._config = config
        weight = [config.lesion_weight if name == "lesion" else 1.0 for name in CLASSES]
        self._dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0, weight=weight)
        self._focal = FocalLoss(alpha=config.focal_alpha, gamma=config.focal_gamma, weight=weight)

    def forward(self, logits: Tensor, masks: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weighted Dice and focal terms.

        Args:
            logits: (N, classes, h, w).
            masks: (N, classes, h, w) in [0, 1].
            known: (N, classes) bool, which masks somebody drew; all where None. Both terms are means over what is
                known: focal over the known masks' pixels, Dice over the classes that the batch has a known mask of.
        """
        dice_scale: float | Tensor = 1.0
        focal_scale: float | Tensor = 1.0
        if known is not None:
            # What is not known becomes a certain and right "no": no gradient, nothing added to any sum.
            logits = logits.masked_fill(~known[:, :, None, None], CERTAIN_NO)
            masks = masks * known[:, :, None, None]
            dice_scale = known.shape[1] / known.any(0).sum().clamp(min=1)
            focal_scale = known.numel() / known.sum().clamp(min=1)
        dice = self._dice(logits, masks) * (self._config.dice_weight * dice_scale)
        return dice, self._focal(logits, masks) * (self._config.focal_weight * focal_scale)


def info_nce(
    similarity: Tensor,
    positive: Tensor,
    scale: Tensor,
    candidates: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """-log( sum_{k positive} exp(s_k / tau) / sum_{k candidate} exp(s_k / tau) ), mean over rows.

    Args:
        similarity: (R, K) cosine similarities.
        positive: (R, K) bool, at least one True a row.
        scale: 1 / tau.
        candidates: (R, K) bool, which of the K compete; all where None.
        weights: (R,) of the rows, in place of 1 / R each.
    """
    logits = similarity * scale
    if candidates is not None:
        logits = logits.masked_fill(~candidates, float("-inf"))
    hit = logits.masked_fill(~positive, float("-inf")).logsumexp(1)
    losses = logits.logsumexp(1) - hit
    return losses.mean() if weights is None else (losses * weights).sum()


class NodeTargets:
    """Which concepts compete at a node, as index tensors over the concept bank."""

    def __init__(self, tree: DecisionTree, concepts: Sequence[str]) -> None:
        self._tree = tree
        self.index = {concept: i for i, concept in enumerate(concepts)}
        self.nodes = [n.id for n in tree.nodes.values() if n.answered_by == "retrieval"] + ["zone"]
        self.nodes = list(dict.fromkeys(self.nodes))

    def rows(self, answers: Mapping[str, str]) -> list[tuple[str, list[int], int]]:
        """(node, candidate indices, index of the true concept) of every node that a rationale answers by retrieval."""
        zone = self._tree.zones.get(answers.get("zone", ""))
        rows = []
        for node in self.nodes:
            concept = answers.get(node)
            if concept is not None:
                candidates = self._tree.nodes[node].candidates(None if node == "zone" else zone)
                rows.append((node, [self.index[c] for c in candidates], self.index[concept]))
        return rows

    def loss(
        self, similarity: Tensor, answers: Sequence[Mapping[str, str]], scale: Tensor, *, balanced: bool = False
    ) -> Tensor:
        """InfoNCE over all nodes of R rationales; similarity (R, K) of each region to every concept.

        Every row counts as much as any other. If `balanced`, every node does, and of a node's answers each that is
        true of some row: which is the commonest is then no reason to give it.
        """
        picked, masks, positives = [], [], []
        asked: list[tuple[str, int]] = []
        for row, rationale in enumerate(answers):
            for node, candidates, truth in self.rows(rationale):
                asked.append((node, truth))
                mask = torch.zeros(similarity.shape[1], dtype=torch.bool)
                mask[candidates] = True
                picked.append(row)
                masks.append(mask)
                positives.append(nn.functional.one_hot(torch.tensor(truth), similarity.shape[1]).bool())
        if not picked:
            return similarity.sum() * 0
        device = similarity.device
        chosen = similarity[torch.tensor(picked, device=device)]
        allowed = torch.stack(masks).to(device)
        weights = self._balance(asked).to(device) if balanced else None
        return info_nce(chosen, torch.stack(positives).to(device), scale, allowed, weights)

    def _balance(self, asked: Sequence[tuple[str, int]]) -> Tensor:
        """Weights of (node, true concept) rows; their sum is the share of all nodes that occur."""
        rows = Counter(asked)
        answers = Counter(node for node, _ in rows)
        return torch.tensor([1 / (rows[node, truth] * answers[node] * len(self.nodes)) for node, truth in asked])
