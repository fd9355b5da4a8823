"""A lesion's answers: who says what, and what happens where mask and image disagree."""

from dataclasses import replace

import numpy as np
import pytest

from MedRationaleLib.assessment import RationaleStep
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.evidence import TYPICAL_MM2, asked_of_slices, rank, region_similarity
from MedRationaleLib.findings import Extension, LesionMeasurement
from MedRationaleLib.rationale import LesionAnswers, signal_contradictions
from MedRationaleLib.sectors import Sector

TREE = DecisionTree.load()
CANCER = {
    "lesion_present": 0.9,
    "zone_pz": 0.5,
    "adc_marked_hypointense": 0.8,
    "dwi_marked_hyperintense": 0.7,
    "diffusion_focal": 0.6,
    "t2w_moderate_hypointense": 0.6,
    "round_oval": 0.5,
    "circumscribed": 0.4,
    "homogeneous": 0.3,
}


def similarity(**changes):
    return dict.fromkeys(TREE.bank, 0.0) | CANCER | changes


def lesion(**changes):
    values = {
        "label": 1,
        "zone": "PZ",
        "zone_fraction": 0.9,
        "in_gland_fraction": 1.0,
        "axial_mm": 9.0,
        "greatest_mm": 10.0,
        "size_mm": 9.0,
        "size_plane": "axial",
        "volume_ml": 0.4,
        "center_mm": (0.0, 0.0, 0.0),
        "likelihood": 0.8,
        "sector": Sector(side="left", zone="PZ", part="posterolateral", level="mid"),
        "sectors": (),
        "extension": Extension(extent_mm=0.0, volume_ml=0.0, present=False),
    }
    return LesionMeasurement(**(values | changes))


def walk(measured, similar, missing=()):
    answers = LesionAnswers(measured, similar, TREE, missing=missing)
    return TREE.walk(answers), answers


def test_each_question_is_answered_by_whom_the_tree_names():
    result, answers = walk(lesion(), similarity())
    assert result.pirads == 4
    sources = {step.node: step.source for step in answers.steps}
    assert sources["t2w_signal"] == sources["adc_signal"] == "model"
    assert sources["zone"] == sources["size"] == sources["epe"] == "measured"
    assert not answers.contradictions


def test_the_chosen_concept_is_the_most_similar_and_the_runners_up_follow_in_order():
    _, answers = walk(lesion(), similarity(t2w_mild_hypointense=0.2, t2w_marked_hypointense=0.5))
    step = next(s for s in answers.steps if s.node == "t2w_signal")
    assert step.concept == "t2w_moderate_hypointense" and step.similarity == 0.6
    assert [c.concept for c in step.runners_up][:2] == ["t2w_marked_hypointense", "t2w_mild_hypointense"]


def test_size_from_the_mask_raises_the_category_to_5():
    result, answers = walk(lesion(size_mm=16.2), similarity())
    assert result.pirads == 5
    assert next(s for s in answers.steps if s.node == "size").measurement == "16.2 mm"


def test_extension_from_the_mask_raises_the_category_to_5():
    extension = Extension(extent_mm=6.0, volume_ml=0.3, present=True)
    assert walk(lesion(extension=extension), similarity())[0].pirads == 5


@pytest.mark.parametrize(
    ("changes", "word"), [({"zone_tz": 0.9}, "zone"), ({"lesion_absent": 0.95}, "lesion")], ids=["zone", "presence"]
)
def test_the_mask_stands_and_the_contradiction_is_kept(changes, word):
    result, answers = walk(lesion(), similarity(**changes))
    assert result.answers["zone"] == "zone_pz" and result.answers["lesion_presence"] == "lesion_present"
    assert len(answers.contradictions) == 1 and word in answers.contradictions[0]


def test_answers_that_rest_on_a_missing_sequence_say_so():
    _, answers = walk(lesion(), similarity(), missing=("adc",))
    weak = {step.node for step in answers.steps if "adc" in step.weakened_by}
    assert "adc_signal" in weak and "diffusion_pattern" in weak and "t2w_signal" not in weak


def test_what_was_not_imaged_is_called_inferred_and_has_no_heatmap():
    _, answers = walk(lesion(), similarity(), missing=("adc",))
    steps = {step.node: step for step in answers.steps}
    assert "not imaged" in steps["adc_signal"].text and steps["adc_signal"].evidence is None
    assert "not imaged" not in steps["diffusion_pattern"].text and steps["diffusion_pattern"].evidence


def test_contrast_enhancement_is_not_available_unless_a_reader_gives_it():
    result, answers = walk(lesion(), similarity(dwi_marked_hyperintense=0.1, dwi_mild_hyperintense=0.7))
    assert result.dwi_score == 3 and result.dce == "not available" and result.pirads == 3
    step = next(s for s in answers.steps if s.node == "dce")
    assert step.source == "reader" and step.similarity is None and step.evidence is None


def test_only_retrieved_answers_have_evidence():
    _, answers = walk(lesion(), similarity())
    assert {s.node for s in answers.steps if s.evidence is None} == {"size", "epe"}


def test_the_mean_over_a_region_is_weighted_by_its_coverage():
    maps = np.zeros((2, 1, 2, 2), np.float32)
    maps[0, 0] = [[1, 0], [0, 0]]
    maps[1, 0] = [[0, 1], [0, 0]]
    weights = np.array([[[0.5, 1.5], [0, 0]]], np.float32)
    assert region_similarity(maps, weights) == pytest.approx([0.25, 0.75])


def test_ties_keep_the_trees_order():
    assert rank(("b", "a", "c"), {"a": 0.1, "b": 0.1, "c": 0.2}) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("concept", "lesion", "contradicts"),
    [
        ("dwi_marked_hyperintense", 7.0, "darker"),
        ("dwi_marked_hyperintense", 30.0, None),
        ("dwi_normal", 7.0, None),
    ],
)
def test_a_signal_that_the_image_does_not_show_is_a_contradiction(concept, lesion, contradicts):
    tree = DecisionTree.load()
    step = RationaleStep(node="dwi_signal", concept=concept, text=tree.bank[concept].text, source="model")
    found = signal_contradictions([step], tree, {"dwi": (lesion, 18.0)})
    assert bool(found) == bool(contradicts)
    if contradicts:
        assert contradicts in found[0] and "mean 7, median 18" in found[0]
        assert not signal_contradictions([replace(step, source="reader")], tree, {"dwi": (lesion, 18.0)})


@pytest.mark.parametrize(
    ("dce", "pirads"), [("positive", 4), ("negative", 3), ("not available", 3)], ids=lambda value: str(value)
)
def test_contrast_enhancement_is_what_the_reader_says_and_decides_a_dwi_score_of_3_in_the_pz(dce, pirads):
    answers = LesionAnswers(lesion(), similarity(dwi_marked_hyperintense=0.1, dwi_mild_hyperintense=0.7), TREE, dce=dce)
    result = TREE.walk(answers)
    step = next(s for s in answers.steps if s.node == "dce")
    assert (result.dwi_score, result.dce, result.pirads) == (3, dce, pirads)
    assert (step.concept, step.source, step.similarity) == (f"dce_{dce.replace(' ', '_')}", "reader", None)


def test_where_contrast_enhancement_decides_nothing_it_is_not_asked():
    answers = LesionAnswers(lesion(), similarity(), TREE, dce="positive")
    assert TREE.walk(answers).pirads == 4
    assert "dce" not in {step.node for step in answers.steps}


def test_a_slice_is_asked_where_its_gland_looks_most_like_a_lesion():
    similarity = np.zeros((3, 3, 8, 8), np.float32)
    present, absent, other = similarity
    absent[:] = 0.2
    present[0, 2, 2:5], other[0, 2, 2:5] = 0.8, 0.9  # three patches in the gland ...
    present[0, 7, :] = 1.0  # ... and eight outside
    gland = np.zeros((3, 32, 32), np.float32)
    gland[:2, 4:20, 4:20] = 0.9  # rows and columns 1 to 4 of the patches
    asked = asked_of_slices(similarity, gland, present=0, absent=1, patch_mm=(TYPICAL_MM2 / 3) ** 0.5)
    assert asked[0] == pytest.approx([0.8, 0.2, 0.9]) and asked[1] == pytest.approx([0.0, 0.2, 0.0])
    assert asked[2] == pytest.approx([0.0, 0.2, 0.0])  # no gland: the whole slice
    few = asked_of_slices(similarity, gland, present=0, absent=1, patch_mm=1.0)  # 130 patches, of which 16 are there
    assert few[0] == pytest.approx([0.8 * 3 / 16, 0.2, 0.9 * 3 / 16])
