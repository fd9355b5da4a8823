"""assessment.json and the folder around it: what is written is what is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import SimpleITK as sitk
from sample_assessments import drawn_assessment

from MedRationaleLib.assessment import Assessment
from MedRationaleLib.errors import InputError
from MedRationaleLib.output import OutputPaths, write_results
from MedRationaleLib.resources import resource_path
from MedRationaleLib.serialization import assessment_to_dict, load_assessment, plain, to_json, validate

PROMISED_KEYS = {
    "finding": {"id", "zone", "sector", "size_mm", "volume_ml", "center_mm", "likelihood", "t2w_score", "dwi_score"}
    | {"pirads", "rationale"},
    "step": {"node", "concept", "similarity", "source", "evidence"},
}


@pytest.fixture(scope="module")
def assessment() -> Assessment:
    return drawn_assessment()


@pytest.fixture(scope="module")
def written(assessment: Assessment, tmp_path_factory: pytest.TempPathFactory) -> OutputPaths:
    return write_results(assessment, tmp_path_factory.mktemp("results") / "out")


def test_the_schema_is_itself_valid_and_the_written_file_follows_it(written: OutputPaths) -> None:
    schema = json.loads(resource_path("Schemas/assessment.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(written.assessment.read_text(encoding="utf-8")), schema)


def test_findings_and_steps_have_the_documented_keys(written: OutputPaths) -> None:
    for finding in json.loads(written.assessment.read_text(encoding="utf-8"))["findings"]:
        assert PROMISED_KEYS["finding"] <= finding.keys()
        for step in finding["rationale"]:
            assert PROMISED_KEYS["step"] <= step.keys()


def test_every_path_in_the_file_exists_and_the_manifest_lists_every_file(written: OutputPaths) -> None:
    data = json.loads(written.assessment.read_text(encoding="utf-8"))
    steps = [step for finding in data["findings"] for step in finding["rationale"]]
    paths = {step["evidence"] for step in steps if step["evidence"]}
    assert paths == set(data["evidence"].values()) and len(paths) == len(written.evidence)
    on_disk = {p.relative_to(written.folder).as_posix() for p in written.folder.rglob("*") if p.is_file()}
    assert set(json.loads(written.manifest.read_text(encoding="utf-8"))["files"]) == on_disk >= paths


def test_a_folder_reads_back_as_the_same_assessment(assessment: Assessment, written: OutputPaths) -> None:
    loaded = load_assessment(written.folder)
    same = ("findings", "slices", "volumes_ml", "decision_tree", "warnings", "evidence_resolution_mm")
    for name in same:
        assert getattr(loaded, name) == getattr(assessment, name), name
    assert loaded.manifest["model"] == assessment.manifest["model"]
    assert assessment_to_dict(loaded) == assessment_to_dict(assessment)
    for name in ("gland", "pz", "tz", "lesions"):
        expected, got = getattr(assessment, name), getattr(loaded, name)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(expected))
        np.testing.assert_allclose(got.GetDirection(), expected.GetDirection(), atol=1e-9)
        np.testing.assert_allclose(got.GetOrigin(), expected.GetOrigin(), atol=1e-9)
    for key, heatmap in assessment.evidence.items():
        got = sitk.GetArrayFromImage(loaded.evidence[key])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, sitk.GetArrayFromImage(heatmap), atol=1 / 500)


def test_evidence_files_are_compressed_and_on_the_grid_of_the_t2w(assessment: Assessment, written: OutputPaths) -> None:
    for path in written.evidence:
        image = sitk.ReadImage(str(path))
        assert image.GetSize() == assessment.study.t2w.GetSize()
        assert b"encoding: gzip" in path.read_bytes()[:1000]


def test_a_loaded_folder_with_its_study_can_be_written_again(assessment: Assessment, tmp_path: Path) -> None:
    first = write_results(assessment, tmp_path)
    before = json.loads(first.assessment.read_text(encoding="utf-8"))
    second = write_results(load_assessment(tmp_path, assessment.study), tmp_path)
    assert json.loads(second.assessment.read_text(encoding="utf-8")) == before


def test_a_second_run_with_fewer_findings_leaves_no_evidence_of_the_first(
    assessment: Assessment, tmp_path: Path
) -> None:
    write_results(assessment, tmp_path)
    (tmp_path / "evidence" / "mine.txt").write_text("kept")
    write_results(replace(assessment, findings=(), evidence={}), tmp_path)
    assert [p.name for p in (tmp_path / "evidence").iterdir()] == ["mine.txt"]


def test_a_failed_report_leaves_no_output(
    assessment: Assessment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, image: sitk.Image) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("MedRationaleLib.output.write_nrrd", fail)
    with pytest.raises(InputError, match="is full"):
        write_results(assessment, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_numpy_values_nan_and_paths_become_plain_json() -> None:
    values = {"a": np.float32(0.5), "b": np.int64(3), "c": float("nan"), "d": Path("x") / "y", "e": (np.bool_(True),)}
    assert plain(values) == {"a": 0.5, "b": 3, "c": None, "d": "x/y", "e": [True]}
    assert json.loads(to_json(values)) == plain(values)


def test_a_file_against_the_schema_is_refused_with_the_place(assessment: Assessment) -> None:
    data = assessment_to_dict(assessment)
    data["findings"][1]["zone"] = "AFS"
    with pytest.raises(InputError, match="findings/1/zone"):
        validate(data, "assessment.json")


def test_a_folder_without_results_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="medrationale predict"):
        load_assessment(tmp_path)


def test_a_missing_evidence_file_is_refused_by_name(assessment: Assessment, tmp_path: Path) -> None:
    paths = write_results(assessment, tmp_path)
    paths.evidence[0].unlink()
    with pytest.raises(InputError, match=paths.evidence[0].name):
        load_assessment(tmp_path)
