"""The panel with the real worker and the shipped model, on the phantom and on a real examination."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "MedRationale" / "MedRationale.py"


def test_the_modules_own_test_passes_here_as_far_as_it_goes(
    open_panel: Callable[[Path], Any], offscreen_views: Any
) -> None:
    open_panel(MODULE)
    test = sys.modules["MedRationale"].MedRationaleTest()
    test.runTest()


def test_the_phantom_is_among_the_sample_data(
    open_panel: Callable[[Path], Any], slicer_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[dict[str, Any]] = []

    class SampleDataLogic:
        @staticmethod
        def registerCustomSampleDataSource(**source: Any) -> None:
            sources.append(source)

    monkeypatch.setitem(sys.modules, "SampleData", types.SimpleNamespace(SampleDataLogic=SampleDataLogic))
    open_panel(MODULE)
    slicer_app.emit("startupCompleted()")
    source = sources[-1]
    assert "synthetic" in source["sampleName"]
    assert Path(source["thumbnailFileName"]).is_file()
    nodes = source["customDownloader"](source)
    assert [node.GetName() for node in nodes] == ["phantom_0_t2w", "phantom_0_adc", "phantom_0_hbv"]


def test_a_real_examination_is_read_from_dicom_assessed_and_saved(
    offscreen_views: Any,
    open_panel: Callable[[Path], Any],
    wait_until: Callable[..., None],
    shared_data: Path,
    tmp_path: Path,
) -> None:
    """prostatex-0000: what the panel shows is what its expert masks and its tags say."""
    import slicer

    panel = open_panel(MODULE)
    panel.loadFolder(str(shared_data / "prostatex-0000" / "dicom"))
    wait_until(lambda: panel.ui.applyButton.text == "Apply", seconds=120)
    assert panel.ui.t2wSelector.currentNode().GetName() == "t2_tse_tra"
    assert panel.ui.adcSelector.currentNode().GetName() == "ep2d_diff_tra_DYNDIST_ADC"
    assert "series 8" in panel.ui.choiceLabel.toolTip
    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    study = shown.GetItemParent(shown.GetItemByDataNode(panel.ui.t2wSelector.currentNode()))
    assert shown.GetItemLevel(study) == "Study" and shown.GetItemUID(shown.GetItemParent(study), "DICOM")
    panel.ui.suggestButton.click()
    assert (
        panel.ui.choiceLabel.text
        == "Chosen: T2W by its DICOM tags, ADC by its DICOM tags, DWI by its DICOM tags. Please check."
    )
    panel.ui.applyButton.click()
    wait_until(lambda: panel.ui.applyButton.text == "Apply", seconds=180)
    results = panel.results.current
    assert results is not None, panel.ui.statusLabel.text
    assert results.data["study"]["patient"]["id"] == "ProstateX-0000"
    gland = results.assessment().gland
    truth = sitk.ReadImage(str(shared_data / "prostatex-0000" / "gland.nii.gz"))
    truth = sitk.Resample(truth, gland, interpolator=sitk.sitkNearestNeighbor)
    found, expert = (sitk.GetArrayFromImage(image) > 0 for image in (gland, truth))
    assert 2 * (found & expert).sum() / (found.sum() + expert.sum()) > 0.8
    assert slicer.util.saveScene(str(tmp_path / "scene.mrb"))
    before = [panel.ui.volumesLabel.text, panel.ui.findingsTable.rowCount]
    slicer.mrmlScene.Clear(0)
    slicer.util.loadScene(str(tmp_path / "scene.mrb"))
    assert [panel.ui.volumesLabel.text, panel.ui.findingsTable.rowCount] == before
