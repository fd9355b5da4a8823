"""What is chosen on a validation set: thresholds, and the likelihood of a candidate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from MedRationaleTraining.calibration import FLOORS, SPACING, calibrate_masks, margin_of

from MedRationaleLib.errors import InputError
from MedRationaleLib.postprocessing import PostprocessingConfig, lesion_candidates

SHAPE = (4, 96, 96)


def examinations(count: int, *, hits: bool = True) -> Iterator[tuple]:
    """Each with a lesion and a mimic of it in the PZ, alike to the network; ADC tells them apart, DWI shows nothing."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]] - SHAPE[1] / 2
    gland = np.broadcast_to(np.hypot(rows, columns) < 36, SHAPE)
    for _ in range(count):
        spots = [np.zeros(SHAPE, bool) for _ in range(2)]
        for spot, column in zip(spots, rng.permutation((-16, 16)), strict=True):
            spot[1:3] = np.hypot(rows - 8, columns - column) < 5
        lesion, mimic = spots
        probability = np.where(lesion | mimic, rng.uniform(0.55, 0.9), 0.01)
        pz = np.where(gland, 0.9, 0.05)
        truth = np.stack([gland, gland, np.zeros(SHAPE, bool), lesion if hits else np.zeros(SHAPE, bool)])
        adc = rng.normal(1500, 50, SHAPE) * np.where(lesion, rng.uniform(0.4, 0.7), np.where(mimic, 0.95, 1))
        dwi = rng.normal(100, 3, SHAPE)
        seen = {name: (values, np.ones(SHAPE, bool)) for name, values in (("adc", adc), ("dwi", dwi))}
        yield np.stack([pz, pz, 1 - pz, probability]), truth, seen


def test_likelihood_learns_what_tells_lesions_from_their_mimics() -> None:
    chosen = calibrate_masks(examinations(12), "set")
    assert set(chosen.likelihood) == {"mask", "mask+adc", "mask+dwi", "mask+adc+dwi"}
    assert chosen.likelihood["mask+adc"]["adc"] < -1 and abs(chosen.likelihood["mask+dwi"]["dwi"]) < 0.5
    config = PostprocessingConfig(**chosen.postprocessing)
    right = wrong = 0
    for p, truth, seen in examinations(12):
        for candidate in lesion_candidates(p[3], truth[1], truth[2], seen, SPACING, config):
            shown = candidate.likelihood(config) >= config.lesion_likelihood
            right += shown == (candidate.mask & truth[3]).any()
            wrong += shown != (candidate.mask & truth[3]).any()
    assert right == 24 and wrong == 0
    assert max(chosen.lesion_f2.values()) == 1
    assert chosen.lesion_slices == 24  # of every examination the two that its lesion is on


def test_what_scored_each_choice_saw_no_candidate_of_the_examination_that_it_judged() -> None:
    """With signals that are chance, weights fitted on all candidates would still find some order among them."""

    def by_chance() -> Iterator[tuple]:
        rng = np.random.default_rng(1)
        for p, truth, seen in examinations(10):
            spots = p[3] > 0.5, truth[3]
            for values, _ in seen.values():
                for spot in (spots[0] & ~spots[1], spots[1]):
                    values[spot] = values[~spots[0]].mean() * rng.uniform(0.2, 5)
            yield p, truth, seen

    assert max(calibrate_masks(by_chance(), "set").lesion_score.values()) < 0.6


def test_with_too_few_lesions_likelihood_is_the_mean_mask_probability() -> None:
    chosen = calibrate_masks(examinations(3), "set")
    assert chosen.likelihood == {}


@pytest.mark.parametrize(("highest", "floor"), [(0.599, 0.25), (0.61, 0.5)])
def test_of_floors_that_score_alike_it_is_the_one_nearest_to_the_default(
    highest: float, floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.598, 0.587, 0.591, 0.595, 0.588, 0.592, highest]
    told = iter(scores)
    monkeypatch.setattr("MedRationaleTraining.calibration.Detection.score", lambda _: next(told))
    chosen = calibrate_masks(examinations(3), "set")
    assert chosen.lesion_score == dict(zip(FLOORS, scores, strict=True)) and chosen.lesion_floor == floor


def test_the_gland_is_opened_as_far_as_takes_away_what_is_no_gland() -> None:
    """Beyond each gland a tongue runs on, 4 mm wide."""

    def with_tongue() -> Iterator[tuple]:
        for p, truth, seen in examinations(3):
            p[0, :, 45:50, :20] = 0.9
            yield p, truth, seen

    assert calibrate_masks(examinations(3), "set").gland_opening_mm == PostprocessingConfig().gland_opening_mm
    chosen = calibrate_masks(with_tongue(), "set")
    best = {opening: max(of_threshold.values()) for opening, of_threshold in chosen.gland_dice.items()}
    assert best[1.5] < best[chosen.gland_opening_mm] == max(best.values())


def test_a_set_without_a_lesion_is_refused() -> None:
    with pytest.raises(InputError, match="Expected glands and lesions in set"):
        calibrate_masks(examinations(3, hits=False), "set")


def test_the_margin_is_exceeded_on_as_many_slices_as_the_masks_have_a_lesion_on() -> None:
    nearer = np.random.default_rng(0).normal(size=200)
    for count in (0, 1, 50, 199, 200):
        assert (nearer > margin_of(nearer, count)).sum() == count
