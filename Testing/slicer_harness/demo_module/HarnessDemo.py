"""A small scripted module in the usual style of Slicer, for the tests of the stand-in."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any

import numpy as np
import qt
import slicer
import vtk
from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import Choice, WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin


class HarnessDemo(ScriptedLoadableModule):
    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("Harness demo")
        self.parent.categories = ["Testing"]


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


@parameterNodeWrapper
class HarnessDemoParameterNode:
    t2Volume: vtkMRMLScalarVolumeNode
    adcVolume: vtkMRMLScalarVolumeNode
    segmentation: vtkMRMLSegmentationNode
    threshold: Annotated[float, WithinRange(0, 1)] = 0.25
    showHeatmap: bool = True
    side: Side
    coil: Annotated[str, Choice(["surface", "endorectal"])] = "surface"
    psa: float | None = None


class HarnessDemoWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self._parameterNode: Any = None
        self._guiTag: int | None = None

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/HarnessDemo.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = HarnessDemoLogic()
        self.model = qt.QStandardItemModel()
        self.model.setHorizontalHeaderLabels([_("Step"), _("Outcome")])
        self.ui.rationaleTree.setModel(self.model)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.ui.applyButton.connect("clicked(bool)", self.onApply)

    def cleanup(self) -> None:
        self.setParameterNode(None)
        self.removeObservers()

    def enter(self) -> None:
        self.setParameterNode(self.logic.getParameterNode())

    def exit(self) -> None:
        self.setParameterNode(None)

    def onSceneStartClose(self, caller: Any = None, event: Any = None) -> None:
        self.setParameterNode(None)

    def onSceneEndClose(self, caller: Any = None, event: Any = None) -> None:
        if self.parent.isEntered:
            self.setParameterNode(self.logic.getParameterNode())

    def setParameterNode(self, node: Any) -> None:
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._guiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._checkCanApply)
        self._parameterNode = node
        if node:
            named = ((widget.property("SlicerParameterName"), widget) for widget in vars(self.ui).values())
            self._guiTag = node.connectParametersToGui({name: widget for name, widget in named if name})
            self.addObserver(node, vtk.vtkCommand.ModifiedEvent, self._checkCanApply)
            self._checkCanApply()

    def _checkCanApply(self, caller: Any = None, event: Any = None) -> None:
        parameters = self._parameterNode
        self.ui.applyButton.enabled = bool(parameters and parameters.t2Volume and parameters.adcVolume)
        self.ui.applyButton.toolTip = _("Run") if self.ui.applyButton.enabled else _("Select T2W and ADC")

    def onApply(self, checked: bool = False) -> None:
        with slicer.util.tryWithErrorDisplay(_("Failed to compute results."), waitCursor=True):
            parameters = self._parameterNode
            segmentation, steps = self.logic.process(parameters.t2Volume, parameters.adcVolume, parameters.threshold)
            parameters.segmentation = segmentation
            self.ui.segmentsTable.setSegmentationNode(segmentation)
            self.showSteps(steps)

    def showSteps(self, steps: list[dict[str, str]]) -> None:
        self.model.removeRows(0, self.model.rowCount())
        parent = self.model.invisibleRootItem()
        for step in steps:
            row = [qt.QStandardItem(step["test"]), qt.QStandardItem(step["outcome"])]
            parent.appendRow(row)
            parent = row[0]
        self.ui.rationaleTree.expandAll()


class HarnessDemoLogic(ScriptedLoadableModuleLogic):
    def getParameterNode(self) -> Any:
        return HarnessDemoParameterNode(super().getParameterNode())

    def process(self, t2: Any, adc: Any, threshold: float) -> tuple[Any, list[dict[str, str]]]:
        """A segment where ADC is low, a heat volume that shows how low, and two steps in a text node."""
        array = slicer.util.arrayFromVolume(adc).astype(np.float32)
        if not array.any():
            raise ValueError("The ADC map is empty")
        heat = np.clip((1200 - array) / 1200, 0, 1)
        matrix = vtk.vtkMatrix4x4()
        t2.GetIJKToRASMatrix(matrix)
        volume = slicer.util.addVolumeFromArray(heat, matrix, "Concept: low ADC")
        display = volume.GetDisplayNode()
        display.AutoWindowLevelOff()
        display.SetWindowLevelMinMax(0, 1)
        display.SetThreshold(threshold, 1)
        display.SetApplyThreshold(True)
        segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Harness demo")
        segmentation.CreateDefaultDisplayNodes()
        segmentation.SetReferenceImageGeometryParameterFromVolumeNode(t2)
        segment = segmentation.GetSegmentation().AddEmptySegment("lesion-1", "Lesion 1", (1.0, 0.2, 0.1))
        mask = (heat > threshold).astype(np.uint8)
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask, segmentation, segment, t2)
        steps = [
            {"test": "ADC markedly low?", "outcome": f"yes, {heat.max():.2f}"},
            {"test": "Size ≥ 15 mm?", "outcome": "no"},
        ]
        text = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode", "Rationale")
        text.SetText(json.dumps(steps, ensure_ascii=False))
        segmentation.SetNodeReferenceID("HarnessDemo.rationale", text.GetID())
        slicer.util.setSliceViewerLayers(background=t2, foreground=volume, foregroundOpacity=0.5)
        return segmentation, steps


class HarnessDemoTest(ScriptedLoadableModuleTest):
    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        self.setUp()
        self.test_process()

    def test_process(self) -> None:
        self.delayDisplay("Starting")
        array = np.full((8, 32, 32), 1300, np.int16)
        array[3:5, 10:20, 10:20] = 300
        t2 = slicer.util.addVolumeFromArray(array, name="T2W")
        adc = slicer.util.addVolumeFromArray(array, name="ADC")
        segmentation, steps = HarnessDemoLogic().process(t2, adc, 0.25)
        self.assertEqual(segmentation.GetSegmentation().GetNumberOfSegments(), 1)
        self.assertEqual(len(steps), 2)
