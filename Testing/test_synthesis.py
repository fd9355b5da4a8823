"""Synthetic examinations: reproducible, and what the rationale says is what the image shows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_erosion, grey_erosion

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.synthesis import Anatomy, phantom_anatomy, synthesize
from MedRationaleLib.synthesis import exam as examination
from MedRationaleLib.synthesis.acquisition import acquire_diffusion, double, half
from MedRationaleLib.synthesis.anatomy import random_placement
from MedRationaleLib.synthesis.exam import RealBackground, SyntheticExam
from MedRationaleLib.synthesis.fields import PIXEL_MM, PIXELS, Canvas, smooth_noise
from MedRationaleLib.synthesis.gland import paint_calcifications
from MedRationaleLib.synthesis.regions import (
    PROFILES,
    draw_answers,
    invent_shape,
    measured_answers,
    measured_shape,
    paint_region,
)

SLICES = 6
REFERENCE = 0.7
"""T2W signal of the zone that regions are painted on."""


def ball(radius_mm: float = 9.0) -> np.ndarray:
    """(6, 256, 256) a cylinder through the four middle slices, at the centre."""
    axis = (np.arange(PIXELS) - PIXELS / 2) * PIXEL_MM
    disc = np.hypot(axis[:, None], axis[None]) < radius_mm
    mask = np.zeros((SLICES, PIXELS, PIXELS), bool)
    mask[1:-1] = disc
    return mask


def paint(seed: int = 0, **answers: str) -> tuple[Canvas, np.ndarray, list]:
    """One region of the given answers on a flat gland without noise; returns canvas, its core and the DWI target."""
    rng = np.random.default_rng(seed)
    canvas = Canvas.blank(rng, SLICES)
    canvas.t2w += REFERENCE
    canvas.adc += 1.6
    canvas.s0 += 0.8
    said = {
        "zone": "zone_pz",
        "t2w_signal": "t2w_moderate_hypointense",
        "homogeneity": "homogeneous",
        "margin": "circumscribed",
        "shape": "round_oval",
        "adc_signal": "adc_marked_hypointense",
        "dwi_signal": "dwi_marked_hyperintense",
    } | answers
    mask = ball()
    target = paint_region(canvas, mask, said, REFERENCE)
    core = mask.copy()
    core[:] = [binary_erosion(plane, iterations=5) for plane in mask]
    core[[1, -2]] = False
    return canvas, core, [target]


def mean_over_seeds(channel: str, **answers: str) -> float:
    values = []
    for seed in range(4):
        canvas, core, _ = paint(seed, **answers)
        values.append(getattr(canvas, channel)[core].mean())
    return float(np.mean(values))


@pytest.fixture(scope="module")
def exam() -> SyntheticExam:
    """A phantom with two cancers, the whole field of view in all sequences."""
    rng = np.random.default_rng(3)
    return synthesize(phantom_anatomy(rng), rng, cancers=2, crop_field_of_view=False)


# ------------------------------------------------------------------ reproducible


def test_the_same_seed_gives_the_same_examination_to_the_last_bit() -> None:
    def make(seed: int) -> SyntheticExam:
        rng = np.random.default_rng(seed)
        return synthesize(phantom_anatomy(rng), rng)

    first, second, other = make(11), make(11), make(12)
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.regions, second.regions)
    assert first.rationales == second.rationales
    assert not np.array_equal(first.images, other.images)


def test_the_phantom_is_one_gland_with_a_transition_zone_in_it_of_the_asked_volume() -> None:
    anatomy = phantom_anatomy(np.random.default_rng(0), volume_ml=50)
    assert (anatomy.gland.sum() * 3 * PIXEL_MM**2 / 1000) == pytest.approx(50, rel=0.2)
    assert 0.2 < (anatomy.zones == 2).sum() / anatomy.gland.sum() < 0.8


def test_calcifications_have_no_signal_on_any_sequence_and_spare_what_is_taken() -> None:
    rng = np.random.default_rng(5)
    anatomy = phantom_anatomy(rng, volume_ml=60)
    taken = np.zeros(anatomy.gland.shape, bool)
    taken[:, :, PIXELS // 2 :] = True
    seen = 0
    for seed in range(8):
        canvas = Canvas.blank(np.random.default_rng(seed), anatomy.gland.shape[0])
        canvas.t2w += REFERENCE
        canvas.s0 += 0.8
        canvas.adc += 1.6
        for box, mask in paint_calcifications(canvas, anatomy, taken, np.random.default_rng(seed)):
            core = mask > 0.98
            seen += core.sum()
            assert (canvas.t2w[box][core] < 0.2).all()
            assert (canvas.s0[box][core] < 0.2).all()
            assert (canvas.adc[box][core] < 1.1).all()
            for kept_clear in (taken, anatomy.zones == 0):
                assert mask[binary_erosion(kept_clear, iterations=4)[box]].max(initial=0) < 0.02
    assert seen > 20


def test_calcifications_stand_in_an_examination_over_a_real_background_too(monkeypatch) -> None:
    anatomy = phantom_anatomy(np.random.default_rng(0), volume_ml=60)
    flat = np.ones(anatomy.gland.shape, np.float32)
    real = RealBackground(t2w=0.7 * flat, adc=1.6 * flat, dwi=flat, interior="diffusion")
    drawn: list[tuple] = []

    def recorded(*given):
        drawn.extend(paint_calcifications(*given))
        return list(drawn)

    for seed in range(8):
        drawn.clear()
        pair = []
        for paint_them in (recorded, lambda *_: []):
            monkeypatch.setattr(examination, "paint_calcifications", paint_them)
            rng = np.random.default_rng(seed)
            pair.append(
                synthesize(anatomy, rng, background=lambda *_: real, cancers=0, crop_field_of_view=False).images
            )
        if drawn:
            break
    core = np.zeros(anatomy.gland.shape, bool)
    for box, mask in drawn:
        core[box] |= mask > 0.9
    t2w, adc, dwi = (with_them[core].mean() / without[core].mean() for with_them, without in zip(*pair, strict=True))
    assert max(t2w, adc, dwi) < 0.8
    outside = ~binary_dilation(core, iterations=30)
    assert all(
        np.median(a[outside]) == pytest.approx(np.median(b[outside]), rel=0.05) for a, b in zip(*pair, strict=True)
    )


# ------------------------------------------------------------------ appearance


@pytest.mark.parametrize("zone", ["zone_pz", "zone_tz"])
def test_t2w_signal_is_ordered_as_the_words_are(zone: str) -> None:
    words = ("t2w_hyperintense", "t2w_mild_hypointense", "t2w_moderate_hypointense", "t2w_marked_hypointense")
    ratios = [mean_over_seeds("t2w", zone=zone, t2w_signal=word) / REFERENCE for word in words]
    assert ratios[0] > 1.0 > ratios[1] > ratios[2] > ratios[3]
    assert all(np.diff(ratios) < -0.1)


@pytest.mark.parametrize(("zone", "between"), [("zone_pz", (0.96, 1.3)), ("zone_tz", (0.87, 1.17))])
def test_adc_is_ordered_as_the_words_are_and_between_them_lies_a_gap(zone: str, between: tuple[float, float]) -> None:
    words = ("adc_marked_hypointense", "adc_mild_hypointense", "adc_normal")
    marked, mild, normal = (mean_over_seeds("adc", zone=zone, adc_signal=word) for word in words)
    assert marked < between[0] < mild < between[1] < normal


def test_the_high_b_signal_is_ordered_as_the_words_are() -> None:
    ratios = []
    gland = ball(25)
    for word in ("dwi_normal", "dwi_mild_hyperintense", "dwi_marked_hyperintense"):
        found = []
        for seed in range(3):
            canvas, core, targets = paint(seed, dwi_signal=word)
            _, dwi, _ = acquire_diffusion(canvas, targets, gland, np.random.default_rng(seed))
            around = gland & ~ball(13)
            found.append(dwi[core].mean() / np.median(dwi[around]))
        ratios.append(np.mean(found))
    assert ratios[0] < 1.25 < ratios[1] < 2.0 < ratios[2]


@pytest.mark.parametrize("channel", ["t2w", "adc"])
def test_heterogeneous_varies_more_within_the_region_and_has_the_same_mean(channel: str) -> None:
    spread, level = {}, {}
    for word in ("homogeneous", "heterogeneous"):
        painted = [paint(seed, homogeneity=word) for seed in range(4)]
        spread[word] = np.mean([getattr(canvas, channel)[core].std() for canvas, core, _ in painted])
        level[word] = np.mean([getattr(canvas, channel)[core].mean() for canvas, core, _ in painted])
    assert spread["heterogeneous"] > 2 * spread["homogeneous"]
    assert level["heterogeneous"] == pytest.approx(level["homogeneous"], rel=0.15)


def edge_width(margin: str) -> float:
    """Mean gradient at the border relative to the step: large where the border is sharp."""
    values = []
    for seed in range(4):
        canvas, core, _ = paint(seed, margin=margin)
        plane, mask = canvas.t2w[3], ball()[3]
        slope = np.hypot(*np.gradient(plane, PIXEL_MM))
        border = mask & ~binary_erosion(mask, iterations=2)
        values.append(slope[border].mean() / abs(REFERENCE - canvas.t2w[core].mean()))
    return float(np.mean(values))


def test_a_circumscribed_border_is_sharper_than_a_non_circumscribed_or_obscured_one() -> None:
    assert edge_width("circumscribed") > 1.5 * edge_width("non_circumscribed")
    assert edge_width("circumscribed") > 1.5 * edge_width("obscured")


def test_an_encapsulated_nodule_has_a_dark_rim_all_around_and_a_mostly_encapsulated_one_has_a_gap() -> None:
    share = {}
    for margin in ("circumscribed", "mostly_encapsulated", "encapsulated"):
        dark = []
        for seed in range(4):
            canvas, _, _ = paint(seed, margin=margin, t2w_signal="t2w_hyperintense", zone="zone_tz")
            mask = ball()[3]
            rim = mask & ~binary_erosion(mask, iterations=1)
            dark.append((grey_erosion(canvas.t2w[3], 3)[rim] < 0.85 * REFERENCE).mean())
        share[margin] = np.mean(dark)
    assert share["circumscribed"] < 0.1
    assert 0.4 < share["mostly_encapsulated"] < 0.9 < share["encapsulated"]


@pytest.mark.parametrize("shape", ["round_oval", "lenticular"])
def test_an_invented_shape_that_no_border_cuts_is_what_its_word_says(shape: str) -> None:
    rng = np.random.default_rng(0)
    everywhere = np.full((SLICES, PIXELS, PIXELS), 2, np.uint8)
    masks = [invent_shape(shape, everywhere, 2, Canvas.blank(rng, SLICES)) for _ in range(8)]
    inner = [m for m in masks if m.any() and not m[:, [0, -1]].any() and not m[:, :, [0, -1]].any()]
    assert len(inner) >= 4
    assert {measured_shape(mask) for mask in inner} == {shape}


def test_the_shape_in_the_rationale_is_the_shape_on_the_mask(exam: SyntheticExam) -> None:
    for region in exam.rationales:
        if region.answers.get("shape") in ("round_oval", "lenticular"):
            assert region.answers["shape"] == measured_shape(exam.regions == region.label)


def test_an_invented_shape_stays_in_its_zone() -> None:
    rng = np.random.default_rng(0)
    zones = np.where(ball(20), 1, 0).astype(np.uint8)
    for shape in ("round_oval", "lenticular", "linear_wedge", "diffuse"):
        mask = invent_shape(shape, zones, 1, Canvas.blank(rng, SLICES))
        assert mask.any()
        assert not (mask & (zones != 1)).any()


def test_size_and_extension_are_measured_on_the_mask() -> None:
    zones = ball(20).astype(np.uint8)
    assert measured_answers(ball(7), zones) == {"size": "size_below_15mm", "epe": "epe_absent"}
    assert measured_answers(ball(8), zones)["size"] == "size_15mm_or_more"
    assert measured_answers(np.roll(ball(6), 24, axis=2), zones)["epe"] == "epe_present"


# ------------------------------------------------------------------ examinations


def test_every_region_lies_in_the_zone_that_its_rationale_names(exam: SyntheticExam) -> None:
    assert exam.rationales
    for region in exam.rationales:
        mask = exam.regions == region.label
        zone = {"zone_pz": 1, "zone_tz": 2}[region.answers["zone"]]
        inside = exam.anatomy.zones[mask]
        assert mask.any()
        assert (inside[inside > 0] == zone).mean() > 0.5, region


def test_the_lesion_mask_is_where_adc_is_low_and_the_high_b_signal_high() -> None:
    adc, dwi = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        exam = synthesize(phantom_anatomy(rng), rng, cancers=2, crop_field_of_view=False)
        for region in exam.rationales:
            mask = exam.regions == region.label
            if region.dwi_score >= 4 and mask.sum() > 300:
                healthy = exam.anatomy.gland & (exam.regions == 0)
                adc.append(exam.images[1][mask].mean() / np.median(exam.images[1][healthy]))
                dwi.append(exam.images[2][mask].mean() / np.median(exam.images[2][healthy]))
    assert len(adc) >= 2
    assert max(adc) < 0.85
    assert min(dwi) > 1.3


def test_scores_and_category_of_every_region_are_the_trees(exam: SyntheticExam) -> None:
    tree = DecisionTree.load()
    for region in exam.rationales:
        scores = tree.scores(region.answers)
        assert (region.t2w_score, region.dwi_score, region.pirads) == (scores.t2w, scores.dwi, scores.pirads)
        assert region.is_lesion == (region.pirads >= 3)
    lesions = [r.label for r in exam.rationales if r.is_lesion]
    assert np.array_equal(exam.lesions, np.isin(exam.regions, lesions))


@pytest.mark.parametrize("kind", sorted(PROFILES))
def test_every_kind_of_region_draws_answers_that_the_tree_accepts(kind: str) -> None:
    tree, rng = DecisionTree.load(), np.random.default_rng(0)
    for _ in range(20):
        answers = draw_answers(PROFILES[kind], rng) | {"size": "size_below_15mm", "epe": "epe_absent"}
        assert 1 <= tree.walk_answers(answers).pirads <= 5


def test_haemorrhage_is_dark_on_t2w_without_restricted_diffusion() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_answers(PROFILES["haemorrhage_pz"], rng) for _ in range(30)]
    assert {a["adc_signal"] for a in drawn} == {"adc_normal"}
    assert {a["dwi_signal"] for a in drawn} == {"dwi_normal"}
    assert all(a["t2w_signal"] != "t2w_hyperintense" for a in drawn)


def test_images_are_finite_and_in_the_units_that_the_reader_gives(exam: SyntheticExam) -> None:
    assert exam.images.shape == (3, 24, PIXELS, PIXELS)
    assert np.isfinite(exam.images).all() and exam.images.min() >= 0
    healthy = exam.anatomy.gland & (exam.regions == 0)
    assert 800 < np.median(exam.images[1][healthy]) < 2200  # 1e-6 mm^2/s
    assert 800 <= exam.b_value <= 2000


def test_a_real_label_map_keeps_its_shape_when_it_is_placed_without_augmentation() -> None:
    zones = np.zeros((24, 256, 256), np.uint8)
    zones[6:18, 90:166, 80:176] = 1
    zones[8:16, 90:130, 100:156] = 2
    lesions = np.zeros_like(zones)
    lesions[10:12, 150:162, 90:106] = 3
    placed = random_placement(zones, lesions, np.random.default_rng(0), source="x", augment=False)
    ml = {name: (a > 0).sum() * 3 * s**2 for name, a, s in (("old", zones, 0.5), ("new", placed.zones, PIXEL_MM))}
    assert ml["new"] == pytest.approx(ml["old"], rel=0.03)
    assert np.array_equal(np.flatnonzero(placed.gland.any((1, 2))), np.arange(6, 18))
    assert set(np.unique(placed.lesions)) == {0, 3}


def test_a_real_lesion_keeps_its_place_and_gets_a_rationale() -> None:
    rng = np.random.default_rng(0)
    anatomy = phantom_anatomy(rng)
    pz = np.argwhere(anatomy.zones == 1)
    s, r, c = pz[len(pz) // 2]
    lesions = np.zeros_like(anatomy.zones)
    lesions[s - 1 : s + 2, r - 6 : r + 7, c - 6 : c + 7] = 4
    lesions *= anatomy.zones == 1
    exam = synthesize(Anatomy(zones=anatomy.zones, lesions=lesions, source="x"), rng, cancers=0)
    assert np.array_equal(exam.regions == 1, lesions > 0)
    assert exam.rationales[0].answers["zone"] == "zone_pz"


# ------------------------------------------------------------------ fields


def test_halving_is_the_area_mean_and_doubling_brings_a_linear_image_back() -> None:
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32), (2, 16, 16)).copy()
    assert np.allclose(half(ramp)[0, 0], np.arange(8) * 2 + 0.5)
    assert np.allclose(double(half(ramp))[:, :, 1:-1], ramp[:, :, 1:-1])


def test_smooth_noise_is_smooth_and_of_about_unit_variance() -> None:
    noise = smooth_noise(np.random.default_rng(0), (6, 20, 20), (12, 200, 200))
    assert 0.5 < noise.std() < 1.2
    assert np.abs(np.diff(noise, axis=2)).mean() < 0.15 * noise.std()
