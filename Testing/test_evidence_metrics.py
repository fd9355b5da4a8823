"""Evidence and rationale figures of merit against values worked out by hand."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ABSENT = [name for name in ("monai", "picai_eval") if find_spec(name) is None]
if ABSENT:
    pytest.skip(f"the train extra is not installed: {', '.join(ABSENT)}", allow_module_level=True)

from MedRationaleTraining.data.stacks import Stack, whole_exam  # noqa: E402
from MedRationaleTraining.data.synthetic import StoredExam, stored_exams  # noqa: E402
from MedRationaleTraining.evaluation import Prediction, evaluate, predict  # noqa: E402
from MedRationaleTraining.evaluation_figures import example_of, example_panel  # noqa: E402
from MedRationaleTraining.evaluation_tables import markdown  # noqa: E402
from MedRationaleTraining.evidence_metrics import (  # noqa: E402
    THRESHOLDS,
    evidence_scores,
    intersection_over_union,
    lesion_gradcam,
    on_region_grid,
    pointing,
    relevance_mass,
    summarise_evidence,
    true_regions,
)
from MedRationaleTraining.losses import NodeTargets  # noqa: E402
from MedRationaleTraining.metrics import ratio  # noqa: E402
from MedRationaleTraining.rationale_metrics import (  # noqa: E402
    Discriminant,
    Match,
    RationaleResult,
    Unit,
    assess_rationale,
    examination_answers,
    logit_answers,
    summarise_rationale,
)
from training_samples import TINY  # noqa: E402

from MedRationaleLib.decision_tree import DecisionTree  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.model.checkpoint import save_checkpoint  # noqa: E402
from MedRationaleLib.model.config import ModelConfig  # noqa: E402
from MedRationaleLib.model.rationale_model import RationaleModel  # noqa: E402
from MedRationaleLib.postprocessing import PostprocessingConfig  # noqa: E402
from MedRationaleLib.synthesis.regions import Region  # noqa: E402

TREE = DecisionTree.load()
CONCEPTS = list(TREE.bank)
AT = {concept: i for i, concept in enumerate(CONCEPTS)}
ADC, DWI = "adc_marked_hypointense", "dwi_marked_hyperintense"
LESION = {"lesion_presence": "lesion_present", "zone": "zone_pz", "adc_signal": ADC, "dwi_signal": DWI,
          "diffusion_pattern": "diffusion_focal", "t2w_signal": "t2w_hyperintense", "size": "size_below_15mm",
          "epe": "epe_absent"}  # fmt: skip
"""DWI 4 in the peripheral zone: PI-RADS 4."""
LARGE = LESION | {"size": "size_15mm_or_more"}
"""PI-RADS 5."""
MIMIC = LESION | {"dwi_signal": "dwi_mild_hyperintense", "diffusion_pattern": "diffusion_linear_wedge"}
"""PI-RADS 2."""


# ------------------------------------------------------------------ one map


def grid(*rows: list[float]) -> np.ndarray:
    return np.array([rows], np.float32)


def test_relevance_mass_is_the_positive_share_inside() -> None:
    heat = grid([3, 1], [-5, 0])
    assert relevance_mass(heat, grid([1, 0], [1, 0])) == pytest.approx([0.75])
    assert relevance_mass(heat, grid([0.5, 0], [0, 0])) == pytest.approx([0.375])  # half of the patch is inside


def test_an_empty_map_has_no_relevance_mass_and_points_nowhere() -> None:
    region = np.repeat(grid([1, 0], [0, 0]), 3, 0)
    heat = np.stack([np.zeros((2, 2)), np.full((2, 2), -1.0), np.ones((2, 2))])
    assert np.isnan(relevance_mass(heat, region)).tolist() == [True, True, False]
    assert np.isnan(pointing(heat, region)).tolist() == [True, True, False]
    assert relevance_mass(heat, region)[2] == 0.25  # an even map


def test_ties_and_patches_partly_inside_count_by_their_share() -> None:
    region = grid([1, 0], [0.25, 0])
    assert pointing(grid([2, 1], [1, 0]), region) == 1
    assert pointing(grid([1, 2], [1, 0]), region) == 0
    assert pointing(grid([2, 2], [1, 0]), region) == 0.5
    assert pointing(grid([0, 1], [2, 0]), region) == 0.25
    assert pointing(grid([1, 1], [1, 1]), region) == pytest.approx(1.25 / 4)


def test_overlap_at_every_threshold_with_the_bound_included() -> None:
    iou = intersection_over_union(grid([0.6, 0.6, 0.2]), grid([1, 0, 0.5]))[0]
    assert iou.shape == (len(THRESHOLDS),)
    assert iou[THRESHOLDS.index(0.2)] == pytest.approx(1.5 / 3)
    assert iou[THRESHOLDS.index(0.5)] == pytest.approx(1 / (2 + 1.5 - 1))
    assert iou[THRESHOLDS.index(0.6)] == pytest.approx(1 / 2.5)
    assert iou[THRESHOLDS.index(0.65)] == 0


# ------------------------------------------------------------------ maps and places


def stack(answers: list[dict[str, str]], is_lesion: list[bool], slices: int = 2, columns=None) -> Stack:
    """Each region is 4 x 4 patches beside the one before on slice 0; the zones are the upper and lower half."""
    regions = torch.zeros(len(answers), slices, 64, 64)
    for i in range(len(answers)):
        regions[i, 0, 8:12, 8 * i : 8 * i + 4] = 1
    masks = torch.zeros(slices, 4, 128, 128)
    masks[:, 0], masks[:, 1, :64], masks[:, 2, 64:] = 1, 1, 1
    return Stack(
        images=torch.zeros(slices, 3, 256, 256),
        masks=masks,
        regions=regions,
        answers=tuple(answers),
        is_lesion=tuple(is_lesion),
    )


EVERYWHERE = np.ones((2, 64, 64), np.float32)


def test_a_concept_is_in_all_findings_that_it_is_true_of_and_presence_in_lesions_only() -> None:
    given = stack([LESION, MIMIC, {"lesion_presence": "lesion_absent", "zone": "zone_pz"}], [True, False, False])
    found = true_regions(given, TREE, EVERYWHERE)
    assert set(found) == {ADC, DWI, "dwi_mild_hyperintense", "diffusion_focal", "diffusion_linear_wedge",
                          "t2w_hyperintense", "lesion_present", "zone_pz", "zone_tz"}  # fmt: skip
    assert found[ADC].node == "adc_signal" and found[ADC].region.sum() == 32  # both
    assert found[DWI].region.sum() == 16 and found[DWI].lesion.tolist() == [True, False]
    assert found["dwi_mild_hyperintense"].region.sum() == 16 and not found["dwi_mild_hyperintense"].lesion.any()
    assert found["lesion_present"].region.sum() == 16 and found["lesion_present"].lesion.tolist() == [True, False]
    assert found["zone_pz"].region[:, :32].min() == 1 and found["zone_pz"].region[:, 32:].max() == 0


def test_what_the_t2w_does_not_show_is_no_place() -> None:
    field = EVERYWHERE.copy()
    field[:, :, :2] = 0
    found = true_regions(stack([LESION], [True]), TREE, field)
    assert found[ADC].region.sum() == 8 and found["zone_pz"].region.sum() == 2 * 32 * 62


def drawn(**heat: np.ndarray) -> dict[str, np.ndarray]:
    """Heatmaps of the given concepts; all others, and Grad-CAM, are dark."""
    maps = np.zeros((len(CONCEPTS), 2, 64, 64), np.float32)
    for concept, h in heat.items():
        maps[AT[concept]] = h
    return {"heatmap": maps, "similarity": maps, "gradcam": np.zeros((1, 2, 64, 64), np.float32)}


def patches(inside: float, outside: float) -> np.ndarray:
    """Heat of all 16 patches of the first region and of 16 patches beyond, on both slices."""
    heat = np.zeros((2, 64, 64), np.float32)
    heat[:, 8:12, 0:4], heat[:, 40:44, 40:44] = inside, outside
    return heat


def summary_of_two(stored: dict[str, float] | None = None) -> dict:
    """ADC 3/4 and 1/4 in place, DWI 1 in place and empty; a mimic's ADC, wholly out of place, beside the second."""
    first = evidence_scores(
        drawn(**{ADC: patches(0.6, 0.2), DWI: patches(0.3, 0)}),
        true_regions(stack([LESION], [True]), TREE, EVERYWHERE),
        CONCEPTS,
        EVERYWHERE,
    )
    regions = true_regions(stack([LESION, MIMIC | {"adc_signal": "adc_normal"}], [True, False]), TREE, EVERYWHERE)
    second = evidence_scores(
        drawn(**{ADC: patches(0.1, 0.3), "adc_normal": patches(0, 1.0)}), regions, CONCEPTS, EVERYWHERE
    )
    return summarise_evidence([first, second], TREE, stored)


def test_lesion_concepts_are_averaged_over_their_slices_and_empty_maps_are_counted() -> None:
    summary = summary_of_two()
    heat = summary["heatmap"]
    assert heat["concepts"][ADC]["rma"]["value"] == pytest.approx(0.5) and heat["concepts"][ADC]["rma"]["n"] == 2
    assert heat["concepts"][ADC]["pointing"]["value"] == 0.5
    assert heat["concepts"][DWI]["rma"]["value"] == 1 and heat["concepts"][DWI]["rma"]["n"] == 1
    assert heat["concepts"][DWI]["empty"] == 1
    assert heat["concepts"][ADC]["uniform"] == pytest.approx(16 / 4096)
    # 3/4, 1/4 and 1; the pattern's and the T2W signal's maps are empty
    assert summary["rma_lesion"] == heat["lesion"]["rma"]
    assert summary["rma_lesion"]["value"] == pytest.approx(2 / 3) and summary["rma_lesion"]["n"] == 3
    assert heat["lesion"]["empty"] == 5
    assert heat["findings"]["rma"]["value"] == pytest.approx(2 / 4)  # the mimic's 0 with them
    assert heat["nodes"]["adc_signal"]["rma"]["value"] == pytest.approx(1 / 3)
    assert json.dumps(summary, allow_nan=False)


def test_the_best_threshold_is_one_a_concept_and_a_stored_one_is_taken_as_it_is() -> None:
    row = summary_of_two({ADC: 0.6})["heatmap"]["concepts"][ADC]
    # Up to 0.1 all 32 patches are above in both: 1/2 and 1/2. From 0.25 the first is whole, the second wholly beside.
    assert row["best_threshold"] == 0.05 and row["iou_best"]["value"] == pytest.approx(0.5)
    assert row["iou_50"]["value"] == pytest.approx(0.5) and row["iou_stored"]["value"] == pytest.approx(0.5)
    dwi = summary_of_two({ADC: 0.6})["heatmap"]["concepts"][DWI]
    assert dwi["iou_50"]["value"] == 0 and dwi["iou_best"]["value"] == pytest.approx(0.5)  # whole, and empty
    assert dwi["iou_stored"] == {"value": None, "ci95": None, "n": 0}
    assert summary_of_two({ADC: 0.7})["heatmap"]["concepts"][ADC]["iou_stored"]["value"] == 0


def test_gradcam_is_held_against_lesions_and_not_against_zones() -> None:
    summary = summary_of_two()
    assert {"zone_pz", "zone_tz"} <= set(summary["similarity"]["concepts"])
    assert not {"zone_pz", "zone_tz"} & set(summary["gradcam"]["concepts"])
    assert summary["gradcam"]["lesion"]["rma"]["value"] is None and summary["gradcam"]["lesion"]["empty"] == 8


def test_without_findings_only_the_zones_have_a_place() -> None:
    scores = evidence_scores(drawn(), true_regions(stack([], []), TREE, EVERYWHERE), CONCEPTS, EVERYWHERE)
    summary = summarise_evidence([scores], TREE)
    assert set(summary["heatmap"]["concepts"]) == {"zone_pz", "zone_tz"}
    assert summary["rma_lesion"] == {"value": None, "ci95": None, "n": 0}
    assert summary["heatmap"]["lesion"]["uniform"] is None


def test_maps_of_any_resolution_come_onto_the_regions_grid() -> None:
    even = torch.full((1, 1, 16, 16), 0.3)
    assert torch.allclose(on_region_grid(even), torch.full((1, 1, 64, 64), 0.3))
    fine = torch.zeros(1, 1, 128, 128)
    fine[..., :2, :1] = 1
    assert on_region_grid(fine)[0, 0, 0, 0] == 0.5 and on_region_grid(fine).sum() == 0.5


class TwoChannels:
    """A decoder whose lesion logit is 2 A_0 - A_1."""

    def f_mask(self, features, detail):
        lesion = 2 * features[:, 0] - features[:, 1]
        return torch.stack([lesion * 0, lesion * 0, lesion * 0, lesion], 1)


def test_gradcam_of_a_linear_decoder_is_its_positive_logit() -> None:
    features = torch.tensor([[[[1.0, 0.0]], [[0.0, 3.0]]], [[[0.0, 0.5]], [[2.0, 4.0]]]])  # logits (2, -3), (-2, -3)
    cam = lesion_gradcam(TwoChannels(), features, [])
    # One of two pixels is positive in the first slice: a = (1, -1/2). In the second none is, all count: a = (2, -1).
    assert torch.allclose(cam, torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]))
    assert not cam.requires_grad


def random_model(config: ModelConfig = TINY) -> RationaleModel:
    torch.manual_seed(0)
    model = RationaleModel(config, CONCEPTS)
    model.concept_embeddings = torch.nn.functional.normalize(torch.randn(len(CONCEPTS), config.shared_dim), dim=1)
    return model.eval()


def test_evidence_is_made_as_inference_makes_it_and_follows_a_mirrored_image(
    tiny_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("MedRationaleTraining.evaluation.autocast", lambda device: torch.autocast("cpu", enabled=False))
    model = random_model()
    exam = StoredExam.open(stored_exams(tiny_set)[0])
    given = predict(model, exam, evidence=True)
    images = whole_exam(exam).images
    with torch.inference_mode():
        output = model(torch.stack([images, images.flip(-1)]))
        straight, mirrored = (output.similarity(i, model.concept_embeddings) for i in (0, 1))
        expected = model.heat((straight + mirrored.flip(-1)) / 2).numpy()
    assert np.allclose(given.maps["heatmap"], expected * given.field, atol=1e-5)
    assert np.allclose(given.maps["similarity"], np.maximum(given.similarity, 0) * given.field, atol=1e-6)
    top = given.maps["gradcam"][0].max((1, 2))
    assert ((top < 1e-6) | np.isclose(top, 1)).all() and (top > 0.5).any()
    flipped = replace(exam, images=exam.images[..., ::-1], labels=exam.labels[..., ::-1],
                      regions=exam.regions[..., ::-1])  # fmt: skip
    mirror = predict(model, flipped, evidence=True)
    for source, maps in given.maps.items():
        assert np.allclose(mirror.maps[source][..., ::-1], maps, atol=1e-4), source
    assert predict(model, exam).maps == {}


# ------------------------------------------------------------------ rationales


def test_the_discriminant_finds_the_nearer_class_and_prefers_the_commoner_one() -> None:
    x = np.array([[0.0, 0], [0, 2], [1, 1], [6, 0], [6, 2], [5, 1]])
    fitted = Discriminant(x, [7, 7, 7, 9, 9, 9])
    assert fitted.best(np.array([1.0, 5.0]), [7, 9]) == 7 and fitted.best(np.array([5.0, -5.0]), [7, 9]) == 9
    assert fitted.best(np.array([0.0, 0.0]), [9]) == 9  # among the candidates only
    assert fitted.best(np.array([0.0, 0.0]), [3]) is None
    same = np.zeros((5, 2))
    assert Discriminant(same, [1, 1, 1, 2, 2]).best(np.zeros(2), [1, 2]) == 1


def unit(truth: int, logit: float, retrieval: int | None = 0, mask: int | None = 0) -> Unit:
    return Unit(
        asked=[("shape", [0, 1], truth)],
        said={"retrieval": {"shape": retrieval}, "whole": {"shape": retrieval}, "mask": {"shape": mask}},
        logits=np.array([logit, 0.0]),
    )


def test_the_logits_answer_an_examination_by_what_is_true_of_others() -> None:
    agreeing = [[unit(0, -1.0), unit(1, 1.0)] for _ in range(3)]
    assert logit_answers(agreeing) == [[{"shape": 0}, {"shape": 1}]] * 3
    odd = [*agreeing[:2], [unit(1, -1.0), unit(0, 1.0)]]  # its own truth would have been learned
    assert logit_answers(odd)[2] == [{"shape": 0}, {"shape": 1}]
    assert logit_answers([agreeing[0]]) == [[{"shape": None}, {"shape": None}]]


def test_accuracy_counts_answers_and_whole_rationales_and_a_missing_answer_is_wrong() -> None:
    two = Unit(
        asked=[("shape", [0, 1], 1), ("margin", [2, 3], 2)],
        said={m: {"shape": 1, "margin": None if m == "mask" else 2} for m in ("retrieval", "whole", "mask")},
        logits=np.zeros(2),
    )
    results = [
        RationaleResult(
            units={"slices": [two, unit(1, 0.0, retrieval=0, mask=1)], "examinations": [two]},
            matches=[Match(zone=True, pirads=4, true_pirads=5), Match(zone=False, pirads=2, true_pirads=5)],
            contradicted=[True, False, False],
            slices=10,
            disagreements={"mask_only": 1, "rationale_only": 2, "zone": 0},
            of_whole=6,
        ),
        RationaleResult(
            units={"slices": [unit(0, 0.0)], "examinations": [unit(0, 0.0)]},
            matches=[],
            contradicted=[],
            slices=10,
            disagreements={"mask_only": 0, "rationale_only": 0, "zone": 1},
            of_whole=0,
        ),
    ]
    report = summarise_rationale(results)
    retrieval, mask = (report["rationale"]["slices"][m] for m in ("retrieval", "mask"))
    assert retrieval["overall"]["value"] == pytest.approx(3 / 4) and retrieval["overall"]["n"] == 4
    assert retrieval["complete"]["value"] == pytest.approx(2 / 3)
    assert mask["overall"]["value"] == pytest.approx(3 / 4) and mask["nodes"]["margin"]["value"] == 0
    assert mask["nodes"]["shape"]["value"] == 1 and mask["complete"]["value"] == pytest.approx(2 / 3)
    findings, rates = report["findings"], report["inconsistency"]
    assert (findings["zone"]["value"], findings["pirads"]["value"], findings["pirads_within_one"]["value"]) == (
        0.5,
        0,
        0.5,
    )
    assert findings["confusion"] == {"5": {"2": 1, "4": 1}}
    assert rates["slices"]["value"] == pytest.approx(4 / 20) and rates["slices_mask_only"]["value"] == 0.05
    assert rates["slices_rationale_only"]["value"] == 0.1 and rates["slices_zone"]["value"] == 0.05
    assert rates["findings"]["value"] == pytest.approx(1 / 3) and rates["slices_whole"]["value"] == 0.3
    alone = summarise_rationale(results[1:])
    assert alone["rationale"]["slices"]["logits"]["overall"]["value"] is None  # nothing to learn it from
    assert alone["findings"]["zone"]["value"] is None


def test_an_examination_is_its_most_suspicious_lesion_then_its_largest() -> None:
    assert examination_answers(stack([LESION, LARGE, MIMIC], [True, True, False]), TREE) == LARGE
    assert examination_answers(stack([MIMIC], [False]), TREE) == {"lesion_presence": "lesion_absent"}
    two = stack([LESION, dict(LESION)], [True, True])
    two.regions[1, 1, :8, :8] = 1
    assert examination_answers(two, TREE) is two.answers[1]


def test_where_nobody_looked_for_lesions_nothing_is_asked() -> None:
    given, masks = prediction()
    unknown = replace(stack([], [], slices=5), known=torch.tensor([True, True, True, False]))
    assert examination_answers(unknown, TREE) == {}
    given = replace(given, stack=unknown, rationales=())
    result = assess_rationale(given, masks, (0.8, 0.8), TREE, NodeTargets(TREE, CONCEPTS), PostprocessingConfig())
    assert result.units == {"slices": [], "examinations": []} and result.matches == []
    assert examination_answers(stack([{"zone": "zone_pz"}, LESION], [True, True]), TREE) == LESION


def prediction() -> tuple[Prediction, dict[str, np.ndarray]]:
    """Five slices, the last one not seen; a lesion of PI-RADS 5 and a finding of PI-RADS 4 on it in slices 1 and 2.

    Retrieval says of the slices: absent, absent, present in the TZ, present, present; as a whole, all are absent.
    """
    gland, lesion = np.zeros((5, 256, 256), bool), np.zeros((5, 256, 256), bool)
    gland[:4, 100:160, 100:160] = True
    lesion[1:3, 140:150, 120:130] = True
    low = np.arange(256)[:, None] >= 128
    masks = {"gland": gland, "pz": gland & low, "tz": gland & ~low, "lesions": lesion.astype(np.uint8)}
    similarity = np.zeros((len(CONCEPTS), 5, 64, 64), np.float32)
    for concept in ("lesion_present", ADC, DWI, "diffusion_focal", "t2w_hyperintense", "zone_tz"):
        similarity[AT[concept]] = 0.5
    similarity[AT["lesion_absent"], :2] = 0.6
    slices = np.zeros((5, len(CONCEPTS)), np.float32)
    slices[:, AT["lesion_absent"]] = slices[:, AT["zone_pz"]] = 1
    given = stack([LARGE], [True], slices=5)
    given.regions.zero_()
    given.regions[0, 1:3, 35:37, 30:32] = 1
    region = Region(label=3, answers=LARGE, t2w_score=1, dwi_score=5, pirads=5, is_lesion=True)
    return (
        Prediction(
            probabilities=np.stack([gland, masks["pz"], masks["tz"], 0.8 * lesion]).astype(np.float32),
            truth=np.stack([gland, masks["pz"], masks["tz"], lesion]),
            pooled=np.zeros((1, len(CONCEPTS))),
            slices=slices,
            sequences={},
            similarity=similarity,
            logits=np.zeros((5, 8)),
            stack=given,
            seen=np.array([True, True, True, True, False]),
            field=np.ones((5, 64, 64), np.float32),
            regions=3 * lesion.astype(np.uint8),
            rationales=(region,),
            maps={},
            constraints={"contain.margin": 0.75},
        ),
        masks,
    )


def test_masks_and_rationale_are_compared_slice_by_slice_and_finding_by_finding() -> None:
    given, masks = prediction()
    result = assess_rationale(given, masks, (0.8, 0.8), TREE, NodeTargets(TREE, CONCEPTS), PostprocessingConfig())
    assert result.slices == 4
    assert result.disagreements == {"mask_only": 1, "rationale_only": 1, "zone": 1}
    assert result.of_whole == 2  # as a whole, no slice has a lesion
    assert result.contradicted == [True]  # its own embedding is nearer to the TZ
    assert result.matches == [Match(zone=True, pirads=4, true_pirads=5)]
    # In the zone that the slice says, there is nothing to disagree on.
    given.similarity[AT["zone_pz"]] = 1
    result = assess_rationale(given, masks, (0.8, 0.8), TREE, NodeTargets(TREE, CONCEPTS), PostprocessingConfig())
    assert result.disagreements["zone"] == 0 and result.contradicted == [False]


def test_each_method_answers_a_slice_and_the_examination_in_its_own_way() -> None:
    given, masks = prediction()
    units = assess_rationale(given, masks, (0.8, 0.8), TREE, NodeTargets(TREE, CONCEPTS), PostprocessingConfig()).units
    first, second = units["slices"][:2]
    assert [node for node, *_ in first.asked] == ["lesion_presence"]
    assert first.said["retrieval"]["lesion_presence"] == first.said["mask"]["lesion_presence"] == AT["lesion_absent"]
    assert second.said["retrieval"]["lesion_presence"] == AT["lesion_absent"]
    assert second.said["mask"]["lesion_presence"] == AT["lesion_present"]
    assert second.said["mask"]["zone"] == AT["zone_pz"]  # measured, though the embedding says TZ
    assert second.said["mask"]["adc_signal"] == AT[ADC] and second.said["retrieval"]["dwi_signal"] == AT[DWI]
    (exam,) = units["examinations"]
    assert exam.said["retrieval"]["lesion_presence"] == AT["lesion_present"]
    assert exam.said["retrieval"]["zone"] == AT["zone_tz"] and exam.said["mask"]["zone"] == AT["zone_pz"]
    assert exam.said["whole"]["lesion_presence"] == AT["lesion_absent"] and exam.said["whole"]["zone"] == AT["zone_pz"]
    # A lesion must be nearer than none by more than the model's margin, which the whole slice does not have.
    strict = PostprocessingConfig(presence_margin=0.6)
    units = assess_rationale(given, masks, (0.8, 0.8), TREE, NodeTargets(TREE, CONCEPTS), strict).units
    assert units["examinations"][0].said["retrieval"]["lesion_presence"] == AT["lesion_absent"]
    masks["lesions"][:] = 0
    units = assess_rationale(given, masks, (0.8, 0.8), TREE, NodeTargets(TREE, CONCEPTS), PostprocessingConfig()).units
    assert units["slices"][1].said["mask"]["lesion_presence"] == AT["lesion_absent"]
    assert units["slices"][1].said["mask"]["adc_signal"] is None


def test_a_finding_beside_the_lesion_is_no_match_and_a_lesion_is_matched_once() -> None:
    given, masks = prediction()
    masks["lesions"][:, :, 126:] *= 2  # the right 4 of 10 columns are a second finding
    result = assess_rationale(given, masks, (0.8, 0.8), TREE, NodeTargets(TREE, CONCEPTS), PostprocessingConfig())
    assert len(result.contradicted) == 2 and len(result.matches) == 1
    given, masks = prediction()
    masks["lesions"] = np.roll(masks["lesions"], -15, 2)
    assert not assess_rationale(
        given, masks, (0.8, 0.8), TREE, NodeTargets(TREE, CONCEPTS), PostprocessingConfig()
    ).matches


# ------------------------------------------------------------------ the whole evaluation


@pytest.mark.parametrize(("given", "words"), [({"cases": 0}, "at least 1 examination"), ({"device": "x"}, "a device")])
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(given, words, tiny_set, tmp_path) -> None:
    with pytest.raises(InputError, match=words):
        evaluate("compact", tiny_set, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_an_interval_leaves_out_resamples_without_an_example() -> None:
    estimate = ratio([0, 0, 3], [0, 0, 4])
    assert estimate.value == 0.75 and estimate.ci95 == (0.75, 0.75) and estimate.n == 4


def test_an_evaluation_of_an_untrained_model_has_all_figures_and_tells_what_it_finds(
    tiny_set: Path, tmp_path: Path
) -> None:
    config = replace(TINY, detail_dim=0, reason_dim=0, heatmap="relu")  # 12 mm patches
    save_checkpoint(random_model(config), tmp_path / "model", card="", vocabulary=[])
    report = evaluate(tmp_path / "model", tiny_set, tmp_path / "out", cases=2)
    assert {"evidence", "rationale", "findings", "inconsistency"} <= set(report)
    heat = report["evidence"]["heatmap"]
    assert heat["lesion"]["rma"]["n"] + heat["lesion"]["empty"] > 5
    assert {"zone", "lesion_presence", "adc_signal"} <= set(heat["nodes"])
    for source in ("heatmap", "similarity", "gradcam"):
        row = report["evidence"][source]["lesion"]
        assert row["rma"]["value"] is None or 0 <= row["rma"]["value"] <= 1
        every = report["evidence"][source]["findings"]  # which the best thresholds are chosen on
        assert every["iou_best"]["value"] >= every["iou_50"]["value"] >= 0
    # Heat is max(cos, 0) in this configuration, so the plain similarity map is the same map.
    assert heat["lesion"]["rma"] == report["evidence"]["similarity"]["lesion"]["rma"]
    for level in ("slices", "examinations"):
        assert set(report["rationale"][level]) == {"retrieval", "whole", "mask", "logits"}
        assert report["rationale"][level]["logits"]["overall"]["n"] > 0
    assert 0 <= report["inconsistency"]["slices"]["value"] <= 1
    text = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == text.splitlines()[:1]  # the card demotes it
    for words in ("RMA (Eq. 5)", "pointing game", "gradcam", "adc_signal", "logits", "contradict each other"):
        assert words in text
    for name in ("evidence_rma.svg", "evidence_examples.svg"):
        path = tmp_path / "out" / name
        ElementTree.parse(path)
        assert 1_000 < path.stat().st_size < 500_000
    assert "RMA" in (tmp_path / "out" / "evidence_examples.svg").read_text(encoding="utf-8")
    quick = evaluate(tmp_path / "model", tiny_set, tmp_path / "quick", cases=2, gradcam=False)
    cam = quick["evidence"].pop("gradcam")
    assert report["evidence"].pop("gradcam") != cam and cam["lesion"]["rma"]["value"] is None
    assert quick == report and "Grad-CAM" not in (tmp_path / "quick" / "evidence_examples.svg").read_text("utf-8")


def test_the_example_is_the_lesion_with_the_heat_of_its_own_concepts() -> None:
    given, _ = prediction()
    places = true_regions(given.stack, TREE, given.field)
    assert example_of(given, places, TREE, CONCEPTS) is None  # no maps were made
    heat = np.zeros((len(CONCEPTS), 5, 64, 64), np.float32)
    heat[AT[ADC]], heat[AT["epe_absent"]] = places[ADC].region, 1
    given = replace(given, maps={"heatmap": heat, "gradcam": given.field[None]})
    example = example_of(given, places, TREE, CONCEPTS)
    assert example is not None and example.t2w.shape == example.region.shape == (128, 128)
    words = [TREE.bank[c].text for c in (ADC, DWI, "diffusion_focal", "t2w_hyperintense")]
    assert sorted(example.maps) == sorted([*words, "Grad-CAM"])
    assert example.rma[words[0]] == 1 and np.isnan(example.rma[words[1]])
    assert example.rma["Grad-CAM"] == pytest.approx(4 / 4096)
    rows, columns = np.nonzero(example.region)
    assert abs(rows.mean() - 63.5) <= 2 and abs(columns.mean() - 63.5) <= 2  # in the middle of the tile
    panel = example_panel([example])
    assert panel.count("<image") == 6 and "no heat" in panel and "RMA 1.00" in panel
    assert "No examination" in example_panel([])


def test_a_report_from_before_these_figures_is_still_shown() -> None:
    report = {"model": "x", "data": {"examinations": 1, "split": "test"}, "metrics": {},
              "retrieval": {"regions": {}, "slices": {}}}  # fmt: skip
    assert "x on 1 synthetic" in markdown(report) and "Eq. 5" not in markdown(report)
