"""A run from the panel or a script: progress, cancelling, what goes wrong; the worker is played."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from panel_fixtures import MODULE, Play, alive, select_step, table_texts, tag

from MedRationaleLib.assessment import Assessment
from MedRationaleLib.output import write_results

pytestmark = pytest.mark.usefixtures("module_folder")


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


def test_images_without_a_prostate_are_told_as_not_assessed(
    run: Callable[[], Any], drawn: Assessment, tmp_path: Path
) -> None:
    blind = replace(drawn, findings=(), evidence={}, volumes_ml=dict.fromkeys(drawn.volumes_ml, 0.0))
    write_results(blind, tmp_path / "results")
    assert run().ui.statusLabel.text.startswith("Not assessed, after")
    write_results(replace(drawn, findings=(), evidence={}), tmp_path / "results")
    assert run().ui.statusLabel.text.startswith("No suspicious lesion was found, after")


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


HANGING = pytest.mark.parametrize(
    ("how", "limit", "sentence"),
    [("is silent", "SILENCE_S", "gave no sign of life"), ("waits for nothing", "STUCK_S", "did nothing for")],
)


@HANGING
def test_a_worker_that_hangs_is_ended(
    panel: Any, play: Play, run: Callable[[], Any], new_nodes: Any, monkeypatch: Any, how, limit, sentence
) -> None:
    from MedRationaleSlicer import worker

    monkeypatch.setattr(worker, limit, 1.0)
    play(how)
    run()
    assert sentence in panel.ui.statusLabel.text
    assert new_nodes.names() == []


def test_a_worker_that_computes_without_a_word_is_not_ended(
    panel: Any, play: Play, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from MedRationaleSlicer import worker

    monkeypatch.setattr(worker, "STUCK_S", 1.5)
    play("computes")
    assert run().ui.statusLabel.text.startswith("2 finding(s)")


@HANGING
def test_a_script_does_not_wait_for_a_worker_that_hangs(
    volumes: dict[str, Any], play: Play, open_panel: Any, new_nodes: Any, monkeypatch: Any, how, limit, sentence
) -> None:
    from MedRationaleSlicer import worker

    logic = open_panel(MODULE).logic
    monkeypatch.setattr(worker, limit, 1.0)
    play(how)
    with pytest.raises(RuntimeError, match=sentence):
        logic.process(**volumes)
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


def test_a_panel_that_is_left_and_entered_again_listens_once(panel: Any, run: Callable[[], Any]) -> None:
    run()
    node, tag = panel._parameterNode, panel._guiTag
    for _ in range(3):
        panel.exit()
        panel.enter()
    assert panel._parameterNode is node and panel._guiTag == tag is not None


def test_a_script_run_shows_its_first_finding(volumes: dict[str, Any], panel: Any, run: Callable[[], Any]) -> None:
    run()
    panel.ui.findingsTable.selectRow(1)
    select_step(panel, "t2w_signal")
    panel.logic.process(**volumes)
    assert panel.ui.findingLabel.text.startswith("Lesion 1") and panel._parameterNode.step == ""
    assert panel.results.current.node is panel.logic.results()[-1].node


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
