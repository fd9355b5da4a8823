"""The page: complete, self-contained, escaped, light, and every colour where its phrase is."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from sample_assessments import (
    PZ_ANSWERS,
    assess_by_hand,
    drawn_assessment,
    drawn_masks,
    drawn_study,
    on_grid,
    prostatex_assessment,
)

from MedRationaleLib.assessment import Assessment, Candidate, SliceRationale
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.override import override_finding
from MedRationaleLib.report import STEP_COLORS, build_report
from MedRationaleLib.report_images import ReportPictures
from MedRationaleLib.serialization import StudyRecord

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text) with a check that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[dict[str, str]] = []
        self._open: list[dict[str, str]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"unclosed: {[item['tag'] for item in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parent = self._open[-1] if self._open else None
        element = {"tag": tag, "text": "", "parent": str(id(parent))} | {k: v or "" for k, v in attrs}
        element["self"] = str(id(element))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data

    def find(self, tag: str, css: str = "") -> list[dict[str, str]]:
        return [e for e in self.elements if e["tag"] == tag and set(css.split()) <= set(e.get("class", "").split())]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", next(e["text"] for e in self.elements if e["tag"] == "main"))


@pytest.fixture(scope="module")
def assessment() -> Assessment:
    return drawn_assessment(warnings=("A warning of the run.",))


@pytest.fixture(scope="module")
def html(assessment: Assessment) -> str:
    return build_report(assessment)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def empty(assessment: Assessment, **changes: object) -> Assessment:
    nothing = on_grid(np.zeros(assessment.study.t2w.GetSize()[::-1], np.uint8), assessment.gland)
    return replace(assessment, lesions=nothing, findings=(), evidence={}, **changes)


def test_nothing_is_fetched_from_anywhere(page: Page, html: str) -> None:
    for element in page.elements:
        for name in ("href", "src", "action", "data", "poster", "srcset"):
            assert element.get(name, "#").startswith(("#", "data:")) or element.get(name) == "", element
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest", html)
    policy = next(e for e in page.find("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_every_reference_on_the_page_has_its_target(page: Page) -> None:
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids))
    pictures = [e["href"][1:] for e in page.find("use") if re.match(r"#(i|h)", e.get("href", ""))]
    assert pictures and set(pictures) <= set(ids)
    assert {e["href"][1:] for e in page.find("a")} <= set(ids)


def test_every_concept_of_every_rationale_is_there_with_its_branches(assessment: Assessment, page: Page) -> None:
    steps = page.find("li", "step")
    expected = [s for f in assessment.findings for s in f.rationale if s.node != "pirads"]
    assert [(e["data-node"], e["data-concept"]) for e in steps] == [(s.node, s.concept) for s in expected]
    for element, step in zip(steps, expected, strict=True):
        assert step.text in element["text"] and step.source in element["text"]
        if step.similarity is not None:
            assert f"{step.similarity:.2f}".replace("-", "−") in element["text"]
        for other in step.runners_up:
            assert f"{other.similarity:.2f}".replace("-", "−") in element["text"]
    assert len(page.find("li", "taken")) == len(expected)
    assert len(page.find("li", "not")) >= sum(len(s.runners_up) for s in expected)


def test_each_phrase_has_the_colour_of_its_own_heatmaps_frame(page: Page) -> None:
    frames = page.find("figure", "evidence")
    assert frames
    for step in page.find("li", "step"):
        inside = [e for e in (*frames, *page.find("mark", "phrase")) if is_inside(e, step, page)]
        assert {e["style"] for e in inside} == {step["style"]}
    for finding in page.find("section", "finding"):
        colors = [f["style"] for f in frames if is_inside(f, finding, page)]
        assert len(colors) == len(set(colors)) == 8


def test_a_heatmap_lies_over_the_sequence_that_its_concept_describes(page: Page) -> None:
    shown = {}
    for step in page.find("li", "step"):
        uses = [e["href"] for e in page.find("use") if e.get("href", "").startswith("#i-") and is_inside(e, step, page)]
        if uses:
            shown[step["data-node"]] = uses[0].split("-")[1]
    assert shown["adc_signal"] == "adc" and shown["dwi_signal"] == "dwi" and shown["margin"] == "t2w"
    assert shown["diffusion_pattern"] == "adc" and shown["lesion_presence"] == "t2w"


def is_inside(element: dict[str, str], ancestor: dict[str, str], page: Page) -> bool:
    by_id = {e["self"]: e for e in page.elements}
    current: dict[str, str] | None = element
    while current is not None and current is not ancestor:
        current = by_id.get(current["parent"])
    return current is ancestor


def test_scores_category_resolution_sources_and_contradictions_are_said(assessment: Assessment, page: Page) -> None:
    for finding in assessment.findings:
        assert f"PI-RADS {finding.pirads}" in page.text and finding.sector in page.text
        for sentence in finding.contradictions:
            assert sentence in page.text
    for phrase in (
        "patch of 8.0 mm",
        "does not replace the radiologist",
        "Synthetic images.",
        "A warning of the run.",
        "changed by the reader; before: DCE not available",
        "measured: 12.4 mm",
        "given as the ADC file",
        "Not asked on this path",
        "DWI decides; at DWI 3, DCE does (positive)",
        "DRAWN-1",
    ):
        assert phrase in page.text + page.find("header")[0]["text"], phrase


@pytest.mark.parametrize(("lead", "tied"), [(0.01, True), (0.3, False)])
def test_an_answer_that_hardly_leads_is_called_nearly_a_tie(assessment: Assessment, lead: float, tied: bool) -> None:
    finding = assessment.findings[0]
    step = next(s for s in finding.rationale if s.similarity is not None and s.runners_up)
    rivals = tuple(replace(r, similarity=step.similarity - lead) for r in step.runners_up)
    shown = replace(finding, rationale=(replace(step, runners_up=rivals),))
    html = build_report(replace(assessment, findings=(shown,)))
    assert f"{lead:.2f} ahead of the next" in html and ("nearly a tie" in html) == tied


def test_a_patient_gets_no_synthetic_banner(assessment: Assessment) -> None:
    study = replace(assessment.study, patient={"id": "A", "study_date": "2020-01-02"})
    html = build_report(replace(assessment, study=study))
    assert "Synthetic images" not in html and "Study date" in html


def test_the_header_has_dates_as_people_read_them_and_leaves_identifiers_to_the_table_below(
    assessment: Assessment,
) -> None:
    patient = {"study_date": "20110707", "field_strength_t": 3.0, "study_uid": "1.2.3.4"}
    page = Page(build_report(replace(assessment, study=replace(assessment.study, patient=patient))))
    header, table = page.find("header")[0]["text"], page.find("table", "manifest")[0]["text"]
    assert "2011-07-07" in header and "Field strength (T)" in header and "1.2.3.4" not in header
    assert "1.2.3.4" in table


def test_texts_from_files_are_escaped(assessment: Assessment) -> None:
    evil = "<script>alert('x')</script>" + "long " * 200
    finding = replace(assessment.findings[0], sector=evil, contradictions=(evil,))
    study = replace(assessment.study, patient={"id": evil}, warnings=(evil,))
    slices = tuple(
        replace(item, answers={"a": replace(item.answers["lesion_presence"], concept="</script><b>")})
        for item in assessment.slices
    )
    html = build_report(replace(assessment, study=study, findings=(finding,), slices=slices, manifest={"model": evil}))
    assert "<script>alert" not in html and "</script><b>" not in html
    assert len(Page(html).find("script")) == 2


def test_a_slice_whose_answer_denies_the_lesion_on_it_says_so(assessment: Assessment) -> None:
    finding = assessment.findings[0]
    index = int((sitk.GetArrayFromImage(assessment.lesions) == finding.label).any((1, 2)).argmax())
    for concept, denied in (("lesion_absent", True), ("lesion_present", False)):
        said = SliceRationale(
            slice_index=index,
            position_mm=(0.0, 0.0, 0.0),
            answers={"lesion_presence": Candidate(concept=concept, similarity=0.5)},
        )
        html = build_report(replace(assessment, findings=(finding,), slices=(said,)))
        assert (f"which contradicts {finding.id} marked here" in html) == denied


@pytest.mark.parametrize(
    ("category", "words"),
    [(2, "No finding of category 3 or more. 1 candidate"), (4, "1 finding of category 3 or more; index")],
)
def test_the_summary_counts_what_is_suspicious(assessment: Assessment, category: int, words: str) -> None:
    finding = replace(assessment.findings[0], pirads=category)
    assert words in build_report(replace(assessment, findings=(finding,)))


def test_no_finding_is_said_properly_and_the_slices_stay(assessment: Assessment) -> None:
    page = Page(build_report(empty(assessment)))
    assert "The model marked no lesion" in page.text and "not proof that there is none" in page.text
    assert not page.find("section", "finding") and len(page.find("image")) == 3 * 10


def test_a_case_without_gland_still_shows_its_images(assessment: Assessment) -> None:
    bare = empty(assessment)
    nothing = bare.lesions
    page = Page(build_report(replace(bare, gland=nothing, pz=nothing, tz=nothing)))
    assert "The model found no prostate in these images" in page.text


def test_a_missing_sequence_is_said_and_the_weakened_answers_are_marked() -> None:
    study = replace(drawn_study(), adc=None)
    page = Page(build_report(assess_by_hand(study, drawn_masks(study.t2w), (PZ_ANSWERS,))))
    assert "missing in this study" in page.text and "no ADC in this study" in page.text
    assert "weakened: rests on ADC, which this study lacks here" in page.text


def test_a_rationale_that_the_tree_cannot_walk_is_still_drawn(assessment: Assessment) -> None:
    first = assessment.findings[0]
    steps = tuple(replace(s, concept="of_another_bank") if s.node == "margin" else s for s in first.rationale)
    page = Page(build_report(replace(assessment, findings=(replace(first, rationale=steps),))))
    assert len(page.find("li", "step")) == len(steps) - 1


def test_a_study_without_voxels_is_refused_with_what_to_do(assessment: Assessment) -> None:
    with pytest.raises(InputError, match="read the study again"):
        build_report(replace(assessment, study=StudyRecord()))


def test_pictures_are_in_radiological_orientation_whatever_the_storage_order(assessment: Assessment) -> None:
    def stored(image: sitk.Image) -> sitk.Image:
        return sitk.DICOMOrient(image, "SAR")

    study = assessment.study
    turned = replace(
        assessment,
        study=replace(study, **{name: stored(getattr(study, name)) for name in ("t2w", "adc", "dwi")}),
        **{name: stored(getattr(assessment, name)) for name in ("gland", "pz", "tz", "lesions")},
        evidence={key: stored(image) for key, image in assessment.evidence.items()},
    )
    one, two = ReportPictures(assessment), ReportPictures(turned)
    finding = assessment.findings[0]
    k = one.key_slice(finding)
    assert two.key_slice(finding) == k
    assert one.grey("t2w", k) == two.grey("t2w", k)
    assert one.outline("lesion-1", k) == two.outline("lesion-1", k)
    assert one.heat(finding.rationale[0].evidence or "") == two.heat(finding.rationale[0].evidence or "")
    x, y = (float(v) for v in re.findall(r"M([\d.]+),([\d.]+)", one.outline("lesion-1", k))[0])
    assert x < one.width_mm / 2 and y > one.height_mm / 2  # right posterior: to the left and below on the picture


def test_outlines_enclose_the_area_of_the_mask(assessment: Assessment) -> None:
    pictures = ReportPictures(assessment)
    k = pictures.key_slice(assessment.findings[0])
    points = np.array([[float(v) for v in p.split(",")] for p in pictures.outline("gland", k)[1:-1].split()])
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    voxels = pictures.masks["gland"][k].sum() * pictures.spacing[0] * pictures.spacing[1]
    assert area == pytest.approx(voxels, rel=0.02)


def test_a_faint_heatmap_is_drawn_on_a_scale_of_its_own(assessment: Assessment) -> None:
    key = assessment.findings[0].rationale[0].evidence or ""
    faint = replace(assessment, evidence=assessment.evidence | {key: assessment.evidence[key] * 0.2})
    one, two = ReportPictures(assessment), ReportPictures(faint)
    assert two.heat_tops[key] == pytest.approx(0.2 * one.heat_tops[key], abs=0.01)
    assert one.heat(key) and two.heat(key).keys() == one.heat(key).keys()
    others = [k for k in assessment.evidence if k != key]
    assert others and all(one.heat_tops[k] == two.heat_tops[k] for k in others)


def test_a_heatmap_picture_is_strongest_where_the_evidence_is(assessment: Assessment) -> None:
    pictures = ReportPictures(assessment)
    finding = assessment.findings[0]
    k = pictures.key_slice(finding)
    uri = pictures.heat(finding.rationale[0].evidence or "")[k]
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGBA"))[..., 3]
    row, column = np.unravel_index(alpha.argmax(), alpha.shape)
    width, height = pictures.heat_size_mm
    mask = pictures.masks[finding.id][k]
    center = np.argwhere(mask).mean(axis=0) * pictures.spacing[1::-1]
    peak = (row + 0.5) * height / alpha.shape[0], (column + 0.5) * width / alpha.shape[1]
    assert np.hypot(*(center - peak)) < 10  # mm


def test_a_heatmap_is_drawn_where_it_is_hottest_in_the_lesion_and_says_how_hot(assessment: Assessment) -> None:
    finding = assessment.findings[0]
    step = next(s for s in finding.rationale if s.evidence)
    reference = assessment.evidence[step.evidence]
    lesion = sitk.GetArrayFromImage(sitk.DICOMOrient(assessment.lesions, "LPS")) == finding.label
    slices = np.flatnonzero(lesion.any(axis=(1, 2)))
    heat = np.zeros(lesion.shape, np.float32)
    heat[slices[0]][lesion[slices[0]]] = 0.25
    heat[:, 0, 0] = 0.75
    image = sitk.DICOMOrient(assessment.gland, "LPS")
    drawn = sitk.GetImageFromArray(heat)
    drawn.CopyInformation(image)
    evidence = assessment.evidence | {step.evidence: sitk.Resample(drawn, reference)}
    page = build_report(replace(assessment, evidence=evidence))
    assert f"slice {slices[0] + 1}; up to 0.25 in the lesion" in page


def test_candidates_that_were_not_marked_are_told(assessment: Assessment) -> None:
    assert "PZ 0.21 ml at (-12, 30, 6) mm LPS (likelihood 0.13)" in build_report(assessment)
    assert "not marked" not in build_report(replace(assessment, not_shown=()))


def test_what_a_reader_changed_is_told_wherever_the_category_is(assessment: Assessment) -> None:
    model = assessment.findings[0]
    tree = DecisionTree.load(assessment.decision_tree)
    finding = override_finding(tree, model, {"dwi_signal": "dwi_normal", "adc_signal": "adc_normal"})
    assert finding.pirads != model.pirads and finding.model_pirads == model.pirads
    page = build_report(replace(assessment, findings=(finding, *assessment.findings[1:])))
    told = f"{finding.pirads} (reader; model {model.pirads})"
    assert page.count(f">{told}</span>") == 1 and page.count(f"PI-RADS {told}<") >= 2
    assert f"by the reader; the model’s: {model.pirads}" in page
    step = page[page.index('data-concept="dwi_normal"') :]
    step = step[: step.index("</ul>")]
    assert "changed by the reader" in step and "ahead of the next" not in step


def test_what_nobody_answered_is_called_not_given_as_in_the_panel(assessment: Assessment) -> None:
    tree = DecisionTree.load()
    finding, step = next((f, s) for f in assessment.findings for s in f.rationale if s.source == "reader")
    default = tree.nodes[step.node].default
    left = replace(step, concept=default, text=tree.bank[default].text, overridden=None)
    rationale = tuple(left if s is step else s for s in finding.rationale)
    html = build_report(replace(assessment, findings=(replace(finding, rationale=rationale),)))
    assert '<span class="source reader">not given</span>' in html and "Nobody has answered" in html


def test_a_dwi_score_that_no_diffusion_shows_is_called_inferred(assessment: Assessment) -> None:
    finding = assessment.findings[0]
    unseen = replace(finding, rationale=tuple(replace(s, weakened_by=("adc", "dwi")) for s in finding.rationale))
    assert not finding.dwi_inferred and unseen.dwi_in_words == f"{finding.dwi_score} (inferred)"
    page = build_report(replace(assessment, findings=(unseen,)))
    assert f"DWI {unseen.dwi_in_words}" in page and "PI-RADS v2.1 gives no DWI score" in page
    assert "(inferred)" not in build_report(assessment)


def test_frame_colours_stand_out_from_white_and_from_each_other() -> None:
    def luminance(color: str) -> float:
        rgb = np.array(list(bytes.fromhex(color[1:]))) / 255
        linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    assert len(set(STEP_COLORS)) == len(STEP_COLORS)
    assert all(1.05 / (luminance(color) + 0.05) >= 4.5 for color in STEP_COLORS)


def test_a_large_study_with_three_findings_stays_below_15_mb() -> None:
    study = drawn_study((320, 300, 24), (0.5, 0.5, 3.0))
    masks = drawn_masks(study.t2w)
    masks["lesions"][masks["lesions"] == 2] = 3
    masks["lesions"][12, 150:160, 150:160] = 2
    three = assess_by_hand(study, masks, (PZ_ANSWERS, PZ_ANSWERS, PZ_ANSWERS))
    assert len(build_report(three).encode()) < 15e6


def test_the_real_examination_makes_a_complete_page(shared_data: Path) -> None:
    html = build_report(prostatex_assessment(shared_data / "prostatex-0000"))
    page = Page(html)
    assert "right peripheral zone posteromedial mid gland" in page.text
    assert len(page.find("image")) > 3 * 19 and len(html) < 5e6
