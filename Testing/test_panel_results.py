"""What the panel shows of an assessment, and what its reader does with it; the results are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from panel_fixtures import answer, chain_texts, distance_to_slice, select_step, table_texts

from MedRationaleLib.assessment import Assessment
from MedRationaleLib.serialization import load_assessment

pytestmark = pytest.mark.usefixtures("module_folder")


def test_selecting_a_lesion_jumps_to_it_and_outlines_it(
    panel: Any, run: Callable[[], Any], offscreen_views: Any, drawn: Assessment
) -> None:
    run()
    panel.ui.findingsTable.selectRow(1)
    x, y, z = drawn.findings[1].center_mm
    node = offscreen_views.sliceWidget("Red").mrmlSliceNode()
    assert distance_to_slice(node, (-x, -y, z)) < 2
    display = panel.results.current.segmentation.GetDisplayNode()
    assert display.GetSegmentOpacity2DOutline("lesion-2") > display.GetSegmentOpacity2DOutline("lesion-1")
    assert "Lesion 2: PI-RADS" in panel.ui.findingLabel.text
    assert panel.ui.contradictionsLabel.text == f"⚠ {drawn.findings[1].contradictions[0]}"


def test_a_step_shows_its_heatmap_over_its_sequence_at_its_hottest_slice(
    panel: Any, run: Callable[[], Any], offscreen_views: Any, volumes: dict[str, Any], drawn: Assessment
) -> None:
    import slicer

    run()
    panel.ui.findingsTable.selectRow(0)
    for node, sequence in (("adc_signal", "adc"), ("dwi_signal", "dwi"), ("t2w_signal", "t2w")):
        select_step(panel, node)
        step = next(s for s in drawn.findings[0].rationale if s.node == node)
        composite = offscreen_views.sliceWidget("Red").mrmlSliceCompositeNode()
        heatmap = slicer.mrmlScene.GetNodeByID(composite.GetForegroundVolumeID())
        assert heatmap.GetName() == f"Evidence: {step.text}"
        assert composite.GetBackgroundVolumeID() == volumes[sequence].GetID()
        heat = sitk.GetArrayViewFromImage(drawn.evidence[step.evidence])
        assert np.abs(slicer.util.arrayFromVolume(heatmap) - heat).max() < 1 / 255
        inside = np.where(sitk.GetArrayViewFromImage(drawn.lesions) == 1, heat, 0)
        k, j, i = (int(v) for v in np.unravel_index(inside.argmax(), inside.shape))
        x, y, z = drawn.study.t2w.TransformIndexToPhysicalPoint((i, j, k))
        assert distance_to_slice(offscreen_views.sliceWidget("Red").mrmlSliceNode(), (-x, -y, z)) < 2


def test_opacity_threshold_and_the_switch_work_on_the_heatmap(
    panel: Any, run: Callable[[], Any], offscreen_views: Any, drawn: Assessment
) -> None:
    import slicer

    run()
    panel.ui.findingsTable.selectRow(0)
    select_step(panel, "adc_signal")
    composite = offscreen_views.sliceWidget("Red").mrmlSliceCompositeNode()
    heatmap = slicer.mrmlScene.GetNodeByID(composite.GetForegroundVolumeID())
    panel.ui.opacitySlider.setValue(0.25)
    assert composite.GetForegroundOpacity() == pytest.approx(0.25)
    panel.ui.thresholdSlider.setValue(0.5)
    inside = sitk.GetArrayViewFromImage(drawn.lesions) == 1
    top = float(slicer.util.arrayFromVolume(heatmap)[inside].max())
    assert heatmap.GetDisplayNode().GetLowerThreshold() == pytest.approx(0.5 * top, abs=0.01)
    assert heatmap.GetDisplayNode().GetWindowLevelMax() == pytest.approx(top, abs=0.01)
    assert panel.ui.heatmapCheckBox.text.startswith(f"up to {top:.2f} in the lesion")
    panel.ui.heatmapCheckBox.setChecked(False)
    assert not composite.GetForegroundVolumeID()


def test_a_measured_step_takes_the_heatmap_away(panel: Any, run: Callable[[], Any], offscreen_views: Any) -> None:
    run()
    select_step(panel, "adc_signal")
    select_step(panel, "size")
    assert not offscreen_views.sliceWidget("Red").mrmlSliceCompositeNode().GetForegroundVolumeID()


def test_the_chain_says_answers_similarities_and_sources(panel: Any, run: Callable[[], Any], drawn: Assessment) -> None:
    run()
    panel.ui.findingsTable.selectRow(0)
    texts = chain_texts(panel)
    steps = [s for s in drawn.findings[0].rationale if s.node != "pirads"]
    assert steps[1].measurement
    assert [row[1] for row in texts] == [f"{s.text} ({s.measurement})" if s.measurement else s.text for s in steps]
    assert [row[3] for row in texts[:3]] == ["model", "measured", "model"]
    assert texts[0][0] == "1. Lesion presence" and texts[2][2] == f"{steps[2].similarity:.2f}".replace("-", "−")
    model = panel.ui.rationaleTree.model()
    runner_up = steps[2].runners_up[0]
    assert model.index(0, 2, model.index(2, 0)).data() == f"{runner_up.similarity:.2f}".replace("-", "−")


def test_the_picture_shows_heat_over_the_lesion(
    panel: Any, run: Callable[[], Any], offscreen_views: Any, needs_gl: None, drawn: Assessment
) -> None:
    run()
    select_step(panel, "adc_signal")
    x, y, z = drawn.findings[0].center_mm
    view = offscreen_views.sliceWidget("Red")
    red, _, blue = (int(v) for v in view.picture()[view.pixel_of((-x, -y, z))])
    assert red > blue + 40
    panel.ui.heatmapCheckBox.setChecked(False)
    red, _, blue = (int(v) for v in view.picture()[view.pixel_of((-x, -y, z))])
    assert abs(red - blue) < 12


def test_an_answer_of_the_reader_changes_the_category_everywhere_and_is_undone(
    panel: Any, run: Callable[[], Any], drawn: Assessment
) -> None:
    run()
    panel.ui.findingsTable.selectRow(0)
    before, chain = table_texts(panel), chain_texts(panel)
    select_step(panel, "adc_signal")
    answer(panel, "adc_normal")
    select_step(panel, "dwi_signal")
    answer(panel, "dwi_normal")
    results = panel.results.current
    finding = results.findings[0]
    assert finding.pirads < drawn.findings[0].pirads
    category = f"{finding.pirads} (reader; model {drawn.findings[0].pirads})"
    assert table_texts(panel)[0][1] == category and table_texts(panel)[1] == before[1]
    assert results.node.GetNodeReference("MedRationale.table").GetCellText(0, 1) == category
    segment = results.segmentation.GetSegmentation().GetSegment("lesion-1")
    assert segment.GetName() == f"Lesion 1 (PI-RADS {category})"
    assert f"PI-RADS {category} (T2W" in panel.ui.findingLabel.text
    marked = next(row for row in chain_texts(panel) if "ADC signal" in row[0])
    assert marked[3] == "reader"
    model = panel.ui.rationaleTree.model()
    assert "The model said: markedly hypointense on ADC." in model.index(2, 0).data(3)  # Qt::ToolTipRole
    panel.ui.undoButton.click()
    panel.ui.undoButton.click()
    assert (table_texts(panel), chain_texts(panel)) == (before, chain)
    assert not panel.ui.undoButton.enabled


def test_the_reader_can_answer_what_no_image_shows(panel: Any, run: Callable[[], Any]) -> None:
    run()
    panel.ui.findingsTable.selectRow(0)
    select_step(panel, "dce")
    before = panel.results.current.findings[0]
    answer(panel, "dce_negative")
    after = panel.results.current.findings[0]
    assert (before.dce, after.dce) == ("positive", "negative")


def test_an_answer_that_leads_to_another_question_asks_it(
    panel: Any, run: Callable[[], Any], dialogs: Any, slot_errors: Any
) -> None:
    import qt

    run()
    panel.ui.findingsTable.selectRow(0)
    results = panel.results.current
    without = results.data
    for step in ("adc_signal", "dwi_signal"):
        results.override("lesion-1", step, step.replace("signal", "normal"))
    record = json.loads(results.node.GetNodeReference("MedRationale.record").GetText())
    record |= {"assessment": without | {"findings": results.data["findings"]}, "overrides": []}  # as if the model's own
    results.node.GetNodeReference("MedRationale.record").SetText(json.dumps(record))
    panel.results.refresh(again=True)
    select_step(panel, "adc_signal")
    before = chain_texts(panel)
    assert not any("Diffusion pattern" in row[0] for row in before)

    dialogs.answer("another question", lambda dialog: qt.QDialog.Rejected)
    dialogs.answer("The answer was not changed", "Ok")
    answer(panel, "adc_marked_hypointense")
    assert chain_texts(panel) == before
    assert len(slot_errors.take()) == 1

    def linear(dialog: Any) -> int:
        box = dialog.findChildren(qt.QComboBox)[0]
        box.setCurrentIndex(box.findData("diffusion_linear_wedge"))
        return qt.QDialog.Accepted

    dialogs.answer("another question", linear)
    answer(panel, "adc_marked_hypointense")
    told = {row[0].split(". ")[1]: row for row in chain_texts(panel)}
    assert told["Diffusion pattern"][3] == "reader" and "linear" in told["Diffusion pattern"][1]
    panel.ui.undoButton.click()
    assert chain_texts(panel) == before


def test_a_saved_scene_reopens_with_everything(
    panel: Any, run: Callable[[], Any], offscreen_views: Any, tmp_path: Path, drawn: Assessment
) -> None:
    import slicer

    run()
    panel.ui.findingsTable.selectRow(0)
    select_step(panel, "adc_signal")
    answer(panel, "adc_normal")
    table, chain = table_texts(panel), chain_texts(panel)
    assert slicer.util.saveScene(str(tmp_path / "saved.mrb"))
    slicer.mrmlScene.Clear(0)
    assert table_texts(panel) == []
    slicer.util.loadScene(str(tmp_path / "saved.mrb"))
    assert (table_texts(panel), chain_texts(panel)) == (table, chain)
    select_step(panel, "dwi_signal")  # its heatmap was never shown before
    step = next(s for s in drawn.findings[0].rationale if s.node == "dwi_signal")
    heat = slicer.util.arrayFromVolume(panel.results.current.heatmap(step.evidence))
    assert np.abs(heat - sitk.GetArrayViewFromImage(drawn.evidence[step.evidence])).max() < 1 / 255
    panel.ui.undoButton.click()
    assert panel.results.current.findings == panel.results.current.findings_of_model()


def test_export_writes_what_predict_writes_with_the_readers_answers(
    panel: Any, run: Callable[[], Any], dialogs: Any, tmp_path: Path, drawn: Assessment
) -> None:
    run()
    panel.ui.findingsTable.selectRow(0)
    select_step(panel, "dwi_signal")
    answer(panel, "dwi_normal")
    out = tmp_path / "out"
    dialogs.answer("Folder for the results", str(out))
    panel.ui.exportButton.click()
    assert {p.name for p in out.iterdir()} == {
        "assessment.json", "segmentation.seg.nrrd", "evidence", "report.html", "manifest.json", "scene.mrb",
    }  # fmt: skip
    read = load_assessment(out)
    assert read.findings == panel.results.current.findings
    assert read.manifest["reader_overrides"] == [["lesion-1", "dwi_signal", "dwi_normal"]]
    for name in ("gland", "pz", "tz", "lesions"):
        assert (sitk.GetArrayFromImage(getattr(read, name)) == sitk.GetArrayFromImage(getattr(drawn, name))).all()
    assert "changed by the reader" in (out / "report.html").read_text(encoding="utf-8").lower()


def test_export_over_foreign_files_is_refused_in_one_sentence(
    panel: Any, run: Callable[[], Any], dialogs: Any, slot_errors: Any, tmp_path: Path
) -> None:
    run()
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("mine", encoding="utf-8")
    dialogs.answer("Folder for the results", str(out))
    dialogs.answer("is not from MedRationale", "Ok")
    panel.ui.exportButton.click()
    assert (out / "report.html").read_text(encoding="utf-8") == "mine"
    assert [p.name for p in out.iterdir()] == ["report.html"]
    assert len(slot_errors.take()) == 1  # Slicer's way: shown, and raised on to the console


def test_a_failed_export_leaves_no_word_of_an_earlier_one(
    panel: Any, run: Callable[[], Any], dialogs: Any, slot_errors: Any, tmp_path: Path
) -> None:
    run()
    dialogs.answer("Folder for the results", str(tmp_path / "good"))
    panel.ui.exportButton.click()
    assert "Exported" in panel.ui.statusLabel.text
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    dialogs.answer("Folder for the results", str(tmp_path / "file"))
    dialogs.answer("The export failed", "Ok")
    panel.ui.exportButton.click()
    assert panel.ui.statusLabel.text == "The export failed."
    assert len(slot_errors.take()) == 1


def test_an_export_leaves_the_scene_where_the_user_has_it(panel: Any, run: Callable[[], Any], tmp_path: Path) -> None:
    import slicer

    run()
    slicer.mrmlScene.SetURL(str(tmp_path / "mine.mrml"))
    slicer.mrmlScene.SetRootDirectory(str(tmp_path))
    panel.logic.export(panel.results.current, str(tmp_path / "out"))
    assert (tmp_path / "out" / "scene.mrb").is_file()
    assert (slicer.mrmlScene.GetURL(), slicer.mrmlScene.GetRootDirectory()) == (
        str(tmp_path / "mine.mrml"),
        str(tmp_path),
    )


def test_an_edited_outline_is_exported_with_a_warning_and_a_deleted_one_not_at_all(
    panel: Any, run: Callable[[], Any], volumes: dict[str, Any], tmp_path: Path
) -> None:
    import slicer

    run()
    results = panel.results.current
    assert not any("edited" in warning for warning in results.assessment().warnings)
    mask = results._mask("lesion-1").copy()
    mask[:, :, : int(np.median(np.nonzero(mask)[2]))] = 0
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask, results.segmentation, "lesion-1", volumes["t2w"])
    now_ml = mask.sum() * np.prod(volumes["t2w"].GetSpacing()) / 1000
    report = Path(panel.logic.export(results, str(tmp_path / "out")))
    (warning,) = (w for w in load_assessment(tmp_path / "out").warnings if "edited" in w)
    assert f"lesion 1 was edited after the analysis (0.798 ml then, {now_ml:.3f} ml now)" in warning
    assert "was edited after the analysis" in report.read_text(encoding="utf-8")
    results.segmentation.GetSegmentation().RemoveSegment("lesion-1")
    select_step(panel, "adc_signal")
    with pytest.raises(RuntimeError, match="lesion-1 was deleted; run it again"):
        panel.logic.export(results, str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_results_can_be_removed_without_trace(panel: Any, volumes: Any, new_nodes: Any, run: Callable[[], Any]) -> None:
    run()
    select_step(panel, "adc_signal")
    results = panel.results.current
    results.remove()
    left = [name for name in new_nodes.names() if "ColorTable" not in name and "ScriptedModule" not in name]
    assert left == []
    assert table_texts(panel) == []


def test_the_views_follow_one_oblique_volume_after_another(
    panel: Any, run: Callable[[], Any], offscreen_views: Any, volumes: dict[str, Any]
) -> None:
    import slicer
    import vtk

    node = offscreen_views.sliceWidget("Red").mrmlSliceNode()
    for angle in (0.0, 12.0):
        turn = vtk.vtkTransform()
        turn.RotateX(angle)
        turned = slicer.util.arrayFromVTKMatrix(turn.GetMatrix())
        matrix = vtk.vtkMatrix4x4()
        volumes["t2w"].GetIJKToRASMatrix(matrix)
        to_ras = turned @ slicer.util.arrayFromVTKMatrix(matrix)
        volumes["t2w"].SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(to_ras))
        run()
        normal = np.array([node.GetSliceToRAS().GetElement(row, 2) for row in range(3)])
        assert abs(normal @ to_ras[:3, 2]) / np.linalg.norm(to_ras[:3, 2]) == pytest.approx(1, abs=1e-6)
        assert node.GetOrientation() == "AxialT2W"


def test_a_second_run_shows_its_own_outlines_alone(panel: Any, run: Callable[[], Any]) -> None:
    run()
    first = panel.results.current
    run()
    second = panel.results.current
    assert first.node is not second.node
    shown = [r.segmentation.GetDisplayNode().GetVisibility() for r in (first, second)]
    assert shown == [0, 1]


def test_an_earlier_assessment_can_be_chosen_again(panel: Any, run: Callable[[], Any]) -> None:
    run()
    first = panel.results.current
    for step, concept in (("adc_signal", "adc_normal"), ("dwi_signal", "dwi_normal")):
        select_step(panel, step)
        answer(panel, concept)
    overridden = table_texts(panel)
    run()
    selector = panel.ui.resultsSelector
    assert selector.nodeCount() == 2, "records and other texts are not offered"
    assert selector.currentNode() is panel.results.current.node
    assert table_texts(panel) != overridden
    selector.setCurrentNode(first.node)
    selector.nodeActivated.emit(first.node)
    assert table_texts(panel) == overridden
    assert panel._parameterNode.step == "" and panel._parameterNode.finding == first.data["findings"][0]["id"]
    assert first.segmentation.GetDisplayNode().GetVisibility() == 1
    selector.setCurrentNode(None)
    selector.nodeActivated.emit(None)
    assert table_texts(panel) == [] and not panel.ui.exportButton.enabled
    assert panel.ui.statusLabel.text == "" and panel.ui.heatmapCheckBox.text.startswith("show the evidence")


def test_when_the_shown_assessment_is_deleted_the_latest_other_one_is_shown(
    panel: Any, run: Callable[[], Any], wait_until: Callable[..., None]
) -> None:
    import slicer

    run()
    first = panel.results.current
    run()
    slicer.mrmlScene.RemoveNode(panel.results.current.node)
    wait_until(lambda: panel.results.current is not None and panel.results.current.node is first.node)
    assert len(table_texts(panel)) == 2 and panel.ui.findingLabel.text.startswith("Lesion 1")


def test_an_assessment_whose_text_was_spoilt_is_told_in_one_sentence(panel: Any, run: Callable[[], Any]) -> None:
    run()
    panel.results.current.node.SetText("{")
    panel.results.refresh(again=True)
    assert "cannot be read any more; run it again" in panel.ui.statusLabel.text
    assert table_texts(panel) == []


def test_heat_that_is_highest_elsewhere_is_marked(panel: Any, run: Callable[[], Any], monkeypatch: Any) -> None:
    from MedRationaleSlicer.results import Hottest, Results

    run()
    monkeypatch.setattr(Results, "hottest", lambda *_: Hottest(ras=(0.0, 0.0, 0.0), in_lesion=0.04, anywhere=0.43))
    select_step(panel, "adc_signal")
    assert panel.ui.heatmapCheckBox.text == "⚠ hotter elsewhere: 0.43, and 0.04 in the lesion (brightest colour)"


def test_an_assessment_deleted_by_hand_takes_what_it_hid_with_it(
    panel: Any, run: Callable[[], Any], new_nodes: Any, wait_until: Callable[..., None]
) -> None:
    import slicer

    run()
    select_step(panel, "adc_signal")
    results = panel.results.current
    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    hidden = [n for n in slicer.util.getNodesByClass("vtkMRMLNode") if n.GetAttribute("MedRationale.role") == "record"]
    assert all(shown.GetItemByDataNode(node) == 0 for node in hidden), "the Data module does not list it"
    shown.RemoveItem(results.folder_item)
    wait_until(lambda: not [name for name in new_nodes.names() if "record" in name or "evidence" in name.lower()])
    assert table_texts(panel) == []


def test_results_follow_a_moved_t2w(panel: Any, run: Callable[[], Any], volumes: dict[str, Any]) -> None:
    import slicer
    import vtk

    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    matrix = vtk.vtkMatrix4x4()
    matrix.SetElement(2, 3, 50.0)
    transform.SetMatrixTransformToParent(matrix)
    for node in volumes.values():
        node.SetAndObserveTransformNodeID(transform.GetID())
    run()
    results = panel.results.current
    assert results.segmentation.GetTransformNodeID() == transform.GetID()
    assert results.world((1.0, 2.0, 3.0)) == (1.0, 2.0, 53.0)
    images = results.assessment().study
    assert images.adc is not None and images.t2w.GetOrigin() == pytest.approx(images.adc.GetOrigin())
