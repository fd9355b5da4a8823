"""What is installed is what is in the tree."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

import MedRationaleLib

ROOT = Path(__file__).resolve().parents[1]


def test_the_installed_version_is_the_package_version() -> None:
    try:
        version = metadata.version("medrationale")
    except metadata.PackageNotFoundError:
        pytest.skip("MedRationale is not installed here (make install)")
    assert version == MedRationaleLib.__version__


def test_every_folder_with_code_is_a_package_so_that_it_is_installed() -> None:
    code = {
        path.parent
        for top in ("MedRationaleLib", "Training/MedRationaleTraining")
        for path in (ROOT / top).rglob("*.py")
    }
    assert [folder for folder in sorted(code) if not (folder / "__init__.py").is_file()] == []


def test_every_constraint_names_a_dependency_or_timm_that_open_clip_brings() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in pinned if not re.search(rf'^    "{name}[\[>]', project, re.MULTILINE)] == ["timm"]
