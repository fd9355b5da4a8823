"""The constraints on concept heatmaps, as g <= 0 in units of their epsilon (paper, Eq. 3).

h_k = heat(f_img . f_txt(c_k)) at the resolution of the embedding; M is a structure's mask there. With
D(a, b) = sum_p (a - b)^2 / |M| (distance "l2"; the other two have no unit) the constraints are

disentangle   g = 1 - D(h_k, h_k') / (disentangle_share * attainable)      for every two concepts of one finding
localise      g = D(sum_k h_k, M) / localise_share - 1                     for what the concepts describe
contain       g = (1 - sum_p(h_k M) / (sum_p(h_k) + FAINT |M|)) / contain_share - 1    for every concept of a finding

The third goes beyond the paper. The sum of a finding's maps can lie on the finding while each of the dim ones among
them has most of its mass elsewhere, which a squared distance hardly counts; one minus a map's relevance mass accuracy
(paper, Eq. 5), a slice at a time, does, and a map that is dark is not contained either. It belongs to `localise`, and
with a share of 1 it holds always. Where the sum exceeds 1 within M it counts as 1: heatmaps that share a finding would
else have to be faint, each 1 / K, to let the sum be M.

`attainable` is the distance at which the sum is still M: K concepts that share a structure evenly and do not overlap
are 2 |M| / K apart, hence 2 / K in this unit. Constraints of one kind and node pair share a multiplier; within a batch
they are averaged. For `localise`, |M| is at least a typical lesion's area in each slice: where only the end of a lesion
is seen, or nothing at all, a squared distance would else be measured against next to nothing, and a few such examples
would outweigh all others. A dark sum is near such small masks, so that there only `contain` asks for light.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.evidence import TYPICAL_MM2
from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.model.rationale_model import ModelOutput, RationaleModel
from MedRationaleLib.preprocessing import CropSpec
from MedRationaleTraining.config import ConstraintConfig, Distance
from MedRationaleTraining.data.stacks import Stack

NOT_DESCRIBED = ("lesion_presence", "zone")
"""Nodes that are answered by retrieval, but do not describe a lesion's appearance."""
CROP_MM = CropSpec.spacing_mm[0] * CropSpec.size[0]
LESION_SHARE = TYPICAL_MM2 / CROP_MM**2
"""Of a slice that is taken by a typical lesion."""
FAINT = 0.002
"""Heat, as a mean over the structure, that is as good as none."""
PRESENT = "lesion_present"
ZONES = {"zone_pz": "pz", "zone_tz": "tz"}


def at_full_shares(distance: Distance) -> ConstraintConfig:
    """Settings with which g says at which share a constraint would just be held, see `held_at`."""
    return ConstraintConfig(distance=distance, disentangle_share=1.0, localise_share=1.0, contain_share=1.0)


def held_at(name: str, g: float) -> float:
    """g `at_full_shares` -> the share of what is attainable at which the constraint would just be held.

    It is held at that share and at less strict ones: at lower ones for disentangle, at higher ones for the other two.
    """
    return 1 - g if name.startswith("disentangle") else 1 + g


def violation(name: str, held: float, config: ConstraintConfig) -> float:
    """max(g, 0), in units of epsilon, of a constraint that would be `held_at` this share."""
    if name.startswith("disentangle"):
        return max(1 - held / config.disentangle_share, 0.0)
    return max(held / (config.contain_share if name.startswith("contain") else config.localise_share) - 1, 0.0)


class RationaleConstraints:
    """Computes all g of a batch."""

    def __init__(self, config: ConstraintConfig, tree: DecisionTree, concepts: Sequence[str]) -> None:
        self._config = config
        self._index = {concept: i for i, concept in enumerate(concepts)}
        retrieved = [n.id for n in tree.nodes.values() if n.answered_by == "retrieval"]
        self.nodes = tuple(n for n in retrieved if n not in NOT_DESCRIBED)
        self._candidates = {n: tree.nodes[n].candidates() for n in self.nodes}
        self.names: tuple[str, ...] = ()
        if config.disentangle:
            self.names += tuple(f"disentangle.{a}.{b}" for a, b in combinations(self.nodes, 2)) + ("disentangle.zone",)
        if config.localise:
            self.names += tuple(f"localise.{what}" for what in ("lesion", "nothing", "presence", "pz", "tz", "gland"))
            self.names += tuple(f"contain.{node}" for node in self.nodes)

    @property
    def described(self) -> list[int]:
        """Index of every concept that describes a lesion's appearance."""
        return [self._index[c] for candidates in self._candidates.values() for c in candidates]

    def __call__(
        self,
        model: RationaleModel,
        output: ModelOutput,
        stacks: Sequence[Stack],
        concepts: Tensor,
        rng: np.random.Generator,
    ) -> dict[str, Tensor]:
        """Name -> mean g over the batch, of the constraints that occur in it.

        Args:
            model: whose heat turns similarities into heatmaps.
            output: its forward pass over the stacks.
            stacks: with masks, regions and answers.
            concepts: (K, shared_dim) embeddings of all concepts; gradients reach f_txt through them.
            rng: draws which concepts must not light up where there is nothing.
        """
        found: dict[str, list[Tensor]] = defaultdict(list)
        for index, stack in enumerate(stacks):
            heat = model.heat(output.similarity(index, concepts))
            self._findings(heat, stack, found)
            self._anatomy(heat, stack, found)
            if self._config.localise:
                self._nothing(heat, stack, found, rng)
        return {name: torch.stack(found[name]).mean() for name in self.names if name in found}

    # ------------------------------------------------------------ what is constrained

    def _findings(self, heat: Tensor, stack: Stack, found: dict[str, list[Tensor]]) -> None:
        """Concepts of one finding: apart from each other, together its mask, each for the most part in it.

        Other findings' places are left out; of a single concept, those of findings that have the same answer.
        """
        size = heat.shape[-2:]
        regions = _resized(stack.regions.to(heat.device), size)
        described = [any(n in a for n in self.nodes) for a in stack.answers]
        for r, answers in enumerate(stack.answers):
            nodes = [n for n in self.nodes if n in answers]
            there = regions[r].flatten(1).sum(1) > 1
            if len(nodes) < 2 or not there.any():
                continue
            mask = regions[r, there]
            others = [regions[o, there] for o in range(len(regions)) if o != r and described[o]]
            weight = (1 - torch.stack(others).sum(0)).clamp(0, 1) if others else torch.ones_like(mask)
            maps = heat[[self._index[answers[n]] for n in nodes]][:, there]
            area = mask.sum()
            flat = maps.flatten(1)
            gram = (flat * weight.flatten()) @ flat.T
            if self._config.disentangle:
                attainable = 2 / len(nodes) if self._config.distance == "l2" else 1.0
                for i, j in combinations(range(len(nodes)), 2):
                    apart = self._distance(gram[i, i], gram[j, j], gram[i, j], area)
                    key = f"disentangle.{nodes[i]}.{nodes[j]}"
                    found[key].append(1 - apart / (self._config.disentangle_share * attainable))
            if self._config.localise:
                found["localise.lesion"].append(self._localised(maps.sum(0), mask, weight, area))
                for node, own in zip(nodes, maps, strict=True):
                    alike = [o for o, other in enumerate(stack.answers) if other.get(node) == answers[node]]
                    elsewhere = (1 - regions[alike][:, there].sum(0)).clamp(0, 1)
                    found[f"contain.{node}"].append(self._contained(own, mask, elsewhere))

    def _anatomy(self, heat: Tensor, stack: Stack, found: dict[str, list[Tensor]]) -> None:
        """Zone concepts on their zones, together on the gland; the presence of a lesion on all lesions."""
        masks = dict(zip(CLASSES, _resized(stack.masks.to(heat.device), heat.shape[-2:]).unbind(1), strict=True))
        maps = {name: heat[self._index[concept]] for concept, name in ZONES.items()}
        one = torch.ones_like(masks["gland"])
        areas = {name: mask.sum() for name, mask in masks.items()}
        if self._config.localise:
            for name, zone in maps.items():
                if areas[name] > 1:
                    found[f"localise.{name}"].append(self._localised(zone, masks[name], one, areas[name]))
            if areas["gland"] > 1:
                both = maps["pz"] + maps["tz"]
                found["localise.gland"].append(self._localised(both, masks["gland"], one, areas["gland"]))
            if stack.known[CLASSES.index("lesion")]:
                present = heat[self._index[PRESENT]]
                on_lesions = self._localised(present, masks["lesion"], one, areas["lesion"])
                found["localise.presence"].append(on_lesions if areas["lesion"] > 1 else self._dark(present))
        if self._config.disentangle and min(areas["pz"], areas["tz"]) > 1:
            a, b = maps["pz"], maps["tz"]
            apart = self._distance(a.square().sum(), b.square().sum(), (a * b).sum(), areas["gland"])
            found["disentangle.zone"].append(1 - apart / self._config.disentangle_share)

    def _nothing(self, heat: Tensor, stack: Stack, found: dict[str, list[Tensor]], rng: np.random.Generator) -> None:
        """On slices without anything to describe, a drawn path's concepts light up nowhere."""
        if not stack.known[CLASSES.index("lesion")]:
            return
        described = [r for r, a in enumerate(stack.answers) if stack.is_lesion[r] or any(n in a for n in self.nodes)]
        empty = stack.regions[described].sum((0, 2, 3)).to(heat.device) <= 1
        if not empty.any():
            return
        drawn = [self._index[c[rng.integers(len(c))]] for c in self._candidates.values()]
        found["localise.nothing"].append(self._dark(heat[drawn][:, empty].sum(0)))

    # ------------------------------------------------------------ distances

    def _localised(self, total: Tensor, mask: Tensor, weight: Tensor, area: Tensor) -> Tensor:
        total, area = total - mask * (total - 1).clamp(min=0), area.clamp(min=self._typical(total))
        pairs = ((total, total), (mask, mask), (total, mask))
        apart = self._distance(*((weight * a * b).sum() for a, b in pairs), area)
        return apart / self._config.localise_share - 1

    def _contained(self, heat: Tensor, mask: Tensor, elsewhere: Tensor) -> Tensor:
        """The share of (S, h, w) heat that lies elsewhere, as a mean over slices; FAINT of the mask counts with it."""
        positive = heat.clamp(min=0)
        inside, outside = (positive * mask).sum((1, 2)), (positive * elsewhere).sum((1, 2))
        missed = outside + FAINT * mask.sum((1, 2))
        return (missed / (inside + missed)).mean() / self._config.contain_share - 1

    def _distance(self, aa: Tensor, bb: Tensor, ab: Tensor, area: Tensor) -> Tensor:
        """D of two maps from their inner products."""
        if self._config.distance == "l2":
            return (aa + bb - 2 * ab) / area
        if self._config.distance == "cosine":
            return 1 - ab / (aa * bb).clamp(min=1e-12).sqrt()
        return 1 - ab / (aa + bb - ab).clamp(min=1e-6)

    def _dark(self, total: Tensor) -> Tensor:
        """D(total, 0) with a typical lesion's area a slice for |M|, whichever D is: (S, h, w) -> g."""
        return total.square().sum() / self._typical(total) / self._config.localise_share - 1

    def _typical(self, total: Tensor) -> float:
        """A typical lesion's area in each slice of (S, h, w), in patches."""
        return len(total) * total.shape[-1] ** 2 * LESION_SHARE


def _resized(weights: Tensor, size: torch.Size) -> Tensor:
    """(A, B, h, w) area means on another grid."""
    if weights.shape[-2:] == size:
        return weights
    return torch.nn.functional.interpolate(weights, size, mode="area")
