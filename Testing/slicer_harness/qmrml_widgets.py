"""Look-alikes of the qMRML widgets that the panel uses: they follow the real scene.

They have the properties, slots and signals of the real ones (as far as needed) and no other public names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import slicer
from PySide6 import QtCore, QtGui, QtWidgets

from .widget_parts import lay_out_in_a_row, stored

VISIBLE = "\N{BLACK CIRCLE}"
HIDDEN = "\N{WHITE CIRCLE}"


class _Observations:
    """Observers of VTK objects that go when the widget goes, and do not keep it."""

    def __init__(self, widget: Any) -> None:
        self._tags: list[tuple[Any, int]] = []
        widget.destroyed.connect(self.clear)

    def add(self, observed: Any, event: Any, method: Callable[..., None]) -> None:
        reference = weakref.WeakMethod(method)

        def call(*arguments: Any) -> None:
            alive = reference()
            if alive is not None:
                alive(*arguments)

        self._tags.append((observed, observed.AddObserver(event, call)))

    def clear(self, *_destroyed: Any) -> None:
        for observed, tag in self._tags:
            observed.RemoveObserver(tag)
        self._tags = []


class _KnowsScene:
    """The half that all qMRML widgets share."""

    def _init_scene(self) -> None:
        self._scene = None
        self._scene_receivers: list[Any] = []  # what a .ui file connects to mrmlSceneChanged

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        self._scene = scene
        for receiver in self._scene_receivers:
            receiver.setMRMLScene(scene)
        self.mrmlSceneChanged.emit(scene)


class qMRMLWidget(QtWidgets.QWidget, _KnowsScene):
    """A widget that hands its scene on."""

    mrmlSceneChanged = QtCore.Signal(object)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._init_scene()


class qMRMLNodeComboBox(QtWidgets.QWidget, _KnowsScene):
    """Follows the real scene as nodes come and go. Its menu to add, remove and rename is left out."""

    mrmlSceneChanged = QtCore.Signal(object)
    currentNodeChanged = QtCore.Signal(object)
    currentNodeIDChanged = QtCore.Signal(str)
    nodeActivated = QtCore.Signal(object)
    nodeAdded = QtCore.Signal(object)
    nodeAddedByUser = QtCore.Signal(object)
    showHidden = stored(bool, "showHidden", False)
    showChildNodeTypes = stored(bool, "showChildNodeTypes", True)
    hideChildNodeTypes = stored("QStringList", "hideChildNodeTypes", [])
    baseName = stored(str, "baseName", "")
    addEnabled = stored(bool, "addEnabled", True)
    removeEnabled = stored(bool, "removeEnabled", True)
    editEnabled = stored(bool, "editEnabled", False)
    renameEnabled = stored(bool, "renameEnabled", False)
    selectNodeUponCreation = stored(bool, "selectNodeUponCreation", True)
    interactionNodeSingletonTag = stored(str, "interactionNodeSingletonTag", "")

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._init_scene()
        self._nodeTypes: list[str] = []
        self._noneEnabled = False
        self._noneDisplay = "None"
        self._attributes: list[tuple[str, str, Any]] = []
        self._observations = _Observations(self)
        self._filling = False
        self._box = QtWidgets.QComboBox()
        lay_out_in_a_row(self, self._box)
        self.setEnabled(False)  # until there is a scene
        self._box.currentIndexChanged.connect(self._changed)
        self._box.activated.connect(self._activated)

    def _refilling_property(kind: Any, name: str) -> Any:
        def get(self: Any) -> Any:
            return self.__dict__[name]

        def put(self: Any, value: Any) -> None:
            self.__dict__[name] = value
            self._fill()

        return QtCore.Property(kind, get, put)

    nodeTypes = _refilling_property("QStringList", "_nodeTypes")
    noneEnabled = _refilling_property(bool, "_noneEnabled")
    noneDisplay = _refilling_property(str, "_noneDisplay")
    del _refilling_property

    def setMRMLScene(self, scene: Any) -> None:
        self._observations.clear()
        _KnowsScene.setMRMLScene(self, scene)
        if scene is not None:
            for event in ("NodeAddedEvent", "NodeRemovedEvent", "EndCloseEvent", "EndBatchProcessEvent"):
                self._observations.add(scene, getattr(scene, event), self._on_scene)
        self.setEnabled(scene is not None)
        self._fill()

    def addAttribute(self, nodeType: str, attributeName: str, attributeValue: Any = None) -> None:
        self._attributes.append((nodeType, attributeName, attributeValue))
        self._fill()

    def removeAttribute(self, nodeType: str, attributeName: str) -> None:
        self._attributes = [each for each in self._attributes if each[:2] != (nodeType, attributeName)]
        self._fill()

    def nodeCount(self) -> int:
        return len(self._nodes())

    def nodeFromIndex(self, index: int) -> Any:
        nodes = self._nodes()
        return nodes[index] if 0 <= index < len(nodes) else None

    def currentNode(self) -> Any:
        return self._scene.GetNodeByID(self._id()) if self._scene and self._id() else None

    def setCurrentNode(self, node: Any) -> None:
        self.setCurrentNodeID(node.GetID() if node else "")

    def setCurrentNodeID(self, nodeID: str) -> None:
        self._box.setCurrentIndex(self._box.findData(nodeID or ""))

    def setCurrentNodeIndex(self, index: int) -> None:
        self.setCurrentNode(self.nodeFromIndex(index))

    def addNode(self, nodeType: str = "") -> Any:
        node = self._scene.AddNewNodeByClass(nodeType or self._nodeTypes[0], self.baseName)
        if self.selectNodeUponCreation:
            self.setCurrentNode(node)
        return node

    def removeCurrentNode(self) -> None:
        self._scene.RemoveNode(self.currentNode())

    def _id(self) -> str:
        return self._box.currentData or ""

    currentNodeID = QtCore.Property(str, _id, setCurrentNodeID)

    def _nodes(self) -> list[Any]:
        count = self._scene.GetNumberOfNodes() if self._scene else 0
        return [node for node in map(self._scene.GetNthNode, range(count)) if self._is_offered(node)] if count else []

    def _is_offered(self, node: Any) -> bool:
        if node.GetHideFromEditors() and not self.showHidden:
            return False
        if self.showChildNodeTypes:
            fits = any(map(node.IsA, self._nodeTypes)) and not any(map(node.IsA, self.hideChildNodeTypes))
        else:
            fits = node.GetClassName() in self._nodeTypes
        return fits and all(
            node.GetAttribute(name) is not None if value is None else node.GetAttribute(name) == str(value)
            for kind, name, value in self._attributes
            if node.IsA(kind)
        )

    def _on_scene(self, *_event: Any) -> None:
        if self._scene is not None and not self._scene.IsBatchProcessing():
            self._fill()

    def _fill(self) -> None:
        """Offers the nodes of the scene anew, and keeps the choice if that is still there."""
        before = self._id()
        self._filling = True
        self._box.clear()
        if self._noneEnabled:
            self._box.addItem(self._noneDisplay, "")
        for node in self._nodes():
            self._box.addItem(node.GetName() or node.GetID(), node.GetID())
        kept = self._box.findData(before) if before else -1
        self._box.setCurrentIndex(kept if kept >= 0 else min(0, self._box.count - 1))
        self._filling = False
        if self._id() != before:
            self._emit()

    def _changed(self, _index: int) -> None:
        if not self._filling:
            self._emit()

    def _activated(self, _index: int) -> None:
        self.nodeActivated.emit(self.currentNode())

    def _emit(self) -> None:
        self.currentNodeChanged.emit(self.currentNode())
        self.currentNodeIDChanged.emit(self._id())


class qMRMLSegmentsTableView(qMRMLWidget):
    """Visibility, colour and name of each segment of a segmentation; it follows the segmentation and its display."""

    COLUMNS = ("", "", "Name")
    NAME = 2

    selectionChanged = QtCore.Signal(QtCore.QItemSelection, QtCore.QItemSelection)
    segmentAboutToBeModified = QtCore.Signal(str)
    selectionMode = stored(int, "selectionMode", 3)
    headerVisible = stored(bool, "headerVisible", True)
    visibilityColumnVisible = stored(bool, "visibilityColumnVisible", True)
    colorColumnVisible = stored(bool, "colorColumnVisible", True)
    opacityColumnVisible = stored(bool, "opacityColumnVisible", True)
    statusColumnVisible = stored(bool, "statusColumnVisible", False)
    layerColumnVisible = stored(bool, "layerColumnVisible", False)
    readOnly = stored(bool, "readOnly", False)
    filterBarVisible = stored(bool, "filterBarVisible", False)
    textFilter = stored(str, "textFilter", "")
    jumpToSelectedSegmentEnabled = stored(bool, "jumpToSelectedSegmentEnabled", False)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._observations = _Observations(self)
        self._table = QtWidgets.QTableWidget(0, len(self.COLUMNS))
        self._table.setHorizontalHeaderLabels(self.COLUMNS)
        self._table.setSelectionBehavior(QtWidgets.QAbstractItemView.SelectionBehavior.SelectRows)
        self._table.verticalHeader().hide()
        lay_out_in_a_row(self, self._table)
        self._table.selectionModel().selectionChanged.connect(self.selectionChanged)

    def segmentationNode(self) -> Any:
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        self._observations.clear()
        self._node = node
        if node is not None:
            # The node hands the segmentation's events on when it has made the segment's display properties.
            for event in ("SegmentAdded", "SegmentRemoved", "SegmentModified", "SegmentsOrderModified"):
                self._observations.add(node, getattr(slicer.vtkSegmentation, event), self._fill)
            if node.GetDisplayNode() is not None:
                self._observations.add(node.GetDisplayNode(), "ModifiedEvent", self._fill)
        self._fill()

    def tableWidget(self) -> Any:
        return self._table

    def rowForSegmentID(self, segmentID: str) -> int:
        ids = self.displayedSegmentIDs()
        return ids.index(segmentID) if segmentID in ids else -1

    def segmentIDForRow(self, row: int) -> str:
        return self._table.item(row, self.NAME).data(QtCore.Qt.ItemDataRole.UserRole)

    def displayedSegmentIDs(self) -> list[str]:
        return [self.segmentIDForRow(row) for row in range(self._table.rowCount)]

    def selectedSegmentIDs(self) -> list[str]:
        return [self.segmentIDForRow(index.row()) for index in self._table.selectionModel().selectedRows(self.NAME)]

    def setSelectedSegmentIDs(self, segmentIDs: list[str]) -> None:
        self._table.clearSelection()
        chosen = QtCore.QItemSelectionModel.SelectionFlag
        for segmentID in segmentIDs:
            index = self._table.model().index(self.rowForSegmentID(segmentID), self.NAME)
            self._table.selectionModel().select(index, chosen.Select | chosen.Rows)

    def clearSelection(self) -> None:
        self._table.clearSelection()

    def _segment_count(self) -> int:
        return self._table.rowCount

    segmentCount = QtCore.Property(int, _segment_count)

    def _fill(self, *_event: Any) -> None:
        segmentation = self._node.GetSegmentation() if self._node else None
        ids = list(segmentation.GetSegmentIDs()) if segmentation else []
        display = self._node.GetDisplayNode() if self._node else None
        self._table.setRowCount(len(ids))
        for row, segmentID in enumerate(ids):
            segment = segmentation.GetSegment(segmentID)
            shown = display is not None and display.GetSegmentVisibility(segmentID)
            for column, text in enumerate((VISIBLE if shown else HIDDEN, "", segment.GetName())):
                self._table.setItem(row, column, QtWidgets.QTableWidgetItem(text))
            self._table.item(row, 1).setBackground(QtGui.QColor.fromRgbF(*segment.GetColor()))
            self._table.item(row, self.NAME).setData(QtCore.Qt.ItemDataRole.UserRole, segmentID)
