"""The phantom: an examination like those of an archive, that says what it is, with one lesion that is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from MedRationaleLib import phantom
from MedRationaleLib.cli import main
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.phantom import PhantomPaths, write_phantom
from MedRationaleLib.study import ADC_P99, Study


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> PhantomPaths:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "case", seed=0)


@pytest.fixture(scope="module")
def study(written: PhantomPaths) -> Study:
    return Study.from_case(written.folder)


def array(image: sitk.Image | Path | None) -> np.ndarray:
    assert image is not None
    return sitk.GetArrayFromImage(sitk.ReadImage(str(image)) if isinstance(image, Path) else image)


def truth(paths: PhantomPaths) -> dict:
    return json.loads((paths.truth / "rationale.json").read_text(encoding="utf-8"))


def test_it_is_read_as_a_case_folder_without_a_single_remark(written, study):
    names = {path.name for path in written.folder.iterdir()}
    images = {"phantom_0_t2w.mha", "phantom_0_adc.mha", "phantom_0_hbv.mha"}
    assert names == images | {"truth", "README.txt", "manifest.json"}
    assert study.missing == () and study.warnings == ()
    assert study.provenance["dwi"].b_value == pytest.approx(truth(written)["b_value"], abs=0.5)


def test_it_says_that_it_is_synthetic_also_when_its_files_are_given_one_by_one_or_converted(written, study, tmp_path):
    assert study.patient["synthetic"] is True
    assert Study.from_files(t2w=written.t2w).patient["synthetic"] is True
    sitk.WriteImage(sitk.ReadImage(str(written.t2w)), str(tmp_path / "t2w.nrrd"))
    assert Study.from_case(tmp_path).patient["synthetic"] is True
    assert "NOT A PATIENT" in (written.folder / "README.txt").read_text(encoding="utf-8")


def test_an_ordinary_file_is_not_called_synthetic(written, tmp_path):
    image = sitk.ReadImage(str(written.t2w))
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    sitk.WriteImage(image, str(tmp_path / "t2w.mha"))
    assert "synthetic" not in Study.from_case(tmp_path).patient


def test_diffusion_has_its_own_coarser_and_smaller_grid_and_all_is_oblique(written):
    t2w, adc, dwi = (sitk.ReadImage(str(path)) for path in (written.t2w, written.adc, written.dwi))
    assert adc.GetSize() == dwi.GetSize() and adc.GetOrigin() == dwi.GetOrigin() != t2w.GetOrigin()
    assert all(1.5 <= side <= 2.0 for side in adc.GetSpacing()[:2]) and t2w.GetSpacing()[0] < 1
    sides = [np.multiply(image.GetSize(), image.GetSpacing()) for image in (adc, t2w)]
    assert np.all(sides[0] < sides[1]) and np.all(sides[0] > 0.8 * sides[1])
    normal = np.array(t2w.GetDirection()).reshape(3, 3)[:, 2]
    assert 5 < np.degrees(np.arccos(normal[2])) < 20


def test_adc_values_are_in_the_unit_that_the_study_expects(written):
    values = array(written.adc)
    assert ADC_P99[0] < np.percentile(values[values > 0], 99) < ADC_P99[1]


def test_the_one_clear_lesion_is_where_the_truth_says_and_looks_as_it_says(written, study):
    found = truth(written)
    suspicious = [region for region in found["regions"] if region["pirads"] >= 4]
    assert len(suspicious) == 1 and found["regions"][0] == suspicious[0] and found["synthetic"] is True
    region = suspicious[0]
    lesions, zones = array(written.truth / "lesions.mha"), array(written.truth / "zones.mha")
    lesion, gland = lesions == region["label"], (zones > 0) & (array(written.truth / "regions.mha") == 0)
    index = np.argwhere(lesion)[:, ::-1].mean(axis=0).tolist()
    assert np.allclose(study.t2w.TransformContinuousIndexToPhysicalPoint(index), region["center_mm"], atol=0.01)
    contrast = {
        name: np.median(array(getattr(study, name))[lesion]) / np.median(array(getattr(study, name))[gland])
        for name in ("t2w", "adc", "dwi")
    }
    assert contrast["t2w"] < 0.8 and contrast["adc"] < 0.8 and contrast["dwi"] > 1.4


def test_the_true_rationale_leads_through_the_tree_to_the_stated_scores(written):
    tree = DecisionTree.load()
    for region in truth(written)["regions"]:
        walk = tree.walk_answers({step["node"]: step["concept"] for step in region["rationale"]})
        assert walk.pirads == region["pirads"] and region["is_lesion"] == (region["pirads"] >= 3)
        assert all(step["text"] == tree.bank[step["concept"]].text for step in region["rationale"])


def test_the_same_seed_gives_the_same_voxels_and_another_seed_another_patient(written, tmp_path):
    again, other = write_phantom(tmp_path / "again", seed=0), write_phantom(tmp_path / "other", seed=5)
    assert np.array_equal(array(again.t2w), array(written.t2w)) and np.array_equal(array(again.adc), array(written.adc))
    assert other.t2w.name == "phantom_5_t2w.mha" and not np.array_equal(array(other.t2w), array(written.t2w))


def test_a_phantom_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, written):
    exam = phantom.draw_exam(0)
    monkeypatch.setattr(phantom, "draw_exam", lambda seed: exam)
    monkeypatch.setattr(phantom.sitk, "WriteImage", lambda image, name, useCompression: Path(name).write_bytes(b"half"))
    with pytest.raises(InputError, match="nothing was left there"):
        write_phantom(tmp_path / "case")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_phantom_replaces_it_and_refuses_foreign_files(tmp_path, capsys, monkeypatch):
    exam = phantom.draw_exam(0)
    monkeypatch.setattr(phantom, "draw_exam", lambda seed: exam)
    for seed in (3, 4):
        assert main(["phantom", "--out", str(tmp_path / "p"), "--seed", str(seed)]) == 0
    assert [path.name for path in (tmp_path / "p").glob("*_t2w.mha")] == ["phantom_4_t2w.mha"]
    assert str(tmp_path / "p") in capsys.readouterr().out
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "README.txt").write_text("mine")
    assert main(["phantom", "--out", str(tmp_path / "q")]) == 2
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["README.txt"]
