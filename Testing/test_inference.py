"""The shipped model, from a Study to an Assessment: the phantom anywhere, real examinations where they are at hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.inference import Predictor, Stopwatch, index_first
from MedRationaleLib.phantom import write_phantom
from MedRationaleLib.study import Study

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def predictor():
    return Predictor.load("compact", device="cpu")


@pytest.fixture(scope="module")
def phantom_paths(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="module")
def phantom(phantom_paths):
    return Study.from_case(phantom_paths.folder)


@pytest.fixture(scope="module")
def assessed(predictor, phantom):
    return predictor.assess(phantom)


@pytest.fixture(scope="module")
def prostatex(shared_data):
    folder = shared_data / "prostatex-0000"
    return Study.from_files(**{name: folder / f"{name}.nii.gz" for name in ("t2w", "adc", "dwi")})


@pytest.fixture(scope="module")
def prostatex_assessed(predictor, prostatex):
    return predictor.assess(prostatex)


@pytest.fixture(scope="module")
def eager(predictor):
    """Shows every candidate, so that what is compared on a real case are findings, however unlikely."""
    config = replace(predictor.postprocessing, lesion_likelihood=0.0)
    return Predictor(predictor.checkpoint, predictor.device, config)


@pytest.fixture(scope="module")
def prostatex_candidates(eager, prostatex):
    assessment = eager.assess(prostatex)
    assert len(assessment.findings) > 1
    return assessment


def dice(a, b):
    """Of two masks in physical space, on the first one's grid."""
    b = sitk.Resample(b, a, sitk.Transform(), sitk.sitkNearestNeighbor)
    a, b = (sitk.GetArrayFromImage(i) > 0 for i in (a, b))
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


def images(study):
    """The volumes as they were stored, not as the Study holds them."""
    return {name: sitk.ReadImage(series.path, sitk.sitkFloat32) for name, series in study.provenance.items()}


def flipped(image):
    return sitk.Flip(image, (True, False, True))


def rotated(image):
    return sitk.Flip(sitk.PermuteAxes(image, (1, 0, 2)), (True, False, False))


def reoriented(image):
    return sitk.DICOMOrient(image, "PSR")


def finer(image, factors):
    """Stored on a finer lattice, same field of view."""
    size = [round(n * f) for n, f in zip(image.GetSize(), factors, strict=True)]
    spacing = [s * n / m for s, n, m in zip(image.GetSpacing(), image.GetSize(), size, strict=True)]
    shift = [(a - b) / 2 for a, b in zip(spacing, image.GetSpacing(), strict=True)]
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = np.array(image.GetOrigin()) + direction @ np.array(shift)
    return sitk.Resample(
        image,
        size,
        sitk.Transform(),
        sitk.sitkLinear,
        origin.tolist(),
        spacing,
        image.GetDirection(),
        0.0,
        image.GetPixelID(),
        useNearestNeighborExtrapolator=True,
    )


def resampled(image):
    return finer(image, (1.25, 1.25, 1))


def in_thinner_slices(image):
    return finer(image, (1, 1, 3))


STORAGE = [flipped, rotated, reoriented, resampled]


def name_of(value):
    return getattr(value, "__name__", None)


def assert_same(first, second):
    for name in ("gland", "pz", "tz"):
        assert dice(getattr(first, name), getattr(second, name)) >= 0.98, name
    assert len(first.findings) == len(second.findings)
    for a, b in zip(first.findings, second.findings, strict=True):
        assert (a.zone, a.sector, a.t2w_score, a.dwi_score, a.pirads) == (
            b.zone, b.sector, b.t2w_score, b.dwi_score, b.pirads)  # fmt: skip
        assert math.dist(a.center_mm, b.center_mm) < 2.0
    if first.findings:
        assert dice(first.lesions, second.lesions) >= 0.98


@pytest.mark.parametrize("store", STORAGE, ids=name_of)
def test_a_phantom_stored_in_another_way_gives_the_same_masks_and_findings(predictor, phantom, assessed, store):
    copy = Study.from_images(**{name: store(image) for name, image in images(phantom).items()})
    assert_same(assessed, predictor.assess(copy))


AT_THE_EDGE = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="asked of the model; the real lesion is a finding of 0.05 ml, the least that is one: it is not found on a "
    "finer lattice",
)


@pytest.mark.parametrize(
    "store", [flipped, rotated, reoriented, pytest.param(resampled, marks=AT_THE_EDGE)], ids=name_of
)
def test_a_real_case_stored_in_another_way_gives_the_same(predictor, prostatex, prostatex_assessed, store):
    copy = Study.from_images(**{name: store(image) for name, image in images(prostatex).items()})
    assert_same(prostatex_assessed, predictor.assess(copy))


@pytest.mark.parametrize("store", [flipped, rotated, reoriented], ids=name_of)
def test_a_real_case_turned_in_storage_has_the_same_candidates(eager, prostatex, prostatex_candidates, store):
    copy = Study.from_images(**{name: store(image) for name, image in images(prostatex).items()})
    assert_same(prostatex_candidates, eager.assess(copy))


@pytest.mark.parametrize("store", [flipped, rotated, reoriented, resampled, in_thinner_slices], ids=name_of)
def test_masks_of_a_t2w_as_fine_as_the_crop_depend_on_no_lattice(eager, prostatex, store):
    """One and the same prediction, decided for the T2W as it came and for its copy: no outline moves."""
    copy = Study.from_images(**{name: store(image) for name, image in images(prostatex).items()})
    prediction = eager._predict(prostatex, Stopwatch(), lambda *_: None)
    first, second = (prediction.masks(eager.postprocessing, study) for study in (prostatex, copy))
    for name in ("gland", "pz", "tz", "lesions"):
        assert dice(getattr(first, name), getattr(second, name)) == 1.0, name


def test_the_dicom_folder_gives_the_same_as_the_files(predictor, prostatex, shared_data):
    """Where the network computes in float32. In bfloat16 the last digit of a header's direction may move one of the
    lesion's 67 voxels, and on which processor it does differs."""
    exact = Predictor(predictor.checkpoint, predictor.device, predictor.postprocessing, precision="float32")
    first, second = (exact.assess(s) for s in (prostatex, Study.from_dicom(shared_data / "prostatex-0000" / "dicom")))
    assert_same(first, second)
    for name in ("gland", "pz", "tz", "lesions"):
        assert dice(getattr(first, name), getattr(second, name)) >= 0.999, name


def test_the_dicom_folder_has_the_same_candidates_as_the_files(eager, prostatex_candidates, shared_data):
    assert_same(prostatex_candidates, eager.assess(Study.from_dicom(shared_data / "prostatex-0000" / "dicom")))


def test_the_phantoms_gland_is_found(assessed, phantom_paths):
    assert dice(assessed.gland, sitk.ReadImage(str(phantom_paths.truth / "zones.mha")) > 0) >= 0.85


def test_the_phantoms_lesion_is_found(assessed, phantom_paths):
    lesion = sitk.ReadImage(str(phantom_paths.truth / "lesions.mha")) > 0
    assert any(dice(assessed.lesions == f.label, lesion) >= 0.3 for f in assessed.findings)


def test_scores_are_those_of_the_tree_walked_with_the_rationales_answers(assessed):
    tree = DecisionTree.load(assessed.decision_tree)
    assert assessed.findings
    for finding in assessed.findings:
        scores = tree.scores({step.node: step.concept for step in finding.rationale})
        assert (scores.t2w, scores.dwi, scores.pirads) == (finding.t2w_score, finding.dwi_score, finding.pirads)


def test_every_evidence_key_has_a_heatmap_in_0_to_1_on_the_t2w_grid(assessed):
    keys = {step.evidence for finding in assessed.findings for step in finding.rationale if step.evidence}
    assert keys == set(assessed.evidence)
    for image in assessed.evidence.values():
        values = sitk.GetArrayViewFromImage(image)
        assert image.GetSize() == assessed.study.t2w.GetSize()
        assert values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1 and values.max() > 0


def are_ordered_and_numbered(assessed):
    order = [index_first(f) for f in assessed.findings]
    assert order == sorted(order, reverse=True)
    assert [f.id for f in assessed.findings] == [f"lesion-{f.label}" for f in assessed.findings]
    labels = set(np.unique(sitk.GetArrayViewFromImage(assessed.lesions))) - {0}
    assert labels == set(range(1, len(order) + 1))


def test_findings_are_ordered_by_suspicion_and_numbered(assessed):
    are_ordered_and_numbered(assessed)


def test_findings_of_a_real_case_are_ordered_by_suspicion_and_numbered(prostatex_candidates):
    are_ordered_and_numbered(prostatex_candidates)


def test_the_index_lesion_is_of_the_highest_category_then_extends_then_is_the_largest(assessed):
    first = assessed.findings[0]
    extending = tuple(replace(s, concept="epe_present") if s.concept == "epe_absent" else s for s in first.rationale)
    assert extending != first.rationale
    findings = {
        "small": replace(first, pirads=4, size_mm=5.0),
        "large": replace(first, pirads=4, size_mm=9.0),
        "extends": replace(first, pirads=4, size_mm=5.0, rationale=extending),
        "worst": replace(first, pirads=5, size_mm=3.0),
    }
    order = sorted(findings, key=lambda name: index_first(findings[name]), reverse=True)
    assert order == ["worst", "extends", "large", "small"]


def test_pz_and_tz_share_the_gland(assessed):
    gland, pz, tz = (sitk.GetArrayFromImage(getattr(assessed, n)) for n in ("gland", "pz", "tz"))
    assert np.array_equal(gland, pz + tz)


def test_every_slice_has_a_rationale_of_its_own(assessed):
    assert len(assessed.slices) == assessed.study.t2w.GetSize()[2]
    heights = [s.position_mm[2] for s in assessed.slices]
    assert heights == sorted(heights)
    assert all("lesion_presence" in s.answers for s in assessed.slices)


@pytest.mark.parametrize("missing", [("adc",), ("dwi",), ("adc", "dwi")], ids="+".join)
def test_a_missing_sequence_is_allowed_and_weakens_the_answers_that_rest_on_it(predictor, phantom, missing):
    kept = {name: image for name, image in images(phantom).items() if name not in missing}
    assessment = predictor.assess(Study.from_images(**kept))
    assert assessment.volumes_ml["gland"] > 10
    assert any("missing" in w for w in assessment.warnings)
    for finding in assessment.findings:
        weak = {s for step in finding.rationale for s in step.weakened_by}
        assert weak == set(missing)


def test_a_sequence_without_data_in_a_lesion_weakens_its_answers_as_a_missing_one_does(predictor, phantom):
    stored = images(phantom)
    adc = sitk.DICOMOrient(stored["adc"], "LPS")
    away = [0, 0, 0]
    away[2] = adc.GetSize()[2] - 4  # what is left reaches no lesion
    top = sitk.RegionOfInterest(adc, (*adc.GetSize()[:2], 4), away)
    assessment = predictor.assess(Study.from_images(**(stored | {"adc": top})))
    assert any("check that both are of the same examination" in w for w in assessment.warnings)
    assert assessment.findings
    for finding in assessment.findings:
        assert {s for step in finding.rationale for s in step.weakened_by} == {"adc"}
        step = next(s for s in finding.rationale if s.node == "adc_signal")
        assert "not imaged" in step.text and step.evidence is None


def test_the_manifest_says_what_was_read_and_what_it_was_computed_in(predictor, assessed, phantom):
    manifest = assessed.manifest
    assert manifest["precision"] in ("float32", "bfloat16") and manifest["all_slices"] is False
    assert {n: i["sha256"] for n, i in manifest["inputs"].items()} == {
        n: s.sha256 for n, s in phantom.provenance.items()
    }
    exact = Predictor(predictor.checkpoint, predictor.device, predictor.postprocessing, precision="float32")
    assert exact.settings["precision"] == "float32"


def padded(image, mm):
    """More field of view to the patient's left, so that the crop at the centre shows less of the gland or none."""
    image = sitk.DICOMOrient(image, "LPS")
    return sitk.ConstantPad(image, (0, 0, 0), (round(mm / image.GetSpacing()[0]), 0, 0), 0.0)


@pytest.mark.parametrize("mm", [120, 330], ids=["beside the centre", "outside the first crop"])
def test_a_gland_far_from_the_centre_is_found_by_a_second_pass(predictor, phantom, assessed, mm):
    stored = images(phantom)
    copy = Study.from_images(**(stored | {"t2w": padded(stored["t2w"], mm)}))
    assert dice(assessed.gland, predictor.assess(copy).gland) >= 0.95


def test_progress_goes_through_the_stages_in_order(predictor, phantom):
    seen = []
    predictor.assess(phantom, progress=lambda stage, fraction: seen.append((stage, fraction)))
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["model", "masks", "findings", "evidence"]
    assert all(0 <= fraction <= 1 for _, fraction in seen)


def test_the_whole_image_mean_is_an_option(predictor, phantom, assessed):
    other = predictor.assess(phantom, retrieval="slice")
    assert dice(assessed.gland, other.gland) == 1.0
    first, second = ([s.similarity for s in a.findings[0].rationale] for a in (assessed, other))
    assert first != second and other.manifest["retrieval"] == "slice"


def test_the_manifest_says_what_ran(assessed):
    manifest = assessed.manifest
    assert len(manifest["model"]["sha256"]) == 64 and manifest["device"] == "cpu"
    assert set(manifest["timings_s"]) == {"prepare", "model", "masks", "findings", "evidence"}


def test_an_unknown_device_is_one_sentence():
    from MedRationaleLib.errors import InputError

    with pytest.raises(InputError, match="device"):
        Predictor.load("compact", device="abacus")


REAL = [  # case, mask, Dice that is asked
    ("prostatex-0000", "gland", 0.85),
    ("prostatex-0000", "tz", 0.75),
    ("prostatex-0000", "pz", 0.65),
    ("prostate158-001", "gland", 0.75),
]


@pytest.fixture(scope="module")
def real_dice(predictor, prostatex_assessed, shared_data):
    folder = shared_data / "prostate158-001"
    other = predictor.assess(Study.from_files(t2w=folder / "t2w.nii.gz", dwi=folder / "dwi.nii.gz"))
    result = {}
    for case, assessment in (("prostatex-0000", prostatex_assessed), ("prostate158-001", other)):
        zones = sitk.ReadImage(str(shared_data / case / "zones.nii.gz"))
        truth = {"gland": sitk.ReadImage(str(shared_data / case / "gland.nii.gz")), "pz": zones == 1, "tz": zones == 2}
        result |= {(case, name): dice(getattr(assessment, name), mask) for name, mask in truth.items()}
    return result


@pytest.mark.parametrize(("case", "mask", "asked"), REAL)
def test_real_masks_reach_what_is_asked(real_dice, case, mask, asked):
    """Single cases: a guard against breaking what works, not a result."""
    assert real_dice[case, mask] >= asked


def test_the_real_lesion_is_among_the_findings(prostatex_assessed, shared_data):
    lesion = sitk.ReadImage(str(shared_data / "prostatex-0000" / "lesion.nii.gz")) > 0
    hits = [f for f in prostatex_assessed.findings if dice(prostatex_assessed.lesions == f.label, lesion) > 0.1]
    assert hits and hits[0].zone == "PZ"
    assert len(prostatex_assessed.findings) - len(hits) <= 2


def test_the_evidence_for_the_real_lesion_lies_in_it(prostatex_assessed, shared_data):
    """As `score` measures it, on one case: a guard against breaking what works, not a result."""
    real_cases = pytest.importorskip("MedRationaleTraining.real_cases")
    assert real_cases.score(prostatex_assessed, shared_data / "prostatex-0000").lesion_rma >= 0.25


def copy_of(predictor):
    """With a device of its own, so that a test may change it."""
    return Predictor(predictor.checkpoint, predictor.device, predictor.postprocessing)


def test_where_memory_holds_one_stack_only_they_go_one_after_the_other(
    predictor, phantom, assessed, monkeypatch, caplog
):
    import torch

    small, asked = copy_of(predictor), []
    real = small.network._ask

    def ask(stacks):
        asked.append(len(stacks))
        if len(stacks) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(stacks)

    monkeypatch.setattr(small.network, "_ask", ask)
    assessment = small.assess(phantom)
    assert set(zip(asked[::3], asked[1::3], asked[2::3], strict=True)) == {(2, 1, 1)}
    assert_same(assessed, assessment)
    assert dice(assessed.gland, assessment.gland) > 0.999 and small.device == "cpu"
    assert "the memory of cpu does not suffice for 2 stack(s) at once" in caplog.text


def test_where_the_gpu_has_no_memory_at_all_the_cpu_goes_on_and_says_so(predictor, phantom, assessed, caplog):
    import torch

    gpu = copy_of(predictor)
    gpu.network.device, real, asked = "cuda", gpu.network._ask, []

    def ask(stacks):
        asked.append((gpu.device, len(stacks)))
        if gpu.device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(stacks)

    gpu.network._ask = ask
    assessment = gpu.assess(phantom)
    assert asked[:3] == [("cuda", 2), ("cuda", 1), ("cpu", 2)] and set(asked[3:]) <= {("cpu", 2)}
    assert_same(assessed, assessment)
    assert assessment.manifest["device"] == "cpu"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings[-1] == "the model goes on on the CPU, which takes longer"


def test_memory_that_runs_out_on_the_cpu_too_ends_the_run(predictor, phantom, monkeypatch):
    small = copy_of(predictor)

    def ask(stacks):
        raise MemoryError

    monkeypatch.setattr(small.network, "_ask", ask)
    with pytest.raises(MemoryError):
        small.assess(phantom)


@pytest.fixture(scope="module")
def told(predictor, phantom):
    """Assessed with what a reader tells."""
    study = replace(phantom, patient={**phantom.patient, "psa_ng_ml": 6.0})
    return predictor.assess(study, dce="positive")


def test_what_a_reader_saw_of_contrast_enhancement_answers_wherever_it_is_asked(assessed, told):
    tree = DecisionTree.load(told.decision_tree)
    for finding, before in zip(told.findings, assessed.findings, strict=True):
        for step in (step for step in finding.rationale if step.node == "dce"):
            assert (step.concept, step.source) == ("dce_positive", "reader")
        assert (before.dce, finding.dce) == ("not available", "positive")
        scores = tree.scores({step.node: step.concept for step in finding.rationale})
        assert scores.pirads == finding.pirads >= before.pirads


def test_with_psa_the_record_has_its_density_by_the_ellipsoids_volume(assessed, told):
    record = told.study.patient
    assert record["psa_density_ng_ml2"] == pytest.approx(6.0 / told.volumes_ml["ellipsoid"], abs=0.0005)
    assert record["psa_ng_ml"] == 6.0 and told.volumes_ml == assessed.volumes_ml
    assert "psa_density_ng_ml2" not in assessed.study.patient


def test_a_finding_says_on_how_many_of_its_slices_the_model_denies_it(assessed):
    lesions = sitk.GetArrayFromImage(sitk.DICOMOrient(assessed.lesions, "LPS"))
    said = {item.slice_index: item.answers["lesion_presence"].concept for item in assessed.slices}
    assert assessed.findings
    for finding in assessed.findings:
        here = [index for index in said if (lesions[index] == finding.label).any()]
        denied = sum(said[index] == "lesion_absent" for index in here)
        told = [text for text in finding.contradictions if "asked of each slice by itself" in text]
        assert len(told) == (denied > 0)
        assert all(f"on {len(here)} slices" in text and f"on {denied} of them" in text for text in told)


def test_what_is_below_the_threshold_is_told_and_not_marked(predictor, phantom, assessed):
    strict = replace(predictor.postprocessing, lesion_likelihood=0.99)
    result = Predictor(predictor.checkpoint, predictor.device, strict).assess(phantom)
    assert result.findings == () and not sitk.GetArrayViewFromImage(result.lesions).any()
    first = result.not_shown[0]
    assert first.likelihood == pytest.approx(assessed.findings[0].likelihood, abs=1e-3)
    assert first.zone == assessed.findings[0].zone
    assert np.linalg.norm(np.subtract(first.center_mm, assessed.findings[0].center_mm)) < 2


def test_a_gland_of_impossible_size_is_warned_of(predictor, phantom, monkeypatch):
    from MedRationaleLib import inference

    def sized(ml):
        measure = inference.measure_gland
        monkeypatch.setattr(inference, "measure_gland", lambda mask: replace(measure(mask), volume_ml=ml))
        warned = [w for w in predictor.assess(phantom).warnings if "segmented prostate has" in w]
        monkeypatch.undo()
        return warned

    assert sized(0.2) and not sized(45.0)
