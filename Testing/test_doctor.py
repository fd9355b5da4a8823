from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from MedRationaleLib import doctor
from MedRationaleLib.doctor import DoctorReport, PackageStatus, inspect_model, render, report

ROOT = Path(__file__).resolve().parents[1]


def text_of(seen: DoctorReport) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(seen))
    return console.export_text()


@pytest.fixture(scope="module")
def here() -> DoctorReport:
    return report()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"size": 8}))
    save_file({"a": np.zeros((3, 4), np.float16), "b": np.zeros(5, np.float32)}, folder / "model.safetensors")
    return folder


def healthy(model: Path) -> DoctorReport:
    """A report of a machine on which all is well."""
    torch = PackageStatus(name="torch", extra="", purpose="x", expected=">=2.5", version="2.9", fits=True)
    return DoctorReport(
        version="0.1.0",
        python="3.12.1",
        platform="Linux",
        packages=(torch,),
        torchvision="fits this torch",
        devices=(doctor.DeviceStatus(name="cuda:0", detail="NVIDIA H200", memory_gib=139.4, bf16=True),),
        models=(inspect_model(model),),
        resources=(doctor.ResourceStatus(name="Concepts/prostate.yaml", summary="40 concepts", problem=None),),
    )


def test_the_report_tells_what_is_on_this_machine(here: DoctorReport) -> None:
    versions = {package.name: package.version for package in here.packages}
    assert versions["numpy"] == np.__version__
    assert versions["SimpleITK"] == metadata.version("SimpleITK")
    assert [device.name for device in here.devices][-1] == "cpu"
    assert {resource.name: resource.problem for resource in here.resources} == {
        "Concepts/prostate.yaml": None,
        "DecisionTrees/pirads_v2_1.yaml": None,
        "DecisionTrees/paper_appendix_c.yaml": None,
    }


def test_every_dependency_of_the_project_has_its_purpose_in_the_report() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core, train = (re.search(rf"^{key} = \[\n(.*?)^\]", project, re.M | re.S) for key in ("dependencies", "train"))
    assert core is not None
    assert train is not None
    listed = dict.fromkeys(re.findall(r'^    "([\w-]+)', core[1], re.M), "")
    listed |= dict.fromkeys(re.findall(r'^    "([\w-]+)', train[1], re.M), "train")
    assert {name: extra for name, (extra, _) in doctor.PURPOSES.items()} == listed


def test_versions_are_compared_with_the_ranges_of_the_installed_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=99", "PyYAML>=5", "monai>=98; extra == 'train'"])
    seen = {package.name: package for package in doctor._packages()}
    assert (seen["numpy"].expected, seen["numpy"].fits) == (">=99", False)
    assert (seen["PyYAML"].expected, seen["PyYAML"].fits) == (">=5", True)
    assert (seen["monai"].expected, seen["monai"].fits) == (">=98", False)
    assert seen["scipy"].expected == ""


def test_a_healthy_machine_is_ready(model_folder: Path) -> None:
    seen = healthy(model_folder)
    assert seen.ready
    assert (seen.models[0].parameters, seen.models[0].problem) == (17, None)
    text = text_of(seen)
    assert "Ready: predict can run." in text
    assert re.search(r"cuda:0 +│ NVIDIA H200 +│ 139 GiB +│ in hardware", text)


def test_a_missing_optional_package_is_named_and_does_not_keep_predict_from_running(model_folder: Path) -> None:
    monai = PackageStatus(name="monai", extra="train", purpose="losses", expected=">=1.4", version=None, fits=False)
    seen = dataclasses.replace(healthy(model_folder), packages=(monai,))
    assert seen.ready
    assert "Training needs what is missing or too old: monai." in text_of(seen)


def test_a_missing_or_old_package_that_predict_needs_is_a_problem(model_folder: Path) -> None:
    need = {"extra": "", "purpose": "x", "fits": False}
    gone = PackageStatus(name="rich", expected=">=13", version=None, **need)
    old = PackageStatus(name="scipy", expected=">=1.11", version="1.2", **need)
    problems = dataclasses.replace(healthy(model_folder), packages=(gone, old)).problems
    assert [problem.partition(";")[0] for problem in problems] == [
        "Expected rich>=13, but it is not installed",
        "Expected scipy>=1.11, but 1.2 is installed",
    ]


def test_no_torch_and_no_model_are_problems(model_folder: Path) -> None:
    seen = dataclasses.replace(healthy(model_folder), devices=(), models=())
    assert len(seen.problems) == 2
    assert all(problem in text_of(seen) for problem in seen.problems)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_folder_that_lacks_a_file_says_which(model_folder: Path, name: str) -> None:
    (model_folder / name).unlink()
    problem = inspect_model(model_folder).problem
    assert problem is not None
    assert f"expected {name} in {model_folder}, but it is missing" in problem
    assert not healthy(model_folder).ready


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", b"{"), ("config.json", b"[]"), ("model.safetensors", b"x" * 40)]
)
def test_a_corrupted_model_file_is_a_problem(model_folder: Path, name: str, content: bytes) -> None:
    (model_folder / name).write_bytes(content)
    assert "cannot be read" in str(inspect_model(model_folder).problem)


def test_truncated_weights_are_a_problem(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "cannot be read" in str(inspect_model(model_folder).problem)


def test_an_invalid_resource_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("MedRationaleLib.concepts.resource_path", lambda name: tmp_path / name)
    bank = next(doctor._resources())
    assert bank.problem is not None
    assert "prostate.yaml" in bank.problem


def test_a_missing_package_is_reported_and_does_not_stop_the_report(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    for name in ("safetensors", "MedRationaleLib.concepts", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    seen = report()
    assert seen.devices == ()
    assert "cannot be read" in str(inspect_model(model_folder).problem)
    assert "cannot be checked" in str(seen.resources[0].problem)
    assert not seen.ready
