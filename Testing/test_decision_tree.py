"""The decision trees: every combination against tables written down here by hand, and every fault of a file refused."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import yaml

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.decision_tree import END, DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.resources import resource_path

TREES = ("pirads_v2_1", "paper_appendix_c")

# PI-RADS v2.1, by hand. Rows T2W 1..5, columns DWI 1..5.
PZ_DCE_POSITIVE = ["12445", "12445", "12445", "12445", "12445"]
PZ_ELSE = ["12345", "12345", "12345", "12345", "12345"]
TZ = ["11111", "22233", "33334", "44444", "55555"]
PAPER_TZ = ["11111", "33332", "44444", "44444", "55555"]


@pytest.fixture(scope="module")
def bank() -> ConceptBank:
    return ConceptBank.load()


@pytest.fixture(scope="module")
def tree(bank) -> DecisionTree:
    return DecisionTree.load(bank=bank)


@pytest.fixture(scope="module")
def paper(bank) -> DecisionTree:
    return DecisionTree.load("paper_appendix_c", bank=bank)


def pz(adc="normal", dwi="normal", pattern="focal", t2w="hyperintense", size="below_15mm", epe="absent", **t2w_words):
    return lesion("zone_pz", adc, dwi, pattern, t2w, size, epe, **t2w_words)


def tz(t2w="hyperintense", adc="normal", dwi="normal", pattern="focal", size="below_15mm", epe="absent", **t2w_words):
    return lesion("zone_tz", adc, dwi, pattern, t2w, size, epe, **t2w_words)


def lesion(zone, adc, dwi, pattern, t2w, size, epe, **t2w_words):
    return {
        "lesion_presence": "lesion_present",
        "zone": zone,
        "adc_signal": "adc_normal" if adc == "normal" else f"adc_{adc}_hypointense",
        "dwi_signal": "dwi_normal" if dwi == "normal" else f"dwi_{dwi}_hyperintense",
        "diffusion_pattern": f"diffusion_{pattern}",
        "t2w_signal": "t2w_hyperintense" if t2w == "hyperintense" else f"t2w_{t2w}_hypointense",
        "size": f"size_{size}",
        "epe": f"epe_{epe}",
        **t2w_words,
    }


# ------------------------------------------------------------------ categories


@pytest.mark.parametrize("t2w", range(1, 6))
@pytest.mark.parametrize("dwi", range(1, 6))
@pytest.mark.parametrize("dce", ["positive", "negative", "not available"])
def test_every_combination_of_scores_has_the_category_of_pirads_v2_1(tree, t2w, dwi, dce):
    expected_pz = PZ_DCE_POSITIVE if dce == "positive" else PZ_ELSE
    assert tree.category("PZ", t2w, dwi, dce) == int(expected_pz[t2w - 1][dwi - 1])
    assert tree.category("TZ", t2w, dwi, dce) == int(TZ[t2w - 1][dwi - 1])


@pytest.mark.parametrize("t2w", range(1, 6))
@pytest.mark.parametrize("dwi", range(1, 6))
@pytest.mark.parametrize("dce", ["positive", "negative", "not available"])
def test_the_papers_tree_reproduces_the_printed_inequalities(paper, t2w, dwi, dce):
    expected_pz = PZ_DCE_POSITIVE if dce == "positive" else PZ_ELSE
    assert paper.category("PZ", t2w, dwi, dce) == int(expected_pz[t2w - 1][dwi - 1])
    assert paper.category("TZ", t2w, dwi, dce) == int(PAPER_TZ[t2w - 1][dwi - 1])


def test_an_impossible_score_is_refused(tree):
    for zone, t2w, dwi, dce in (("PZ", 1, 0, "negative"), ("TZ", 6, 1, "negative"), ("CZ", 1, 1, "negative")):
        with pytest.raises(InputError, match="Expected zone PZ or TZ"):
            tree.category(zone, t2w, dwi, dce)


# ------------------------------------------------------------------ DWI score


@pytest.mark.parametrize("zone", [pz, tz])
@pytest.mark.parametrize(
    ("adc", "dwi", "focal"),
    [
        ("normal", "normal", 1),
        ("normal", "mild", 3),
        ("normal", "marked", 3),
        ("mild", "normal", 3),
        ("mild", "mild", 3),
        ("mild", "marked", 3),
        ("marked", "normal", 3),
        ("marked", "mild", 3),
        ("marked", "marked", 4),
    ],
)
def test_dwi_score_follows_pattern_then_depth(tree, zone, adc, dwi, focal):
    assert tree.scores(zone(adc=adc, dwi=dwi)).dwi == focal
    for pattern in ("linear_wedge", "diffuse"):
        assert tree.scores(zone(adc=adc, dwi=dwi, pattern=pattern)).dwi == (1 if focal == 1 else 2)


@pytest.mark.parametrize("zone", [pz, tz])
def test_size_or_extension_lifts_only_a_score_of_four(tree, zone):
    for larger in ({"size": "15mm_or_more"}, {"epe": "present"}, {"size": "15mm_or_more", "epe": "present"}):
        assert tree.scores(zone(adc="marked", dwi="marked", **larger)).dwi == 5
        assert tree.scores(zone(adc="marked", dwi="mild", **larger)).dwi == 3
        assert tree.scores(zone(adc="marked", dwi="marked", pattern="diffuse", **larger)).dwi == 2


# ------------------------------------------------------------------ T2W score

SIGNALS = ("mild", "moderate", "marked")


@pytest.mark.parametrize(
    ("shape", "margin", "homogeneity", "mild_moderate_marked"),
    [
        ("round_oval", "circumscribed", "homogeneous", "344"),
        ("round_oval", "circumscribed", "heterogeneous", "333"),
        ("round_oval", "non_circumscribed", "homogeneous", "333"),
        ("round_oval", "non_circumscribed", "heterogeneous", "333"),
        ("lenticular", "circumscribed", "homogeneous", "344"),
        ("lenticular", "circumscribed", "heterogeneous", "333"),
        ("lenticular", "non_circumscribed", "homogeneous", "333"),
        ("lenticular", "non_circumscribed", "heterogeneous", "333"),
        ("linear_wedge", "circumscribed", "homogeneous", "222"),
        ("linear_wedge", "circumscribed", "heterogeneous", "222"),
        ("linear_wedge", "non_circumscribed", "homogeneous", "222"),
        ("linear_wedge", "non_circumscribed", "heterogeneous", "222"),
        ("diffuse", "circumscribed", "homogeneous", "233"),
        ("diffuse", "circumscribed", "heterogeneous", "233"),
        ("diffuse", "non_circumscribed", "homogeneous", "233"),
        ("diffuse", "non_circumscribed", "heterogeneous", "233"),
    ],
)
def test_t2w_score_of_the_peripheral_zone(tree, paper, shape, margin, homogeneity, mild_moderate_marked):
    for signal, score in zip(SIGNALS, mild_moderate_marked, strict=True):
        words = {"t2w": signal, "shape": shape, "margin": margin, "homogeneity": homogeneity}
        assert tree.scores(pz(**words)).t2w == int(score)
        assert tree.scores(pz(**words, size="15mm_or_more")).t2w == (5 if score == "4" else int(score))
        # Oddity 2: in the paper's tree the same words give the DWI score of the peripheral zone.
        printed = paper.scores(pz(**words))
        assert printed.dwi == printed.t2w == int(score)


TZ_T2W = [  # shape, margin, homogeneity, scores of mild, moderate, marked in PI-RADS v2.1 and in the paper's tree
    ("round_oval", "encapsulated", "homogeneous", "111", "111"),
    ("round_oval", "encapsulated", "heterogeneous", "111", "111"),
    ("round_oval", "mostly_encapsulated", "homogeneous", "222", "222"),
    ("round_oval", "mostly_encapsulated", "heterogeneous", "222", "222"),
    ("round_oval", "circumscribed", "homogeneous", "222", "222"),
    ("round_oval", "circumscribed", "heterogeneous", "333", "333"),
    ("round_oval", "non_circumscribed", "homogeneous", "344", "344"),
    ("round_oval", "non_circumscribed", "heterogeneous", "333", "333"),
    ("round_oval", "obscured", "homogeneous", "344", "333"),
    ("round_oval", "obscured", "heterogeneous", "333", "333"),
    ("lenticular", "encapsulated", "homogeneous", "222", "344"),
    ("lenticular", "encapsulated", "heterogeneous", "222", "333"),
    ("lenticular", "mostly_encapsulated", "homogeneous", "244", "244"),
    ("lenticular", "mostly_encapsulated", "heterogeneous", "222", "222"),
    ("lenticular", "circumscribed", "homogeneous", "344", "244"),
    ("lenticular", "circumscribed", "heterogeneous", "333", "333"),
    ("lenticular", "non_circumscribed", "homogeneous", "344", "344"),
    ("lenticular", "non_circumscribed", "heterogeneous", "333", "333"),
    ("lenticular", "obscured", "homogeneous", "344", "344"),
    ("lenticular", "obscured", "heterogeneous", "333", "333"),
    ("diffuse", "encapsulated", "homogeneous", "222", "333"),
    ("diffuse", "encapsulated", "heterogeneous", "222", "333"),
    ("diffuse", "mostly_encapsulated", "homogeneous", "222", "222"),
    ("diffuse", "mostly_encapsulated", "heterogeneous", "222", "222"),
    ("diffuse", "circumscribed", "homogeneous", "233", "222"),
    ("diffuse", "circumscribed", "heterogeneous", "333", "333"),
    ("diffuse", "non_circumscribed", "homogeneous", "244", "344"),
    ("diffuse", "non_circumscribed", "heterogeneous", "333", "333"),
    ("diffuse", "obscured", "homogeneous", "244", "333"),
    ("diffuse", "obscured", "heterogeneous", "333", "333"),
]


@pytest.mark.parametrize(("shape", "margin", "homogeneity", "v2_1", "printed"), TZ_T2W)
def test_t2w_score_of_the_transition_zone(tree, paper, shape, margin, homogeneity, v2_1, printed):
    for walked, scores in ((tree, v2_1), (paper, printed)):
        for signal, score in zip(SIGNALS, scores, strict=True):
            words = {"t2w": signal, "shape": shape, "margin": margin, "homogeneity": homogeneity}
            assert walked.scores(tz(**words)).t2w == int(score), signal
            assert walked.scores(tz(**words, epe="present")).t2w == (5 if score == "4" else int(score)), signal


def test_the_tz_table_above_is_complete():
    assert len({row[:3] for row in TZ_T2W}) == 3 * 5 * 2


def test_what_is_bright_on_t2w_is_score_one_in_both_zones(tree):
    assert tree.scores(pz()).t2w == tree.scores(tz()).t2w == 1


# ------------------------------------------------------------------ walking


def test_the_dominant_sequence_is_asked_first(tree):
    words = {"shape": "round_oval", "margin": "circumscribed", "homogeneity": "homogeneous", "t2w": "moderate"}
    diffusion, t2w = ["adc_signal", "dwi_signal", "diffusion_pattern"], ["t2w_signal", "shape", "margin", "homogeneity"]
    start, end = ["lesion_presence", "zone"], ["size", "epe"]
    order = [node for node, _ in tree.walk_answers(pz(adc="mild", dwi="mild", **words)).steps]
    assert order == start + diffusion + t2w + end + ["dce"]
    order = [node for node, _ in tree.walk_answers(tz(adc="mild", dwi="mild", **words)).steps]
    assert order == start + t2w + diffusion + end


def test_contrast_enhancement_is_asked_only_in_the_peripheral_zone_with_dwi_three(tree):
    for facts in tree.paths():
        walk = tree.conclude(facts)
        assert ("dce" in facts) == (facts.get("zone") == "zone_pz" and walk.dwi_score == 3)


def test_contrast_enhancement_decides_dwi_three(tree):
    answers = pz(adc="mild", dwi="mild")
    assert tree.walk_answers(answers).dce == "not available"
    assert tree.scores(answers).pirads == 3
    assert tree.scores({**answers, "dce": "dce_negative"}).pirads == 3
    assert tree.scores({**answers, "dce": "dce_positive"}).pirads == 4


def test_no_lesion_is_category_one_without_scores(tree):
    walk = tree.walk_answers({"lesion_presence": "lesion_absent"})
    assert (walk.category, walk.t2w_score, walk.dwi_score) == ("pirads_1", None, None)


def test_the_answer_is_asked_with_its_candidates_and_what_is_known(tree):
    seen = {}

    def answer(node, candidates, so_far):
        seen[node.id] = (candidates, so_far)
        return candidates[0]

    tree.walk(answer)  # lesion_absent comes first
    assert list(seen) == ["lesion_presence"]
    tree.walk(lambda node, candidates, so_far: answer(node, candidates, so_far) and candidates[-1])
    assert seen["margin"][0][2:] == ("encapsulated", "mostly_encapsulated", "obscured")
    assert seen["margin"][1]["shape"] == "diffuse"


def test_an_answer_that_is_no_candidate_is_refused(tree):
    with pytest.raises(InputError, match="Expected one of lesion_absent, lesion_present at 'lesion_presence', got 'x'"):
        tree.walk(lambda node, candidates, so_far: "x")
    with pytest.raises(InputError, match="Expected an answer to 'zone'"):
        tree.walk_answers({"lesion_presence": "lesion_present"})


def test_size_is_classified_at_fifteen_millimetres(tree):
    size = tree.nodes["size"]
    assert [size.classify(mm) for mm in (0.0, 14.9, 15.0, 40.0)] == ["size_below_15mm"] * 2 + ["size_15mm_or_more"] * 2
    with pytest.raises(InputError, match="threshold"):
        tree.nodes["margin"].classify(3.0)


def test_a_trace_shows_the_branches_not_taken(tree):
    trace = {step.node.id: step for step in tree.trace(pz())}
    dwi = {branch.concept: branch for branch in trace["dwi_signal"].branches}
    assert dwi["dwi_normal"].taken and dwi["dwi_normal"].leads_to == "t2w_signal"
    assert not dwi["dwi_marked_hyperintense"].taken
    assert dwi["dwi_marked_hyperintense"].leads_to == "diffusion_pattern"
    assert {branch.leads_to for branch in trace["lesion_presence"].branches} == {END, "zone"}


# ------------------------------------------------------------------ the files


@pytest.mark.parametrize("name", TREES)
def test_every_node_category_and_score_is_reached(bank, name):
    tree = DecisionTree.load(name, bank=bank)
    assert tree.reachable() == {*tree.nodes, *(f"pirads_{n}" for n in range(1, 6))}
    reached = {
        (sequence, tree.zone(facts), tree.score(sequence, facts))
        for facts in tree.paths()
        for sequence in tree.score_rules
        if tree.zone(facts)
    }
    assert reached == set(product(("t2w", "dwi"), ("PZ", "TZ"), range(1, 6)))


@pytest.mark.parametrize("name", TREES)
def test_the_shipped_trees_pass_the_validator(bank, name):
    tree = DecisionTree.load(resource_path(f"DecisionTrees/{name}.yaml"), bank=bank)  # a path is walked completely
    assert tree.id == name


@pytest.mark.parametrize("name", TREES)
def test_every_concept_of_the_bank_is_an_answer_of_the_tree(bank, name):
    tree = DecisionTree.load(name, bank=bank)
    answers = {concept for node in tree.nodes.values() for concept in node.candidates()}
    assert answers | {f"pirads_{n}" for n in range(1, 6)} == set(bank)


def test_the_papers_label_says_that_it_is_not_pirads(paper, tree):
    assert tree.label == "PI-RADS v2.1"
    for word in ("Appendix C.1", "not PI-RADS v2.1", "inverted", "wording of T2W", "missing", "DCE"):
        assert word in paper.label


def _drop(rows, **fields):
    rows[:] = [row for row in rows if not all(row.get(key) == value for key, value in fields.items())]


FAULTS = {
    "unknown concept": (lambda d: d["nodes"]["epe"]["answers"].append("epe_maybe"), "unknown concept 'epe_maybe'"),
    "concept of another node": (
        lambda d: d["nodes"]["epe"]["answers"].append("homogeneous"),
        "answers of 'epe' in the PZ one of epe_absent, epe_present, got 'homogeneous'",
    ),
    "concept of another zone": (
        lambda d: d["nodes"]["margin"]["answers"]["PZ"].append("obscured"),
        "answers of 'margin' in the PZ",
    ),
    "unknown node": (lambda d: d["nodes"]["shape"].update(next="margins"), "unknown node 'margins'"),
    "unknown start": (lambda d: d.update(start="begin"), "unknown node 'begin'"),
    "unknown node in a rule": (
        lambda d: d["scores"]["t2w"]["PZ"].insert(0, {"score": 1, "when": {"colour": ["homogeneous"]}}),
        "unknown node 'colour'",
    ),
    "impossible value in a rule": (
        lambda d: d["scores"]["t2w"]["PZ"].insert(0, {"score": 1, "when": {"margin": ["encapsulated"]}}),
        "t2w scores of the PZ for 'margin'",
    ),
    "unreachable node": (lambda d: d["nodes"]["shape"].update(next="homogeneity"), "'margin', which is unreachable"),
    "cycle": (lambda d: d["nodes"]["margin"].update(next="shape"), "cycle back to 'shape'"),
    "rule that cannot match": (lambda d: d["scores"]["t2w"]["TZ"].append({"score": 3}), "rule 11 of the t2w scores"),
    "branch that cannot be taken": (
        lambda d: d["nodes"]["homogeneity"]["next"].append({"to": "size"}),
        "rule 3 of next of 'homogeneity'",
    ),
    "category that cannot match": (
        lambda d: d["category"].append({"zone": "TZ", "pirads": 5}),
        "rule 14 of the category table",
    ),
    "combination without a score": (lambda d: d["scores"]["t2w"]["TZ"].pop(), "t2w score for the TZ, got no rule"),
    "combination without a next node": (lambda d: d["nodes"]["homogeneity"]["next"].pop(), "what follows"),
    "combination without a category": (lambda d: _drop(d["category"], zone="TZ", t2w=[4]), "none for TZ, T2W 4, DWI 1"),
    "missing field": (lambda d: d["nodes"]["size"].pop("question"), "'question' is a required property"),
    "score out of range": (lambda d: d["category"][0].update(pirads=6), "decision_tree.schema.json"),
    "node named as the end": (
        lambda d: d["nodes"].update(category=copy.deepcopy(d["nodes"]["size"])),
        "which ends a walk",
    ),
    "no zone asked": (lambda d: d["nodes"]["lesion_presence"].update(next="epe"), "ask for the zone"),
    "unknown default": (lambda d: d["nodes"]["dce"].update(default="dce_unknown"), "threshold or default of 'dce'"),
    "printed rule that matches": (lambda d: d["category"][0].update(as_printed=True), "never match"),
}


@pytest.fixture(scope="module")
def shipped() -> str:
    """The default tree as JSON (which YAML contains): no shared anchors, and quickly read again."""
    return json.dumps(yaml.safe_load(resource_path("DecisionTrees/pirads_v2_1.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_tree_is_refused_in_one_sentence(bank, shipped, tmp_path, fault):
    change, words = FAULTS[fault]
    data = json.loads(shipped)
    change(data)
    path = tmp_path / "tree.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        DecisionTree.load(path, bank=bank)
    message = str(caught.value)
    assert words in message
    assert message.endswith(".") and "\n" not in message


def test_an_unknown_tree_is_refused():
    with pytest.raises(InputError, match="one of the trees .*pirads_v2_1 or a YAML file, got 'pirads_v9'"):
        DecisionTree.load("pirads_v9")
