"""The terms of Eq. 2 against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("monai")

from MedRationaleTraining.config import LossConfig  # noqa: E402
from MedRationaleTraining.losses import NodeTargets, SegmentationLoss, info_nce  # noqa: E402
from MedRationaleTraining.phrases import all_phrases, draw_phrases, draw_rationale  # noqa: E402

from MedRationaleLib.concepts import ConceptBank  # noqa: E402
from MedRationaleLib.decision_tree import DecisionTree  # noqa: E402


def test_the_focal_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 4, 8, 8), (torch.rand(2, 4, 8, 8) > 0.8).float()
    _, focal = SegmentationLoss(LossConfig())(logits, masks)
    p = logits.sigmoid()
    right = torch.where(masks > 0, p, 1 - p)
    weight = torch.where(masks > 0, 0.97, 0.03)
    assert focal.item() == pytest.approx((-weight * (1 - right) ** 2 * right.log()).mean().item(), rel=1e-4)


def test_the_dice_loss_is_one_minus_dice_over_the_batch_and_defined_without_a_lesion() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 4, 8, 8), (torch.rand(2, 4, 8, 8) > 0.5).float()
    masks[:, 3] = 0
    dice, _ = SegmentationLoss(LossConfig())(logits, masks)
    p = logits.sigmoid()
    both, total = (p * masks).sum((0, 2, 3)), (p + masks).sum((0, 2, 3))
    assert dice.item() == pytest.approx((1 - (2 * both + 1) / (total + 1)).mean().item(), rel=1e-4)


def test_info_nce_equals_a_hand_computation() -> None:
    similarity = torch.tensor([[0.5, 0.2, -0.1], [0.0, 0.4, 0.3]])
    positive = torch.tensor([[True, False, False], [False, True, True]])
    first = -math.log(math.exp(5) / (math.exp(5) + math.exp(2) + math.exp(-1)))
    second = -math.log((math.exp(4) + math.exp(3)) / (math.exp(0) + math.exp(4) + math.exp(3)))
    assert info_nce(similarity, positive, torch.tensor(10.0)).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_only_candidates_compete_and_gradients_stay_finite() -> None:
    similarity = torch.tensor([[0.5, 0.2, 0.9]], requires_grad=True)
    positive, candidates = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    loss = info_nce(similarity, positive, torch.tensor(10.0), candidates)
    assert loss.item() == pytest.approx(-math.log(math.exp(5) / (math.exp(5) + math.exp(2))), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, similarity)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 2] == 0
    assert gradient[0, 0] < 0 < gradient[0, 1]


@pytest.fixture(scope="module")
def targets() -> NodeTargets:
    return NodeTargets(DecisionTree.load(), list(ConceptBank.load()))


def test_the_candidates_of_a_node_are_those_of_the_zone(targets: NodeTargets) -> None:
    ids = list(ConceptBank.load())

    def margins(zone: str) -> set[str]:
        answers = {"lesion_presence": "lesion_present", "zone": zone, "margin": "circumscribed"}
        return {ids[i] for node, candidates, _ in targets.rows(answers) if node == "margin" for i in candidates}

    assert margins("zone_pz") == {"circumscribed", "non_circumscribed"}
    assert margins("zone_tz") == margins("zone_pz") | {"encapsulated", "mostly_encapsulated", "obscured"}


def test_measured_and_read_nodes_are_not_learned(targets: NodeTargets) -> None:
    assert not {"size", "epe", "dce", "pirads"} & set(targets.nodes)
    assert {"lesion_presence", "zone", "t2w_signal", "adc_signal", "dwi_signal"} <= set(targets.nodes)


def test_without_any_answer_the_node_loss_is_zero_and_differentiable(targets: NodeTargets) -> None:
    similarity = torch.zeros(1, len(targets.index), requires_grad=True)
    loss = targets.loss(similarity, [{}], torch.tensor(10.0))
    loss.backward()
    assert loss.item() == 0
    assert similarity.grad is not None


def test_where_answers_are_balanced_each_counts_alike_however_common_it_is(targets: NodeTargets) -> None:
    absent, present = {"lesion_presence": "lesion_absent"}, {"lesion_presence": "lesion_present", "zone": "zone_pz"}
    similarity = torch.zeros(4, len(targets.index))
    similarity[0, targets.index["lesion_present"]] = similarity[1, targets.index["lesion_absent"]] = 0.1
    scale = torch.tensor(10.0)
    rows = [math.log(1 + math.exp(s)) for s in (-1, -1, 0, 0)]  # of three places without a lesion one is told
    told = targets.loss(similarity, [present, absent, absent, absent], scale, balanced=True).item()
    presence = (rows[0] + (rows[1] + rows[2] + rows[3]) / 3) / 2
    assert told == pytest.approx((presence + math.log(2)) / len(targets.nodes), rel=1e-5)
    plain = targets.loss(similarity, [present, absent, absent, absent], scale).item()
    assert plain == pytest.approx((sum(rows) + math.log(2)) / 5, rel=1e-5)


def test_phrases_cover_the_bank_and_are_drawn_from_it() -> None:
    bank = ConceptBank.load()
    phrases = all_phrases(bank)
    drawn = draw_phrases(phrases, np.random.default_rng(0))
    assert list(phrases) == list(bank)
    assert all(text in phrases[id] for id, text in zip(phrases, drawn, strict=True))
    answers = {"zone": "zone_pz", "t2w_signal": "t2w_mild_hypointense", "size": "size_below_15mm"}
    sentence = draw_rationale(answers, phrases, np.random.default_rng(0)).split("; ")
    assert len(sentence) == 2  # the size is measured, so it is never part of the sentence
    assert all(any(part in phrases[c] for c in ("zone_pz", "t2w_mild_hypointense")) for part in sentence)
