"""The panel, as a user works with it: over the real scene and Qt; the worker is played, its results are drawn."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from sample_assessments import drawn_assessment

from MedRationaleLib.assessment import Assessment
from MedRationaleLib.output import write_results
from MedRationaleLib.serialization import load_assessment

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "MedRationale" / "MedRationale.py"
PLAYED = Path(__file__).with_name("played_worker.py")
Play = Callable[..., None]


@pytest.fixture(autouse=True)
def module_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slicer has the module's folder on its path before anything of it is imported."""
    monkeypatch.syspath_prepend(MODULE.parent)


@pytest.fixture(scope="module")
def drawn() -> Assessment:
    """Two findings, a heatmap for every answer that a model gave."""
    return drawn_assessment()


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Assessment) -> Play:
    """play("crashes"): from now on PythonSlicer runs played_worker.py, through a launcher as Slicer has it."""
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


# ---------------------------------------------------------------- inputs


def test_apply_waits_for_a_t2w_and_says_so(scene: Any, play: Play, open_panel: Callable[[Path], Any]) -> None:
    panel = open_panel(MODULE)
    assert not panel.ui.applyButton.enabled
    assert "T2W" in panel.ui.applyButton.toolTip


def test_the_volumes_are_chosen_by_their_names_and_shown_for_confirmation(panel: Any, volumes: dict[str, Any]) -> None:
    chosen = {name: getattr(panel.ui, f"{name}Selector").currentNode() for name in volumes}
    assert chosen == volumes
    assert panel.ui.choiceLabel.text == "Chosen: T2W by its name, ADC by its name, DWI by its name. Please check."
    assert panel.ui.applyButton.enabled


def test_a_sagittal_t2w_is_not_suggested(scene: Any) -> None:
    import slicer
    from MedRationaleSlicer import inputs

    sagittal = np.array([[0, 0, -3, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float)
    slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), sagittal, "t2_tse")
    slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name="t2_tse_cor")
    assert inputs.suggest()["t2w"] is None
    axial = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name="t2_tse_tra")
    assert inputs.suggest()["t2w"] is axial


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("T2W", "t2w"), ("5: t2_tse_tra", "t2w"), ("10000_1000000_t2w", "t2w"), ("t2star", None), ("dyn_t1_vibe", None),
        ("10000_1000000_hbv", "dwi"), ("ep2d_diff_b1400", "dwi"), ("DWI b=800", "dwi"), ("ep2d_diff_ADC", "adc"),
        ("Apparent Diffusion Coefficient", "adc"), ("b1000", "dwi"), ("knob12345", None),
    ],
)  # fmt: skip
def test_names_tell_the_sequence(scene: Any, name: str, sequence: str | None) -> None:
    import slicer
    from MedRationaleSlicer import inputs

    node = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)
    if sequence != "t2w":
        slicer.util.addVolumeFromArray(np.ones((3, 5, 6), np.int16), name="t2")
    found = inputs.suggest()
    assert found["t2w"] is not None
    assert [s for s in inputs.SEQUENCES if found[s] is node] == ([sequence] if sequence else [])


def test_dicom_tags_come_before_names(scene: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import slicer
    from dicom_samples import write_examination
    from MedRationaleSlicer import inputs

    class Database:
        def fileForInstance(self, uid: str) -> str:
            return files.get(uid, "")

    write_examination(tmp_path, b_values=(800,))
    files = {
        "t2w.1": str(tmp_path / "t2" / "000.dcm"),
        "adc.1": str(tmp_path / "adc" / "000.dcm"),
        "dwi.1": str(tmp_path / "dwi" / "b800-000.dcm"),
    }
    named = slicer.util.addVolumeFromArray(np.ones((9, 5, 6), np.int16), name="t2 by its name only")
    tagged = {}
    for kind, name in (("t2w", "series 4"), ("adc", "t2_misnamed"), ("dwi", "series 6 b50")):
        tagged[kind] = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)
        tagged[kind].SetAttribute("DICOM.instanceUIDs", f"{kind}.1 {kind}.2")
    monkeypatch.setattr(slicer, "dicomDatabase", Database(), raising=False)
    found = inputs.suggest()
    assert {kind: found[kind] for kind in tagged} == tagged
    assert found["t2w"] is not named
    assert "DICOM tags" in found.text
    assert inputs.b_value(tagged["dwi"]) == 800


def test_of_two_examinations_the_complete_one_is_chosen(scene: Any) -> None:
    import slicer
    from MedRationaleSlicer import inputs

    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    nodes = {}
    for study, names in (("complete", ("t2", "adc", "dwi")), ("later", ("t2", "adc"))):
        item = shown.CreateStudyItem(shown.GetSceneItemID(), study)
        for name in names:
            node = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)
            shown.SetItemParent(shown.GetItemByDataNode(node), item)
            nodes[study, name] = node
    found = inputs.suggest()
    assert [found[s] for s in inputs.SEQUENCES] == [nodes["complete", name] for name in ("t2", "adc", "dwi")]


def test_two_patients_known_by_name_only_are_not_mixed(
    scene: Any, play: Play, open_panel: Callable[[Path], Any]
) -> None:
    import slicer

    for name in ("a_t2w", "a_dwi", "b_t2w", "b_adc", "b_dwi"):
        slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)
    panel = open_panel(MODULE)
    assert "a_t2w, b_t2w may each be the T2W" in panel.ui.choiceLabel.text
    assert panel.ui.t2wSelector.currentNode() is None and not panel.ui.applyButton.enabled


# ---------------------------------------------------------------- a run


def test_apply_brings_the_assessment_into_the_scene_under_its_study(
    panel: Any, run: Callable[[], Any], volumes: dict[str, Any], drawn: Assessment
) -> None:
    import slicer

    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    study = shown.CreateStudyItem(shown.GetSceneItemID(), "Study")
    shown.SetItemParent(shown.GetItemByDataNode(volumes["t2w"]), study)
    run()
    results = panel.results.current
    assert panel.ui.statusLabel.text.startswith("2 finding(s), after")
    assert shown.GetItemParent(results.folder_item) == study
    segmentation = results.segmentation.GetSegmentation()
    assert set(segmentation.GetSegmentIDs()) == {"gland", "pz", "tz", "lesion-1", "lesion-2"}
    assert "SCT^52988006^Lesion" in tag(segmentation.GetSegment("lesion-1"), "TerminologyEntry")
    assert segmentation.GetSegment("lesion-1").GetName() == f"Lesion 1 (PI-RADS {drawn.findings[0].pirads})"
    voxels = slicer.util.arrayFromSegmentBinaryLabelmap(results.segmentation, "lesion-1", volumes["t2w"])
    assert (voxels == (sitk.GetArrayViewFromImage(drawn.lesions) == 1)).all()
    assert json.loads(results.node.GetText())["findings"][0]["pirads"] == drawn.findings[0].pirads
    table = results.node.GetNodeReference("MedRationale.table")
    assert [table.GetCellText(row, 1) for row in range(2)] == [str(f.pirads) for f in drawn.findings]
    assert [row[:3] for row in table_texts(panel)] == [[f.id, str(f.pirads), f.zone] for f in drawn.findings]
    assert panel.ui.volumesLabel.text.startswith("Gland 51.9 ml (PZ 17.3, TZ 33.8)")


def test_progress_is_shown_and_apply_becomes_cancel(panel: Any, play: Play, wait_until: Callable[..., None]) -> None:
    play("slow")
    panel.ui.applyButton.click()
    assert panel.ui.applyButton.text == "Cancel" and not panel.ui.progressBar.isHidden()
    wait_until(lambda: panel.ui.statusLabel.text == "running the model …")
    assert 400 < panel.ui.progressBar.value < 600
    assert not panel.ui.suggestButton.enabled
    panel.ui.applyButton.click()
    assert panel.ui.applyButton.text == "Apply" and panel.ui.progressBar.isHidden()


@pytest.mark.parametrize("stage", ["writing", "worker", "bringing"])
def test_cancel_leaves_the_scene_as_it_was_in_every_stage(
    stage: str, panel: Any, play: Play, run: Callable[[], Any], wait_until: Callable[..., None], new_nodes: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    play("slow" if stage == "worker" else "delivers")
    panel.ui.applyButton.click()
    if stage == "worker":
        wait_until(lambda: (tmp_path / "pids").is_file() and (tmp_path / "pids").read_text().count(" ") == 1)
    else:
        wait_until(lambda: stage in panel.ui.statusLabel.text, seconds=20)
    panel.ui.applyButton.click()
    assert panel.ui.statusLabel.text == "Cancelled; nothing was changed."
    assert new_nodes.names() == []
    if stage == "worker":  # the worker and its own child
        for pid in map(int, (tmp_path / "pids").read_text().split()):
            wait_until(lambda pid=pid: not alive(pid))
    play()
    assert run().ui.statusLabel.text.startswith("2 finding(s)"), "the panel is usable at once"


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            "dies at once",
            "The analysis ended unexpectedly (exit code 1, last words: ImportError: no module named torch)",
        ),
        ("crashes", "last words: Fatal Python error: Segmentation fault"),
        ("is killed", "as a rule because memory ran out"),
        ("prints garbage", "The analysis ended unexpectedly (exit code 0, last words: some words)"),
        ("fails", "T2W: expected an axial series, got a sagittal one; give the axial T2W."),
        ("says done without results", "assessment.json, which is missing"),
    ],
)
def test_a_worker_that_fails_is_told_in_one_sentence_and_leaves_nothing(
    how: str, sentence: str, panel: Any, play: Play, run: Callable[[], Any], new_nodes: Any, dialogs: Any
) -> None:
    play(how)
    dialogs.answer(sentence[-30:], "Ok")
    run()
    told = panel.ui.statusLabel.text
    assert sentence in told and "\n" not in told and len(dialogs.shown) == 1
    assert new_nodes.names() == []
    assert panel.results.current is None and panel.ui.applyButton.enabled
    play()
    assert run().ui.statusLabel.text.startswith("2 finding(s)")


def test_a_silent_worker_is_ended(
    panel: Any, play: Play, run: Callable[[], Any], new_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from MedRationaleSlicer import worker

    monkeypatch.setattr(worker, "SILENCE_S", 1.0)
    play("is silent")
    run()
    assert "gave no sign of life" in panel.ui.statusLabel.text
    assert new_nodes.names() == []


def test_closing_the_scene_ends_the_run(
    panel: Any, play: Play, wait_until: Callable[..., None], tmp_path: Path
) -> None:
    import slicer

    play("slow")
    panel.ui.applyButton.click()
    wait_until(lambda: (tmp_path / "pids").is_file() and (tmp_path / "pids").read_text().count(" ") == 1)
    slicer.mrmlScene.Clear(0)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        wait_until(lambda pid=pid: not alive(pid))
    assert panel.ui.applyButton.text == "Apply" and not panel.ui.applyButton.enabled


def test_a_t2w_deleted_during_the_run_ends_in_results_without_it(
    panel: Any, play: Play, wait_until: Callable[..., None], volumes: dict[str, Any]
) -> None:
    import slicer

    panel.ui.applyButton.click()
    wait_until(lambda: "the memory of cuda" in panel.ui.statusLabel.text or "bringing" in panel.ui.statusLabel.text)
    slicer.mrmlScene.RemoveNode(volumes["t2w"])
    wait_until(lambda: panel.ui.applyButton.text == "Apply", seconds=20)
    results = panel.results.current
    assert results.input("t2w") is None and len(table_texts(panel)) == 2
    panel.ui.rationaleTree.setCurrentIndex(panel.ui.rationaleTree.model().index(2, 0))
    with pytest.raises(RuntimeError, match="one was deleted"):
        results.assessment()


def test_a_t2w_deleted_before_it_was_written_is_told(
    panel: Any, play: Play, wait_until: Callable[..., None], volumes: dict[str, Any]
) -> None:
    import slicer

    panel.ui.applyButton.click()
    slicer.mrmlScene.RemoveNode(volumes["t2w"])
    wait_until(lambda: panel.ui.applyButton.text == "Apply", seconds=20)
    assert "T2W: expected a volume with voxels, got none" in panel.ui.statusLabel.text


def test_the_window_lives_during_a_run(panel: Any, wait_until: Callable[..., None]) -> None:
    """A Qt timer's longest pause, on a small study; `make bench-scene` measures a full-size one."""
    from slicer_harness.heartbeat import Heartbeat

    with Heartbeat() as heartbeat:
        panel.ui.applyButton.click()
        wait_until(lambda: panel.ui.applyButton.text == "Apply", seconds=30)
    assert heartbeat.longest_s < 0.5


# ---------------------------------------------------------------- findings, reasons, evidence


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
    assert [row[1] for row in texts] == [s.text for s in steps]
    assert [row[3] for row in texts[:3]] == ["model", f"measured: {steps[1].measurement}", "model"]
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


# ---------------------------------------------------------------- the reader decides


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
    assert table_texts(panel)[0][1] == str(finding.pirads)
    assert results.node.GetNodeReference("MedRationale.table").GetCellText(0, 1) == str(finding.pirads)
    segment = results.segmentation.GetSegmentation().GetSegment("lesion-1")
    assert segment.GetName().endswith(f"(PI-RADS {finding.pirads})")
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


# ---------------------------------------------------------------- scenes, files, scripts


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


def test_results_can_be_removed_without_trace(panel: Any, volumes: Any, new_nodes: Any, run: Callable[[], Any]) -> None:
    run()
    select_step(panel, "adc_signal")
    results = panel.results.current
    results.remove()
    left = [name for name in new_nodes.names() if "ColorTable" not in name and "ScriptedModule" not in name]
    assert left == []
    assert table_texts(panel) == []


def test_the_console_needs_three_lines_and_no_window(volumes: dict[str, Any], play: Play, open_panel: Any) -> None:
    import slicer

    open_panel(MODULE)
    logic = slicer.util.getModuleLogic("MedRationale")
    told: list[tuple[str, float]] = []
    assessment = logic.process(
        volumes["t2w"], volumes["adc"], volumes["dwi"], progress=lambda text, part: told.append((text, part))
    )
    assert [f.pirads for f in assessment.findings] == [f.pirads for f in logic.results()[0].findings]
    assert slicer.app.layoutManager() is None
    fractions = [part for _, part in told if part >= 0]
    assert fractions == sorted(fractions) and fractions[-1] > 0.4


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


def test_nothing_is_installed_for_a_script_that_did_not_ask(
    volumes: dict[str, Any], play: Play, open_panel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from MedRationaleSlicer import installation

    logic = open_panel(MODULE).logic
    asked = []
    monkeypatch.setattr(installation, "missing", lambda torch=True: ["torch>=2.5"] if torch else [])
    monkeypatch.setattr(installation, "_pytorch_extension", lambda: asked.append("torch"))
    with pytest.raises(RuntimeError, match="torch>=2.5, which are not installed; .* install=True"):
        logic.process(volumes["t2w"])
    assert asked == []


@pytest.mark.parametrize("what", ["a label map", "no voxels", "text"])
def test_what_is_no_image_is_refused_with_a_sentence(what: str, scene: Any, play: Play, open_panel: Any) -> None:
    import slicer

    logic = open_panel(MODULE).logic
    node: Any = "t2w"
    if what == "a label map":
        kind = "vtkMRMLLabelMapVolumeNode"
        node = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name="labels", nodeClassName=kind)
    elif what == "no voxels":
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty")
    with pytest.raises(RuntimeError, match="T2W: expected"):
        logic.process(node)


def test_a_script_gets_an_exception_with_one_sentence(
    volumes: dict[str, Any], play: Play, open_panel: Any, new_nodes: Any
) -> None:
    logic = open_panel(MODULE).logic
    new_nodes.forget()
    play("fails")
    with pytest.raises(RuntimeError, match="expected an axial series"):
        logic.process(volumes["t2w"])
    with pytest.raises(RuntimeError, match="choose the axial T2W"):
        logic.process(None, volumes["adc"])
    assert new_nodes.names() == []


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


def test_a_sequence_under_another_transform_is_written_in_the_t2ws_space(volumes: dict[str, Any]) -> None:
    import slicer
    import vtk
    from MedRationaleSlicer.nodes import volume_image

    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    matrix = vtk.vtkMatrix4x4()
    matrix.SetElement(0, 3, 7.0)
    transform.SetMatrixTransformToParent(matrix)
    before = volume_image(volumes["adc"]).GetOrigin()
    volumes["adc"].SetAndObserveTransformNodeID(transform.GetID())
    after = volume_image(volumes["adc"], volumes["t2w"]).GetOrigin()
    assert np.subtract(after, before) == pytest.approx([-7.0, 0.0, 0.0])  # LPS


def test_choices_reach_the_worker(panel: Any, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from MedRationaleLib import worker

    jobs = []
    write = worker.Job.write
    monkeypatch.setattr(worker.Job, "write", lambda job, path: (jobs.append(job), write(job, path)))
    panel.ui.psaSpinBox.setValue(6.5)
    panel.ui.bValueSpinBox.setValue(1400)
    panel.ui.dceComboBox.setCurrentText("positive")
    panel.ui.deviceComboBox.setCurrentText("cpu")
    run()
    (job,) = jobs
    assert (job.psa_ng_ml, job.dce, job.device, job.model) == (6.5, "positive", "cpu", "compact")
    assert job.inputs["t2w"].name == "case_t2w" and job.inputs["dwi"].b_value == 1400
    assert "The last run on this device took" in panel.ui.estimateLabel.text


@pytest.fixture
def our_modules() -> Iterator[None]:
    """After the test the packages are those that the other tests hold."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in ("MedRationaleSlicer", "MedRationaleLib")]

    before = {name: sys.modules[name] for name in ours()}
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


def test_the_panel_works_after_a_reload(our_modules: None, panel: Any, wait_until: Callable[..., None]) -> None:
    import slicer

    before = sys.modules["MedRationaleSlicer.results"]
    panel.onReload()
    after = slicer.modules.MedRationaleWidget
    assert after is not panel and sys.modules["MedRationaleSlicer.results"] is not before
    after.ui.applyButton.click()
    wait_until(lambda: after.ui.applyButton.text == "Apply", seconds=30)
    assert type(after.results.current) is sys.modules["MedRationaleSlicer.results"].Results
    assert len(table_texts(after)) == 2


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
