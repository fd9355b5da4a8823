"""What the tests of the panel share: a drawn examination in the scene, a played worker, and how a user clicks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import SimpleITK as sitk

if TYPE_CHECKING:
    from MedRationaleLib.assessment import Assessment

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "MedRationale" / "MedRationale.py"
PLAYED = Path(__file__).with_name("played_worker.py")
Play = Callable[..., None]


@pytest.fixture
def module_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slicer has the module's folder on its path before anything of it is imported."""
    monkeypatch.syspath_prepend(MODULE.parent)


@pytest.fixture(scope="module")
def drawn() -> Assessment:
    """Two findings, a heatmap for every answer that a model gave."""
    from sample_assessments import drawn_assessment

    return drawn_assessment()


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Assessment) -> Play:
    """play("crashes"): from now on PythonSlicer runs played_worker.py, through a launcher as Slicer has it."""
    from MedRationaleLib.output import write_results

    write_results(drawn, tmp_path / "results")
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def how(name: str = "delivers") -> None:
        launcher = folder / "PythonSlicer"
        launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "{PLAYED}" "{name}" "{tmp_path}" "$@"\n', encoding="utf-8")
        launcher.chmod(0o755)

    how()
    return how


@pytest.fixture
def volumes(scene: Any, drawn: Assessment, tmp_path: Path) -> dict[str, Any]:
    """T2W, ADC and DWI of the drawn study, loaded from files."""
    import slicer

    nodes = {}
    for name in ("t2w", "adc", "dwi"):
        sitk.WriteImage(getattr(drawn.study, name), str(tmp_path / f"case_{name}.nrrd"))
        nodes[name] = slicer.util.loadVolume(str(tmp_path / f"case_{name}.nrrd"))
    return nodes


@pytest.fixture
def panel(volumes: dict[str, Any], play: Play, open_panel: Callable[[Path], Any]) -> Any:
    return open_panel(MODULE)


@pytest.fixture
def run(panel: Any, wait_until: Callable[..., None]) -> Callable[[], Any]:
    """Presses Apply, waits for the end, and returns the panel."""

    def press() -> Any:
        panel.ui.applyButton.click()
        wait_until(lambda: panel.ui.applyButton.text == "Apply", seconds=30)
        return panel

    return press


def table_texts(panel: Any) -> list[list[str]]:
    table = panel.ui.findingsTable
    return [[table.item(row, column).text() for column in range(9)] for row in range(table.rowCount)]


def chain_texts(panel: Any) -> list[list[str]]:
    model = panel.ui.rationaleTree.model()
    return [[model.index(row, column).data() for column in range(4)] for row in range(model.rowCount())]


def select_step(panel: Any, node: str) -> None:
    model = panel.ui.rationaleTree.model()
    rows = [row for row in range(model.rowCount()) if model.index(row, 0).data(0x0100) == node]
    panel.ui.rationaleTree.setCurrentIndex(model.index(rows[0], 0))


def answer(panel: Any, concept: str) -> None:
    box = panel.ui.answerComboBox
    box.setCurrentIndex(box.findData(concept))
    box.activated.emit(box.findData(concept))


def tag(segment: Any, name: str) -> str:
    import vtk

    value = vtk.reference("")
    assert segment.GetTag(name, value)
    return str(value)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie whose parent has not asked for it does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def distance_to_slice(node: Any, ras: tuple[float, float, float]) -> float:
    """mm between a point and the plane of a slice view."""
    matrix = node.GetSliceToRAS()
    normal = np.array([matrix.GetElement(row, 2) for row in range(3)])
    origin = np.array([matrix.GetElement(row, 3) for row in range(3)])
    return float(abs((np.array(ras) - origin) @ normal))
