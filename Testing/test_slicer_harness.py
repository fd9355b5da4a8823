"""The stand-in for Slicer's Qt half: what a panel's tests rely on, and that its checks can fail."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from slicer_harness import probes

if TYPE_CHECKING:
    from slicer_fixtures import NewNodes, SlotErrors
    from slicer_harness.application import Application
    from slicer_harness.dialogs import Dialogs
    from slicer_harness.offscreen_views import OffscreenLayoutManager
    from slicer_harness.torch_standin import TorchState
    from slicer_harness.vtk_messages import VtkMessages

TESTING = Path(__file__).resolve().parent
DEMO = TESTING / "slicer_harness" / "demo_module" / "HarnessDemo.py"
SHAPE = (12, 64, 64)  # k, j, i; voxels of 1 mm, and the identity from IJK to RAS
SPOT = (slice(4, 8), slice(20, 40), slice(30, 50))
SPOT_RAS = (40.0, 30.0, 6.0)
ELSEWHERE_RAS = (10.0, 10.0, 6.0)


def add_volume(name: str, inside: float, outside: float) -> Any:
    import slicer

    array = np.full(SHAPE, outside, np.float32)
    array[SPOT] = inside
    return slicer.util.addVolumeFromArray(array, name=name)


def colour_of(view: Any, ras: tuple[float, float, float]) -> np.ndarray:
    return view.picture()[view.pixel_of(ras)].astype(int)


# The way of access


def test_properties_are_read_and_written_as_attributes_and_setters_still_work(scene: Any) -> None:
    import qt

    label = qt.QLabel("first")
    label.text = "second"
    assert label.text == "second"
    label.setText("third")
    label.enabled = False
    assert (label.text, label.enabled, label.isEnabled()) == ("third", False, False)
    label.name = "title"
    assert (label.objectName, label.className()) == ("title", "QLabel")


@pytest.mark.parametrize("make, name", [("qt.QLabel", "txet"), ("ctk.ctkSliderWidget", "valuue")])
def test_a_misspelt_attribute_is_refused(scene: Any, make: str, name: str) -> None:
    module, cls = make.split(".")
    widget = getattr(importlib.import_module(module), cls)()
    with pytest.raises(AttributeError, match=name):
        setattr(widget, name, 1)


def test_a_slot_gets_as_many_of_the_arguments_as_it_takes(scene: Any) -> None:
    import qt

    button = qt.QPushButton()
    button.checkable = True
    got: list[Any] = []

    def with_checked(checked: bool) -> None:
        got.append(checked)

    button.connect("clicked(bool)", with_checked)
    button.connect("clicked(bool)", lambda: got.append("none"))
    button.clicked.connect(lambda checked=False: got.append("modern"))
    button.click()
    assert got == [True, "none", "modern"]
    assert button.disconnect("clicked(bool)", with_checked)
    button.click()
    assert got[3:] == ["none", "modern"]


def test_an_exception_in_a_slot_is_kept_for_the_test(slot_errors: SlotErrors) -> None:
    import qt
    import vtk

    def fail(*arguments: Any) -> None:
        raise KeyError("lost in a slot")

    button = qt.QPushButton()
    button.connect("clicked(bool)", fail)
    button.click()
    observed = vtk.vtkObject()
    observed.AddObserver("ModifiedEvent", fail)
    observed.Modified()
    assert len(slot_errors.errors) == 2
    with pytest.raises(AssertionError, match="lost in a slot"):
        slot_errors.check()
    assert [type(error) for error in slot_errors.take()] == [KeyError, KeyError]
    slot_errors.check()


def test_settings_are_those_of_the_test_and_not_the_users(slicer_app: Application, scene: Any) -> None:
    import qt
    import slicer

    slicer.app.userSettings().setValue("MedRationale/Key", "5")
    assert qt.QSettings().value("MedRationale/Key") == "5"
    assert slicer.util.settingsValue("MedRationale/Key", 0, converter=int) == 5
    assert Path(slicer_app.temporaryPath).parent in Path(qt.QSettings().fileName()).parents


# The widgets


def test_a_node_selector_follows_the_scene(scene: Any) -> None:
    import slicer

    selector = slicer.qMRMLNodeComboBox()
    selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    selector.showChildNodeTypes = False
    assert not selector.enabled
    selector.setMRMLScene(scene)
    chosen: list[str] = []
    selector.connect("currentNodeChanged(vtkMRMLNode*)", lambda node: chosen.append(node.GetName() if node else ""))
    first = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "first")
    scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "a label map is another type")
    second = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "second")
    assert selector.enabled and selector.nodeCount() == 2
    selector.setCurrentNode(second)
    scene.RemoveNode(second)
    assert selector.currentNode() is first
    scene.Clear(0)
    assert selector.currentNode() is None and selector.currentNodeID == ""
    assert chosen == ["first", "second", "first", ""]


def test_a_node_selector_with_none_waits_for_the_user(scene: Any) -> None:
    import slicer

    selector = slicer.qMRMLNodeComboBox()
    selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    selector.noneEnabled = True
    selector.addAttribute("vtkMRMLScalarVolumeNode", "Sequence", "T2W")
    selector.setMRMLScene(scene)
    scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "unmarked")
    marked = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "marked")
    marked.SetAttribute("Sequence", "T2W")
    scene.RemoveNode(scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "comes and goes"))
    assert selector.currentNode() is None
    selector.setCurrentNodeIndex(0)
    assert selector.currentNode() is marked


def test_a_segments_table_follows_segments_and_their_visibility(scene: Any) -> None:
    import slicer

    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.CreateDefaultDisplayNodes()
    table = slicer.qMRMLSegmentsTableView()
    table.setSegmentationNode(node)
    for name in ("gland", "lesion"):
        node.GetSegmentation().AddEmptySegment(name, name)
    assert table.segmentCount == 2
    table.setSelectedSegmentIDs(["lesion"])
    assert table.selectedSegmentIDs() == ["lesion"]
    shown = table.tableWidget().item(1, 0).text()
    node.GetDisplayNode().SetSegmentVisibility("lesion", False)
    assert table.tableWidget().item(1, 0).text() != shown


def test_a_section_folds_with_its_button_and_by_its_property(scene: Any) -> None:
    import ctk
    import qt

    section = ctk.ctkCollapsibleButton("Inputs")
    child = qt.QLabel("inside")
    qt.QVBoxLayout(section).addWidget(child)
    open_height = section.sizeHint.height()
    section.collapsed = True
    assert (section.checked, child.isHidden(), section.text) == (False, True, "Inputs")
    assert section.sizeHint.height() < open_height
    section.click()
    assert (section.collapsed, child.isHidden()) == (False, False)


def test_slider_and_path_send_what_is_set(scene: Any, dialogs: Dialogs) -> None:
    import ctk

    slider, values = ctk.ctkSliderWidget(), []
    slider.connect("valueChanged(double)", values.append)
    slider.maximum, slider.decimals = 1.0, 2
    slider.value = 0.25
    slider.setValue(7)
    assert values == [0.25, 1.0]

    path, paths = ctk.ctkPathLineEdit(), []
    path.label = "Model"
    path.currentPathChanged.connect(paths.append)
    dialogs.answer("Model", "/models/compact")
    path.browse()
    assert (path.currentPath, paths) == ("/models/compact", ["/models/compact"])


def test_a_ui_file_with_an_unknown_property_or_widget_is_refused(scene: Any, tmp_path: Path) -> None:
    import slicer

    text = DEMO.with_name("Resources").joinpath("UI", "HarnessDemo.ui").read_text(encoding="utf-8")
    for right, wrong, words in (
        ('name="singleStep"', 'name="singelStep"', "no property 'singelStep'"),
        ('class="ctkSliderWidget"', 'class="ctkKnob"', "ctkKnob"),
    ):
        assert right in text
        (tmp_path / "wrong.ui").write_text(text.replace(right, wrong), encoding="utf-8")
        with pytest.raises(RuntimeError, match=words):
            slicer.util.loadUI(str(tmp_path / "wrong.ui"))


# The scene, and what is stored


def test_a_scene_comes_back_from_an_mrb_file_as_it_was(scene: Any, tmp_path: Path) -> None:
    import slicer

    volume = add_volume("T2W", 300, 100)
    volume.GetDisplayNode().SetThreshold(150, 400)
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Findings")
    segmentation.CreateDefaultDisplayNodes()
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    assert segmentation.GetSegmentation().AddEmptySegment("lesion", "Lesion 1") == "lesion"
    mask = (slicer.util.arrayFromVolume(volume) == 300).astype(np.uint8)
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask, segmentation, "lesion", volume)
    segmentation.SetNodeReferenceID("MedRationale.t2w", volume.GetID())
    assert slicer.util.saveScene(str(tmp_path / "scene.mrb"))
    scene.Clear(0)
    slicer.util.loadScene(str(tmp_path / "scene.mrb"))
    volume, segmentation = slicer.util.getNode("T2W"), slicer.util.getNode("Findings")
    assert segmentation.GetNodeReference("MedRationale.t2w") is volume
    assert volume.GetDisplayNode().GetLowerThreshold() == 150
    assert np.array_equal(slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, "lesion", volume), mask)


def test_nodes_are_saved_and_loaded_by_the_ending_of_the_file(scene: Any, tmp_path: Path) -> None:
    import slicer

    volume = add_volume("ADC", 700, 1200)
    assert slicer.util.saveNode(volume, str(tmp_path / "adc.nrrd"))
    text = scene.AddNewNodeByClass("vtkMRMLTextNode", "Rationale")
    text.SetText("because")
    assert slicer.util.exportNode(text, str(tmp_path / "why.txt"))
    assert text.GetStorageNode() is None  # as an exported node does not remember the file
    loaded = slicer.util.loadVolume(str(tmp_path / "adc.nrrd"))
    assert np.array_equal(slicer.util.arrayFromVolume(loaded), slicer.util.arrayFromVolume(volume))
    assert slicer.util.loadNodeFromFile(str(tmp_path / "why.txt")).GetText() == "because"
    with pytest.raises(RuntimeError, match="File not found"):
        slicer.util.loadVolume(str(tmp_path / "none.nrrd"))


def test_every_node_that_users_see_has_an_item_in_the_subject_hierarchy(scene: Any, new_nodes: NewNodes) -> None:
    hierarchy = scene.GetSubjectHierarchyNode()
    text = scene.AddNewNodeByClass("vtkMRMLTextNode", "Rationale")
    item = hierarchy.GetItemByDataNode(text)
    assert item and new_nodes.names() == ["vtkMRMLTextNode Rationale"]
    scene.RemoveNode(text)
    assert hierarchy.GetItemByDataNode(text) == 0 and new_nodes.names() == []


def test_an_error_of_vtk_fails_the_check(vtk_messages: VtkMessages) -> None:
    import vtk

    vtk_messages.check()
    reader = vtk.vtkXMLPolyDataReader()
    reader.SetFileName("/nowhere/at/all.vtp")
    reader.Update()
    with pytest.raises(AssertionError, match="/nowhere/at/all.vtp"):
        vtk_messages.check()
    assert vtk_messages.take() and not vtk_messages.errors()
    vtk.vtkOutputWindow.GetInstance().DisplayWarningText("Warning: In x, line 1\nonly this\n")
    vtk_messages.check()
    assert [text.splitlines()[-1] for text in vtk_messages.warnings()] == ["only this"]


# Modules


def test_a_panel_runs_its_logic_and_shows_the_result(
    open_panel: Callable[[Path], Any], new_nodes: NewNodes, offscreen_views: OffscreenLayoutManager
) -> None:
    import slicer

    panel = open_panel(DEMO)
    assert slicer.modules.harnessdemo.widgetRepresentation().self() is panel
    assert not panel.ui.applyButton.enabled
    t2, adc = add_volume("T2W", 200, 300), add_volume("ADC", 500, 1300)
    panel.ui.t2Selector.setCurrentNode(t2)
    panel.ui.adcSelector.setCurrentNode(adc)
    assert panel.ui.applyButton.enabled
    new_nodes.forget()
    panel.ui.applyButton.click()
    assert panel._parameterNode.segmentation.GetName() == "Harness demo"
    assert panel.ui.segmentsTable.segmentCount == 1
    assert panel.model.item(0, 1).text() == "yes, 0.58"
    assert "vtkMRMLScalarVolumeNode Concept: low ADC" in new_nodes.names()
    composite = offscreen_views.sliceWidget("Green").mrmlSliceCompositeNode()
    assert composite.GetBackgroundVolumeID() == t2.GetID()
    picture = panel.parent.grab().toImage()
    assert picture.width() > 100 and picture.height() > 100


def test_a_failure_is_shown_and_the_panel_stays_usable(
    open_panel: Callable[[Path], Any], dialogs: Dialogs, slot_errors: SlotErrors
) -> None:
    panel = open_panel(DEMO)
    panel.ui.t2Selector.setCurrentNode(add_volume("T2W", 200, 300))
    panel.ui.adcSelector.setCurrentNode(add_volume("ADC", 0, 0))
    panel.ui.applyButton.click()
    assert dialogs.texts == ["Failed to compute results.\n\nThe ADC map is empty"]
    assert "Traceback" in dialogs.shown[0].details
    assert [str(error) for error in slot_errors.take()] == ["The ADC map is empty"]
    assert panel.ui.applyButton.enabled


def test_closing_the_scene_empties_the_panel_and_reloading_makes_it_anew(
    open_panel: Callable[[Path], Any], scene: Any
) -> None:
    import slicer

    panel = open_panel(DEMO)
    panel.ui.t2Selector.setCurrentNode(add_volume("T2W", 200, 300))
    scene.Clear(0)
    assert panel.ui.t2Selector.currentNode() is None and panel._parameterNode.t2Volume is None
    panel.onReload()
    again = slicer.modules.HarnessDemoWidget
    assert again is not panel and again is slicer.modules.harnessdemo.widgetRepresentation().self()
    again.ui.thresholdSlider.value = 0.75
    assert again._parameterNode.threshold == 0.75


def test_a_modules_own_test_runs(open_panel: Callable[[Path], Any]) -> None:
    import slicer

    open_panel(DEMO)
    slicer.modules.HarnessDemoInstance.runTest(msec=0)
    assert slicer.util.getNode("Concept: low ADC")


def test_parameters_keep_type_and_value_through_widgets_and_a_saved_scene(
    open_panel: Callable[[Path], Any], scene: Any, tmp_path: Path
) -> None:
    import slicer

    panel = open_panel(DEMO)
    parameters = panel._parameterNode
    side = type(parameters.side)
    assert (parameters.threshold, parameters.showHeatmap, parameters.side.name) == (0.25, True, "LEFT")
    assert (parameters.coil, parameters.psa) == ("surface", None)
    panel.ui.thresholdSlider.value = 0.5
    panel.ui.showHeatmap.checked = False
    panel.ui.sideBox.currentText = "RIGHT"
    panel.ui.coilBox.currentIndex = 1
    parameters.psa = 6.2
    parameters.t2Volume = add_volume("T2W", 200, 300)
    assert panel.ui.t2Selector.currentNode().GetName() == "T2W"
    assert slicer.util.saveScene(str(tmp_path / "scene.mrb"))
    scene.Clear(0)
    slicer.util.loadScene(str(tmp_path / "scene.mrb"))
    parameters = panel.logic.getParameterNode()
    assert (parameters.threshold, parameters.showHeatmap, parameters.side) == (0.5, False, side.RIGHT)
    assert (parameters.coil, parameters.psa, parameters.t2Volume.GetName()) == ("endorectal", 6.2, "T2W")
    assert panel.ui.sideBox.currentText == "RIGHT"


def test_a_value_out_of_range_or_of_another_type_is_refused(open_panel: Callable[[Path], Any]) -> None:
    parameters = open_panel(DEMO)._parameterNode
    with pytest.raises(ValueError, match="WithinRange"):
        parameters.threshold = 1.5
    with pytest.raises(ValueError, match="Choice"):
        parameters.coil = "none"
    with pytest.raises(TypeError, match="must be bool"):
        parameters.showHeatmap = "yes"
    with pytest.raises(ValueError, match="no parameter"):
        parameters.setValue("no_such_threshold", 0.5)
    assert (parameters.threshold, parameters.coil, parameters.showHeatmap) == (0.25, "surface", True)


# Dialogs, processes, installation


def test_dialogs_are_answered_as_the_test_says(dialogs: Dialogs) -> None:
    import qt
    import slicer

    dialogs.answer("delete", "Cancel")
    dialogs.answer("delete", "Ok")
    assert slicer.util.confirmOkCancelDisplay("Delete the result?") is False
    assert slicer.util.confirmOkCancelDisplay("Delete the result?") is True
    dialogs.answer("overwrite", "Yes")
    assert qt.QMessageBox.question(None, "Overwrite", "Overwrite it?") == qt.QMessageBox.Yes
    dialogs.answer("Save report", "/tmp/report.html")
    assert qt.QFileDialog.getSaveFileName(None, "Save report", "", "HTML (*.html)") == "/tmp/report.html"
    slicer.util.warningDisplay("Only a warning", detailedText="with details")
    assert dialogs.shown[-1].says("WITH DETAILS") and dialogs.shown[-1].buttons == ("Ok",)
    slicer.util.delayDisplay("Passing by", autoCloseMsec=400)
    assert dialogs.texts[-1] == "Passing by"


def test_a_dialog_of_ones_own_is_worked_by_a_function(dialogs: Dialogs) -> None:
    import qt

    dialog = qt.QDialog()
    dialog.windowTitle = "Correct the answer"
    layout = qt.QVBoxLayout(dialog)
    box = qt.QComboBox()
    box.addItems(["no", "yes"])
    layout.addWidget(box)

    def choose_yes(shown: Any) -> None:
        box.currentIndex = 1
        shown.accept()

    dialogs.answer("correct", choose_yes)
    assert dialog.exec_() == qt.QDialog.Accepted and box.currentText == "yes"

    menu = qt.QMenu()
    chosen: list[str] = []
    menu.addAction("Jump").triggered.connect(lambda: chosen.append("jumped"))
    menu.addAction("Delete")
    dialogs.answer("jump", "Jump")
    assert menu.exec_().text == "Jump" and chosen == ["jumped"]


def test_an_unanswered_question_is_refused_and_fails_the_check(dialogs: Dialogs) -> None:
    import slicer

    assert slicer.util.confirmOkCancelDisplay("Install 3 GB?") is False
    with pytest.raises(AssertionError, match="Install 3 GB?"):
        dialogs.check()
    dialogs.clear()
    dialogs.answer("never asked", "Ok")
    with pytest.raises(AssertionError, match="never asked"):
        dialogs.check()
    dialogs.clear()
    dialogs.answer("go on", "Retry")
    with pytest.raises(AssertionError, match="not 'Retry'"):
        slicer.util.confirmOkCancelDisplay("Go on?")


def test_without_a_main_window_messages_are_only_logged(scene: Any, caplog: pytest.LogCaptureFixture) -> None:
    import slicer
    from slicer_harness.dialogs import DIALOGS

    slicer.util.errorDisplay("No model")
    assert "No model" in caplog.text and DIALOGS.shown == []
    assert slicer.app.layoutManager() is None


def test_a_child_process_reports_while_the_event_loop_runs(scene: Any, wait_until: Callable[..., None]) -> None:
    import qt
    import slicer

    code = "import time; [(print(i, flush=True), time.sleep(0.15)) for i in range(3)]; raise SystemExit(3)"
    lines: list[str] = []
    codes: list[int] = []
    ticks: list[int] = []
    timer = qt.QTimer()
    timer.connect("timeout()", lambda: ticks.append(len(lines)))
    timer.start(10)
    slicer.util.launchConsoleProcess(
        [sys.executable, "-c", code], blocking=False, logCallback=lines.append, completedCallback=codes.append
    )
    wait_until(lambda: bool(codes))
    timer.stop()
    assert (lines, codes) == (["0", "1", "2"], [3])
    assert {0, 1} <= set(ticks)  # the timer ticked before and between the lines


def test_python_slicer_is_found_and_children_get_the_environment_from_before(
    slicer_app: Application, scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    import slicer

    monkeypatch.setenv("SET_BY_THE_APPLICATION", "1")
    environment = slicer.util.startupEnvironment()
    assert "SET_BY_THE_APPLICATION" not in environment and "SET_BY_THE_APPLICATION" in os.environ
    assert slicer_app.slicerHome not in environment["PATH"] and slicer_app.slicerHome in os.environ["PATH"]
    output: list[str] = []
    slicer.util.executePythonModule("platform", [], logCallback=output.append)
    assert len(output) == 1


def test_the_application_remembers_the_exit_code_and_sends_its_signals(slicer_app: Application, scene: Any) -> None:
    import slicer

    started: list[str] = []
    slicer.app.connect("startupCompleted()", lambda: started.append("now"))
    slicer_app.emit("startupCompleted()")
    slicer.app.disconnect("startupCompleted()")
    slicer_app.emit("startupCompleted()")
    slicer.util.exit(3)
    assert (started, slicer_app.exit_code) == (["now"], 3)


def test_waiting_for_what_never_happens_fails(wait_until: Callable[..., None]) -> None:
    with pytest.raises(AssertionError, match=r"within 0\.05 s"):
        wait_until(lambda: False, seconds=0.05)


def test_packages_are_checked_and_asked_for_but_never_installed(dialogs: Dialogs, tmp_path: Path) -> None:
    import slicer.packaging

    file = tmp_path / "requirements.txt"
    file.write_text("# why\n--index-url https://nowhere\nnumpy>=1.20\n\nno-such-package==2.0; python_version >= '3'\n")
    requirements = slicer.packaging.load_requirements(file)
    assert [each.name for each in requirements] == ["numpy", "no-such-package"]
    assert slicer.packaging.pip_check("numpy>=1.20") and not slicer.packaging.pip_check("numpy>=999")
    assert slicer.packaging.pip_check("no-such-package; sys_platform == 'win31'")
    assert not slicer.packaging.pip_check(requirements)

    dialogs.answer("MedRationale - Install", "Cancel")
    with pytest.raises(RuntimeError, match="declined"):
        slicer.packaging.pip_ensure(requirements, requester="MedRationale")
    dialogs.answer("no-such-package==2.0", "Ok")
    slicer.packaging.pip_ensure(requirements, requester="MedRationale")
    calls = slicer.packaging.INSTALLER.calls
    assert [call.function for call in calls] == ["pip_ensure", "pip_ensure", "pip_install"]
    assert calls[-1].requester == "MedRationale" and "no-such-package==2.0" in calls[-1].requirements[0]
    slicer.packaging.pip_ensure(requirements)  # now they count as installed, and nobody is asked


def test_a_failing_installation_raises_as_pip_does(dialogs: Dialogs) -> None:
    import slicer.packaging

    slicer.packaging.INSTALLER.missing.add("numpy")
    slicer.packaging.INSTALLER.fails = True
    with pytest.raises(subprocess.CalledProcessError):
        slicer.packaging.pip_ensure("numpy", prompt_install=False)
    codes: list[int] = []
    slicer.util.pip_install("numpy", blocking=False, completedCallback=codes.append)
    assert codes == [1]


def test_in_testing_mode_nothing_is_asked_and_nothing_installed(slicer_app: Application, dialogs: Dialogs) -> None:
    import slicer.packaging

    slicer_app.testing = True
    slicer.packaging.pip_ensure("no-such-package")
    assert [call.function for call in slicer.packaging.INSTALLER.calls] == ["pip_ensure"]
    slicer.util.confirmOkCancelDisplay("Go on?")
    assert dialogs.shown == []


def test_the_torch_extension_says_what_the_test_says(torch_extension: TorchState, dialogs: Dialogs) -> None:
    import PyTorchUtils
    import slicer

    logic = PyTorchUtils.PyTorchUtilsLogic()
    assert logic.torchInstalled() and slicer.modules.pytorchutils.name == "PyTorchUtils"
    torch_extension.installed = False
    torch_extension.module = "torch itself"
    dialogs.answer("PyTorch will be", "Cancel")
    assert logic.installTorch(askConfirmation=True, torchVersionRequirement=">=2.5") is None
    assert not logic.torchInstalled()
    assert logic.installTorch(torchVersionRequirement=">=2.5") == "torch itself" == logic.torch
    assert [call["torchVersionRequirement"] for call in torch_extension.calls] == [">=2.5", ">=2.5"]
    torch_extension.installed = torch_extension.installable = False
    with pytest.raises(RuntimeError, match="no torch"):
        logic.importTorch()


def test_without_the_torch_extension_it_cannot_be_imported(scene: Any) -> None:
    import slicer

    assert not hasattr(slicer.modules, "pytorchutils")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("PyTorchUtils")


# Views


def test_slice_views_show_layers_and_jump_to_a_point(offscreen_views: OffscreenLayoutManager) -> None:
    import slicer

    volume = add_volume("T2W", 300, 100)
    slicer.util.setSliceViewerLayers(background=volume, fit=True)
    composites = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
    assert [each.GetBackgroundVolumeID() for each in composites] == [volume.GetID()] * 3
    slicer.vtkMRMLSliceNode.JumpAllSlices(slicer.mrmlScene, *SPOT_RAS, slicer.vtkMRMLSliceNode.OffsetJumpSlice)
    views = {name: slicer.app.layoutManager().sliceWidget(name) for name in offscreen_views.sliceViewNames()}
    normals = {"Red": 2, "Green": 1, "Yellow": 0}
    places = {name: views[name].mrmlSliceNode().GetSliceToRAS().GetElement(axis, 3) for name, axis in normals.items()}
    assert places == pytest.approx({"Red": 6, "Green": 30, "Yellow": 40})
    red = views["Red"]
    red.mrmlSliceNode().JumpSliceByCentering(*SPOT_RAS)
    assert np.abs(np.subtract(red.pixel_of(SPOT_RAS), np.array(red.size) / 2)).max() <= 1


def test_views_leave_no_node_and_no_layout_manager_behind(slicer_app: Application, scene: Any) -> None:
    import slicer
    from slicer_harness.offscreen_views import OffscreenLayoutManager

    manager = OffscreenLayoutManager()
    assert slicer.util.getNodesByClass("vtkMRMLSliceNode") != []
    manager.close()
    assert slicer.app.layoutManager() is None
    for kind in ("vtkMRMLSliceNode", "vtkMRMLSliceCompositeNode", "vtkMRMLViewNode"):
        assert slicer.util.getNodesByClass(kind) == []


def test_an_overlay_colours_the_pixels_of_its_place(offscreen_views: OffscreenLayoutManager, needs_gl: None) -> None:
    import slicer

    heat = add_volume("Heat", 1, 0)
    colours = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLColorTableNode", "Red only")
    colours.SetTypeToUser()
    colours.SetNumberOfColors(2)
    colours.SetColor(0, "cold", 0, 0, 0, 1)
    colours.SetColor(1, "hot", 1, 0, 0, 1)
    display = heat.GetDisplayNode()
    display.SetAndObserveColorNodeID(colours.GetID())
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(0, 1)
    display.SetThreshold(0.5, 1)
    display.SetApplyThreshold(True)
    background = add_volume("T2W", 100, 100)
    background.GetDisplayNode().AutoWindowLevelOff()
    background.GetDisplayNode().SetWindowLevelMinMax(0, 200)
    slicer.util.setSliceViewerLayers(background=background, foreground=heat, foregroundOpacity=0.5, fit=True)
    view = offscreen_views.sliceWidget("Red")
    red, green, blue = colour_of(view, SPOT_RAS)
    assert red > green + 60 and abs(green - blue) <= 4
    grey = colour_of(view, ELSEWHERE_RAS)
    assert grey.min() > 110 and np.ptp(grey) <= 4
    display.SetThreshold(2, 3)
    assert np.ptp(colour_of(view, SPOT_RAS)) <= 4


def test_a_segment_is_drawn_in_slices_and_in_3d(offscreen_views: OffscreenLayoutManager, needs_gl: None) -> None:
    import slicer

    three_d = offscreen_views.threeDWidget(0).threeDView()
    empty = three_d.picture()
    volume = add_volume("T2W", 300, 100)
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    segmentation.CreateDefaultDisplayNodes()
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    segmentation.GetSegmentation().AddEmptySegment("lesion", "Lesion", (0.0, 1.0, 0.0))
    mask = (slicer.util.arrayFromVolume(volume) == 300).astype(np.uint8)
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask, segmentation, "lesion", volume)
    segmentation.CreateClosedSurfaceRepresentation()
    slicer.util.setSliceViewerLayers(background=volume, fit=True)
    red, green, blue = colour_of(offscreen_views.sliceWidget("Red"), SPOT_RAS)
    assert green > max(red, blue)
    slicer.app.layoutManager().resetThreeDViews()
    changed = np.abs(three_d.picture().astype(int) - empty).max(axis=2) > 30
    assert 0.01 < changed.mean() < 0.9


# What this machine can do


def test_a_probe_tells_an_end_by_a_signal_from_success() -> None:
    assert probes.run("pass") is None
    assert "no such thing" in str(probes.run("raise SystemExit('no such thing')"))
    assert "signal" in str(probes.run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))


@pytest.mark.parametrize("blocked", ["PySide6", "slicer"])
def test_where_the_stand_in_cannot_start_its_tests_are_skipped_with_the_reason(tmp_path: Path, blocked: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {blocked!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "properties or overlay",
        ],
        env={**probes.environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert child.returncode == 0, child.stdout + child.stderr
    package = {"PySide6": "PySide6_Essentials", "slicer": "slicer-core"}[blocked]
    assert "2 skipped" in child.stdout and f"{package} is not installed" in child.stdout


def test_tests_without_slicer_do_not_import_it() -> None:
    code = "import sys, slicer_fixtures; print(sorted({'slicer', 'vtk', 'PySide6'} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", code], cwd=TESTING, capture_output=True, text=True, encoding="utf-8")
    assert child.stdout.strip() == "[]", child.stderr
