"""A reader's override changes the answer, keeps the trail, and recomputes the category by the same tree."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_assessments import drawn_assessment

from MedRationaleLib.assessment import Candidate, Finding, RationaleStep
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.override import MissingAnswer, override, override_finding

ANSWERS = {
    "lesion_presence": "lesion_present",
    "zone": "zone_tz",
    "t2w_signal": "t2w_moderate_hypointense",
    "shape": "lenticular",
    "margin": "encapsulated",
    "homogeneity": "homogeneous",
    "adc_signal": "adc_normal",
    "dwi_signal": "dwi_normal",
    "size": "size_below_15mm",
    "epe": "epe_absent",
}


@pytest.fixture(scope="module")
def tree() -> DecisionTree:
    return DecisionTree.load()


@pytest.fixture
def rationale(tree) -> tuple[RationaleStep, ...]:
    """A model's rationale of a TZ lesion (T2W 2, DWI 1, PI-RADS 2) in a study without ADC."""
    steps = []
    for node_id, concept in tree.walk_answers(ANSWERS).steps:
        node = tree.nodes[node_id]
        others = [c for c in node.candidates("TZ") if c != concept]
        retrieved = node.answered_by == "retrieval"
        steps.append(
            RationaleStep(
                node=node_id,
                concept=concept,
                text=tree.bank[concept].text,
                source="model" if retrieved else "measured",
                similarity=0.9 if retrieved else None,
                runners_up=tuple(Candidate(concept=c, similarity=0.8 - 0.1 * i) for i, c in enumerate(others))
                if retrieved
                else (),
                measurement="12.4 mm" if node_id == "size" else None,
                evidence=concept,
                weakened_by=("adc",) if "adc" in node.sequences else (),
            )
        )
    return tuple(steps)


def by_node(result):
    return {step.node: step for step in result.rationale}


def test_no_override_leaves_the_rationale_as_it_is(tree, rationale):
    result = override(tree, rationale, {})
    assert result.rationale == rationale
    assert (result.walk.t2w_score, result.walk.dwi_score, result.walk.pirads) == (2, 1, 2)


def test_an_override_recomputes_the_category_and_keeps_the_trail(tree, rationale):
    result = override(tree, rationale, {"margin": "obscured"})
    assert (result.walk.t2w_score, result.walk.pirads) == (4, 4)
    step = by_node(result)["margin"]
    assert (step.source, step.overridden, step.text) == ("reader", "encapsulated", "obscured margin")
    assert step.similarity == pytest.approx(0.5)
    assert step.runners_up[0] == Candidate(concept="encapsulated", similarity=0.9)
    assert step.evidence is None  # the old heatmap shows another concept
    assert all(new == old for new, old in zip(result.rationale, rationale, strict=True) if new.node != "margin")


def test_a_measured_size_can_be_overridden_and_keeps_its_measurement(tree, rationale):
    result = override(tree, rationale, {"margin": "obscured", "size": "size_15mm_or_more"})
    assert result.walk.pirads == 5
    step = by_node(result)["size"]
    assert (step.source, step.overridden, step.measurement) == ("reader", "size_below_15mm", "12.4 mm")


def test_going_back_to_the_first_answer_undoes_the_override(tree, rationale):
    once = override(tree, rationale, {"margin": "obscured", "size": "size_15mm_or_more"})
    back = override(tree, once.rationale, {"margin": "encapsulated", "size": "size_below_15mm"})
    assert back.walk.pirads == 2
    assert (by_node(back)["margin"].source, by_node(back)["margin"].overridden) == ("model", None)
    assert (by_node(back)["size"].source, by_node(back)["size"].overridden) == ("measured", None)
    twice = override(tree, once.rationale, {"margin": "circumscribed"})
    assert by_node(twice)["margin"].overridden == "encapsulated"  # what the model had said, not the first override


def test_repeating_the_models_answer_changes_nothing(tree, rationale):
    assert override(tree, rationale, {"margin": "encapsulated"}).rationale == rationale


def test_an_answer_impossible_in_the_new_zone_gives_way_to_the_runner_up(tree, rationale):
    result = override(tree, rationale, {"zone": "zone_pz"})
    steps = by_node(result)
    assert (steps["zone"].source, steps["zone"].overridden) == ("reader", "zone_tz")
    assert (steps["margin"].concept, steps["margin"].source) == ("circumscribed", "model")
    assert [c.concept for c in steps["margin"].runners_up] == ["non_circumscribed"]
    assert [step.node for step in result.rationale][2] == "adc_signal"  # the order of the peripheral zone
    assert (result.walk.t2w_score, result.walk.dwi_score, result.walk.pirads) == (4, 1, 1)


def test_a_question_that_becomes_necessary_is_put_to_the_callback(tree, rationale):
    asked = []

    def answer(node, candidates, so_far):
        asked.append((node.id, so_far["adc_signal"]))
        return "diffusion_focal"

    result = override(tree, rationale, {"adc_signal": "adc_marked_hypointense"}, answer)
    assert asked == [("diffusion_pattern", "adc_marked_hypointense")]
    step = by_node(result)["diffusion_pattern"]
    assert (step.source, step.similarity, step.weakened_by) == ("model", None, ("adc",))
    assert result.walk.dwi_score == 3


def test_without_a_callback_the_missing_answer_is_named(tree, rationale):
    with pytest.raises(InputError, match="'diffusion_pattern'.*diffusion_focal"):
        override(tree, rationale, {"adc_signal": "adc_marked_hypointense"})
    both = {"adc_signal": "adc_marked_hypointense", "diffusion_pattern": "diffusion_focal"}
    step = by_node(override(tree, rationale, both))["diffusion_pattern"]
    assert (step.source, step.overridden) == ("reader", None)


def test_contrast_enhancement_is_not_available_until_the_reader_says_so(tree, rationale):
    focal_pz = {"zone": "zone_pz", "adc_signal": "adc_mild_hypointense", "diffusion_pattern": "diffusion_focal"}
    unknown = override(tree, rationale, focal_pz)
    assert by_node(unknown)["dce"].concept == "dce_not_available"
    assert unknown.walk.pirads == 3
    positive = override(tree, unknown.rationale, {"dce": "dce_positive"})
    assert (positive.walk.dce, positive.walk.pirads) == ("positive", 4)
    assert by_node(positive)["dce"].overridden == "dce_not_available"


def test_what_the_reader_saw_of_enhancement_stays_where_the_tree_does_not_ask(tree):
    finding = replace(
        drawn_assessment().findings[0], dce="positive", rationale=drawn_assessment().findings[1].rationale
    )
    changed = override_finding(tree, finding, {"homogeneity": "heterogeneous"})
    assert "dce" not in {step.node for step in changed.rationale} and changed.dce == "positive"


def test_what_the_reader_saw_of_enhancement_answers_where_the_new_path_asks(tree):
    finding = replace(drawn_assessment().findings[0], dce="positive")
    rationale = tuple(step for step in finding.rationale if step.node != "dce")
    marked = {"adc_signal": "adc_marked_hypointense", "dwi_signal": "dwi_marked_hyperintense"}
    unasked = override_finding(tree, replace(finding, rationale=rationale), marked)
    assert "dce" not in {step.node for step in unasked.rationale} and unasked.dce == "positive"
    asked = override_finding(tree, unasked, {"adc_signal": "adc_mild_hypointense"})
    (step,) = (step for step in asked.rationale if step.node == "dce")
    assert (step.concept, step.source, asked.dwi_score, asked.pirads) == ("dce_positive", "reader", 3, 4)


def test_an_override_that_the_path_does_not_ask_for_is_named(tree, rationale):
    result = override(tree, rationale, {"lesion_presence": "lesion_absent", "margin": "obscured"})
    assert result.not_asked == ("margin",)
    assert (result.walk.pirads, result.walk.t2w_score, len(result.rationale)) == (1, None, 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"colour": "red"}, "got 'colour'"),
        ({"margin": "red"}, "got 'red'"),
        ({"shape": "linear_wedge"}, "linear_wedge"),
    ],
)
def test_an_impossible_override_is_refused(tree, rationale, overrides, words):
    with pytest.raises(InputError, match=words):
        override(tree, rationale, overrides)


@pytest.fixture
def finding(tree, rationale) -> Finding:
    return Finding(
        id="lesion-1", label=1, zone="TZ", sector="right transition zone", size_mm=12.4, volume_ml=0.8,
        center_mm=(0.0, 0.0, 0.0), likelihood=0.6, t2w_score=2, dwi_score=1, dce="not available", pirads=2,
        rationale=rationale,
        contradictions=(f"{tree.nodes['t2w_signal'].question} Dark, but bright.", "Something else."),
    )  # fmt: skip


def test_a_finding_without_overrides_is_itself(tree, finding):
    assert override_finding(tree, finding, {}) is finding


def test_an_override_gives_the_finding_its_new_scores_and_settles_its_contradiction(tree, finding):
    changed = override_finding(tree, finding, {"t2w_signal": "t2w_marked_hypointense", "margin": "non_circumscribed"})
    walk = tree.walk_answers(ANSWERS | {"t2w_signal": "t2w_marked_hypointense", "margin": "non_circumscribed"})
    assert (changed.t2w_score, changed.dwi_score, changed.pirads) == (walk.t2w_score, walk.dwi_score, walk.pirads)
    assert changed.pirads > finding.pirads
    assert changed.contradictions == ("Something else.",)
    assert changed.size_mm == finding.size_mm


def test_the_zone_of_a_finding_can_be_overridden(tree, finding):
    assert override_finding(tree, finding, {"zone": "zone_pz"}).zone == "PZ"


def test_a_question_without_an_answer_is_handed_to_the_caller(tree, finding):
    with pytest.raises(MissingAnswer) as raised:
        override_finding(tree, finding, {"adc_signal": "adc_marked_hypointense"})
    assert raised.value.node.id == "diffusion_pattern"
    assert raised.value.candidates == tree.nodes["diffusion_pattern"].candidates("TZ")
