"""What is minimised: all terms of Eq. 2 and the constraints of Eq. 3, for the stacks that go through the model at once.

Each such part of a batch is an objective of its own, and a step follows the mean of the parts' gradients, so that it
does not matter over how many processes, or how many passes one after the other, the parts of a batch are spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.evidence import TYPICAL_MM2
from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.model.rationale_model import ModelOutput, RationaleModel
from MedRationaleLib.model.text_encoder import TextEncoder
from MedRationaleTraining.config import FitConfig
from MedRationaleTraining.constraints import RationaleConstraints
from MedRationaleTraining.data.stacks import Stack, absence, slice_answers, slice_lesions
from MedRationaleTraining.losses import NodeTargets, SegmentationLoss, info_nce
from MedRationaleTraining.phrases import all_phrases, draw_phrases, draw_rationale


class Part:
    """Some stacks of one step. No dataclass: Fabric would copy its tensors to convert them."""

    def __init__(self, stacks: Sequence[Stack], step: int, number: int) -> None:
        """`number` is the part's place in its batch; with the step it seeds what is drawn."""
        self.stacks, self.step, self.number = stacks, step, number


class MaskObjective(nn.Module):
    """Dice and focal loss alone, for networks that segment and say nothing."""

    constrained: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, config: FitConfig) -> None:
        super().__init__()
        self.model = model
        self._segmentation = SegmentationLoss(config.loss)

    def forward(self, part: Part) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As Objective's; no constraint occurs."""
        device = next(self.model.parameters()).device
        logits = self.model(torch.stack([s.images for s in part.stacks]).to(device)).float()
        dice, focal = _segmentation_terms(self._segmentation, logits, part.stacks)
        return {"dice": dice, "focal": focal}, {}


class Objective(nn.Module):
    """Model and losses in one forward pass, which is what DistributedDataParallel must see as a whole."""

    def __init__(self, model: RationaleModel, config: FitConfig, bank: ConceptBank, tree: DecisionTree) -> None:
        super().__init__()
        self.model = model
        self._config = config.loss
        self._seed = config.seed
        self._phrases = all_phrases(bank)
        self._segmentation = SegmentationLoss(config.loss)
        self._nodes = NodeTargets(tree, list(bank))
        self.constraints = RationaleConstraints(config.constraints, tree, list(bank))
        self.constrained = self.constraints.names
        self._start = config.constraints.start
        self._text_frozen = config.tuning.text == "frozen"
        self._embedded: dict[str, Tensor] = {}

    def forward(self, part: Part) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Name -> weighted scalar, whose sum is the objective, and name -> g of each constraint that occurs."""
        model, stacks = self.model, part.stacks
        device = model.concept_embeddings.device
        output = model(torch.stack([s.images for s in stacks]).to(device))
        dice, focal = _segmentation_terms(self._segmentation, output.mask_logits, stacks)

        scale = model.logit_scale.exp().clamp(max=100)
        answers = [a for s in stacks for a in s.answers]
        rng = np.random.default_rng((self._seed, part.step, part.number))
        train_text = part.step % self._config.text_every == 0
        concepts, rationales = self._texts(answers, part, rng) if train_text else (model.concept_embeddings, None)
        pooled = _pool(output, stacks)
        terms = {"dice": dice, "focal": focal}
        terms["nodes"] = self._config.node_weight * self._nodes.loss(pooled @ concepts.T, answers, scale)

        of_slices = self._whole_slices if self._config.slice_unit == "whole" else self._likeliest_places
        terms["slices"] = self._config.slice_weight * of_slices(output, stacks, concepts, scale)
        if rationales is not None and len(answers) > 1:
            same = torch.tensor([[a == b for b in answers] for a in answers], device=device)
            similarity = pooled @ rationales.T
            both = info_nce(similarity, same, scale) + info_nce(similarity.T, same.T, scale)
            terms["rationales"] = self._config.rationale_weight * both / 2
        if part.step < self._start or not self.constrained:
            return terms, {}
        return terms, self.constraints(model, output, stacks, concepts, rng)

    def _whole_slices(self, output: ModelOutput, stacks: Sequence[Stack], concepts: Tensor, scale: Tensor) -> Tensor:
        answers = [a for s in stacks for a in slice_answers(s)]
        return self._nodes.loss(output.slice_means().flatten(0, 1) @ concepts.T, answers, scale)

    def _likeliest_places(
        self, output: ModelOutput, stacks: Sequence[Stack], concepts: Tensor, scale: Tensor
    ) -> Tensor:
        """Lesions where they look most like one, and of every slice the rest of the gland where it does."""
        lesion, elsewhere = (torch.stack(p).to(concepts.device) for p in zip(*map(places, stacks), strict=True))
        size = output.embedding.shape[-2:]
        largest = nn.functional.interpolate(lesion, size, mode="area")
        within = (largest > 0) & (largest >= largest.amax((2, 3), keepdim=True) / 2)
        outside = nn.functional.interpolate(elsewhere, size, mode="area") > 0.5
        present, absent = (concepts[self._nodes.index[c]] for c in ("lesion_present", "lesion_absent"))
        count = max(1, round(TYPICAL_MM2 / self.model.patch_mm**2))
        asked = [output.likeliest_means(present - absent, place, count).flatten(0, 1) for place in (within, outside)]
        of_lesions = [{} if r is None else s.answers[r] for s in stacks for r in slice_lesions(s)]
        of_the_rest = [absence(s) for s in stacks for _ in s.images]
        similarity = torch.cat(asked) @ concepts.T
        similarity[:, self._nodes.index["lesion_present"]] -= self._config.slice_margin
        return self._nodes.loss(similarity, of_lesions + of_the_rest, scale, balanced=True)

    def _texts(self, answers: Sequence[dict[str, str]], part: Part, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Embeddings of a phrasing of every concept, the same for all parts of a step, and of the rationales."""
        texts = draw_phrases(self._phrases, np.random.default_rng((self._seed, part.step)))
        sentences = [draw_rationale(a, self._phrases, rng) for a in answers]
        if self._text_frozen:
            concepts, rationales = self._remembered(texts), self._encode(sentences)
        else:
            concepts, rationales = self._encode(texts + sentences).split((len(texts), len(sentences)))
        self.model.concept_embeddings.copy_(concepts.detach())
        return concepts, rationales

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """(N, shared_dim); a frozen tower is asked as in inference, without dropout and gradients."""
        encoder = cast(TextEncoder, self.model.f_txt)
        if self._text_frozen:
            encoder.eval()
        with torch.set_grad_enabled(not self._text_frozen and torch.is_grad_enabled()):
            return encoder(encoder.tokenize(texts).to(self.model.concept_embeddings.device))

    def _remembered(self, phrasings: Sequence[str]) -> Tensor:
        """Embeddings of phrasings, of which there are some hundreds, by a tower that does not change."""
        new = [text for text in dict.fromkeys(phrasings) if text not in self._embedded]
        if new:
            self._embedded.update(zip(new, self._encode(new), strict=True))
        return torch.stack([self._embedded[text] for text in phrasings])


def _segmentation_terms(loss: SegmentationLoss, logits: Tensor, stacks: Sequence[Stack]) -> tuple[Tensor, Tensor]:
    """(B, S, classes, h, w) logits against the stacks' masks."""
    masks = torch.stack([s.masks for s in stacks]).to(logits.device)
    if masks.shape[-2:] != logits.shape[-2:]:
        resized = nn.functional.interpolate(masks.flatten(0, 1), logits.shape[-2:], mode="area")
        masks = resized.unflatten(0, masks.shape[:2])
    known = torch.stack([s.known for s in stacks]).repeat_interleave(masks.shape[1], 0).to(logits.device)
    return loss(logits.flatten(0, 1), masks.flatten(0, 1), known)


def places(stack: Stack) -> tuple[Tensor, Tensor]:
    """Each slice's largest lesion (S, 64, 64), empty where it has none, and its gland without any (S, 128, 128).

    Both in [0, 1].
    """
    empty = stack.regions.new_zeros(stack.regions.shape[2:])
    regions = [empty if r is None else stack.regions[r, s] for s, r in enumerate(slice_lesions(stack))]
    gland, lesion = (stack.masks[:, CLASSES.index(name)] for name in ("gland", "lesion"))
    return torch.stack(regions), gland * (lesion == 0)


def _pool(output: ModelOutput, stacks: Sequence[Stack]) -> Tensor:
    """Mean embeddings of all stacks' regions, (R, shared_dim), in the stacks' order."""
    device, size = output.embedding.device, output.embedding.shape[-2:]
    most = max(s.regions.shape[0] for s in stacks)
    weights = torch.stack([torch.nn.functional.pad(s.regions, (0, 0) * 3 + (0, most - len(s.regions))) for s in stacks])
    weights = weights.to(device)
    if weights.shape[-2:] != size:
        weights = torch.nn.functional.interpolate(weights.flatten(0, 1), size, mode="area").unflatten(
            0, weights.shape[:2]
        )
    pooled = output.pool(weights)
    return torch.cat([p[: len(s.regions)] for p, s in zip(pooled, stacks, strict=True)])
