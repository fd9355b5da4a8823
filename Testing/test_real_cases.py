"""Comparing assessments with an expert's masks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import sample_assessments
import SimpleITK as sitk

pytest.importorskip("picai_eval", reason="the train extra is not installed")

from MedRationaleTraining import real_cases  # noqa: E402

from MedRationaleLib.errors import InputError  # noqa: E402


@pytest.fixture
def assessment():
    return sample_assessments.drawn_assessment()


@pytest.fixture
def case(assessment, tmp_path):
    """The expert agrees on the gland, calls all of it TZ, and marks the first lesion and one that nobody found."""
    gland = sitk.GetArrayFromImage(assessment.gland)
    lesion = (sitk.GetArrayFromImage(assessment.lesions) == 1).astype(np.uint8)
    lesion[1:3, 3:6, 3:6] = 1
    for name, array in {"gland": gland, "zones": 2 * gland, "lesion": lesion}.items():
        sitk.WriteImage(sample_assessments.on_grid(array, assessment.gland), str(tmp_path / f"{name}.nii.gz"))
    return tmp_path


class Predictor:
    """Gives the hand-made assessment whatever it is asked."""

    def __init__(self, assessment):
        self.assess = lambda study: assessment


@pytest.fixture
def scored(assessment, case, monkeypatch):
    monkeypatch.setattr(real_cases.Predictor, "load", lambda model: Predictor(assessment))
    monkeypatch.setattr(real_cases.Study, "from_case", lambda folder: assessment.study)
    return real_cases.score_cases("any", [case])


def test_agreement_is_one_and_disagreement_is_less(scored, assessment):
    score = scored[0]
    assert score.gland == 1.0 and score.pz == 0.0
    tz, gland = (sitk.GetArrayFromImage(i).sum() for i in (assessment.tz, assessment.gland))
    assert score.tz == pytest.approx(2 * tz / (tz + gland), abs=1e-4)


def test_a_found_and_a_missed_lesion_are_counted(scored):
    score = scored[0]
    assert (score.lesions, score.lesions_found, score.findings) == (2, 1, 2)
    assert score.best_lesion_dice == 1.0 and len(score.hits) == 1 and score.hits[0].startswith("lesion-1 PZ")


@pytest.mark.parametrize("where", ["on the lesion", "everywhere", "nowhere"])
def test_the_evidence_of_the_finding_is_held_against_the_experts_lesion(scored, assessment, case, where):
    lesion = sitk.GetArrayFromImage(assessment.lesions) == 1
    heat = {"on the lesion": lesion, "everywhere": np.ones_like(lesion), "nowhere": np.zeros_like(lesion)}[where]
    for key in [s.evidence for s in assessment.findings[0].rationale if s.evidence]:
        assessment.evidence[key] = sample_assessments.on_grid(heat.astype(np.float32), assessment.gland)
    score = real_cases.score_cases("any", [case])[0]
    share = np.mean([plane.mean() for plane in lesion if plane.any()])
    expected = {"on the lesion": 1.0, "everywhere": pytest.approx(share, abs=1e-4), "nowhere": None}[where]
    assert score.lesion_rma == expected


def test_the_scores_are_written_shown_and_read_for_the_card_of_the_same_weights(scored, tmp_path, monkeypatch):
    weights = SimpleNamespace(sha256="abc")
    monkeypatch.setattr(real_cases, "load_checkpoint", lambda model: weights)
    real_cases.write_scores("any", scored, tmp_path / "out")
    path = tmp_path / "out" / "real_cases.json"
    assert json.loads(path.read_text(encoding="utf-8"))["cases"][0]["gland"] == 1.0
    assert real_cases.table(scored).row_count == 1
    assert real_cases.read_scores(path, "abc") == scored
    assert "| 1.000 | 0.000 |" in real_cases.markdown_table(scored)
    with pytest.raises(InputError, match="got those of others"):
        real_cases.read_scores(path, "def")
    path.write_text("[]")
    with pytest.raises(InputError, match="cannot be used"):
        real_cases.read_scores(path, "abc")


def test_a_folder_without_masks_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"zones\.nii\.gz"):
        real_cases.score_cases("compact", [tmp_path])
