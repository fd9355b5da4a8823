"""Paths and fixtures that all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))

from panel_fixtures import drawn, module_folder, panel, play, run, volumes  # noqa: F401  found here by pytest
from slicer_fixtures import (  # noqa: F401  found here by pytest
    dialogs,
    needs_gl,
    new_nodes,
    offscreen_views,
    open_panel,
    scene,
    slicer_app,
    slot_errors,
    torch_extension,
    vtk_messages,
    wait_until,
)

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "Training", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real examinations and label maps; the test is skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real examinations are not at hand: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic examinations of procedural phantoms; two of them have a lesion, and one has none."""
    from MedRationaleTraining.data.synthetic import SynthesisConfig, make_set

    folder = tmp_path_factory.mktemp("synthetic") / "tiny"
    make_set(folder, SynthesisConfig(cases=3, seed=6))
    return folder
