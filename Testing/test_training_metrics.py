"""Figures of merit against hand computations and picai_eval's own edge cases."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("picai_eval") is None:
    pytest.skip("the train extra is not installed: picai_eval", allow_module_level=True)

from MedRationaleTraining.metrics import Detection, dice, match_lesions, mean, ratio, smoothed_dice  # noqa: E402

EVERY = np.arange(4)


def test_dice_and_the_papers_smoothed_dice() -> None:
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert np.isnan(dice(a, b))
    a[:2], b[1:3] = True, True
    assert dice(a, b) == 0.5
    assert smoothed_dice(a, b) == pytest.approx(9 / 17)
    nine = np.zeros((4, 4), bool)
    nine[:3, :3] = True
    assert smoothed_dice(np.zeros((4, 4), bool), nine) == pytest.approx(0.10)  # a complete miss


def test_a_mean_leaves_undefined_examinations_out_and_has_an_interval_around_it() -> None:
    estimate = mean([0.2, 0.4, float("nan"), 0.6])
    assert estimate.value == pytest.approx(0.4) and estimate.n == 3
    assert estimate.ci95 is not None and 0.2 <= estimate.ci95[0] < 0.4 < estimate.ci95[1] <= 0.6
    assert estimate == mean([0.2, 0.4, float("nan"), 0.6])  # seeded


def test_an_examination_with_more_examples_weighs_more() -> None:
    assert ratio([1, 9], [1, 9]).value == 1.0
    assert ratio([0, 9], [1, 9]).value == pytest.approx(0.9)


def test_what_is_not_defined_is_none_and_one_examination_has_no_interval() -> None:
    assert mean([float("nan")] * 3).value is None
    assert mean([0.5]).value == 0.5 and mean([0.5]).ci95 is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        low, high = mean(rng.normal(0.5, 0.1, 30).tolist()).ci95 or (1, 0)
        covered += low <= 0.5 <= high
    assert covered >= 33


def test_a_candidate_on_a_lesion_is_a_hit_and_one_beside_it_is_not() -> None:
    truth = np.zeros((6, 20, 20), bool)
    truth[2:4, 2:8, 2:8] = True
    labels = np.zeros(truth.shape, np.uint8)
    labels[2:4, 2:8, 3:8] = 1
    labels[2:4, 14:18, 14:18] = 2
    found = sorted(match_lesions(labels, (0.9, 0.3), truth), reverse=True)
    assert [(hit, round(confidence, 2)) for hit, confidence, _ in found] == [(1, 0.9), (0, 0.3)]
    assert found[0][2] == pytest.approx(5 / 6, rel=1e-3)
    missed = match_lesions(np.zeros_like(labels), (), truth)
    assert missed == [(1, 0.0, 0.0)]


def test_a_perfect_detector_scores_one_and_its_operating_point_finds_all() -> None:
    perfect = Detection([[(1, 0.9, 0.5)], [], [(1, 0.8, 0.5)], [(0, 0.1, 0.0)]])
    assert perfect.ap(EVERY) == 1 and perfect.auroc(EVERY) == 1 and perfect.score() == 1
    estimates = perfect.estimates(0.5)
    assert estimates["lesion_sensitivity"].value == 1
    assert estimates["false_candidates_per_case"].value == 0
    assert perfect.f2(0.5) == 1
    assert perfect.f2(0.05) == pytest.approx(10 / 11)


def test_without_a_positive_examination_nothing_is_claimed() -> None:
    negative = Detection([[(0, 0.4, 0.0)], [], [], []])
    estimates = negative.estimates(0.3)
    assert estimates["lesion_ap"].value is None
    assert estimates["case_auroc"].value is None
    assert estimates["lesion_sensitivity"].value is None
    assert estimates["false_candidates_per_case"].value == 0.25


def test_with_positive_examinations_only_there_is_a_precision_but_no_auroc() -> None:
    positive = Detection([[(1, 0.9, 0.5)], [(1, 0.7, 0.5), (0, 0.8, 0.0)]])
    assert positive.estimates(0.5)["case_auroc"].value is None
    assert positive.score() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_one_false_candidate_an_examination_is_an_operating_point_of_its_own_for_each_model() -> None:
    hit, missed = (1, 0.4, 0.5), (1, 0.0, 0.0)
    detection = Detection([[hit, (0, 0.9, 0.0), (0, 0.3, 0.0)], [missed, (0, 0.5, 0.0)], [(0, 0.2, 0.0)]])
    shown_from = detection.threshold_for(1.0)
    assert 0.2 < shown_from <= 0.3, "of four false candidates in three examinations, the least likely is not shown"
    assert sum(detection.at(shown_from)[2]) == 3
    estimates = detection.estimates(0.6)
    assert estimates["lesion_sensitivity"].value == 0
    assert estimates["lesion_sensitivity_at_1_fp"].value == 0.5
    assert detection.threshold_for(2.0) == 0, "all are shown where there are no more than that"
    assert sum(detection.at(0.0)[0]) == 1, "and what no candidate hits is missed all the same"
    few = Detection([[hit, missed], [(0, 0.2, 0.0)], [(0, 0.1, 0.0)]])
    assert few.estimates(0.6)["lesion_sensitivity_at_1_fp"].value == 0.5


def test_the_dice_of_any_operating_point_follows_from_the_candidates() -> None:
    from MedRationaleTraining.evaluation import assess_masks, summarise_masks

    from MedRationaleLib.postprocessing import PostprocessingConfig

    truth = np.zeros((4, 8, 64, 64), bool)
    truth[:3, 1:7, 8:56, 8:56] = True
    truth[1, :, :, 32:], truth[2, :, :, :32] = False, False
    truth[3, 3:5, 20:30, 12:22] = True
    p = np.where(truth, 0.9, 0.0).astype(np.float32)
    p[3, 3:5, 20:30, 17:27] = 0.8
    p[3, 3:5, 20:30, :17] = 0
    p[3, 3:5, 40:48, 40:48] = 0.6
    of = {
        threshold: assess_masks(p, truth, {}, PostprocessingConfig(lesion_likelihood=threshold))[0]
        for threshold in (0.5, 0.7, 0.9)
    }
    result = of[0.5]
    assert [round(value, 1) for value, _, _ in result.candidates] == [0.8, 0.6]
    assert result.dice_from(0.7) == pytest.approx(2 * 100 / (200 + 200))
    for threshold, other in of.items():
        assert result.dice_from(threshold) == pytest.approx(other.dice["lesion"])
        alike = summarise_masks([other], PostprocessingConfig(lesion_likelihood=threshold))["dice_lesion_at_1_fp"]
        assert alike["value"] == pytest.approx(result.dice_from(0.5)), "whatever the model's own threshold"
